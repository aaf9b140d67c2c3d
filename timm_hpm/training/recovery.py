"""The checkpoints of a training run, folders that appear whole, and its identity, by which it must be resumed."""

import os
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from huggingface_hub.utils.sha import sha_fileobj
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..data import PixelModel, first_images
from ..evaluation.resume import sealed, unsealed
from ..files import remove, replacing
from ..head import find_head, head_name, mode_if_any
from ..report import data_digest
from ..seeding import seeded
from .setup import Data

_STATE: Final = "state.json"
_MODEL: Final = "model.safetensors"
_AVERAGE: Final = "average.safetensors"
_OPTIMIZER: Final = "optimizer.safetensors"
BEST: Final = "best"
_NAME: Final = re.compile(r"epoch-\d{5,}-batch-\d{8,}")
# Images of each split that are kept by their numbers, and how far rounding takes these apart, relative to the largest.
_IMAGES: Final = 8
_ROUNDING: Final = 1e-2


class DamagedCheckpointWarning(UserWarning):
    """A checkpoint differs from its digests; the run resumes from an older one."""


@dataclass
class Progress:
    """The position of a run, and its results so far."""

    processes: int
    updates: int = 0
    epoch: int = 0  # from 0
    batches: int = 0  # of that epoch that are done
    loss: float = 0.0  # sum of their losses
    rows: list[dict[str, Any]] = field(default_factory=list)  # the metrics of each finished epoch
    best: dict[str, Any] = field(default_factory=dict)  # the row of the best epoch; {} before there is one
    log_scale: float = 0.0  # the head's when its prototypes were fitted, or at the start if it came with some
    warnings: dict[str, Any] = field(default_factory=dict)  # signs that the run does not learn, by name
    identity: dict[str, Any] = field(default_factory=dict)  # of the network and the images


@dataclass
class Checkpoint:
    """The state of a run.

    It holds no random state: a run's randomness is a function of its seed and of its position.
    """

    model: dict[str, Tensor]  # state dict, as safetensors takes it
    average: dict[str, Tensor] | None  # that of the averaged model
    optimizer: dict[str, Any]  # states of the optimizer and the gradient scaler: tensors and plain values
    progress: dict[str, Any]  # the fields of a `Progress`
    config: dict[str, Any]  # the options of the run
    metadata: dict[str, str] = field(default_factory=dict)  # of the weights' files, by `weights_metadata`
    best: Path | None = None  # folder of the best epoch's files, which the checkpoint copies


def write_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Writes a checkpoint as a new folder below `folder`, keeps the newest `keep` ones, and returns its path.

    Checkpoints of a later state are removed: they were damaged, and the run resumed from an earlier one.
    """
    folder.mkdir(exist_ok=True)
    target = folder / f"epoch-{checkpoint.progress['epoch']:05d}-batch-{checkpoint.progress['batches']:08d}"
    with replacing(target) as temporary:
        temporary.mkdir()
        _write(temporary, checkpoint)
        remove(target)  # it was damaged: no run writes the same state twice
    all_of_them = _newest_first(folder)
    mine = all_of_them.index(target)
    for other in all_of_them[:mine] + all_of_them[mine + keep:]:
        remove(other)
    return target


def _write(folder: Path, checkpoint: Checkpoint) -> None:
    save_file(checkpoint.model, folder / _MODEL, checkpoint.metadata)
    if checkpoint.average is not None:
        save_file(checkpoint.average, folder / _AVERAGE, checkpoint.metadata)
    tensors: dict[str, Tensor] = {}
    optimizer = _taken_out(checkpoint.optimizer, tensors)
    save_file(tensors, folder / _OPTIMIZER)
    if checkpoint.best is not None:
        shutil.copytree(checkpoint.best, folder / BEST)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    state = {"digests": {path.relative_to(folder).as_posix(): _digest(path) for path in files},
             "progress": checkpoint.progress, "config": checkpoint.config, "optimizer": optimizer}
    (folder / _STATE).write_text(sealed(state), encoding="utf-8")
    for path in (*files, folder / _STATE):
        with path.open("rb") as file:
            os.fsync(file.fileno())  # the rename may reach the disk before the contents do


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """Returns the newest checkpoint below `folder` that is as its digests say, or None; warns of a damaged one."""
    for path in _newest_first(folder):
        try:
            return _read(path)
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError,
                SafetensorError) as error:
            warnings.warn(f"the checkpoint {path} is damaged ({error}); going on from the one before it, or from the "
                          "start if there is none", DamagedCheckpointWarning, stacklevel=2)
    return None


def _read(path: Path) -> Checkpoint:
    state = unsealed((path / _STATE).read_text(encoding="utf-8"))
    for name in {_MODEL, _OPTIMIZER, *state["digests"]}:
        if _digest(path / name) != state["digests"].get(name):
            raise ValueError(f"{name} is not as it was written")
    average = load_file(path / _AVERAGE) if _AVERAGE in state["digests"] else None
    optimizer = _put_back(state["optimizer"], load_file(path / _OPTIMIZER))
    best = path / BEST if state["progress"]["best"] else None
    return Checkpoint(load_file(path / _MODEL), average, optimizer, state["progress"], state["config"], best=best)


def _taken_out(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Returns a nested value as JSON's types, for `_put_back`, and adds its tensors to `tensors`."""
    if isinstance(value, Tensor | torch.dtype):
        name = str(len(tensors))
        if isinstance(value, torch.dtype):
            tensors[name] = torch.empty(0, dtype=value)
            return {"dtype": name}
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": name}
    if isinstance(value, dict):  # of any keys: an optimizer numbers the weights
        return {"dict": [[key, _taken_out(each, tensors)] for key, each in value.items()]}
    if isinstance(value, list | tuple):
        parts = [_taken_out(each, tensors) for each in value]
        return {"tuple": parts} if isinstance(value, tuple) else parts
    return value


