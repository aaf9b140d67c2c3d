"""SVHN, STL-10 and Tiny ImageNet, read from the files of their authors."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torchvision.datasets import STL10, SVHN

from .images import EncodedImages, Part

_STL10_CLASSES: Final = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")


class _SVHN(SVHN):
    def _check_integrity(self) -> bool:  # digests of the whole files, at every start
        return True


class _STL10(STL10):
    base_folder = ""

    def _check_integrity(self) -> bool:
        return True


def read_svhn(part: str, data_dir: Path | None, download: bool) -> Part:
    """Reads SVHN's cropped digits, `{train,test}_32x32.mat`. Source: http://ufldl.stanford.edu/housenumbers"""
    file = _found(data_dir, f"{part}_32x32.mat", ("", "svhn", "SVHN"), "http://ufldl.stanford.edu/housenumbers")
    return _torchvision_part(file, partial(_SVHN, file.parent, part), tuple("0123456789"))


def read_stl10(part: str, data_dir: Path | None, download: bool) -> Part:
    """Reads STL-10's binary files, `{train,test}_{X,y}.bin`. Source: https://cs.stanford.edu/~acoates/stl10"""
    file = _found(data_dir, f"{part}_X.bin", ("", "stl10_binary"), "https://cs.stanford.edu/~acoates/stl10")
    return _torchvision_part(file, partial(_STL10, file.parent, part), _STL10_CLASSES)


def _torchvision_part(file: Path, read: Callable[[], Any], classes: tuple[str, ...]) -> Part:
    """Returns what torchvision `read` from a file, whose labels number its 10 classes."""
    try:
        dataset = read()
        images, labels = torch.from_numpy(np.ascontiguousarray(dataset.data)), torch.from_numpy(dataset.labels).long()
        if not 0 < len(images) == len(labels) or not set(labels.tolist()) <= set(range(len(classes))):
            raise ValueError(f"it has {len(labels)} labels for {len(images)} images; expected one of {len(classes)} "
                             "classes for each image")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{file} is read by scipy, which is not installed; run: pip install scipy") from error
    except Exception as error:  # the reader of damaged files raises almost anything
        raise _damaged(file, error) from error
    return Part(images, labels, len(classes), classes)


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
