"""Several reports on the same images: two compared image by image, and those of several seeds merged."""

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .examples import NUM_EXAMPLES
from .metrics import right_in_all, wilson_interval, worst_accuracy
from .schema import ASSEMBLED, TRUE_MODEL, AttackReport

# Entries of a protocol that reports of several seeds may differ in: the machine, its rounding, and the user's folders.
_FREE = {"seed", "seeds", "device", "threads", "versions", "attacked_scale", "surrogates_at_once", "options", "model",
         "weights", "neighbours", "neighbours_mixes"}
# Relative difference of the clean margins that another machine's rounding explains; another function has another one.
_ROUNDING = 0.05


@dataclass(frozen=True)
class PairedRow:
    """One accuracy of two reports, a and b, on the same images."""

    name: str
    num_images: int
    a: float  # a fraction in [0, 1]
    b: float
    only_a: int  # number of images that are right in this report only
    only_b: int

    @property
    def difference(self) -> float:
        """Accuracy of b minus that of a."""
        return (self.only_b - self.only_a) / self.num_images

    @property
    def difference_interval(self) -> tuple[float, float]:
        """The 95 % interval of `difference`, of the Wilson intervals of a and b; wide also if no image differs.

        Source: Newcombe, Statistics in Medicine 17 (1998), method 10 for paired proportions.
        """
        n, (low_a, high_a), (low_b, high_b) = (
            self.num_images, wilson_interval(self.a, self.num_images), wilson_interval(self.b, self.num_images))
        both = round(self.a * n) - self.only_a
        neither = n - both - self.only_a - self.only_b
        margins = (both + self.only_a) * (self.only_b + neither) * (both + self.only_b) * (self.only_a + neither)
        product = both * neither - self.only_a * self.only_b
        phi = (max(product - n / 2, 0) if product > 0 else product) / math.sqrt(margins) if margins else 0.0

        def reach(one: float, other: float) -> float:
            return math.sqrt(one ** 2 - 2 * phi * one * other + other ** 2)

        return (self.difference - reach(high_a - self.a, self.b - low_b),
                self.difference + reach(self.a - low_a, high_b - self.b))

    @property
    def p_value(self) -> float:
        """Two-sided p-value of McNemar's exact test, `mcnemar_p_value`."""
        return mcnemar_p_value(self.only_a, self.only_b)


@dataclass(frozen=True)
class Comparison:
    """The paired accuracies of two reports, and the differences of their protocols."""

    rows: list[PairedRow]  # clean accuracy, robust accuracy and, if both reports have it, that of the FC classifier
    differing: dict[str, tuple[Any, Any]]  # by name, in a and in b; None if it is missing
    unreliable: list[str]  # "a", "b" or both: their flags make them unreliable


def mcnemar_p_value(only_a: int, only_b: int) -> float:
    """Returns the two-sided p-value of McNemar's exact test, 1 if no image differs; Psychometrika 12 (1947)."""
    total, term, tail = only_a + only_b, 1, 0
    for k in range(min(only_a, only_b) + 1):
        tail += term
        term = term * (total - k) // (k + 1)
    return min(1.0, 2 * tail / 2 ** total)


def compare(a: AttackReport, b: AttackReport) -> Comparison:
    """Returns two reports side by side, with paired significance; raises a ValueError if their images differ."""
    if a.protocol["data_digest"] != b.protocol["data_digest"]:
        images = (f"{report.num_images} images of {report.protocol.get('dataset', 'an unnamed data set')} "
                  f"(data_digest {report.protocol['data_digest']})" for report in (a, b))
        raise ValueError("the reports are of different images or labels, which cannot be paired: "
                         f"{' and '.join(images)}. Evaluate both on the same images in the same order")
    rows = [paired("clean", [a.correct["clean"]], [b.correct["clean"]]),
            paired("robust, worst case", a.verdicts.values(), b.verdicts.values())]
    if a.baseline_correct and b.baseline_correct:
        rows.append(paired("FC classifier, worst case", a.baseline_correct.values(), b.baseline_correct.values()))
    pairs = {name: (a.protocol.get(name), b.protocol.get(name)) for name in {**a.protocol, **b.protocol}}
    return Comparison(rows, {name: pair for name, pair in pairs.items() if pair[0] != pair[1]},
                      [name for name, report in (("a", a), ("b", b)) if report.unreliable])


def paired(name: str, a: Collection[str], b: Collection[str]) -> PairedRow:
    """Returns the row of two sets of verdicts, `metrics.right_in_all`, on the same images."""
    pairs = list(zip(right_in_all(a), right_in_all(b), strict=True))
    return PairedRow(name, len(pairs), worst_accuracy(a), worst_accuracy(b), pairs.count((True, False)),
                     pairs.count((False, True)))


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
