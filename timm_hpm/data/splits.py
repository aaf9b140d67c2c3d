"""`open_split`: the images to train on, to choose an epoch by and to measure with; no two splits share an image."""

import os
import pickle
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import augment_and_mix_transform, auto_augment_transform, rand_augment_transform
from timm.data.readers.class_map import load_class_map
from timm.data.transforms import str_to_interp_mode
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision.transforms import Compose, RandomHorizontalFlip, RandomResizedCrop
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from ..names import some
from ..seeding import seeded
from .images import MODES, EncodedImages, Part
from .sources import DataSource, data_source

SPLITS: Final = ("train", "val", "test")

# Seed of the splits, whatever the run's seed is.
_SPLIT_SEED: Final = 0
# Held out for validation by default.
_VAL_FRACTION: Final = 0.1
_MOST_VAL_IMAGES: Final = 5000
# Images read at once: a whole split is not in memory twice.
_AT_ONCE: Final = 256
_CPU: Final = torch.device("cpu")
_POLICIES: Final = {"rand": rand_augment_transform, "augmix": augment_and_mix_transform}


class ImageSplit(Dataset):
    """A split of a data set: pairs of an image (C, H, W), float32 in [0, 1], and its label; made by `open_split`."""

    def __init__(self, name: str, source: DataSource, part: Part, indices: Tensor, num_channels: int,
                 transform: Callable[[Any], Any] | None, seed: int | None):
        self.labels = part.labels[indices]  # (N,), int64, known without reading an image
        self.num_classes = part.num_classes  # of the data set; a split may lack some, see `check_every_class`
        self.class_names = part.class_names  # "" if the class map leaves one out; None if the data set has no names
        self.num_channels = num_channels
        self.threat = source.threat  # under which the data set is usually measured, such as "Linf:8/255"
        self.mean, self.std = source.mean, source.std  # the usual normalisation, one value a channel, or None
        self._name = name
        self._images = part.images
        self._indices = indices
        self._transform = transform
        self._seed = seed
        # Shared with those workers of a DataLoader that live from epoch to epoch.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __repr__(self) -> str:
        return self._name

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        index = range(len(self))[index]
        chosen = int(self._indices[index])
        image = self._images.read(chosen, self.num_channels) if isinstance(self._images, EncodedImages) \
            else self._images[chosen]
        if self._transform:
            with nullcontext() if self._seed is None else seeded(_CPU, self._seed, int(self._epoch), index):
                image = self._transform(image)
        return _as_pixels(image), int(self.labels[index])

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, int]]:
        """Returns the pairs of all `indices`, faster than one by one if the images lie in memory; for a DataLoader."""
        if not isinstance(self._images, Tensor) or self._transform:
            return [self[index] for index in indices]
        chosen = torch.as_tensor(indices)
        return list(zip(_as_pixels(self._images[self._indices[chosen]]), self.labels[chosen].tolist(), strict=True))

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch: the random crops are a function of the seed, the epoch and an image's index."""
        self._epoch.fill_(epoch)


