"""`mixed_surrogate_attack`: the Mixed Surrogate Attack (MSA)."""

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from tqdm import tqdm

from ..data import as_pixel_model, check_answers_alike, check_pixels, checked_integer, normal_tensor
from ..files import locked, remove_unfinished
from ..report import AttackReport
from ..threat import ThreatModel
from .checks import restored
from .plan import make_plan
from .protocols import Protocol, find_protocol
from .result import make_report
from .resume import ProgressFolder, Step, check_same_run, remove_progress
from .run import Run
from .subject import Subject

#: The files of a run in its folder, and the folder there that keeps an unfinished run.
REPORT: Final = "report.json"
ADVERSARIAL: Final = "adversarial.safetensors"
PROGRESS: Final = "progress"


# A caller's inference mode would leave no gradients to attack by.
@torch.inference_mode(False)
def mixed_surrogate_attack(
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        threat: ThreatModel | str,
        *,
        protocol: str | Protocol = "standard",
        batch_size: int = 128,
        seed: int = 0,
        folder: str | os.PathLike | None = None,
        save_adversarial: bool = False,
        progress: bool = False,
        accelerator: Accelerator | None = None,
        about: Mapping[str, Any] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
) -> AttackReport:
    """Attacks a classifier through differentiable surrogates; the classifier itself judges every candidate.

    Every surrogate is attacked with every component of AutoAttack; each (surrogate, attack, image) yields a candidate.
    The true model, in its own inference mode, judges the candidates in the same whole batches in which they were
    crafted: images 0 to batch_size − 1, and so on. An image counts as robust only if it is classified correctly clean
    and under every candidate. A classifier without an HPM head is its own only surrogate.

    Square needs no gradient, and the straight-through surrogate computes the true model's own logits: Square on it is
    Square on the true model, reported under both.

    Arguments:
        model: a timm model (normalised by its `pretrained_cfg`, or by `mean` and `std`) or a module of pixels in
            [0, 1]; in eval mode. It is not changed: attacks search a frozen copy
            (`AttackedModel`), and its parameters and buffers are restored if a forward pass changes them. It is judged
            in its own precision and in the caller's autocast.
        images: (N, channels, H, W), pixels in [0, 1].
        labels: (N,), class indices.
        threat: the threat model, or a text such as `"Linf:8/255"`.
        protocol: `"standard"`, `"fast"`, `"autoattack"` or a `Protocol`, such as
            `PROTOCOLS["standard"].changed(attacks=["apgd-ce"])`. Targets are capped at C − 1.
        batch_size: images in a judged batch, at least 1. In the `"batch"` mode the predictions depend on it.
        seed: of the attacks' random numbers; the caller's random state is restored.
        folder: the run's folder. It keeps the results of each attack on each batch, so that a stopped run resumes
            there to the same report, and at last report.json. If that exists already it is returned, and nothing is
            attacked. The folder of another run is refused.
        save_adversarial: writes images, labels, every candidate, the assembled batches and the protocol to
            adversarial.safetensors in the folder, for `rejudge`.
        progress: shows a progress bar on standard error.
        accelerator: of several processes that all make this call: whole batches are dealt out to them, and the report,
            the same on each, does not depend on their number. None means this process only.
        about: further entries of the report's protocol in JSON's types, such as the data set and the weights' origin.
        mean, std: per-channel normalisation of the pixels in [0, 1]; None means the model's own. See `PixelModel`.

    Returns:
        The report, with a verdict for each image and candidate.

    Raises:
        ValueError: if the model, images, labels, threat, protocol, batch size, seed, `about` or the folder are
            malformed, if the model is in train mode, or if the folder is of another run.
        NonFiniteLogitsError: if the logits of a clean image are NaN or infinite; the message names the image. Under
            attack that is an error of the classifier, and the report has the flag `non-finite-logits`.
    """
    batch_size, seed = checked_integer("batch_size", batch_size, 1), checked_integer("seed", seed, 0)
    threat, protocol = ThreatModel.of(threat), find_protocol(protocol).changed()
    about = _in_json({} if about is None else about)
    _check_folder(folder, save_adversarial, accelerator)
    if mean is not None or std is not None:
        model = as_pixel_model(model, mean, std)
    check_answers_alike(model)
    images = check_pixels(images, labels)
    start = time.perf_counter()
    images, labels = normal_tensor(images).detach().float().contiguous(), normal_tensor(labels).detach().long()
    with restored(model):
        subject = Subject.of(model, images, labels, batch_size, seed)
        flags = subject.flags_before(images, labels)
        raised = {flag.name for flag in flags}
        plan = make_plan(protocol, subject.attacked, subject.num_classes, "no-gradient" not in raised)
        described = subject.described(images, labels, raised) | {
            "threat": str(threat), "batch_size": batch_size, "protocol_digest": protocol.digest(),
            **plan.protocol.summary(), "surrogates_at_once": protocol.surrogates_at_once, "seed": seed}
        if folder is not None and (Path(folder) / REPORT).exists():
            return _finished(Path(folder), about | described, accelerator)
        with _progress_folder(folder, described | {"save_adversarial": save_adversarial}, accelerator) as kept:
            run = Run(subject, threat, plan, save_adversarial, kept)
            steps, earlier = _all_steps(run, images, labels, progress, accelerator)
            if save_adversarial and folder is not None and _is_first(accelerator):
                run.save_candidates(Path(folder) / ADVERSARIAL, images, labels, about | described)
        report = make_report(subject, plan, steps, flags, about | described, images, labels)
    report.cost["all"]["seconds"] = time.perf_counter() - start + earlier
    if folder is not None and _is_first(accelerator):
        report.save(Path(folder) / REPORT)
        _tidy(Path(folder), report)
    return report


