"""Two reports on the same images, compared image by image."""

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from .metrics import right_in_all, wilson_interval, worst_accuracy
from .schema import AttackReport


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
        """`mcnemar_p_value`."""
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
    """Returns two reports on the same images side by side, with paired significance.

    Raises:
        ValueError: if the reports are of different images.
    """
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