def open_split(dataset: str, split: str, *, data_dir: str | os.PathLike | None = None,
               input_size: Sequence[int] | None = None, crop_pct: float = 1.0, interpolation: str = "bicubic",
               crop_mode: str = "center", download: bool = False, num_classes: int | None = None,
               val_fraction: float | None = None, class_map: str | os.PathLike | Mapping[str, int] | None = None,
               mean: Sequence[float] | None = None, augmentation_seed: int | None = None,
               random_resized_crop: bool = False, auto_augment: str | None = None) -> ImageSplit:
    """Opens a split of a data set.

    A missing validation split is held out from the training images: stratified by class, always the same ones. Splits
    of files are shuffled, always in the same way.

    Arguments:
        dataset: one of `DATASETS`, or "hfds/" and a data set of the Hugging Face Hub; see docs/data.md.
        split: `"train"`, `"val"` or `"test"`.
        data_dir: folder of its files; None for the system's "fashion_mnist", and data/ for "torch/...".
        input_size: (channels, height, width) of the model. Images from files become grey or colour, are resized by
            `crop_pct` and cropped by `crop_mode`, as timm does; those in memory must fit. None takes these as they are.
        crop_pct: the part of the resized image's shorter side that is kept.
        interpolation: "bicubic", "bilinear" or another of timm's.
        crop_mode: timm's: "center", "squash" (without the aspect ratio) or "border" (the whole image, with a border).
        mean: colour of that border, one value in [0, 1] a channel: the model's mean; None takes grey.
        download: whether a missing "torch/..." data set may be downloaded; by one process at a time.
        num_classes: the model's; all labels must be below it.
        val_fraction: the part held out, above 0 and below 1; None takes a tenth, at most 5,000 images. Open "train" and
            "val" with the same.
        class_map: timm's: a file with a class name in each line, in the order of the model's classes (.txt), or a
            pickled dict of names and numbers (.pkl). Images of other classes are left out. A mapping must have exactly
            the data set's classes, −1 for those left out, and may have more of these. None takes the data set's own
            numbers; class folders are numbered in sorted order, as torchvision does.
        augmentation_seed: seed of `random_resized_crop` and `auto_augment`; None for neither.
        random_resized_crop: random resized crops and flips instead of the centre crop.
        auto_augment: a policy in timm's words, such as "rand-m9-mstd0.5", "original" or "augmix-m3".

    Raises:
        ValueError: if the data set or split is unknown, images or labels do not fit the model, there is no image, or a
            file is damaged; the message gives the remedy.
        OSError: if files are missing; the message says how to fetch them.
        ModuleNotFoundError: if a package is missing; the message says how to install it.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; expected one of {', '.join(SPLITS)}")
    if val_fraction is not None and not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction is {val_fraction}; expected a number above 0 and below 1")
    source = data_source(dataset)
    numbers = class_map if class_map is None or isinstance(class_map, Mapping) else _class_map(class_map, data_dir)
    part, indices = _read(source, split, None if data_dir is None else Path(data_dir), download, val_fraction, numbers)
    name = f"the split {split} of {dataset or 'folder'}"
    if not len(indices):
        if isinstance(numbers, Mapping) and len(part.labels):
            raise ValueError(f"{name} has no image of a class of the class map ({some(numbers)}); expected names of "
                             "its own classes, such as the class folders'")
        raise ValueError(f"{name} has no image; " + (
            "each class has at most one, which is to train on. Add images, or give a test set and a validation set of "
            "their own (test/ and val/)" if split == "val" and len(part.labels) else "give another --data-dir"))
    if numbers is not None and num_classes is not None and num_classes > part.num_classes:
        names = (part.class_names or ()) + ("",) * (num_classes - part.num_classes)
        part = part._replace(num_classes=num_classes, class_names=names)
    _check_labels(name, part.labels[indices], num_classes)
    size = input_size
    if isinstance(part.images, Tensor):
        size = part.images.shape[1:]
        _check_size(name, tuple(size), None if input_size is None else tuple(input_size))
        # Frees the images of the other splits.
        part = part._replace(images=part.images[indices], labels=part.labels[indices])
        indices = torch.arange(len(indices))
    else:
        if size is None:
            raise ValueError(f"{name} has images of any size; give input_size=(channels, height, width)")
        if size[0] not in MODES:
            raise ValueError(f"the model takes images of {size[0]} channels; files can be read as 1 (grey) or 3 (RGB)")
        indices = indices[torch.randperm(len(indices), generator=torch.Generator().manual_seed(_SPLIT_SEED))]
    steps: list[Callable[[Any], Any]] = []
    if random_resized_crop and augmentation_seed is not None:
        mode = str_to_interp_mode(interpolation)
        steps = [RandomResizedCrop(tuple(size[1:]), interpolation=mode), RandomHorizontalFlip()]
    elif not isinstance(part.images, Tensor):
        steps = [create_transform((size[0], size[1], size[2]), interpolation=interpolation, crop_pct=crop_pct,
                                  crop_mode=crop_mode, normalize=False, mean=tuple(mean or (0.5,) * size[0]))]
    if auto_augment and augmentation_seed is not None:
        steps.append(_policy(auto_augment, size))
    return ImageSplit(name, source, part, indices, size[0], Compose(steps) if steps else None, augmentation_seed)


def _policy(name: str, size: Sequence[int]) -> Callable[[Any], Image.Image]:
    """Returns timm's augmentation policy of a name for images of a size (channels, height, width)."""
    make = next((make for start, make in _POLICIES.items() if name.startswith(start)), auto_augment_transform)
    params = {"translate_const": int(0.45 * min(size[1:])), "img_mean": (128,) * 3 if size[0] == 3 else 128}
    try:
        if bare := [part for part in name.split("-")[1:] if not any(map(str.isdigit, part))]:
            raise ValueError(f"its part {bare[0]!r} has no number")  # timm leaves it out
        policy = make(name, params)
    except (AssertionError, KeyError, ValueError) as error:
        raise ValueError(f"auto_augment (--aa) is {name!r}, which timm does not know ({type(error).__name__}: {error});"
                         " expected such as rand-m9-mstd0.5, augmix-m3, original, v0 or 3a") from error
    return Compose([partial(_as_image, MODES[size[0]]), policy])


