"""The data sets: their files, how they are read, and the usual threat model and normalisation."""

import gzip
import math
import zlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, Final
from urllib.error import URLError

import numpy as np
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_dataset
from torch import Tensor
from torchvision.datasets import STL10, SVHN, FashionMNIST

from ..names import did_you_mean
from .images import EncodedImages, Part, class_folders, image_folder

_DEBIAN_FASHION_MNIST: Final = Path("/usr/share/datasets/fashion-mnist")
_FASHION_MNIST_HINT: Final = ("fetch it with: apt-get install dataset-fashion-mnist (Debian, Ubuntu); or put the four "
                              "original files, gzipped or not, into the folder of --data-dir")
# Five times the size of its largest file.
_MOST_IDX_BYTES: Final = 1 << 28
# timm takes these names for folders, in this order.
_FOLDER_NAMES: Final = {"train": ("train", "training"), "val": ("val", "valid", "validation", "eval", "evaluation"),
                        "test": ("test", "testing")}
_STL10_CLASSES: Final = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
_STREAMED: Final = ("hfids/", "tfds/", "wds/")


@dataclass(frozen=True)
class DataSource:
    """A data set: how to read it, and what is usual for it."""

    # `data_dir` to the parts, of "train", "val" and "test", that the data set has by itself.
    parts: Callable[[Path | None], Collection[str]]
    read: Callable[[str, Path | None, bool], Part]  # a part's name, `data_dir` and `download` to the part
    threat: str  # the usual threat model
    mean: tuple[float, ...] | None = None  # with std the usual normalisation of its models, one value a channel
    std: tuple[float, ...] | None = None
    num_classes: int | None = None  # None if only the files say
    image_size: tuple[int, int, int] | None = None  # (channels, height, width); None if images are decoded from files
    # `data_dir` to the names of all classes in order; None if all parts number them alike.
    classes: Callable[[Path | None], tuple[str, ...]] | None = None


def data_source(dataset: str) -> DataSource:
    """Returns the `DataSource` of a name: one of `DATASETS`, "" for "folder", or "hfds/" and a name of the Hub."""
    prefix, slash, name = dataset.partition("/")
    if prefix.lower() == "hfds" and name:
        return DataSource(partial(_hfds_parts, name), partial(_read_hfds, name), "Linf:4/255",
                          IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    if f"{prefix.lower()}{slash}" in _STREAMED:
        raise ValueError(f"the data set {dataset!r} is streamed: its images have no numbers, by which a validation "
                         "split is held out and a run resumes; use a folder of images, or hfds/...")
    known = dataset.lower() if slash else dataset or "folder"
    if known not in DATASETS:
        raise ValueError(f"unknown data set {dataset!r}; expected one of {', '.join(DATASETS)}, hfds/NAME"
                         f"{did_you_mean(known.lower(), DATASETS)}")
    return DATASETS[known]


def _has(*parts: str) -> Callable[[Path | None], Collection[str]]:
    return lambda data_dir: parts


def _read_digits(part: str, data_dir: Path | None, download: bool) -> Part:
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the data set 'digits' lies inside scikit-learn, which is not installed; "
                                  "run: pip install scikit-learn") from error
    digits = load_digits()
    indices = range(len(digits.target))
    rest, test = train_test_split(indices, test_size=0.2, stratify=digits.target, random_state=0)
    train, val = train_test_split(rest, test_size=0.25, stratify=digits.target[rest], random_state=0)
    chosen = {"train": train, "val": val, "test": test}[part]
    # Grey levels 0 to 16.
    images = torch.from_numpy(digits.images[chosen]).float().unsqueeze(1) / 16
    return Part(images, torch.from_numpy(digits.target[chosen]).long(), 10, tuple("0123456789"))


def _read_fashion_mnist(part: str, data_dir: Path | None, download: bool) -> Part:
    folders = [_DEBIAN_FASHION_MNIST]
    if data_dir is not None:
        # The second is torchvision's.
        folders = [data_dir, data_dir / "FashionMNIST" / "raw", *folders]
    prefix = {"train": "train", "test": "t10k"}[part]
    images = _read_idx(_find(f"{prefix}-images-idx3-ubyte", folders), dimensions=3)
    file = _find(f"{prefix}-labels-idx1-ubyte", folders)
    labels = _read_idx(file, dimensions=1)
    if len(labels) != len(images):
        raise ValueError(f"{file} has {len(labels)} labels for {len(images)} images; {_FASHION_MNIST_HINT}")
    return Part(images.unsqueeze(1), labels.long(), 10, tuple(FashionMNIST.classes))


def _find(name: str, folders: list[Path]) -> Path:
    for folder in folders:
        for file in (folder / name, folder / f"{name}.gz"):
            if file.is_file():
                return file
    raise FileNotFoundError(f"no {name}[.gz] in {', '.join(map(str, folders))}; {_FASHION_MNIST_HINT}")