def _all_steps(run: Run, images: Tensor, labels: Tensor, progress: bool,
               accelerator: Accelerator | None) -> tuple[list[Step], float]:
    """Returns the steps of all batches in order, and the mean seconds of a process that earlier ones had spent."""
    rank, processes = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    size = run.subject.batch_size
    mine = range(rank * size, len(images), processes * size)
    with tqdm(total=len(mine) * run.plan.queries(), disable=not progress or rank > 0, unit="query",
              smoothing=0) as bar:
        batches = [(first, run.attack_batch(first, images[first:first + size], labels[first:first + size], bar))
                   for first in mine]
    earlier = [run.earlier_seconds]
    if accelerator is not None:
        batches = sorted(gather_object(batches), key=lambda batch: batch[0])
        earlier = gather_object(earlier)
    return [step for _, steps in batches for step in steps], sum(earlier) / processes


def _is_first(accelerator: Accelerator | None) -> bool:
    return accelerator is None or accelerator.is_main_process


def _check_folder(folder: str | os.PathLike | None, save_adversarial: bool, accelerator: Accelerator | None) -> None:
    """Raises a ValueError if one of them is of another type, or candidates are to be saved without a folder."""
    for name, value, kind, expected in (("folder", folder, str | os.PathLike, "a path"),
                                        ("accelerator", accelerator, Accelerator, "an Accelerator")):
        if value is not None and not isinstance(value, kind):
            raise ValueError(f"{name} is {value!r}, of the type {type(value).__name__}; expected {expected} or None")
    if not isinstance(save_adversarial, bool):
        raise ValueError(f"save_adversarial is {save_adversarial!r}; expected True or False, and the place as folder")
    if save_adversarial and folder is None:
        raise ValueError("save_adversarial needs a folder to write into")


def _finished(folder: Path, protocol: dict[str, Any], accelerator: Accelerator | None) -> AttackReport:
    """Returns the report of a finished run; raises a ValueError if it is of another run."""
    report = AttackReport.load(folder / REPORT)
    check_same_run(f"{folder / REPORT} is the report", report.protocol, protocol)
    if _is_first(accelerator):
        _tidy(folder, report)
    return report


def _tidy(folder: Path, report: AttackReport) -> None:
    """Removes the progress of a finished run, also if an earlier process was stopped in between."""
    remove_progress(folder / PROGRESS, report.protocol)
    remove_unfinished(folder)


@contextmanager
def _progress_folder(folder: str | os.PathLike | None, run: dict[str, Any],
                     accelerator: Accelerator | None) -> Iterator[ProgressFolder | None]:
    """Yields the folder that keeps the steps of an unfinished run, or None if the run has no folder."""
    if folder is None:
        yield None
        return
    place = Path(folder) / PROGRESS
    with locked(place, shared=accelerator is not None):
        begins = _is_first(accelerator)
        if begins:
            kept = ProgressFolder(place, run)
        if accelerator is not None:
            accelerator.wait_for_everyone()
        yield kept if begins else ProgressFolder(place, run, begins=False)


def _in_json(about: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `about` as JSON gives it back, such as lists in the place of tuples; raises a ValueError if it cannot."""
    if not isinstance(about, Mapping):
        raise ValueError(f"about is a {type(about).__name__}; expected a dictionary")
    for name, value in about.items():
        try:
            if not isinstance(name, str):
                raise TypeError("its name is no text")
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"about[{name!r}] cannot be written as JSON ({error}); expected texts, finite numbers, "
                             "None, and lists or dictionaries of them") from error
    return json.loads(json.dumps(dict(about)))
