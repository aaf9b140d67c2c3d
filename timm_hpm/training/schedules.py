"""Learning rates as functions of the fraction of the training that is done."""

import math
from collections.abc import Callable
from typing import Final


def cosine(done: float, warmup: float = 0.0) -> float:
    """Returns the learning rate over its peak: a linear rise over the fraction `warmup`, then half a cosine to zero.

    `done` is the fraction of all updates that have been made, in [0, 1].
    """
    if done < warmup:
        return done / warmup
    return 0.5 * (1 + math.cos(math.pi * (done - warmup) / max(1 - warmup, 1e-9)))


def one_cycle(done: float, warmup: float) -> float:
    """Returns the learning rate over its peak: a cosine from 1/25 up over the fraction `warmup`, then one to zero.

    `done` is the fraction of all updates that have been made, in [0, 1]. Source: Smith and Topin, arXiv 1708.07120.
    """
    low = 0.04
    if done < warmup:
        return low + (1 - low) * 0.5 * (1 - math.cos(math.pi * done / warmup))
    return cosine(done, warmup)


def constant(done: float, warmup: float) -> float:
    """Returns the learning rate over its peak: a linear rise over the fraction `warmup`, then 1."""
    return min(1.0, done / warmup) if warmup else 1.0


SCHEDULES: Final[dict[str, Callable[[float, float], float]]] = {
    "cosine": cosine, "onecycle": one_cycle, "constant": constant}
