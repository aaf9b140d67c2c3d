"""Strict checks of a report from a file: a report that loads can be shown, compared and published."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Final

from ..head import INFERENCE_MODES
from ..threat import ThreatModel

# Larger numbers and deeper values come from damaged files: no table or plot could show them.
_LARGEST: Final = 1e15
_DEEPEST: Final = 8


def _number(value: Any) -> bool:
    return type(value) in (int, float) and -_LARGEST <= value <= _LARGEST  # NaN is not


def _amount(value: Any) -> bool:
    return _number(value) and value >= 0


def _whole(value: Any) -> bool:
    return type(value) is int and abs(value) <= _LARGEST


def _count(value: Any) -> bool:
    return _whole(value) and value > 0


def _text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _digest(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{16}", value) is not None


def _truth(value: Any) -> bool:
    return isinstance(value, bool)


def _picture(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[A-Za-z0-9+/]+=*", value) is not None


def _threat(value: Any) -> bool:
    try:
        return bool(ThreatModel.parse(value))
    except (ValueError, AttributeError):
        return False


def _or_none(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or holds(value)


def _array(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(holds, value))


def _object(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(holds, value.values()))


def _budget(value: Any) -> bool:
    return _object(_count)(value) and "iterations" in value and set(value) <= {"iterations", "targets", "rounds"}


def _normalisation(value: Any) -> bool:
    return (isinstance(value, dict) and all(_array(_number)(value.get(name)) for name in ("mean", "std"))
            and isinstance(value.get("source", ""), str))


# Entries of the protocol that `mixed_surrogate_attack` always writes: the check, and its words.
_PROTOCOL: Final[dict[str, tuple[Callable[[Any], bool], str]]] = {
    "architecture": (_text, "a text, the model's architecture"),
    "weights_digest": (_digest, "16 hexadecimal digits"),
    "data_digest": (_digest, "16 hexadecimal digits"),
    "threat": (_threat, "a threat model such as 'Linf:8/255'"),
    "num_images": (_count, "a whole number above 0"),
    "num_classes": (_count, "a whole number above 0"),
    "batch_size": (_count, "a whole number above 0"),
    "inference": (lambda value: value in (*INFERENCE_MODES, "none"), f"one of {', '.join(INFERENCE_MODES)}, none"),
    "mix": (_or_none(_number), "a number or null"),
    "prototypes_fitted": (_or_none(_truth), "true, false or null"),
    "surrogates": (_array(_text), "an array of texts"),
    "attacks": (_object(_budget), "an object of budgets, with iterations, targets and rounds above 0"),
    "seed": (_whole, "a whole number"),
    "device": (_text, "a text"),
    "versions": (_object(_text), "an object of texts"),
}
# Entries that it or evaluate.py may add.
_TEXTS: Final = ("model", "weights", "dataset", "split", "precision", "protocol", "protocol_digest")
_OPTIONAL: Final = dict.fromkeys(_TEXTS, (_text, "a text")) | {
    "normalisation": (_or_none(_normalisation), "an object with mean and std, arrays of numbers, or null"),
    "clean_margin": (_or_none(_number), "a number or null"),
    "attacked_scale": (_or_none(_number), "a number or null"),
    "survivors_only": (_truth, "true or false"),
    "surrogates_at_once": (_count, "a whole number above 0"),
    "neighbours": (_or_none(_array(_count)), "an array of whole numbers above 0"),
    "neighbours_mixes": (_or_none(_array(_number)), "an array of numbers, or null"),
    "class_names": (_or_none(_array(lambda value: isinstance(value, str))), "an array of texts, or null"),
    "options": (_or_none(lambda value: isinstance(value, dict)), "an object"),
}
_EXAMPLE: Final = {
    "image": (_amount, "0 or more"), "label": (_amount, "0 or more"), "predicted": (_whole, "a whole number"),
    "found_by": (_text, "a text"), "amplification": (_amount, "a number"),
    "clean": (_picture, "base64"), "perturbation": (_picture, "base64"), "adversarial": (_picture, "base64"),
}
_NEIGHBOURS: Final = {
    "batch_size": (_count, "a whole number above 0"), "mix": (_number, "a number"), "kind": (_text, "a text"),
    "targets": (_count, "a whole number above 0"), "flipped": (_amount, "a number"),
}
_COST: Final = dict.fromkeys(("seconds", "forward_passes", "backward_passes"), (_amount, "a number of 0 or more"))
_FLAG: Final = {"name": (_text, "a text"), "text": (lambda value: isinstance(value, str), "a text")}


def check_report(values: Mapping[str, Any], computed: Mapping[str, Any]) -> None:
    """Checks the fields of a report that were read from a file.

    Arguments:
        values: the fields of `AttackReport` in JSON's types.
        computed: further entries of the file.

    Raises:
        ValueError: if a field is malformed; the message names the first.
    """
    for name in ("protocol", "correct", "baseline_correct", "cost"):
        _expect(isinstance(values[name], dict), name, values[name], "an object")
    for name in ("flags", "examples", "neighbours"):
        _expect(isinstance(values[name], list), name, values[name], "an array")
    correct, total = values["correct"], _check_rows(values)
    protocol = values["protocol"]
    _check_entries("the protocol's", protocol, _PROTOCOL)
    _check_entries("the protocol's", protocol, {name: rule for name, rule in _OPTIONAL.items() if name in protocol})
    _expect(protocol["num_images"] == total, "the protocol's num_images", protocol["num_images"],
            f"{total}, the number of verdicts in a row")
    for name, value in protocol.items():
        _expect(_is_shallow(value, _DEEPEST), f"the protocol's {name}", value, f"at most {_DEEPEST} levels")
    for name, row in values["cost"].items():
        _check_row(f"the cost of {name}", row, _COST)
    for name, rules in (("flags", _FLAG), ("examples", _EXAMPLE), ("neighbours", _NEIGHBOURS)):
        for i, row in enumerate(values[name]):
            _check_row(f"row {i} of {name}", row, rules)
    _expect(all(example["image"] < total for example in values["examples"]), "examples",
            [example["image"] for example in values["examples"]], f"images below {total}")
    for name, right in (("num_images", total), ("clean_accuracy", correct["clean"].count("1") / total)):
        _expect(computed.get(name, right) == right, name, computed.get(name), f"{right}, by its verdicts")


def _check_rows(values: Mapping[str, Any]) -> int:
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


def _check_row(name: str, row: Any, rules: Mapping[str, Any]) -> None:
    _expect(isinstance(row, dict), name, row, f"an object with {', '.join(rules)}")
    _check_entries(f"{name}: its", row, rules)
    unknown = sorted(row.keys() - rules.keys())
    _expect(not unknown, f"{name}: its other entries", unknown, f"only {', '.join(rules)}")


def _check_entries(whose: str, entries: Mapping[str, Any], rules: Mapping[str, Any]) -> None:
    for name, (holds, expected) in rules.items():
        _expect(name in entries, f"{whose} {name}", None, f"{expected}; it is missing")
        _expect(holds(entries[name]), f"{whose} {name}", entries[name], expected)


def _is_shallow(value: Any, levels: int) -> bool:
    """Returns whether a value of JSON's types nests at most so deep, and holds no NaN and no infinity."""
    if isinstance(value, dict | list):
        return levels > 0 and all(
            _is_shallow(part, levels - 1) for part in (value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or math.isfinite(value)


def _expect(holds: bool, name: str, value: Any, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {value!r:.60}, expected {expected}")
