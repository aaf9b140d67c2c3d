"""`make_report`: the report of a run, from its steps."""

from collections.abc import Iterable
from datetime import datetime, timezone
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ..report import ASSEMBLED, TRUE_MODEL, AttackReport, Flag
from ..report.metrics import attack_of
from ..threat import ThreatModel
from .checks import clean_flags
from .plan import Plan
from .resume import Step, no_cost
from .run import first_examples
from .subject import Subject
from .table import ATTACKS


def make_report(subject: Subject, plan: Plan, steps: list[Step], flags: list[Flag], protocol: dict[str, Any],
                images: Tensor, labels: Tensor) -> AttackReport:
    """Returns the report of the steps of all batches, after the checks that follow the attacks.

    Arguments:
        subject: the model.
        plan: the attacks on a batch.
        steps: the steps of all batches, in order.
        flags: the flags of the checks before the attacks.
        protocol: the report's protocol.
        images: (N, channels, H, W), pixels in [0, 1].
        labels: (N,), class indices.
    """
    judged = _joined(step.correct for step in steps)
    correct = _in_order(judged, plan.surrogates)
    if subject.attacked.head is not None:
        # Without gradients an attack on the exact surrogate is one on the true model.
        exact = subject.attacked.exact_surrogate()
        correct |= {f"{TRUE_MODEL}/{attack}": correct[f"{exact}/{attack}"] for attack in plan.protocol.attacks
                    if not ATTACKS[attack].needs_gradient and f"{exact}/{attack}" in correct}
    classes = torch.tensor(list(chain.from_iterable(step.answers for step in steps)))
    flags = [*clean_flags(classes, labels.cpu(), subject.num_classes), *flags, *_noted_flags(steps),
             *_not_finite_flags(steps)]
    flags += subject.flags_after(images, labels, ThreatModel.of(protocol["threat"]), correct,
                                 plan.protocol.survivors_only, {flag.name for flag in flags})
    return AttackReport(
        protocol=protocol,
        correct=correct,
        assembled=judged.get(ASSEMBLED, ""),
        baseline_correct=_in_order(_joined(step.baseline_correct for step in steps), plan.surrogates),
        cost=_total_cost(steps, subject.cost),
        flags=flags,
        examples=first_examples(chain.from_iterable(step.examples for step in steps)),
        date=f"{datetime.now(timezone.utc):%Y-%m-%d}",
    )


def _joined(parts: Iterable[dict[str, str]]) -> dict[str, str]:
    """Returns the verdicts of all batches, given in order, name by name."""
    rows: dict[str, str] = {}
    for part in parts:
        for name, row in part.items():
            rows[name] = rows.get(name, "") + row
    return rows


def _noted_flags(steps: Iterable[Step]) -> list[Flag]:
    """Returns a flag for each thing that attacks warned of, over all batches."""
    counts: dict[tuple[str, str], list[int]] = {}
    for step in steps:
        for name, text, affected, total in step.noted:
            count = counts.setdefault((name, text), [0, 0])
            count[0] += affected
            count[1] += total
    return [Flag(name, text.format(*count)) for (name, text), count in counts.items() if count[0]]


def _not_finite_flags(steps: Iterable[Step]) -> list[Flag]:
    """Returns a flag for each place at which logits were not finite, over all batches."""
    images: dict[str, list[int]] = {}
    for step in steps:
        for where, some in step.not_finite.items():
            images.setdefault(where, []).extend(some)
    return [Flag("non-finite-logits", f"{where} logits are not finite for {len(some)} images, the first image "
                                      f"{min(some)}") for where, some in images.items()]


def _in_order(verdicts: dict[str, str], surrogates: tuple[str, ...]) -> dict[str, str]:
    """Returns the verdicts by surrogate and attack in the order of the tables, the clean ones first."""
    columns = list(ATTACKS)

    def place(name: str) -> tuple[int, int, int]:
        surrogate, _, attack = name.partition("/")
        return ((*surrogates, TRUE_MODEL).index(surrogate), columns.index(attack_of(name)),
                int(attack.partition("#")[2] or 0))

    return {name: verdicts[name] for name in ["clean", *sorted((name for name in verdicts if "/" in name), key=place)]
            if name in verdicts}


def _total_cost(steps: list[Step], checks: dict[str, float]) -> dict[str, dict[str, float]]:
    """Returns seconds and passes of each attack, and of all with the checks and the judges' passes."""
    cost: dict[str, dict[str, float]] = {}
    total = dict(checks)
    for step in steps:
        for key, value in step.cost.items():
            if step.attack not in ("clean", ASSEMBLED):
                row = cost.setdefault(attack_of(step.attack), no_cost())
                row[key] += value
            total[key] += value
        total["forward_passes"] += sum(map(len, [*step.correct.values(), *step.baseline_correct.values()]))
    return cost | {"all": total}
