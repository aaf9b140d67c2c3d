"""Verdicts: texts with a character an image, `1` where it is classified correctly and `0` where not."""

import math
from collections.abc import Iterable


def attack_of(name: str) -> str:
    """Returns the attack of a row's name such as `"ste/joint"`, or of a round of it, as `"ste/joint-rest#2"`."""
    return name.rpartition("/")[2].partition("#")[0]


def right_in_all(rows: Iterable[str]) -> list[bool]:
    """Returns for each image whether it is right in every row (point-wise worst case).

    Raises:
        ValueError: rows of different lengths.
    """
    return [all(verdict == "1" for verdict in verdicts) for verdicts in zip(*rows, strict=True)]


def worst_accuracy(rows: Iterable[str]) -> float:
    """Returns the fraction of the images that are right in every row."""
    right = right_in_all(rows)
    return sum(right) / len(right)


def standard_error(accuracy: float, num_images: int) -> float:
    """Returns the standard error of an accuracy, by the binomial distribution."""
    return math.sqrt(accuracy * (1 - accuracy) / num_images)