def _read_idx(file: Path, dimensions: int) -> Tensor:
    """Returns the bytes of an idx file, gzipped or not, as a uint8 tensor; raises unless it has these `dimensions`.

    Source: http://yann.lecun.com/exdb/mnist
    """
    start = 4 + 4 * dimensions
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
            header = stream.read(start)
            if header[:4] != bytes([0, 0, 8, dimensions]) or len(header) < start:
                raise ValueError(f"{file} does not begin as an idx file of bytes in {dimensions} dimensions; remove "
                                 f"it, then {_FASHION_MNIST_HINT}")
            shape = np.frombuffer(header, ">u4", offset=4).tolist()
            size = math.prod(shape)
            if size > _MOST_IDX_BYTES:
                raise ValueError(f"{file} has {size} bytes of data by its header; expected at most {_MOST_IDX_BYTES}")
            data = stream.read(size + 1)  # never more, whatever a gzipped file unfolds to
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{file} is damaged ({error}); remove it, then {_FASHION_MNIST_HINT}") from error
    if len(data) != size:
        raise ValueError(f"{file} has {'more' if len(data) > size else len(data)} bytes of data, {size} by its "
                         f"header; remove it, then {_FASHION_MNIST_HINT}")
    return torch.from_numpy(np.frombuffer(data, np.uint8).reshape(shape).copy())


def _read_torch(name: str, part: str, data_dir: Path | None, download: bool) -> Part:
    """Reads a part of torchvision's data set `name`; timm calls its "test" "validation"."""
    place = data_dir or Path("data")
    try:
        dataset = create_dataset(f"torch/{name}", str(place), split={"train": "train", "test": "validation"}[part],
                                 download=download)
    except (RuntimeError, AssertionError, URLError) as error:
        if name == "imagenet":
            hint = "put its archives there, from https://image-net.org/download"
        elif download:
            hint = "see that this machine can download, or bring the files from one that can"
        else:
            hint = f"fetch it with --dataset-download --data-dir {place}, or choose another --data-dir"
        raise FileNotFoundError(f"no undamaged torch/{name} in {place} ({str(error).partition(chr(10))[0]}); "
                                f"{hint}") from error
    return _torchvision_part(dataset)


def _torchvision_part(dataset: Any) -> Part:
    labels = torch.as_tensor(dataset.targets).long()
    # ImageNet's synsets name its folders, too; its classes are lists of synonyms.
    names = tuple(getattr(dataset, "wnids", dataset.classes))
    if not hasattr(dataset, "data"):
        return Part(EncodedImages.of_files([path for path, _ in dataset.samples]), labels, len(names), names)
    images = torch.as_tensor(dataset.data)
    # CIFAR: (N, H, W, 3); the MNISTs: (N, H, W).
    images = images.permute(0, 3, 1, 2).contiguous() if images.ndim == 4 else images.unsqueeze(1)
    return Part(images, labels, len(names), names)


class _SVHN(SVHN):
    def _check_integrity(self) -> bool:  # digests of the whole files, at every start
        return True


class _STL10(STL10):
    base_folder = ""

    def _check_integrity(self) -> bool:
        return True


def _read_svhn(part: str, data_dir: Path | None, download: bool) -> Part:
    """Reads SVHN's cropped digits, `{train,test}_32x32.mat`. Source: http://ufldl.stanford.edu/housenumbers"""
    file = _found(data_dir, f"{part}_32x32.mat", ("", "svhn", "SVHN"), "http://ufldl.stanford.edu/housenumbers")
    return _official_part(file, partial(_SVHN, file.parent, part), tuple("0123456789"))


def _read_stl10(part: str, data_dir: Path | None, download: bool) -> Part:
    """Reads STL-10's binary files, `{train,test}_{X,y}.bin`. Source: https://cs.stanford.edu/~acoates/stl10"""
    file = _found(data_dir, f"{part}_X.bin", ("", "stl10_binary"), "https://cs.stanford.edu/~acoates/stl10")
    return _official_part(file, partial(_STL10, file.parent, part), _STL10_CLASSES)


def _official_part(file: Path, read: Callable[[], Any], classes: tuple[str, ...]) -> Part:
    """Returns what torchvision `read` from a file of its authors, whose labels number its 10 classes."""
    try:
        dataset = read()
        images, labels = torch.from_numpy(np.ascontiguousarray(dataset.data)), torch.from_numpy(dataset.labels).long()
        if not 0 < len(images) == len(labels) or not set(labels.tolist()) <= set(range(len(classes))):
            raise ValueError(f"it has {len(labels)} labels for {len(images)} images; expected one of "
                             f"{len(classes)} classes for each image")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{file} is read by scipy, which is not installed; run: pip install scipy") from error
    except Exception as error:  # the reader of damaged files raises almost anything
        raise _damaged(file, error) from error
    return Part(images, labels, len(classes), classes)


