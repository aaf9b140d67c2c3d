"""Patterns for values in JSON's types, from files that may be damaged or a stranger's.

A pattern is a `Rule`; a list of a pattern, for an array of such values; a tuple of one, which null fits, too; or a dict
of patterns, for an object. In a dict `"name?"` may be missing, and `"*"` is for entries of any other name.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

# Larger numbers come from damaged files: no table or plot could show them.
_LARGEST: Final = 1e15


@dataclass(frozen=True)
class Rule:
    """A check of a value, and the expected value in words."""

    holds: Callable[[Any], bool]
    words: str


def matching(pattern: str, words: str) -> Rule:
    """Returns the rule of texts that match a regular expression as a whole."""
    return Rule(lambda value: isinstance(value, str) and re.fullmatch(pattern, value) is not None, words)


def shallow(levels: int) -> Rule:
    """Returns the rule of values that nest at most so many levels deep, and hold no NaN and no infinity."""
    def holds(value: Any, left: int = levels) -> bool:
        if isinstance(value, dict | list):
            return left > 0 and all(holds(part, left - 1) for part in (
                value.values() if isinstance(value, dict) else value))
        return not isinstance(value, float) or math.isfinite(value)

    return Rule(holds, f"at most {levels} levels of finite numbers and texts")


NUMBER: Final = Rule(  # NaN is not
    lambda value: type(value) in (int, float) and -_LARGEST <= value <= _LARGEST, "a number")
POSITIVE: Final = Rule(lambda value: NUMBER.holds(value) and value > 0, "a number above 0")
AMOUNT: Final = Rule(lambda value: NUMBER.holds(value) and value >= 0, "a number of 0 or more")
WHOLE: Final = Rule(lambda value: type(value) is int and abs(value) <= _LARGEST, "a whole number")
COUNT: Final = Rule(lambda value: WHOLE.holds(value) and value > 0, "a whole number above 0")
STRING: Final = Rule(lambda value: isinstance(value, str), "a text")
TEXT: Final = Rule(lambda value: isinstance(value, str) and value != "", "a text that is not empty")
TRUTH: Final = Rule(lambda value: isinstance(value, bool), "true or false")
ANYTHING: Final = Rule(lambda value: True, "a value")


def expect(holds: bool, name: str, value: Any, words: str) -> None:
    """Raises a ValueError that names a value and the expected one, unless it `holds`."""
    if not holds:
        raise ValueError(f"{name or 'it'} is {value!r:.60}, expected {words}")


def check(name: str, value: Any, pattern: Any) -> None:
    """Raises a ValueError that names the first part of a value, itself called `name`, that does not fit a pattern."""
    if isinstance(pattern, Rule):
        expect(pattern.holds(value), name, value, pattern.words)
    elif isinstance(pattern, tuple):
        if value is not None:
            check(name, value, pattern[0])
    elif isinstance(pattern, list):
        expect(isinstance(value, list | tuple), name, value, "an array")
        for i, part in enumerate(value):
            check(f"{name}[{i}]", part, pattern[0])
    else:
        expect(isinstance(value, dict), name, value, "an object")
        patterns = {key.removesuffix("?"): each for key, each in pattern.items()}
        needed = [key for key in pattern if not key.endswith(("?", "*"))]
        expect(value.keys() >= {*needed}, name, value, f"an object with {', '.join(needed)}")
        expect("*" in patterns or value.keys() <= patterns.keys(), name, value, f"nothing but {', '.join(patterns)}")
        for key, part in value.items():
            check(f"{name}.{key}".strip("."), part, patterns.get(key, pattern.get("*")))
