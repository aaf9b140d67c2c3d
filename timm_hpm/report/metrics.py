"""Verdicts: texts with one character per image, `1` if it is classified correctly, else `0`."""

import math
from collections.abc import Iterable


def attack_of(name: str) -> str:
    """Returns the attack of a row's name such as `"ste/joint"`, or of a round of it, as `"ste/joint-subset#2"`."""
    return name.rpartition("/")[2].partition("#")[0]


def right_in_all(rows: Iterable[str]) -> list[bool]:
    """Returns for each image whether it is right in every row (point-wise worst case)."""
    return [all(verdict == "1" for verdict in verdicts) for verdicts in zip(*rows, strict=True)]


def most_errors_accuracy(rows: Iterable[str], batch_size: int) -> float:
    """Returns the accuracy if each batch is scored by the row with most errors in it."""
    rows = list(rows)
    total = len(rows[0])
    return sum(min(row[first:first + batch_size].count("1") for row in rows)
               for first in range(0, total, batch_size)) / total


def worst_accuracy(rows: Iterable[str]) -> float:
    """Returns the fraction of the images that are right in every row."""
    right = right_in_all(rows)
    return sum(right) / len(right)


def wilson_interval(accuracy: float, num_images: int) -> tuple[float, float]:
    """Returns the 95 % score interval of an accuracy, fractions in [0, 1]; Wilson, JASA 22 (1927)."""
    z = 1.959963984540054
    scale = 1 + z * z / num_images
    centre = (accuracy + z * z / (2 * num_images)) / scale
    half = z * math.sqrt(accuracy * (1 - accuracy) / num_images + (z / (2 * num_images)) ** 2) / scale
    return (max(0.0, centre - half) if accuracy > 0 else 0.0), (min(1.0, centre + half) if accuracy < 1 else 1.0)
