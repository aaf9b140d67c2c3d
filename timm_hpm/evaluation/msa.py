"""`mixed_surrogate_attack`: the Mixed Surrogate Attack (MSA)."""

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any, Final

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from ..console import images_bar
from ..data import check_eval_mode, checked_integer, for_gradients
from ..deadline import OutOfTime
from ..files import locked, remove, remove_unfinished
from ..report import AttackReport
from ..threat import ThreatModel
from .checks import restored
from .plan import make_plan
from .processes import gathered, is_first, rank_of
from .protocols import Protocol, find_protocol
from .result import make_report
from .resume import ProgressFolder, Step, check_same_run, remove_progress
from .run import Run
from .subject import Subject

#: The files of a run in its folder, and the folder there that keeps an unfinished run.
REPORT: Final = "report.json"
ADVERSARIAL: Final = "adversarial.safetensors"
PROGRESS: Final = "progress"
#: The folder there with the report of the batches that a time limit left time for.
PARTIAL: Final = "partial"
#: The entry of such a report's protocol.
STOPPED: Final = "stopped"


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
) -> AttackReport:
    """Attacks a classifier through differentiable surrogates; the classifier itself judges every candidate.

    Each (surrogate, attack, image) yields a candidate. The true model, in its own inference mode, judges the candidates
    in the same whole batches in which they were crafted: images 0 to batch_size − 1, and so on. An image counts as
    robust only if it is classified correctly clean and under every candidate. A classifier without an HPM head is its
    own only surrogate. Square on the surrogate that computes the true model's logits is also reported as on that model.

    Arguments:
        model: a timm model, normalised by its `pretrained_cfg`, a `PixelModel` or another module of pixels in [0, 1];
            in eval mode. It is judged in its own precision and in the caller's autocast. Attacks search a frozen copy,
            and the model's parameters and buffers are restored if a forward pass changes them.
        images: (N, channels, H, W), pixels in [0, 1].
        labels: (N,), class indices.
        threat: the threat model, or a text such as `"Linf:8/255"`.
        protocol: a name in `PROTOCOLS`, or a `Protocol` such as `PROTOCOLS["standard"].changed(attacks=["apgd-ce"])`.
            Targets are capped at C − 1.
        batch_size: images in a judged batch, at least 1. In the `"batch"` mode the predictions depend on it.
        seed: of the attacks' random numbers; the caller's random state is restored.
        folder: the run's folder. It keeps the results of each attack on each batch, so that a stopped run resumes to
            the same report, and at last report.json. If that exists, it is returned and nothing is attacked. If a
            `time_limit` is over before the last batch, `partial/` there has the report of the batches before.
        save_adversarial: writes images, labels, every candidate, the assembled batches and the protocol to
            adversarial.safetensors in the folder, for `rejudge`.
        progress: shows a progress bar on standard error.
        accelerator: of several processes that all make this call: whole batches are dealt out to them, and the report,
            the same on each, does not depend on their number. None means this process only.
        about: further entries of the report's protocol in JSON's types, such as the data set and the weights' origin.

    Returns:
        The report, with a verdict for each image and candidate.

    Raises:
        ValueError: if an argument is malformed, the model is in train mode, or the folder is of another run.
        OutOfTime: if a `time_limit` is over before the first batch is finished; the folder keeps the finished attacks.
        NonFiniteLogitsError: if the logits of a clean image are NaN or infinite; the message names the image. Under
            attack that is an error of the classifier, and the report has the flag `non-finite-logits`.
    """
    batch_size, seed = checked_integer("batch_size", batch_size, 1), checked_integer("seed", seed, 0)
    threat, protocol = ThreatModel.of(threat), find_protocol(protocol).changed()
    about = _in_json(about)
    if save_adversarial and folder is None:
        raise ValueError("save_adversarial needs a folder to write into")
    check_eval_mode(model)
    start = time.perf_counter()
    images, labels = for_gradients(images, labels)
    with restored(model):
        subject = Subject(model, images, labels, batch_size, seed)
        protocol = protocol.for_classifier(plain=subject.attacked.is_plain())
        shown = progress and is_first(accelerator)
        with images_bar(model, "checks before the attacks", shown):
            flags = subject.flags_before(images, labels)
        raised = {flag.name for flag in flags}
        plan = make_plan(protocol, subject.attacked, subject.num_classes, raised)
        described = subject.described(images, labels, raised) | {
            "threat": str(threat), "batch_size": batch_size, "protocol_digest": protocol.digest(),
            **plan.protocol.summary(), "surrogates_at_once": protocol.surrogates_at_once, "seed": seed}
        if folder is not None and (Path(folder) / REPORT).exists():
            report = AttackReport.load(Path(folder) / REPORT)
            check_same_run(f"{Path(folder) / REPORT} is the report", report.protocol, about | described)
            if save_adversarial and not (Path(folder) / ADVERSARIAL).exists():
                raise ValueError(f"the run in {folder} is finished and has kept no {ADVERSARIAL}; leave out "
                                 "save_adversarial, or attack again in another folder")
            _tidy(folder, accelerator)
            return report
        run = Run(subject, threat, plan, images, labels, save_adversarial)
        with images_bar(model, "clean images", shown):  # so that a NaN in the last image stops the run at once
            run.judge_clean(_own_batches(run, accelerator))
        with _progress_folder(folder, described | {"save_adversarial": save_adversarial}, accelerator) as run.folder:
            steps, done, earlier = _all_steps(run, progress, accelerator)
            if not done:
                raise OutOfTime(f"by a time limit, before the first {min(batch_size, len(images))} of {len(images)} "
                                f"images were attacked in full; {folder} keeps the attacks that are done")
            if done < len(images):
                about = about | {STOPPED: f"by a time limit, after {done} of {len(images)} images"}
                images, labels = images[:done], labels[:done]
                described |= subject.described(images, labels, raised)
            elif save_adversarial and folder is not None and is_first(accelerator):
                run.save_candidates(Path(folder) / ADVERSARIAL, about | described)
        with images_bar(model, "checks after the attacks", shown):
            report = make_report(subject, steps, flags, about | described, images, labels)
    report.cost["all"]["seconds"] = time.perf_counter() - start + earlier
    if folder is not None:
        if is_first(accelerator):
            report.save(Path(folder) / (PARTIAL if STOPPED in about else "") / REPORT)
        if STOPPED not in about:
            _tidy(folder, accelerator)
    return report


