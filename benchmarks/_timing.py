"""Ratios of two things in one run, which vary less than seconds on a busy machine."""

import statistics
import time
from collections.abc import Callable


def seconds(task: Callable[[], object]) -> float:
    """Returns how long a task takes."""
    start = time.perf_counter()
    task()
    return time.perf_counter() - start


def paired_ratio(task: Callable[[], object], other: Callable[[], object], runs: int) -> float:
    """Returns the median, over paired runs, of the time of `task` over that of `other`; both run once before."""
    task()
    other()
    ratios = []
    for run in range(runs):
        # By turns: the first task has other caches than the second.
        if run % 2:
            mine, others = seconds(task), seconds(other)
        else:
            others, mine = seconds(other), seconds(task)
        ratios.append(mine / others)
    return statistics.median(ratios)
