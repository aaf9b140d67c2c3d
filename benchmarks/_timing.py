"""Ratios of two things in one run, which vary less than seconds on a busy machine."""

import statistics
import time
from collections.abc import Callable


def seconds(task: Callable[[], object]) -> float:
    """Returns how long a task takes."""
    start = time.perf_counter()
    task()
    return time.perf_counter() - start


def processor_seconds(task: Callable[[], object]) -> float:
    """Returns how long a task takes of this process's processor, which other work on the machine changes less."""
    start = time.process_time()
    task()
    return time.process_time() - start


def paired_ratio(task: Callable[[], object], other: Callable[[], object], runs: int) -> float:
    """Returns the median ratio of the processor's time, `task` to `other`, over paired runs; both run once before."""
    task()
    other()
    ratios = []
    for run in range(runs):
        # By turns: the first task has other caches than the second.
        if run % 2:
            mine, others = processor_seconds(task), processor_seconds(other)
        else:
            others, mine = processor_seconds(other), processor_seconds(task)
        ratios.append(mine / others)
    return statistics.median(ratios)
