"""Time limits: their texts, and the block in which an evaluation heeds one."""

import math
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final

_SECONDS: Final = {"d": 86_400, "h": 3_600, "m": 60, "s": 1}
_END: Final[ContextVar[float]] = ContextVar("end", default=math.inf)


class OutOfTime(Exception):
    """A time limit ended a run before its first batch was finished; the run's folder keeps the finished attacks."""


def parse_time(text: str) -> float:
    """Returns the seconds of a text such as `"30m"`, `"2h30m"`, `"1.5h"` or `"90s"`."""
    parts = re.findall(r"(\d+(?:\.\d+)?)([dhms])", text)
    seconds = sum(float(number) * _SECONDS[unit] for number, unit in parts)
    if "".join(number + unit for number, unit in parts) != text or not 0 < seconds < 1e9:
        raise ValueError(f"cannot read the time {text!r:.50}; expected such as 30m, 2h30m or 90s")
    return seconds


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Makes an evaluation in this block stop after so many seconds, at the end of an attack on a batch; None never.

    Each process finishes at least one attack, so that a run that is resumed comes to an end. Without a folder, which
    keeps finished attacks, a run finishes its first batch.
    """
    token = _END.set(math.inf if seconds is None else time.monotonic() + seconds)
    try:
        yield
    finally:
        _END.reset(token)


def is_over() -> bool:
    """Returns whether the time of the innermost `time_limit` block is over."""
    return time.monotonic() > _END.get()
