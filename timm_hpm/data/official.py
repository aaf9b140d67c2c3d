"""SVHN, STL-10 and Tiny ImageNet, read from the files of their authors."""

from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor

from .images import EncodedImages, Part

_STL10_CLASSES: Final = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
_STL10_SHAPE: Final = (3, 96, 96)
# Above the largest official files: the training images of SVHN, and the 8,000 test images of STL-10.
_MOST_BYTES: Final = 1 << 29


def read_svhn(part: str, data_dir: Path | None, download: bool) -> Part:
    """Reads SVHN's cropped digits, `{train,test}_32x32.mat`; the label 10 is the digit 0.

    Source: http://ufldl.stanford.edu/housenumbers
    """
    file = _found(data_dir, f"{part}_32x32.mat", ("", "svhn", "SVHN"), "http://ufldl.stanford.edu/housenumbers")
    try:
        from scipy import io
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the files of SVHN are read by scipy, which is not installed; run: pip install "
                                  "scipy") from error
    try:
        shapes = {name: shape for name, shape, _ in io.whosmat(file)}
        shape = tuple(shapes.get("X", ()))
        if shape[:3] != (32, 32, 3) or len(shape) != 4 or np.prod(shape) > _MOST_BYTES:
            raise ValueError(f"X has the shape {shape}, expected (32, 32, 3, N)")
        found = io.loadmat(file, variable_names=["X", "y"])
        pixels, labels = found["X"], found["y"].flatten()
    # The reader of damaged files raises almost anything.
    except Exception as error:
        raise _damaged(file, error) from error
    images, labels = torch.from_numpy(pixels).permute(3, 2, 0, 1).contiguous(), torch.from_numpy(labels).long()
    _check_labels(file, images, labels)
    return Part(images, labels % 10, 10, tuple("0123456789"))


def read_stl10(part: str, data_dir: Path | None, download: bool) -> Part:
    """Reads STL-10's binary files, `{train,test}_{X,y}.bin`, whose images are stored column by column.

    Source: https://cs.stanford.edu/~acoates/stl10
    """
    file = _found(data_dir, f"{part}_X.bin", ("", "stl10_binary"), "https://cs.stanford.edu/~acoates/stl10")
    labels_file = file.with_name(f"{part}_y.bin")
    size = int(np.prod(_STL10_SHAPE))
    try:
        if file.stat().st_size % size or file.stat().st_size > _MOST_BYTES:
            raise ValueError(f"it has {file.stat().st_size} bytes, expected {size} for each image")
        images = torch.from_numpy(np.fromfile(file, np.uint8)).reshape(-1, *_STL10_SHAPE).transpose(2, 3).contiguous()
        labels = torch.from_numpy(np.fromfile(labels_file, np.uint8)).long()
    except (ValueError, OSError) as error:
        raise _damaged(file, error) from error
    _check_labels(labels_file, images, labels)
    return Part(images, labels - 1, 10, _STL10_CLASSES)


def read_tiny_imagenet(part: str, data_dir: Path | None, download: bool) -> Part:
    """Reads Tiny ImageNet, whose classes are numbered by their sorted names, as torchvision's ImageFolder does.

    Its validation images lie in one folder, with their classes in val_annotations.txt; its test images have no labels.
    Source: http://cs231n.stanford.edu/tiny-imagenet-200.zip
    """
    root = _found(data_dir, "wnids.txt", ("", "tiny-imagenet-200"),
                  "http://cs231n.stanford.edu/tiny-imagenet-200.zip").parent
    classes = tuple(sorted((root / "wnids.txt").read_text(encoding="utf-8").split()))
    numbers = {name: number for number, name in enumerate(classes)}
    if part == "train":
        pairs = [(path, name) for name in classes for path in sorted((root / "train" / name / "images").glob("*"))]
    else:
        annotations = root / "val" / "val_annotations.txt"
        try:
            rows = [line.split("\t") for line in annotations.read_text(encoding="utf-8").splitlines()]
            pairs = [(root / "val" / "images" / row[0], row[1]) for row in rows]
        except (OSError, ValueError, IndexError) as error:
            raise _damaged(annotations, error) from error
        unknown = sorted({name for _, name in pairs} - numbers.keys())
        if unknown:
            raise ValueError(f"{annotations} names the class {unknown[0]!r} ({len(unknown)} such), which wnids.txt "
                             "does not; expected the files of one release")
    if not pairs:
        raise FileNotFoundError(f"there is no image of the part {part} in {root}; expected the unpacked "
                                "tiny-imagenet-200.zip")
    labels = torch.tensor([numbers[name] for _, name in pairs])
    return Part(EncodedImages.of_files([str(path) for path, _ in pairs]), labels, len(classes), classes)


def _found(data_dir: Path | None, name: str, folders: tuple[str, ...], source: str) -> Path:
    """Returns the file `name` in `data_dir` (None: data/) or in one of its `folders`."""
    root = data_dir or Path("data")
    for folder in folders:
        if (root / folder / name).is_file():
            return root / folder / name
    raise FileNotFoundError(f"there is no {name} in {root}; fetch it from {source}, or choose another --data-dir")


def _damaged(file: Path, error: Exception) -> Exception:
    kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
    return kind(f"cannot read {file}: {error}. Fetch it again")


def _check_labels(file: Path, images: Tensor, labels: Tensor) -> None:
    if not len(labels) or len(labels) != len(images) or int(labels.min()) < 1 or int(labels.max()) > 10:
        raise ValueError(f"{file} has {len(labels)} labels for {len(images)} images; expected one from 1 to 10 for "
                         "each image. Fetch it again")