def _as_image(mode: str, image: Tensor | Image.Image) -> Image.Image:
    """Returns an image of bytes, as timm's policies need it."""
    # Interpolated numbers beyond the range would wrap around.
    shown = image if isinstance(image, Image.Image) else to_pil_image(
        image.clamp(0, 1) if image.is_floating_point() else image)
    return shown if shown.mode == mode else shown.convert(mode)


def load_split(dataset: str, split: str, **options: Any) -> TensorDataset:
    """Returns a whole split as a `TensorDataset` of images (N, C, H, W) in [0, 1], float32, and labels (N,), int64.

    Arguments and errors are `open_split`'s.
    """
    return TensorDataset(*first_images(open_split(dataset, split, **options)))


def first_images(split: ImageSplit, n: int = 0, workers: int = 0) -> tuple[Tensor, Tensor]:
    """Returns the first `n` images (n, C, H, W), float32 in [0, 1], and labels (n,) of a split, 0 for all.

    `workers` processes read them, or this one if it is 0. Raises a ValueError unless the split has so many.
    """
    if not 0 <= n <= len(split):
        raise ValueError(f"asked for the first {n} images; {split} has {len(split)} (0 for all)")
    n = n or len(split)
    images = torch.empty(n, *split[0][0].shape)
    # A generator of its own, or the caller's random state would change.
    loader = DataLoader(split, min(n, _AT_ONCE), sampler=range(n), num_workers=workers, generator=torch.Generator())
    for first, (part, _) in zip(range(0, n, _AT_ONCE), loader, strict=True):
        images[first:first + len(part)] = part
    return images, split.labels[:n]


def check_every_class(split: ImageSplit, num_classes: int) -> None:
    """Raises a ValueError unless each of `num_classes` has an image in `split`, for its prototype."""
    missing = (split.labels.bincount(minlength=num_classes)[:num_classes] == 0).nonzero().flatten().tolist()
    if missing:
        names = dict(enumerate(split.class_names or ()))
        listed = some(f"{number} {names.get(number, '')}".rstrip() for number in missing)
        raise ValueError(f"{split} has no image of {len(missing)} of the model's {num_classes} classes ({listed}); add "
                         f"images of them, or choose a model of fewer classes (--num-classes)")


def hold_out(labels: Tensor, fraction: float | None = None) -> tuple[Tensor, Tensor]:
    """Returns the indices, ascending, of the images to train on and of those held out for validation.

    Each class of the `labels` (N,) gives its share of the `fraction`, rounded so that the sum is right, and keeps at
    least one image to train on. None takes a tenth, at most 5,000 images. The choice depends on the labels only.
    """
    counts = labels.bincount()
    total = max(1, round(len(labels) * (fraction or _VAL_FRACTION)))
    if fraction is None:
        total = min(total, _MOST_VAL_IMAGES)
    shares = total * counts.double() / max(1, len(labels))
    quotas = shares.long()
    largest_rests = (shares - quotas).argsort(descending=True, stable=True)
    quotas[largest_rests[:total - int(quotas.sum())]] += 1
    quotas = quotas.minimum((counts - 1).clamp(min=0))
    generator = torch.Generator().manual_seed(_SPLIT_SEED)
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for number, quota in enumerate(quotas.tolist()):
        members = (labels == number).nonzero().flatten()
        held_out[members[torch.randperm(len(members), generator=generator)[:quota]]] = True
    return (~held_out).nonzero().flatten(), held_out.nonzero().flatten()


