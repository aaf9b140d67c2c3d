"""Strict checks of a report from a file: a report that loads can be shown, compared and published."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from ..head import INFERENCE_MODES
from ..threat import ThreatModel

# Larger numbers and deeper values come from damaged files: no table or plot could show them.
_LARGEST: Final = 1e15
_DEEPEST: Final = 8


class Rule(NamedTuple):
    """A check of a value in JSON's types, and the expected value in words."""

    holds: Callable[[Any], bool]
    words: str


def _matching(pattern: str, words: str) -> Rule:
    return Rule(lambda value: isinstance(value, str) and re.fullmatch(pattern, value) is not None, words)


def _or_none(rule: Rule) -> Rule:
    return Rule(lambda value: value is None or rule.holds(value), f"{rule.words}, or null")


def _array(rule: Rule) -> Rule:
    return Rule(lambda value: isinstance(value, list) and all(map(rule.holds, value)),
                f"an array, with entries that are {rule.words}")


def _object(rule: Rule) -> Rule:
    return Rule(lambda value: isinstance(value, dict) and all(map(rule.holds, value.values())),
                f"an object, with entries that are {rule.words}")


def _is_threat(value: Any) -> bool:
    try:
        return bool(ThreatModel.parse(value))
    except (ValueError, AttributeError):
        return False


_NUMBER: Final = Rule(  # NaN is not
    lambda value: type(value) in (int, float) and -_LARGEST <= value <= _LARGEST, "a number")
_AMOUNT: Final = Rule(lambda value: _NUMBER.holds(value) and value >= 0, "a number of 0 or more")
_WHOLE: Final = Rule(lambda value: type(value) is int and abs(value) <= _LARGEST, "a whole number")
_COUNT: Final = Rule(lambda value: _WHOLE.holds(value) and value > 0, "a whole number above 0")
_STRING: Final = Rule(lambda value: isinstance(value, str), "a text")
_TEXT: Final = Rule(lambda value: isinstance(value, str) and value != "", "a text")
_TRUTH: Final = Rule(lambda value: isinstance(value, bool), "true or false")
_ANY_OBJECT: Final = Rule(lambda value: isinstance(value, dict), "an object")
_ANY_ARRAY: Final = Rule(lambda value: isinstance(value, list), "an array")
_DIGEST: Final = _matching("[0-9a-f]{16}", "16 hexadecimal digits")
_DATE: Final = _matching(r"(\d{4}-\d\d-\d\d)?", "a day such as 2026-11-28, or nothing")
_PICTURE: Final = _matching("[A-Za-z0-9+/]+=*", "a picture in base64")
_BUDGET: Final = Rule(
    lambda value: _object(_COUNT).holds(value) and "iterations" in value
    and set(value) <= {"iterations", "targets", "restarts"}, "budgets of iterations, targets and restarts above 0")
_NORMALISATION: Final = Rule(
    lambda value: isinstance(value, dict) and isinstance(value.get("source", ""), str)
    and all(_array(_NUMBER).holds(value.get(name)) for name in ("mean", "std")),
    "an object with mean and std, arrays of numbers")

# Entries of the protocol that `mixed_surrogate_attack` always writes.
_PROTOCOL: Final = {
    "architecture": _TEXT,
    "weights_digest": _DIGEST,
    "data_digest": _DIGEST,
    "threat": Rule(_is_threat, "a threat model such as 'Linf:8/255'"),
    "num_images": _COUNT,
    "num_classes": _COUNT,
    "batch_size": _COUNT,
    "inference": Rule(lambda value: value in (*INFERENCE_MODES, "none"), f"one of {', '.join(INFERENCE_MODES)}, none"),
    "mix": _or_none(_NUMBER),
    "prototypes_fitted": _or_none(_TRUTH),
    "surrogates": _array(_TEXT),
    "attacks": _object(_BUDGET),
    "seed": _WHOLE,
    "device": _TEXT,
    "versions": _object(_TEXT),
}
# Entries that it or evaluate.py may add.
_OPTIONAL: Final = dict.fromkeys(
    ("model", "weights", "dataset", "split", "class_subset", "precision", "protocol", "protocol_digest"), _TEXT) | {
    "normalisation": _or_none(_NORMALISATION),
    "clean_margin": _or_none(_NUMBER),
    "attacked_scale": _or_none(_NUMBER),
    "full_grid": _TRUTH,
    "eot": _COUNT,
    "surrogates_at_once": _COUNT,
    "neighbours": _or_none(_array(_COUNT)),
    "neighbours_mixes": _or_none(_array(_NUMBER)),
    "class_names": _or_none(_array(_STRING)),
    "options": _or_none(_ANY_OBJECT),
}
_CONVERGENCE: Final = {
    "fell_after": _array(_or_none(_AMOUNT)), "spent": _AMOUNT, "margins": _array(_AMOUNT),
    "clean_margin": _or_none(_AMOUNT),
}
_COST: Final = dict.fromkeys(("seconds", "forward_passes", "backward_passes"), _AMOUNT)
# Rows of the fields that are arrays.
_ROWS: Final = {
    "flags": {"name": _TEXT, "text": _STRING},
    "examples": {"image": _AMOUNT, "label": _AMOUNT, "predicted": _WHOLE, "found_by": _TEXT, "amplification": _AMOUNT,
                 "clean": _PICTURE, "perturbation": _PICTURE, "adversarial": _PICTURE},
    "neighbours": {"batch_size": _COUNT, "mix": _NUMBER, "kind": _TEXT, "targets": _COUNT, "flipped": _AMOUNT},
}


