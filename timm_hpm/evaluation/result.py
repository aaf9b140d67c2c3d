"""`make_report`: the report of a run, from its steps."""

from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from itertools import chain
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ..report import ASSEMBLED, TRUE_MODEL, AttackReport, Convergence, Flag
from ..report.metrics import attack_of, right_in_all
from ..threat import ThreatModel
from .checks import clean_flags
from .resume import Step, no_cost
from .run import first_examples
from .subject import Subject
from .table import ATTACKS


def make_report(subject: Subject, steps: list[Step], flags: list[Flag], protocol: dict[str, Any], images: Tensor,
                labels: Tensor) -> AttackReport:
    """Returns the report of the steps of all batches, in order; `flags` are those of the checks before the attacks."""
    correct = _joined(step.correct for step in steps)
    assembled = correct.pop(ASSEMBLED, "")
    if subject.attacked.head is not None:
        # Without gradients an attack on the exact surrogate is one on the true model.
        exact = f"{subject.attacked.exact_surrogate()}/"
        correct |= {name.replace(exact, f"{TRUE_MODEL}/", 1): row for name, row in correct.items()
                    if name.startswith(exact) and not ATTACKS[attack_of(name)].needs_gradient}
    classes = torch.tensor(list(chain.from_iterable(step.predicted for step in steps)))
    flags = [*clean_flags(classes, labels.cpu(), subject.num_classes), *flags, *_step_flags(steps)]
    flags += subject.flags_after(images, labels, ThreatModel.of(protocol["threat"]), correct,
                                 {flag.name for flag in flags})
    return AttackReport(
        protocol=protocol,
        correct=correct,
        assembled=assembled,
        baseline_correct=_joined(step.baseline_correct for step in steps),
        cost=_total_cost(steps, subject),
        flags=flags,
        examples=first_examples(chain.from_iterable(step.examples for step in steps)),
        date=f"{datetime.now(timezone.utc):%Y-%m-%d}",
        convergence=measured_convergence(steps),
    )


def _joined(parts: Iterable[dict[str, str]]) -> dict[str, str]:
    rows: dict[str, str] = {}
    for part in parts:
        for name, row in part.items():
            rows[name] = rows.get(name, "") + row
    return rows


def _step_flags(steps: Iterable[Step]) -> list[Flag]:
    """Returns the flags of attacks and verdicts, each with its numbers over all batches."""
    counts: dict[tuple[str, str], list[int]] = {}
    images: dict[str, list[int]] = {}
    for step in steps:
        for name, text, affected, total in step.flags:
            count = counts.setdefault((name, text), [0, 0])
            count[0] += affected
            count[1] += total
        for place, some in step.not_finite.items():
            images.setdefault(place, []).extend(some)
    return [Flag(name, text.format(*count)) for (name, text), count in counts.items() if count[0]] + [
        Flag("non-finite-logits", f"{place} logits are not finite for {len(some)} images, the first image {min(some)}")
        for place, some in images.items()]


def _total_cost(steps: list[Step], subject: Subject) -> dict[str, dict[str, float]]:
    """Returns seconds and passes of each attack, and of all with the checks and the judges' passes."""
    cost: dict[str, dict[str, float]] = {}
    total = dict(subject.cost)
    for step in steps:
        for key, value in step.cost.items():
            if step.attack not in ("clean", ASSEMBLED):
                cost.setdefault(attack_of(step.attack), no_cost())[key] += value
            total[key] += value
        judged = sum(map(len, [*step.correct.values(), *step.baseline_correct.values()]))
        total["forward_passes"] += subject.draws * judged
    return cost | {"all": total}


def measured_convergence(steps: Sequence[Step]) -> Convergence:
    fell_after: list[float | None] = []
    margins: list[float] = []
    clean: list[float] = []
    spent = {True: 0.0, False: 0.0}  # by whether an image of the batch is left
    starts = [i for i, step in enumerate(steps) if step.attack == "clean"]
    for start, end in zip(starts, [*starts[1:], len(steps)], strict=True):
        batch = steps[start:end]
        passes = 0.0
        clean += [margin for margin in batch[0].margins if margin > 0]
        fallen: list[float | None] = [None] * len(batch[0].margins)
        for step in batch:
            passes += (step.cost["forward_passes"] + step.cost["backward_passes"]) / max(step.attacked, 1)
            right = right_in_all(step.correct.values())
            fallen = [passes if before is None and not held else before
                      for before, held in zip(fallen, right, strict=True)]
        fell_after += fallen
        margins += [float(f"{min(row):.6g}") for row in zip(*(step.margins for step in batch), strict=True)]
        spent[None in fallen] = max(spent[None in fallen], passes)
    return Convergence(fell_after, spent[True] or spent[False], margins, median(clean) if clean else None)