def _read_tiny_imagenet(part: str, data_dir: Path | None, download: bool) -> Part:
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
        raise FileNotFoundError(f"no image of the part {part} in {root}; expected the unpacked tiny-imagenet-200.zip")
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


def _folders(data_dir: Path | None) -> dict[str, Path]:
    """Returns the folder of each part; one without such subfolders is itself the test part."""
    if data_dir is None:
        raise ValueError("a folder of images needs --data-dir: the folder that has train/, val/ and test/")
    if not data_dir.is_dir():
        raise FileNotFoundError(f"there is no folder {data_dir}; choose another --data-dir")
    found = {part: data_dir / name for part, names in _FOLDER_NAMES.items() for name in reversed(names)
             if (data_dir / name).is_dir()}
    return found or {"test": data_dir}


def _read_folder(part: str, data_dir: Path | None, download: bool) -> Part:
    return image_folder(_folders(data_dir)[part])


def _folder_classes(data_dir: Path | None) -> tuple[str, ...]:
    folders = _folders(data_dir)
    return class_folders(folders.get("train") or folders.get("test") or folders["val"])


def _hfds_parts(name: str, data_dir: Path | None) -> dict[str, str]:
    try:
        from datasets import get_dataset_split_names
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"the data set 'hfds/{name}' is read by the package datasets, which is not "
                                  "installed; run: pip install datasets") from error
    has = get_dataset_split_names(name, cache_dir=None if data_dir is None else str(data_dir))
    return {part: own for part, names in _FOLDER_NAMES.items() for own in reversed(names) if own in has}


def _read_hfds(name: str, part: str, data_dir: Path | None, download: bool) -> Part:
    dataset = create_dataset(f"hfds/{name}", None if data_dir is None else str(data_dir),
                             split=_hfds_parts(name, data_dir)[part])
    reader = dataset.reader
    for column in (reader.image_key, reader.label_key):
        # The reader adds an image column of None if there is none.
        if column not in reader.dataset.column_names or (len(reader.dataset) and reader.dataset[0][column] is None):
            raise ValueError(f"hfds/{name} has no column {column!r}; save it as a folder of images, train/ and test/ "
                             "with one subfolder a class in each")
    labels = torch.tensor(reader.dataset[reader.label_key]).long()
    names = tuple(reader.class_to_idx) or None
    return Part(EncodedImages(partial(_open_hfds, reader)), labels, len(names or ()) or int(labels.max()) + 1, names)


def _open_hfds(reader: Any, index: int) -> tuple[IO[bytes], str]:
    return reader[index][0], reader.filename(index, absolute=True) or f"{index} of the data set"


def _torch(name: str, num_classes: int, threat: str, mean: tuple[float, ...] | None = None,
           std: tuple[float, ...] | None = None, image_size: tuple[int, int, int] | None = None) -> DataSource:
    return DataSource(_has("train", "test"), partial(_read_torch, name), threat, mean, std, num_classes, image_size)


DATASETS: Final = {
    # mean and std of its training split
    "digits": DataSource(_has("train", "val", "test"), _read_digits, "Linf:0.1", (0.3053,), (0.3760,), 10, (1, 8, 8)),
    "fashion_mnist": DataSource(_has("train", "test"), _read_fashion_mnist, "Linf:0.1", (0.2860,), (0.3530,), 10,
                                (1, 28, 28)),
    "folder": DataSource(_folders, _read_folder, "Linf:4/255", IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD,
                         classes=_folder_classes),
    "torch/cifar10": _torch("cifar10", 10, "Linf:8/255", (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616),
                            (3, 32, 32)),
    "torch/cifar100": _torch("cifar100", 100, "Linf:8/255", (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762),
                             (3, 32, 32)),
    "torch/mnist": _torch("mnist", 10, "Linf:0.3", (0.1307,), (0.3081,), (1, 28, 28)),
    "torch/kmnist": _torch("kmnist", 10, "Linf:0.1", image_size=(1, 28, 28)),
    "torch/fashion_mnist": _torch("fashion_mnist", 10, "Linf:0.1", (0.2860,), (0.3530,), (1, 28, 28)),
    "svhn": DataSource(_has("train", "test"), _read_svhn, "Linf:8/255", (0.4377, 0.4438, 0.4728),
                       (0.1980, 0.2010, 0.1970), 10, (3, 32, 32)),
    "stl10": DataSource(_has("train", "test"), _read_stl10, "Linf:8/255", (0.4467, 0.4398, 0.4066),
                        (0.2603, 0.2566, 0.2713), 10, (3, 96, 96)),
    "tiny_imagenet": DataSource(_has("train", "val"), _read_tiny_imagenet, "Linf:8/255", IMAGENET_DEFAULT_MEAN,
                                IMAGENET_DEFAULT_STD, 200),
    "torch/imagenet": _torch("imagenet", 1000, "Linf:4/255", IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
}
