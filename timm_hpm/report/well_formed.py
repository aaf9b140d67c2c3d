"""Strict checks of a report from a file: a report that loads can be shown, compared and published."""

from collections.abc import Mapping
from typing import Any, Final

from .. import rules
from ..head import INFERENCE_MODES
from ..rules import Rule
from ..threat import ThreatModel

_DEEPEST: Final = 8


def _is_threat(value: Any) -> bool:
    try:
        return bool(ThreatModel.of(value))
    except (ValueError, AttributeError):
        return False


_DIGEST: Final = rules.matching("[0-9a-f]{16}", "16 hexadecimal digits")
_PICTURE: Final = rules.matching("[A-Za-z0-9+/]+=*", "a picture in base64")
_BUDGET: Final = Rule(
    lambda value: rules.object_of(rules.COUNT).holds(value) and "iterations" in value
    and set(value) <= {"iterations", "targets", "restarts"}, "budgets of iterations, targets and restarts above 0")
_NORMALISATION: Final = Rule(
    lambda value: isinstance(value, dict) and isinstance(value.get("source", ""), str)
    and all(rules.array(rules.NUMBER).holds(value.get(name)) for name in ("mean", "std")),
    "an object with mean and std, arrays of numbers")

# Entries of the protocol that `mixed_surrogate_attack` always writes.
_PROTOCOL: Final = {
    **dict.fromkeys(("architecture", "device"), rules.TEXT),
    **dict.fromkeys(("weights_digest", "data_digest"), _DIGEST),
    **dict.fromkeys(("num_images", "num_classes", "batch_size"), rules.COUNT),
    "threat": Rule(_is_threat, "a threat model such as 'Linf:8/255'"),
    "inference": Rule(lambda value: value in (*INFERENCE_MODES, "none"), f"one of {', '.join(INFERENCE_MODES)}, none"),
    "mix": rules.or_none(rules.NUMBER),
    "prototypes_fitted": rules.or_none(rules.TRUTH),
    "surrogates": rules.array(rules.TEXT),
    "attacks": rules.object_of(_BUDGET),
    "seed": rules.WHOLE,
    "versions": rules.object_of(rules.TEXT),
}
# Entries that it or evaluate.py may add.
_OPTIONAL: Final = {
    **dict.fromkeys(("model", "weights", "dataset", "split", "class_subset", "precision", "protocol",
                     "protocol_digest"), rules.TEXT),
    **dict.fromkeys(("clean_margin", "attacked_scale"), rules.or_none(rules.NUMBER)),
    **dict.fromkeys(("eot", "surrogates_at_once"), rules.COUNT),
    "normalisation": rules.or_none(_NORMALISATION),
    "full_grid": rules.TRUTH,
    "neighbours": rules.or_none(rules.array(rules.COUNT)),
    "class_names": rules.or_none(rules.array(rules.STRING)),
    "options": rules.or_none(rules.OBJECT),
}
_CONVERGENCE: Final = {
    "fell_after": rules.array(rules.or_none(rules.AMOUNT)), "spent": rules.AMOUNT, "margins": rules.array(rules.AMOUNT),
    "clean_margin": rules.or_none(rules.AMOUNT),
}
_COST: Final = dict.fromkeys(("seconds", "forward_passes", "backward_passes"), rules.AMOUNT)
# Rows of the fields that are arrays.
_ROWS: Final = {
    "flags": {"name": rules.TEXT, "text": rules.STRING},
    "examples": {"image": rules.AMOUNT, "label": rules.AMOUNT, "predicted": rules.WHOLE, "found_by": rules.TEXT,
                 "amplification": rules.AMOUNT,
                 **dict.fromkeys(("clean", "perturbation", "adversarial"), _PICTURE)},
    "neighbours": {"batch_size": rules.COUNT, "mix": rules.NUMBER, "kind": rules.TEXT, "targets": rules.COUNT,
                   "flipped": rules.AMOUNT},
}
_FIELDS: Final = {
    **dict.fromkeys(("protocol", "correct", "baseline_correct", "cost"), rules.OBJECT),
    **dict.fromkeys(_ROWS, rules.ARRAY),
    "date": rules.matching(r"(\d{4}-\d\d-\d\d)?", "a day such as 2026-11-28, or nothing"),
}


def check_report(values: Mapping[str, Any], computed: Mapping[str, Any]) -> None:
    """Checks the fields of a report from a file, in JSON's types; `computed` are further entries of the file."""
    rules.check_entries("", {"date": "", **values}, _FIELDS)
    correct, total, protocol = values["correct"], _check_verdicts(values), values["protocol"]
    rules.check_entries("the protocol's ", protocol,
                        _PROTOCOL | {name: rule for name, rule in _OPTIONAL.items() if name in protocol})
    rules.expect(protocol["num_images"] == total, "the protocol's num_images", protocol["num_images"],
                 f"{total}, the number of verdicts in a row")
    for name, value in protocol.items():
        rules.expect(rules.is_shallow(value, _DEEPEST), f"the protocol's {name}", value, f"at most {_DEEPEST} levels")
    rows = [(f"the cost of {name}", row, _COST) for name, row in values["cost"].items()]
    rows += [(f"row {i} of {name}", row, kinds) for name, kinds in _ROWS.items() for i, row in enumerate(values[name])]
    convergence: Any = values.get("convergence")
    if convergence is not None:
        rows.append(("the convergence", convergence, _CONVERGENCE))
    for name, row, kinds in rows:
        rules.expect(isinstance(row, dict) and row.keys() <= kinds.keys(), name, row,
                     f"an object with {', '.join(kinds)}")
        rules.check_entries(f"{name}: its ", row, kinds)
    for name in ("fell_after", "margins") if convergence is not None else ():
        rules.expect(len(convergence[name]) == total, f"the convergence: its {name}", convergence[name],
                     f"{total} entries, one for each image")
    images = [example["image"] for example in values["examples"]]
    rules.expect(all(image < total for image in images), "examples", images, f"images below {total}")
    for name, right in (("num_images", total), ("clean_accuracy", correct["clean"].count("1") / total)):
        rules.expect(computed.get(name, right) == right, name, computed.get(name), f"{right}, by its verdicts")


def _check_verdicts(values: Mapping[str, Any]) -> int:
    """Checks the verdicts; returns the number of images."""
    correct, baseline, assembled = values["correct"], values["baseline_correct"], values["assembled"]
    rules.expect("clean" in correct, "correct", list(correct), "the row clean among its rows")
    rules.expect("clean" in baseline or not baseline, "baseline_correct", list(baseline),
                 "the row clean among its rows")
    for name, row in [*correct.items(), *baseline.items(), *([("assembled", assembled)] if assembled != "" else [])]:
        rules.expect(isinstance(row, str) and 0 < len(row) == len(correct["clean"]) and set(row) <= {"0", "1"},
                     f"the row {name} ({len(str(row))} characters)", row, "a text with a 0 or 1 for each image")
        rules.expect(name in ("clean", "assembled") or all(name.partition("/")), "the name of a row", name,
                     "clean or <surrogate>/<attack>")
    return len(correct["clean"])
