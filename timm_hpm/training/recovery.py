"""Checkpoints of a training run: folders that appear whole, each with all that a run needs to go on from it."""

import hashlib
import json
import os
import pickle
import shutil
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

_STATE: Final = "state.json"
_MODEL: Final = "model.safetensors"
_AVERAGE: Final = "average.safetensors"
_OPTIMIZER: Final = "optimizer.pt"


class DamagedCheckpointWarning(UserWarning):
    """A checkpoint that is not as it was written; an older one is taken."""


@dataclass
class Checkpoint:
    """The state of a run.

    No random state is among it: a run's randomness is a function of its seed and of where in the run it stands.

    Arguments:
        model: the model's state dict, as safetensors takes it.
        average: that of the averaged model; None without one.
        optimizer: what the optimizer, the schedule and the gradient scaler need: tensors and plain values.
        progress: where the run stands and what it has found so far, in JSON's types; `"epoch"`, and how many of its
            `"batches"` are done.
        config: the options of the run.
        metadata: what the weights' files say of themselves, as `weights_metadata` returns it.
    """

    model: dict[str, Tensor]
    average: dict[str, Tensor] | None
    optimizer: dict[str, Any]
    progress: dict[str, Any]
    config: dict[str, Any]
    metadata: dict[str, str] = field(default_factory=dict)


def write_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Writes a checkpoint as a new folder below `folder`, keeps the newest `keep` ones, and returns its path.

    Those of a later state go: they were damaged, and the run went on from an earlier one.
    """
    folder.mkdir(exist_ok=True)
    target = folder / f"epoch-{checkpoint.progress['epoch']:05d}-batch-{checkpoint.progress['batches']:08d}"
    temporary = folder / f".{target.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    save_file(checkpoint.model, temporary / _MODEL, checkpoint.metadata)
    if checkpoint.average is not None:
        save_file(checkpoint.average, temporary / _AVERAGE, checkpoint.metadata)
    torch.save(checkpoint.optimizer, temporary / _OPTIMIZER)
    digests = {path.name: _digest(path) for path in sorted(temporary.iterdir())}
    state = {"digests": digests, "progress": checkpoint.progress, "config": checkpoint.config}
    (temporary / _STATE).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
    for path in temporary.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())  # the rename may reach the disk before the contents do
    shutil.rmtree(target, ignore_errors=True)  # a damaged one: no run writes the same state twice
    os.replace(temporary, target)
    all_of_them = _newest_first(folder)
    mine = all_of_them.index(target)
    for other in all_of_them[:mine] + all_of_them[mine + keep:]:
        shutil.rmtree(other)
    return target


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """Returns the newest undamaged checkpoint below `folder`, None where there is none.

    Damaged ones are skipped with a `DamagedCheckpointWarning` that says what is wrong with them.
    """
    for path in _newest_first(folder):
        try:
            return _read(path)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, EOFError, SafetensorError,
                pickle.UnpicklingError) as error:
            warnings.warn(f"the checkpoint {path} is damaged ({error}); going on from the one before it, or from the "
                          "start where there is none", DamagedCheckpointWarning, stacklevel=2)
    return None


def _read(path: Path) -> Checkpoint:
    state = json.loads((path / _STATE).read_text(encoding="utf-8"))
    for name, digest in state["digests"].items():
        if _digest(path / name) != digest:
            raise ValueError(f"{name} is not as it was written")
    average = load_file(path / _AVERAGE) if _AVERAGE in state["digests"] else None
    optimizer = torch.load(path / _OPTIMIZER, map_location="cpu", weights_only=True)
    return Checkpoint(load_file(path / _MODEL), average, optimizer, state["progress"], state["config"])


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("epoch-*"), reverse=True)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()