def _put_back(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_put_back(each, tensors) for each in value]
    if not isinstance(value, dict):
        return value
    (kind, content), = value.items()
    if kind in ("tensor", "dtype"):
        return tensors[content] if kind == "tensor" else tensors[content].dtype
    return {"tuple": tuple, "dict": dict}[kind](_put_back(content, tensors))


def _newest_first(folder: Path) -> list[Path]:
    """Returns the folders in `folder` that are named as `write_checkpoint` names them."""
    found = [path for path in folder.glob("epoch-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: [int(part) for part in path.name.split("-")[1::2]], reverse=True)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return sha_fileobj(file).hex()


def identity(model: Any, data: Data, extra: str | None) -> dict[str, Any]:
    """Returns what tells a run's network and images from others, in JSON's types.

    That is a digest of all labels, that of the extra data, the head's arguments, and of the first training and
    validation images the mean pixels and the FC logits of their labels. The model ends in eval mode.
    """
    labels = torch.cat([data.train.labels, data.val.labels])
    pairs = [first_images(split, min(_IMAGES, len(split))) for split in (data.plain_train, data.val)]
    images, truth = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    device = next(model.parameters()).device
    with torch.no_grad(), seeded(device, 0, "identity"), mode_if_any(model, "fc"):
        logits = PixelModel(model.eval())(images.to(device)).cpu()
    return {"labels": data_digest(torch.empty(0), labels), "extra": extra,
            "head": None if head_name(model) is None else find_head(model).config(),
            "pixels": images.mean(dim=(1, 2, 3)).tolist(),
            "logits": logits.gather(1, truth.unsqueeze(1)).squeeze(1).tolist()}


def check_identity(found: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises a ValueError that says what differs if a checkpoint's `identity` is not the present one.

    The weights must be the checkpoint's.
    """
    advice = "give the run what it had, or start another in another --output"
    if found.keys() != now.keys():
        raise ValueError(f"the checkpoint knows its network and images by {', '.join(found) or 'nothing'}; expected "
                         f"{', '.join(now)}. Resume it with the version of timm_hpm that wrote it, or {advice}")
    if found["labels"] != now["labels"]:
        raise ValueError(f"the run was begun with other images: their labels, in order, are others now; {advice}")
    if found["extra"] != now["extra"]:
        raise ValueError(f"the run was begun with other extra data (--extra-data): images or labels differ; {advice}")
    if found["head"] != now["head"]:
        raise ValueError(f"the run's HPM head has {found['head']}, and the model's {now['head']}; {advice}")
    for name, cause in (("pixels", "the images"), ("logits", "the network's code or arguments")):
        before, after = torch.tensor(found[name]), torch.tensor(now[name])
        apart = (before - after).abs().max().item()
        if apart > _ROUNDING * before.abs().max().item():
            raise ValueError(f"{cause} have changed since the run began: {name} of the first images differ by up to "
                             f"{apart:.2g}; {advice}")