def _read(source: DataSource, split: str, data_dir: Path | None, download: bool, val_fraction: float | None,
          numbers: Mapping[str, int] | None) -> tuple[Part, Tensor]:
    """Returns the part of the data set that a split is taken from, and the indices of its images there."""
    has = source.parts(data_dir)
    if split == "test":
        own = "test" if "test" in has else "val"
    else:
        # If there is only one of val and test, it is for measuring.
        own = split if "val" in has and "test" in has else "train"
    if own not in has:
        place = "" if data_dir is None else f" in {data_dir}"
        raise FileNotFoundError(f"there are no images for the split {split}{place}: it has {', '.join(has)} only; "
                                "expected train/, and test/ or val/ or both, with one subfolder a class in each")
    part = source.read(own, data_dir, download)
    indices, labels = torch.arange(len(part.labels)), part.labels
    if numbers is not None:
        named = any(number < 0 for number in numbers.values())
        if named:
            _check_classes(part, numbers)
        part = part.renumbered(numbers)
        indices = (part.labels >= 0).nonzero().flatten()
        if len(indices) < len(part.labels) and not named:
            warnings.warn(f"{len(part.labels) - len(indices)} of {len(part.labels)} images of {own} are of classes "
                          "that the class map leaves out", stacklevel=4)
    elif source.classes is not None:
        classes = source.classes(data_dir)
        if unknown := sorted({*(part.class_names or ())} - {*classes}):
            raise ValueError(f"{own} has the class {unknown[0]!r} ({len(unknown)} such), which train has not; both "
                             "need the same subfolders, one a class")
        part = part.renumbered({name: number for number, name in enumerate(classes)})
    if split == "test" or ("val" in has and "test" in has):
        if val_fraction is not None and split != "test":
            raise ValueError("the data set has a validation split of its own; leave out val_fraction")
        return part, indices
    _check_labels(f"the split {own}", labels, None)
    # By the data set's own numbers: no class map makes validation images of another run's training images.
    kept = hold_out(labels, val_fraction)[split == "val"]
    return part, kept[part.labels[kept] >= 0]


def _check_classes(part: Part, numbers: Mapping[str, int]) -> None:
    own = part.class_names or tuple(map(str, range(part.num_classes)))
    unknown = [name for name in own if name not in numbers]
    absent = [name for name, number in numbers.items() if number >= 0 and name not in own]
    if unknown or absent:
        raise ValueError(f"the data set has {len(unknown)} classes that the model has not ({some(unknown)}) "
                         f"and lacks {len(absent)} of the subset ({some(absent)}); expected the same names: "
                         "rename the folders, or mend the subset; to train on other classes, del model.class_map")


def _class_map(file: str | os.PathLike, data_dir: str | os.PathLike | None) -> dict[str, int]:
    try:
        numbers = load_class_map(str(file), str(data_dir or ""))
        if str(file).lower().endswith(".txt"):
            # timm takes the last of equal names, without a word.
            text = (Path(file) if os.path.exists(file) else Path(data_dir or "", file)).read_text(encoding="utf-8")
            twice = [name for name, n in Counter(map(str.strip, text.split("\n"))).items() if name and n > 1]
            if twice:
                raise ValueError(f"{some(map(repr, twice))} is in more than one line, and a line's number is that of "
                                 "the class; expected each name once: mend or remove all but one of the lines")
    except (AssertionError, OSError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"cannot read the class map {file}: {error}") from error
    numbers.pop("", None)
    if not numbers or not all(isinstance(name, str) and type(number) is int and number >= 0
                              for name, number in numbers.items()):
        raise ValueError(f"the class map {file} does not map names to numbers from 0; expected a name in each line "
                         "(.txt), or a pickled dict (.pkl)")
    return numbers


def _as_pixels(image: Tensor | Image.Image) -> Tensor:
    values: Tensor = image if isinstance(image, Tensor) else pil_to_tensor(image)
    # A random crop of numbers that are no bytes may leave the range.
    return values.float() / 255 if values.dtype == torch.uint8 else values.clamp(0, 1)


def _check_labels(name: str, labels: Tensor, num_classes: int | None) -> None:
    low, high = int(labels.min()), int(labels.max())
    if low < 0:
        raise ValueError(f"{name} has the label {low}; expected 0 and above. Are its labels public?")
    if num_classes is not None and high >= num_classes:
        raise ValueError(f"{name} has labels up to {high}, the model the classes 0 to {num_classes - 1}; choose "
                         f"another model, or give it more classes (--num-classes {high + 1})")


def _check_size(name: str, size: tuple[int, ...], input_size: tuple[int, ...] | None) -> None:
    if input_size is None or input_size == size:
        return
    hints = []
    if input_size[0] != size[0]:
        hints.append(f"--in-chans {size[0]}")
    if input_size[1:] != size[1:]:
        hints.append(f"--img-size {size[1]}")
    raise ValueError(f"{name} has images of (channels, height, width) {size}, the model takes {tuple(input_size)}; "
                     f"they are not converted: give {' and '.join(hints)}, or another --dataset")
