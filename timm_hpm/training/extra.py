"""Extra training images of an npz file, such as generated ones, which are read from the disk as they are drawn."""

import os
import shutil
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from ..files import replacing
from ..report import data_digest

_LAYOUT: Final = "expected `image`, uint8 (N, H, W, channels), and `label`, integers (N,)"
# Images at even distances that the digest reads.
_IN_DIGEST: Final = 256


class ExtraImages:
    """The images of an npz file, memory-mapped, and their labels, in memory.

    The layout is that of the generated images of Gowal et al. (arXiv 2110.09468) and Wang et al. (arXiv 2302.04638):
    `image`, uint8 (N, H, W, channels), and `label` (N,), below `num_classes`; `shape` is (channels, H, W). The member
    of an uncompressed file is mapped as it is, that of a compressed one from the file `unpacked`, which must remain; if
    not `unpack`, another process has unpacked it. `digest` is of the number of images, some of them and all labels.
    """

    def __init__(self, path: str | os.PathLike, shape: tuple[int, ...], num_classes: int, unpacked: Path, *,
                 unpack: bool = True):
        self.path = Path(path)
        try:
            with zipfile.ZipFile(self.path) as archive:
                arrays = [name.removesuffix(".npy") for name in archive.namelist()]
                if not {"image", "label"} <= set(arrays):
                    raise ValueError(f"it holds {', '.join(arrays[:5]) or 'nothing'}")
                members = {name: archive.getinfo(f"{name}.npy") for name in ("image", "label")}
                with archive.open(members["image"]) as file:
                    dtype, size, length = _header(file)
                channels, height, width = shape
                if dtype != np.uint8 or len(size) != 4 or size[1:] != (height, width, channels):
                    raise ValueError(f"`image` is {dtype} {size}; expected uint8 (N, {height}, {width}, {channels})")
                self.labels = self._read_labels(size[0], num_classes)
                start, source = _start(self.path, members["image"]), self.path
                if members["image"].compress_type != zipfile.ZIP_STORED:
                    start, source = 0, unpacked
                    if unpack:
                        with archive.open(members["image"]) as packed, replacing(unpacked) as temporary, \
                                temporary.open("wb") as target:
                            shutil.copyfileobj(packed, target, 1 << 20)
            self._images = np.memmap(source, np.uint8, "r", start + length, size)
            some = np.linspace(0, len(self) - 1, min(_IN_DIGEST, len(self))).astype(int)
            self.digest = data_digest(torch.from_numpy(self._images[some]), self.labels)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"the extra data {path}: there is no such file") from error
        except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, ValueError) as error:
            raise ValueError(f"cannot use the extra data {path}: {error}; {_LAYOUT}") from error

    def _read_labels(self, number: int, num_classes: int) -> Tensor:
        with np.load(self.path, allow_pickle=False) as arrays:
            labels = arrays["label"]
        if labels.shape != (number,) or labels.dtype.kind not in "iu" or not number:
            raise ValueError(f"`label` is {labels.dtype} {labels.shape}, of {number} images")
        if labels.min() < 0 or labels.max() >= num_classes:
            raise ValueError(f"`label` has values from {labels.min()} to {labels.max()}, and the model has "
                             f"the classes 0 to {num_classes - 1}")
        return torch.from_numpy(labels.astype(np.int64))

    def __len__(self) -> int:
        return len(self.labels)

    def draw(self, number: int) -> tuple[Tensor, Tensor]:
        """Returns random images (number, channels, H, W) in [0, 1] and labels (number,), by torch's random state."""
        rows = torch.randint(len(self), (number,))
        images = torch.from_numpy(self._images[rows.numpy()])
        return images.permute(0, 3, 1, 2).float() / 255, self.labels[rows]


def _header(file: Any) -> tuple[np.dtype, tuple[int, ...], int]:
    """Returns the dtype, the shape and the length of the header of an npy file."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, in_fortran_order, dtype = read(file)
    if in_fortran_order:
        raise ValueError("`image` is in Fortran order; save np.ascontiguousarray(image)")
    return dtype, shape, file.tell()


def _start(path: Path, member: zipfile.ZipInfo) -> int:
    """Returns the position of a member's bytes in a zip file: behind its local header, a name and extra fields."""
    with path.open("rb") as file:
        file.seek(member.header_offset + 26)
        return member.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
