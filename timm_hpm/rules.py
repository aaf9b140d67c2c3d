"""Rules for values in JSON's types, from files that may be damaged or a stranger's."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

# Larger numbers come from damaged files: no table or plot could show them.
_LARGEST: Final = 1e15


class Rule(NamedTuple):
    """A check of a value, and the expected value in words."""

    holds: Callable[[Any], bool]
    words: str


def matching(pattern: str, words: str) -> Rule:
    """Returns the rule of texts that match a regular expression as a whole."""
    return Rule(lambda value: isinstance(value, str) and re.fullmatch(pattern, value) is not None, words)


def or_none(rule: Rule) -> Rule:
    """Returns a rule that null follows, too."""
    return Rule(lambda value: value is None or rule.holds(value), f"{rule.words}, or null")


def array(rule: Rule, length: int | None = None) -> Rule:
    """Returns the rule of arrays, perhaps of one length, whose entries follow a rule."""
    number = "" if length is None else f"{length} "
    return Rule(lambda value: isinstance(value, list | tuple) and length in (None, len(value))
                and all(map(rule.holds, value)), f"an array, with {number}entries that are {rule.words}")


def object_of(rule: Rule) -> Rule:
    """Returns the rule of objects whose values follow a rule."""
    return Rule(lambda value: isinstance(value, dict) and all(map(rule.holds, value.values())),
                f"an object, with entries that are {rule.words}")


NUMBER: Final = Rule(  # NaN is not
    lambda value: type(value) in (int, float) and -_LARGEST <= value <= _LARGEST, "a number")
POSITIVE: Final = Rule(lambda value: NUMBER.holds(value) and value > 0, "a number above 0")
AMOUNT: Final = Rule(lambda value: NUMBER.holds(value) and value >= 0, "a number of 0 or more")
WHOLE: Final = Rule(lambda value: type(value) is int and abs(value) <= _LARGEST, "a whole number")
COUNT: Final = Rule(lambda value: WHOLE.holds(value) and value > 0, "a whole number above 0")
STRING: Final = Rule(lambda value: isinstance(value, str), "a text")
TEXT: Final = Rule(lambda value: isinstance(value, str) and value != "", "a text")
TRUTH: Final = Rule(lambda value: isinstance(value, bool), "true or false")
OBJECT: Final = Rule(lambda value: isinstance(value, dict), "an object")
ARRAY: Final = Rule(lambda value: isinstance(value, list | tuple), "an array")


def expect(holds: bool, name: str, value: Any, words: str) -> None:
    """Raises a ValueError that names a value and the expected one, unless it `holds`."""
    if not holds:
        raise ValueError(f"{name} is {value!r:.60}, expected {words}")


def check_entries(whose: str, entries: Mapping[str, Any], rules: Mapping[str, Rule]) -> None:
    """Raises a ValueError for the first of the `rules` whose entry is missing or of another kind."""
    for name, rule in rules.items():
        expect(name in entries, f"{whose}{name}", None, f"{rule.words}; it is missing")
        expect(rule.holds(entries[name]), f"{whose}{name}", entries[name], rule.words)


def is_shallow(value: Any, levels: int) -> bool:
    """Returns whether a value nests at most so many levels deep, and holds no NaN and no infinity."""
    if isinstance(value, dict | list):
        return levels > 0 and all(
            is_shallow(part, levels - 1) for part in (value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or math.isfinite(value)
