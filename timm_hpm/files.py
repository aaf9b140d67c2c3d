"""Files that appear whole or not at all."""

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from torch import Tensor

#: The file in a run's folder by which its process holds it.
LOCK: Final = ".lock"
# Files and folders that are being written: `.<name>.<process>.tmp`.
_UNFINISHED: Final = re.compile(r"\..+\.\d+\.tmp")
# The names of dtypes in safetensors.
_DTYPES: Final = {torch.float32: "F32", torch.int64: "I64"}


class Parts(NamedTuple):
    """A tensor that need not lie in memory: one of its shape and dtype, and its parts along the first dimension."""

    like: Tensor
    parts: Iterable[Tensor]


@contextmanager
def locked(folder: str | os.PathLike, *, shared: bool = False) -> Iterator[None]:
    """Holds `folder` for this process within the block, or raises a ValueError if another process holds it.

    The folder is made if it is missing, and removed if the block leaves it empty. The system lets go of it when the
    process ends, killed or not. `shared`: all processes of torch.distributed enter the block together, and the first
    holds the folder for all.
    """
    folder, lock = Path(folder), FileLock(Path(folder) / LOCK)
    shared = shared and dist.is_available() and dist.is_initialized()
    made: list[Path] = []
    errors: list[ValueError | OSError | None] = [None]
    if not shared or dist.get_rank() == 0:
        made = [part for part in (folder, *folder.parents) if not part.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except Timeout:
            errors = [ValueError(f"another process works on the run in {folder}; wait for it, stop it, or choose "
                                 "another folder")]
        except OSError as error:
            errors = [_not_writable(folder, error)]
        except NotImplementedError:
            pass  # a file system without locks
    if shared:
        dist.broadcast_object_list(errors)
    try:
        if errors[0] is not None:
            raise errors[0]
        yield
    finally:
        if lock.is_locked:
            with suppress(OSError):  # Windows removes no open file
                (folder / LOCK).unlink()
            lock.release()
        with suppress(OSError):  # something is in it
            for part in made:
                part.rmdir()


@contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """Turns an error of the disk in the block into an OSError that names `path`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and (error.errno is None or error.filename is not None):
            raise
        raise OSError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}. Free space on its disk, or "
                      "raise the limits of disk use and of a file's size (ulimit -f)") from error


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path beside `path`, of a file or a folder, which takes its place unless the block raises."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        mode = _mode_of_new(temporary)
        with writing(path):
            yield temporary
        if temporary.is_file():
            temporary.chmod(mode)
        os.replace(temporary, path)
    finally:
        remove(temporary)


@contextmanager
def filling(path: str | os.PathLike, first: str) -> Iterator[Path]:
    """Yields a temporary folder, whose files take their places in the folder `path` if the block ends without an error.

    The file `first` goes before the others. A folder that was made for them goes after an error.
    """
    path = Path(path)
    made = not path.exists()
    temporary = writable_folder(path) / f".files.{os.getpid()}.tmp"
    temporary.mkdir()
    try:
        with writing(path):
            yield temporary
        mode = _mode_of_new(temporary / ".probe")
        for file in sorted(temporary.iterdir(), key=lambda file: file.name != first):
            file.chmod(mode)
            os.replace(file, path / file.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if made:
            with suppress(OSError):  # the files are in it
                path.rmdir()


def _mode_of_new(path: Path) -> int:
    """Returns the mode of a new file, made at `path` for a moment; safetensors' files are for their owner alone."""
    path.touch()
    mode = path.stat().st_mode
    path.unlink()
    return mode


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes `text` to `path`, whole or not at all; bytes of a file's name that are no UTF-8 as `\\udc..`."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def save_parts(tensors: Mapping[str, Parts], path: str | os.PathLike, metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file, whole or not at all, of tensors (float32 or int64) that are read part by part.

    The library's `save_file` holds all tensors in memory, and their bytes once more.
    Source: https://github.com/huggingface/safetensors#format: the header's length as a little-endian uint64, the header
    in JSON, the tensors' bytes one after another.
    """
    # The library's order, in which each tensor begins at a multiple of its dtype's size.
    names = sorted(tensors, key=lambda name: (-tensors[name].like.itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        like = tensors[name].like
        begin, end = end, end + like.nbytes
        header[name] = {"dtype": _DTYPES[like.dtype], "shape": list(like.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            for part in tensors[name].parts:
                file.write(tensor_bytes(part))


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Returns the bytes of a tensor, without a copy if it is contiguous and on the CPU."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def writable_folder(path: str | os.PathLike) -> Path:
    """Makes the folder `path` if it is missing, and returns it."""
    folder = Path(path)
    probe = folder / f".probe.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise _not_writable(folder, error) from error
    return folder


def _not_writable(folder: Path, error: OSError) -> OSError:
    return OSError(f"cannot write into the output folder {folder}: {error.strerror or error}. "
                   "Choose another (--output), or mend its permissions")


def default_folder(model: str, prefix: str = "") -> Path:
    """Returns `output/<prefix><model>-<date>`, of a name that every file system takes: at most 150 ASCII characters."""
    name = re.sub(r"[^\w.+=-]+", "-", model, flags=re.ASCII).strip("-.")
    return Path("output") / f"{prefix}{name[:120]}-{datetime.now():%Y-%m-%d-%H%M%S}"


def remove_unfinished(folder: str | os.PathLike) -> None:
    """Removes the temporary files and folders that a killed process left in `folder`."""
    for rest in Path(folder).glob(".*.tmp"):
        if _UNFINISHED.fullmatch(rest.name):
            remove(rest)


def remove(path: Path) -> None:
    """Removes a file, a folder with its content, or a link without its target, as far as the system permits."""
    with suppress(OSError):
        if path.is_symlink() or not path.is_dir():
            path.unlink()
    shutil.rmtree(path, ignore_errors=True)
