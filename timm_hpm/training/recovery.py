"""Checkpoints of a training run: folders that appear whole, each with everything that a resumed run needs."""

import hashlib
import math
import os
import pickle
import re
import shutil
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..evaluation.resume import sealed, unsealed
from ..files import remove, writing

_STATE: Final = "state.json"
_MODEL: Final = "model.safetensors"
_AVERAGE: Final = "average.safetensors"
_OPTIMIZER: Final = "optimizer.pt"
BEST: Final = "best"
_NAME: Final = re.compile(r"epoch-\d{5,}-batch-\d{8,}")


class DamagedCheckpointWarning(UserWarning):
    """A checkpoint differs from its digests; the run resumes from an older one."""


@dataclass
class Checkpoint:
    """The state of a run.

    It holds no random state: a run's randomness is a function of its seed and of its position.

    Arguments:
        model: the model's state dict, as safetensors takes it.
        average: that of the averaged model; None without one.
        optimizer: states of the optimizer, the schedule and the gradient scaler: tensors and plain values.
        progress: the position of the run and its results so far, in JSON's types; `"epoch"`, and the number of its
            `"batches"` that are done.
        config: the options of the run.
        metadata: metadata of the weights' files, as `weights_metadata` returns it.
        best: the folder of the best epoch's files, which the checkpoint copies; None if there is no such epoch yet.
    """

    model: dict[str, Tensor]
    average: dict[str, Tensor] | None
    optimizer: dict[str, Any]
    progress: dict[str, Any]
    config: dict[str, Any]
    metadata: dict[str, str] = field(default_factory=dict)
    best: Path | None = None


def write_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Writes a checkpoint as a new folder below `folder`, keeps the newest `keep` ones, and returns its path.

    Checkpoints of a later state are removed: they were damaged, and the run resumed from an earlier one.
    """
    folder.mkdir(exist_ok=True)
    target = folder / f"epoch-{checkpoint.progress['epoch']:05d}-batch-{checkpoint.progress['batches']:08d}"
    temporary = folder / f".{target.name}.{os.getpid()}.tmp"
    try:
        temporary.mkdir()
        with writing(target):
            _write(temporary, checkpoint)
        remove(target)  # it was damaged: no run writes the same state twice
        os.replace(temporary, target)
    finally:
        remove(temporary)
    all_of_them = _newest_first(folder)
    mine = all_of_them.index(target)
    for other in all_of_them[:mine] + all_of_them[mine + keep:]:
        remove(other)
    return target


def _write(folder: Path, checkpoint: Checkpoint) -> None:
    save_file(checkpoint.model, folder / _MODEL, checkpoint.metadata)
    if checkpoint.average is not None:
        save_file(checkpoint.average, folder / _AVERAGE, checkpoint.metadata)
    try:
        torch.save(checkpoint.optimizer, folder / _OPTIMIZER)
    except RuntimeError as error:
        raise OSError(f"cannot write {folder / _OPTIMIZER}: {error}. Free space on its disk, or raise the limits of "
                      "disk use and of a file's size (ulimit -f)") from error
    if checkpoint.best is not None:
        (folder / BEST).mkdir()
        for path in checkpoint.best.iterdir():
            shutil.copyfile(path, folder / BEST / path.name)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    digests = {path.relative_to(folder).as_posix(): _digest(path) for path in files}
    state = {"digests": digests, "progress": checkpoint.progress, "config": checkpoint.config}
    (folder / _STATE).write_text(sealed(state), encoding="utf-8")
    for path in (*files, folder / _STATE):
        with path.open("rb") as file:
            os.fsync(file.fileno())  # the rename may reach the disk before the contents do


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """Returns the newest undamaged checkpoint below `folder`; None if there is none.

    A damaged one is skipped with a `DamagedCheckpointWarning` that names the damage.
    """
    for path in _newest_first(folder):
        try:
            return _read(path)
        except (OSError, ValueError, LookupError, TypeError, RuntimeError, EOFError, SafetensorError,
                pickle.UnpicklingError) as error:
            warnings.warn(f"the checkpoint {path} is damaged ({error}); going on from the one before it, or from the "
                          "start if there is none", DamagedCheckpointWarning, stacklevel=2)
    return None


def _read(path: Path) -> Checkpoint:
    state = unsealed((path / _STATE).read_text(encoding="utf-8"))
    _check_state(state)
    for name, digest in state["digests"].items():
        if _digest(path / name) != digest:
            raise ValueError(f"{name} is not as it was written")
    average = load_file(path / _AVERAGE) if _AVERAGE in state["digests"] else None
    optimizer = torch.load(path / _OPTIMIZER, map_location="cpu", weights_only=True)
    best = path / BEST if state["progress"]["best"] else None
    return Checkpoint(load_file(path / _MODEL), average, optimizer, state["progress"], state["config"], best=best)


def _check_state(state: Any) -> None:
    """Raises a ValueError that names the first invalid entry of a state."""
    def expect(right: bool, name: str, value: Any, expected: str) -> None:
        if not right:
            raise ValueError(f"{_STATE}: {name} is {value!r:.100}; expected {expected}")

    expect(isinstance(state, dict) and state.keys() == {"digests", "progress", "config"}, "it", state,
           "digests, progress and config")
    digests, progress, config = state["digests"], state["progress"], state["config"]
    expect(isinstance(config, dict), "config", config, "the options of a run")
    expect(isinstance(digests, dict) and {_MODEL, _OPTIMIZER} <= digests.keys(), "digests", digests,
           f"those of {_MODEL}, {_OPTIMIZER}, ...")
    expect(isinstance(progress, dict), "progress", progress, "the position of the run")
    for name in ("epoch", "batches", "updates", "processes"):
        value = progress.get(name)
        expect(type(value) is int and value >= 0, name, value, "a whole number from 0")
    expect(_is_number(progress.get("loss")), "loss", progress.get("loss"), "a finite number")
    rows, best = progress.get("rows"), progress.get("best")
    expect(isinstance(rows, list) and len(rows) == progress["epoch"], "rows", rows, f"{progress['epoch']} rows")
    for number, row in enumerate(rows):
        expect(isinstance(row, dict) and row.keys() == rows[0].keys() >= {"val_clean", "val_robust"}
               and row.get("epoch") == number and all(map(_is_number, row.values())), f"row {number}", row,
               "the finite numbers of that epoch")
    expect(best == {} or best in rows, "best", best, "{} or one of the rows")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _newest_first(folder: Path) -> list[Path]:
    """Returns the folders in `folder` that are named as `write_checkpoint` names them."""
    found = [path for path in folder.glob("epoch-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: [int(part) for part in path.name.split("-")[1::2]], reverse=True)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()