def _all_steps(run: Run, progress: bool, accelerator: Accelerator | None) -> tuple[list[Step], int, float]:
    """Returns the steps of the batches before the first one that a `time_limit` cut, in order.

    With the number of their images, and the mean seconds of a process before this run.
    """
    size, mine = run.subject.batch_size, _own_batches(run, accelerator)
    with tqdm(total=len(mine) * run.plan.all_queries(), disable=not (progress and is_first(accelerator)), unit="query",
              smoothing=0) as bar:
        batches: list[tuple[int, list[Step]]] = []
        for first in mine:
            found = run.attack_batch(first, bar)
            if found is None:
                break
            batches.append((first, found))
    batches = sorted(gathered(accelerator, batches), key=lambda batch: batch[0])
    earlier = gathered(accelerator, [run.earlier_seconds])
    whole = [steps for number, (first, steps) in enumerate(batches) if first == number * size]
    return list(chain.from_iterable(whole)), min(len(whole) * size, len(run.images)), sum(earlier) / len(earlier)


def _own_batches(run: Run, accelerator: Accelerator | None) -> range:
    """Returns the first images of this process's batches."""
    rank, processes = rank_of(accelerator)
    return range(rank * run.subject.batch_size, len(run.images), processes * run.subject.batch_size)


def _tidy(folder: str | os.PathLike, accelerator: Accelerator | None) -> None:
    """Removes the progress of a finished run, also if an earlier process was stopped in between."""
    if is_first(accelerator):
        remove_progress(Path(folder) / PROGRESS)
        remove(Path(folder) / PARTIAL)
        remove_unfinished(folder)


@contextmanager
def _progress_folder(folder: str | os.PathLike | None, run: dict[str, Any],
                     accelerator: Accelerator | None) -> Iterator[ProgressFolder | None]:
    """Yields the folder that keeps the steps of an unfinished run, or None if the run has no folder."""
    if folder is None:
        yield None
        return
    with locked(Path(folder) / PROGRESS, shared=accelerator is not None):
        with nullcontext() if accelerator is None else accelerator.main_process_first():
            kept = ProgressFolder(Path(folder) / PROGRESS, run, begins=is_first(accelerator))
        yield kept


def _in_json(about: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns `about` as JSON gives it back, such as lists in the place of tuples; raises a ValueError if it cannot."""
    try:
        return json.loads(json.dumps(dict(about or {}), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"about cannot be written as JSON ({error}); expected a dictionary of texts, finite numbers, "
                         "None, and lists or dictionaries of them") from error
