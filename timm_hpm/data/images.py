"""Images from encoded files: which files Pillow reads, and their pixels as grey or RGB."""

import os
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import IO, Final, NamedTuple

import torch
from PIL import Image, ImageFile
from torch import Tensor
from torchvision.datasets.folder import make_dataset

from ..names import some

MODES: Final = {1: "L", 3: "RGB"}
# Pillow reads an EPS by Ghostscript, which runs it as a program, and no picture of an MPEG.
_UNREADABLE: Final = ("EPS", "MPEG")


class EncodedImages:
    """Images that are opened as they are read: `open_file` takes an index and returns a file and its name."""

    def __init__(self, open_file: Callable[[int], tuple[IO[bytes], str]]):
        self._open_file = open_file
        # Shared with the workers of a DataLoader.
        self._has_warned = torch.zeros((), dtype=torch.bool).share_memory_()

    @classmethod
    def of_files(cls, files: list[str]) -> "EncodedImages":
        """Returns the images in files of these paths."""
        return cls(partial(_open, files))

    def read(self, index: int, channels: int) -> Image.Image:
        """Returns image `index` as grey (1 channel) or RGB (3), transparent pixels on white; a warning says so once.

        Raises a ValueError that names the file if it is no image, damaged, too large, or grey of more than 8 bits.
        """
        file, name = self._open_file(index)
        with file:
            try:
                image: Image.Image = Image.open(file, formats=_formats())
                image.load()
                if image.mode.startswith(("I", "F")):  # Pillow would cut it off
                    raise ValueError(f"it has the mode {image.mode}, of more than 8 bits; expected 8 bits a channel")
                if image.has_transparency_data:
                    # The one way to RGBA from La leads through LA.
                    rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
                    if rgba.getchannel("A").getextrema() != (255, 255) and not self._has_warned:
                        self._has_warned.fill_(True)
                        warnings.warn(f"{name} has transparent pixels; it is shown on white, as all such images are",
                                      stacklevel=2)
                    image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
                return image.convert(MODES[channels])
            # Pillow's plugins raise errors of almost any type.
            except Exception as error:
                raise ValueError(f"cannot read the image {name}: {error}. Mend it, or take it away") from error


class Part(NamedTuple):
    """One part of a data set as it lies on disk."""

    images: Tensor | EncodedImages  # a tensor is (N, C, H, W), uint8 or floating point in [0, 1]
    labels: Tensor  # (N,), int64
    num_classes: int
    class_names: tuple[str, ...] | None

    def renumbered(self, numbers: Mapping[str, int]) -> "Part":
        """Returns the part with each class's number in `numbers`, and the label −1 for classes that are not there."""
        own = self.class_names or tuple(map(str, range(self.num_classes)))
        table = torch.tensor([numbers.get(name, -1) for name in own])
        labels = torch.where(self.labels < 0, self.labels, table[self.labels.clamp(min=0)])
        names = {number: name for name, number in reversed(list(numbers.items())) if number >= 0}
        total = max(names) + 1
        return Part(self.images, labels, total, tuple(names.get(number, "") for number in range(total)))


def _open(files: list[str], index: int) -> tuple[IO[bytes], str]:
    return open(files[index], "rb"), files[index]


def class_folders(folder: Path) -> tuple[str, ...]:
    """Returns the names of the class folders, by which torchvision's ImageFolder numbers classes: in sorted order."""
    return tuple(sorted(entry.name for entry in os.scandir(folder) if entry.is_dir()))


def image_folder(folder: Path) -> Part:
    """Returns the images below the class folders of a folder, in torchvision's order.

    A warning names the classes without an image, and counts the files passed over.
    """
    classes = class_folders(folder)
    suffixes = tuple(suffix for suffix, name in Image.registered_extensions().items() if name in _formats())
    files = make_dataset(str(folder), {name: number for number, name in enumerate(classes)},
                         is_valid_file=lambda path: True, allow_empty=True) if classes else []
    samples = [(path, label) for path, label in files if path.lower().endswith(suffixes)]
    others = sorted([path for path, _ in files if not path.lower().endswith(suffixes)]
                    + [entry.path for entry in os.scandir(folder) if not entry.is_dir()])
    if not samples:
        raise ValueError(f"there is no image in {folder}; it needs one subfolder a class, with images in it"
                         + _passed_over(others))
    labels = [label for _, label in samples]
    empty = [repr(classes[number]) for number in sorted(set(range(len(classes))) - set(labels))]
    if empty:
        warnings.warn(f"{folder} has no image in {len(empty)} of its {len(classes)} class folders: {some(empty)}. "
                      "They count as classes", stacklevel=2)
    if others:
        warnings.warn(f"{folder}{_passed_over(others)}", stacklevel=2)
    return Part(EncodedImages.of_files([path for path, _ in samples]), torch.tensor(labels), len(classes), classes)


def _passed_over(files: list[str]) -> str:
    if not files:
        return ""
    kinds = some(f"{n} {kind}" for kind, n in Counter(Path(file).suffix or "no suffix" for file in files).most_common())
    return f": {len(files)} files were passed over, which are no images in a class folder ({kinds})"


@cache
def _formats() -> tuple[str, ...]:
    """Returns the formats that Pillow reads by itself."""
    Image.init()
    return tuple(name for name in Image.ID if name not in _UNREADABLE and not (
        isinstance(factory := Image.OPEN[name][0], type) and issubclass(factory, ImageFile.StubImageFile)))
