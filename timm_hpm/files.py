"""Files that appear whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path beside `path`, which takes its place when the block ends without an error."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        temporary.unlink()
        yield temporary
        # safetensors leaves a file that only its owner can read.
        temporary.chmod(mode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary folder, which becomes `path`, or fills that empty one, when the block ends without an error.

    Raises:
        OSError: `path` exists and is no empty folder, or cannot be written; the message says what to do.
    """
    path = Path(path)
    exists = path.exists()
    if exists and not (path.is_dir() and not any(path.iterdir())):
        raise OSError(f"{path} exists already; choose another --output, or remove it")
    writable_folder(path if exists else path.parent)
    # A folder that exists may be a shell's current one or a mount point: it is filled, not replaced.
    temporary = path / f".{os.getpid()}.tmp" if exists else path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        probe = temporary / ".probe"
        probe.touch()
        mode = probe.stat().st_mode
        probe.unlink()
        files = list(temporary.iterdir())
        for file in files:
            # safetensors leaves a file that only its owner can read.
            file.chmod(mode)
        if exists:
            for file in files:
                file.rename(path / file.name)
        else:
            os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes `text` to `path`, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def writable_folder(path: str | os.PathLike) -> Path:
    """Makes the folder `path` where it is missing and returns it.

    Raises:
        OSError: it cannot be made or written into; the message names it and says what to do.
    """
    folder = Path(path)
    probe = folder / f".probe.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(f"cannot write into the output folder {folder}: {error.strerror or error}. "
                      "Choose another (--output), or mend its permissions") from error
    return folder


def remove_unfinished(folder: str | os.PathLike) -> None:
    """Removes the temporary files that a process left in `folder` when it was killed as it wrote."""
    for rest in Path(folder).glob(".*.[0-9]*.tmp"):
        if rest.is_file():
            rest.unlink(missing_ok=True)
