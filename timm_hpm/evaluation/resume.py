"""The results of an unfinished evaluation on disk: a file for each attack on each batch, whole or not there.

Each names its run, batch and step and has digests of its content: a damaged or displaced file is refused by name.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..files import remove, remove_unfinished, replacing, tensor_bytes, writable_folder, write_text
from ..report import Example

# One for all: thousands of small tensors between large freed ones would fragment the heap.
_NOTHING: Final = torch.empty(0)

# Measured by the model: another number of threads rounds otherwise.
_MEASURED: Final = ("attacked_scale", "clean_margin")

# The file that identifies the run of a folder.
_RUN: Final = "run.json"


def no_cost() -> dict[str, float]:
    """Returns the cost of no work: seconds, and images that went forward and backward through the backbone."""
    return {"seconds": 0.0, "forward_passes": 0, "backward_passes": 0}


@dataclass
class Step:
    """The result of one attack, through surrogates side by side, on one batch of B images."""

    attack: str  # or "clean"
    correct: dict[str, str]  # the true model's verdicts, B characters for each "<surrogate>/<attack>"
    baseline_correct: dict[str, str]  # the FC classifier's, on the candidates of that classifier
    cost: dict[str, float]  # `no_cost`
    flags: list[tuple[str, str, int, int]]  # name, text with two `{}`, the numbers of images affected and of all
    examples: list[Example]  # the first few images that it broke
    broken: Tensor  # (K,), the images of the batch that no earlier step had broken
    points: Tensor  # (K, channels, H, W), the first successful candidate of each
    candidates: dict[str, Tensor] = field(default_factory=dict)  # (B, channels, H, W); not of a loaded step
    not_finite: dict[str, list[int]] = field(default_factory=dict)  # images by place: the search or the verdicts
    predicted: list[int] = field(default_factory=list)  # classes of the clean images, which no folder keeps
    margins: list[float] = field(default_factory=list)  # (B,), smallest lead of the right logit; 0 if misclassified
    attacked: int = 0  # number of images that were left, over which the passes count

    def without_pixels(self) -> "Step":
        """Returns the step without its tensors, of which a mere slice would keep the memory."""
        return replace(self, broken=_NOTHING, points=_NOTHING, candidates={})


class ProgressFolder:
    """The steps of one run in a `locked` folder, which is refused if it holds another run's.

    `run` is everything that they depend on, in JSON's types. Without `begins` another process has begun it here.
    """

    def __init__(self, folder: Path, run: dict[str, Any], *, begins: bool = True):
        self.folder = folder
        file = folder / _RUN
        if begins:
            writable_folder(folder)
            # A hidden file is the lock, or an unfinished file of ours.
            if not file.exists() and any(not path.name.startswith(".") for path in folder.iterdir()):
                raise ValueError(f"{folder} holds no progress of an evaluation, but other files; choose another "
                                 "folder, or empty it")
            remove_unfinished(folder)
            if not file.exists():
                write_text(file, sealed(run))
        try:
            found = unsealed(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file} is damaged ({error}); remove {folder} and start again") from error
        check_same_run(f"{folder} holds the progress", found, run)
        self._run = _digest(json.dumps(found).encode())

    def load(self, batch: int, step: int, names: Sequence[str]) -> Step | None:
        """Returns the step of a batch that judged the candidates `names`, or None if it is still to be made."""
        if not self._path(batch, step).exists():
            return None
        with self._opened(batch, step, names) as (file, record):
            result = record["found"]
            result["flags"] = [tuple(flag) for flag in result["flags"]]
            result["examples"] = [Example(**example) for example in result["examples"]]
            return Step(**result, broken=_tensor(file, record, "broken"), points=_tensor(file, record, "points"))

    def candidates(self, name: str, names: Sequence[str], step: int, batch: int) -> Tensor:
        """Returns the candidates (B, channels, H, W) `name`, of the `names` that a step of a batch was saved with."""
        with self._opened(batch, step, names) as (file, record):
            return _tensor(file, record, name)

    def save(self, batch: int, step: int, found: Step) -> None:
        """Writes a step, whole or not at all."""
        pixels = {"broken": found.broken, "points": found.points, **found.candidates}
        tensors = {name: tensor.cpu().contiguous() for name, tensor in pixels.items()}
        result = {name: value for name, value in asdict(found.without_pixels()).items()
                  if name not in ("broken", "points", "candidates")}
        record = {"run": self._run, "batch": batch, "step": step, "names": list(found.correct), "found": result,
                  "tensors": {name: _tensor_digest(tensor) for name, tensor in tensors.items()}}
        with replacing(self._path(batch, step)) as temporary:
            save_file(tensors, temporary, {"step": sealed(record)})

    @contextmanager
    def _opened(self, batch: int, step: int, names: Sequence[str]) -> Iterator[tuple[safe_open, dict[str, Any]]]:
        """Yields a step's file and its record; errors in the block name the file, too."""
        path = self._path(batch, step)
        place = {"run": self._run, "batch": batch, "step": step, "names": list(names)}
        try:
            with safe_open(path, "pt") as file:
                record = unsealed(file.metadata()["step"])
                other = [f"{name} {record[name]} instead of {value}" for name, value in place.items()
                         if record[name] != value]
                if other:
                    raise ValueError(f"it is of another place: {', '.join(other)}")
                yield file, record
        except (SafetensorError, RuntimeError, LookupError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}); remove it, and it is made "
                             "again") from error

    def _path(self, batch: int, step: int) -> Path:
        return self.folder / f"batch{batch:05d}-step{step:02d}.safetensors"


def sealed(record: Any) -> str:
    """Returns a value of JSON's types as a text with its digest, of which `unsealed` refuses any change."""
    return json.dumps({"digest": _digest(json.dumps(record).encode()), "record": record})


def unsealed(text: str) -> Any:
    """Returns the value that `sealed` took; raises a ValueError if a character of the text has changed."""
    try:
        found = json.loads(text)
    except RecursionError as error:
        raise ValueError(str(error)) from error
    if not isinstance(found, dict) or sealed(found.get("record")) != text:
        raise ValueError("its digest is not that of its content")
    return found["record"]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _tensor_digest(tensor: Tensor) -> str:
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
    digest.update(tensor_bytes(tensor))
    return digest.hexdigest()[:16]


def _tensor(file: safe_open, record: dict[str, Any], name: str) -> Tensor:
    tensor = file.get_tensor(name)
    if _tensor_digest(tensor) != record["tensors"][name]:
        raise ValueError(f"{name} is not as it was written")
    return tensor


def check_same_run(subject: str, found: dict[str, Any], run: dict[str, Any]) -> None:
    """Raises a ValueError if `found`, as read from JSON, is not of this `run`; `subject` begins its message."""
    run = json.loads(json.dumps(run))
    different = [f"{name}: {found.get(name)} there, {run.get(name)} now" for name in {**found, **run}
                 if not _same(name, found.get(name), run.get(name))]
    if different:
        raise ValueError(f"{subject} of another run ({'; '.join(different)}). Give what that run had, or another "
                         "folder")


def _same(name: str, one: Any, other: Any) -> bool:
    if name in _MEASURED and isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-3, abs_tol=1e-6)
    return one == other


def remove_progress(folder: Path) -> None:
    """Removes a `ProgressFolder`, of a link only the link; if that is stopped, `remove_unfinished` does the rest."""
    try:
        unsealed((folder / _RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    folder.rename(temporary)
    remove(temporary)
