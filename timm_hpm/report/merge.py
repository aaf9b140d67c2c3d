"""`merge_reports`: the worst case over the reports of several seeds of one protocol."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from .examples import NUM_EXAMPLES
from .metrics import right_in_all
from .schema import ASSEMBLED, TRUE_MODEL, AttackReport

# Entries of a protocol that reports of several seeds may differ in: the machine, its rounding, and the user's folders.
_FREE = {"seed", "seeds", "device", "threads", "versions", "attacked_scale", "surrogates_at_once", "options", "model",
         "weights", "neighbours", "neighbours_mixes"}
# Relative difference of the clean margins that another machine's rounding explains; another function has another one.
_ROUNDING = 0.05


def merge_reports(reports: Sequence[AttackReport]) -> AttackReport:
    """Returns one report of the worst case over several reports of one model, images, threat model and protocol.

    The candidate sets of the later reports are named by their seed, such as `"fc/apgd-ce#seed1"`; costs are added.

    Raises:
        ValueError: if there are fewer than two reports, or they differ in more than their seeds.
    """
    if len(reports) < 2:
        raise ValueError(f"{len(reports)} report is given; expected two or more, of different seeds")
    first = reports[0]
    for i, other in enumerate(reports[1:], start=2):
        names = sorted((first.protocol.keys() | other.protocol.keys()) - _FREE)
        different = [f"{name} {first.protocol.get(name)} and {other.protocol.get(name)}" for name in names
                     if not _same(name, first.protocol.get(name), other.protocol.get(name))]
        if different:
            raise ValueError(f"the reports 1 and {i} differ in more than their seeds: {'; '.join(different)}. Merge "
                             "reports of one model, images, threat model and protocol")
    seeds = [seed for report in reports for seed in report.protocol.get("seeds", [report.protocol["seed"]])]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"the reports have the seeds {', '.join(map(str, seeds))}; expected different ones, as the "
                         "same seed gives the same candidates")
    correct = dict(first.correct)
    correct["clean"] = _worst(report.correct["clean"] for report in reports)
    for report in reports[1:]:
        rows = {name: row for name, row in report.correct.items() if name != "clean"}
        if report.assembled:
            rows[f"{TRUE_MODEL}/{ASSEMBLED}"] = report.assembled
        correct |= {name if "#seed" in name else f"{name}#seed{report.protocol['seed']}": row
                    for name, row in rows.items()}
    examples = {example.image: example for report in reversed(reports) for example in report.examples}
    return replace(
        first,
        protocol=first.protocol | {"seeds": seeds},
        correct=correct,
        baseline_correct={name: _worst(report.baseline_correct[name] for report in reports)
                          for name in first.baseline_correct},
        cost={name: {key: sum(report.cost[name][key] for report in reports) for key in row}
              for name, row in first.cost.items()},
        flags=list(dict.fromkeys(flag for report in reports for flag in report.flags)),
        examples=[examples[image] for image in sorted(examples)][:NUM_EXAMPLES],
        neighbours=next((report.neighbours for report in reports if report.neighbours), []),
        date=max(report.date for report in reports),
        convergence=None,
    )


def _same(name: str, one: Any, other: Any) -> bool:
    if name == "clean_margin" and None not in (one, other):
        return math.isclose(one, other, rel_tol=_ROUNDING, abs_tol=_ROUNDING / 10)
    return one == other


def _worst(rows: Iterable[str]) -> str:
    return "".join("1" if right else "0" for right in right_in_all(rows))