def check_report(values: Mapping[str, Any], computed: Mapping[str, Any]) -> None:
    """Checks the fields of a report from a file, in JSON's types; `computed` are further entries of the file."""
    objects = dict.fromkeys(("protocol", "correct", "baseline_correct", "cost"), _ANY_OBJECT)
    for name, rule in (objects | dict.fromkeys(_ROWS, _ANY_ARRAY)).items():
        _expect(rule.holds(values[name]), name, values[name], rule.words)
    _expect(_DATE.holds(values.get("date", "")), "date", values.get("date"), _DATE.words)
    correct, total = values["correct"], _check_verdicts(values)
    protocol = values["protocol"]
    _check_entries("the protocol's", protocol,
                   _PROTOCOL | {name: rule for name, rule in _OPTIONAL.items() if name in protocol})
    _expect(protocol["num_images"] == total, "the protocol's num_images", protocol["num_images"],
            f"{total}, the number of verdicts in a row")
    for name, value in protocol.items():
        _expect(_is_shallow(value, _DEEPEST), f"the protocol's {name}", value, f"at most {_DEEPEST} levels")
    rows = [(f"the cost of {name}", row, _COST) for name, row in values["cost"].items()]
    rows += [(f"row {i} of {name}", row, rules) for name, rules in _ROWS.items() for i, row in enumerate(values[name])]
    convergence: Any = values.get("convergence")
    if convergence is not None:
        rows.append(("the convergence", convergence, _CONVERGENCE))
    for name, row, rules in rows:
        _expect(isinstance(row, dict), name, row, f"an object with {', '.join(rules)}")
        _check_entries(f"{name}: its", row, rules)
        unknown = sorted(row.keys() - rules.keys())
        _expect(not unknown, f"{name}: its other entries", unknown, f"only {', '.join(rules)}")
    for name in ("fell_after", "margins") if convergence is not None else ():
        _expect(len(convergence[name]) == total, f"the convergence: its {name}", convergence[name],
                f"{total} entries, one for each image")
    _expect(all(example["image"] < total for example in values["examples"]), "examples",
            [example["image"] for example in values["examples"]], f"images below {total}")
    for name, right in (("num_images", total), ("clean_accuracy", correct["clean"].count("1") / total)):
        _expect(computed.get(name, right) == right, name, computed.get(name), f"{right}, by its verdicts")


def _check_verdicts(values: Mapping[str, Any]) -> int:
    """Checks the verdicts; returns the number of images."""
    correct, baseline, assembled = values["correct"], values["baseline_correct"], values["assembled"]
    _expect("clean" in correct, "correct", list(correct), "the row clean among its rows")
    _expect("clean" in baseline or not baseline, "baseline_correct", list(baseline), "the row clean among its rows")
    for name, row in [*correct.items(), *baseline.items(), *([("assembled", assembled)] if assembled != "" else [])]:
        _expect(isinstance(row, str) and 0 < len(row) == len(correct["clean"]) and set(row) <= {"0", "1"},
                f"the row {name} ({len(str(row))} characters)", row, "a text with a 0 or 1 for each image")
        _expect(name in ("clean", "assembled") or all(name.partition("/")), "the name of a row", name,
                "clean or <surrogate>/<attack>")
    return len(correct["clean"])


def _check_entries(whose: str, entries: Mapping[str, Any], rules: Mapping[str, Rule]) -> None:
    for name, rule in rules.items():
        _expect(name in entries, f"{whose} {name}", None, f"{rule.words}; it is missing")
        _expect(rule.holds(entries[name]), f"{whose} {name}", entries[name], rule.words)


def _is_shallow(value: Any, levels: int) -> bool:
    """Returns whether a value of JSON's types nests at most so deep, and holds no NaN and no infinity."""
    if isinstance(value, dict | list):
        return levels > 0 and all(
            _is_shallow(part, levels - 1) for part in (value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or math.isfinite(value)


def _expect(holds: bool, name: str, value: Any, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {value!r:.60}, expected {expected}")
