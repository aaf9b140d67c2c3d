"""Strict checks of a report from a file: a report that loads can be shown, compared and published."""

from collections.abc import Mapping
from typing import Any, Final

from .. import rules
from ..head import INFERENCE_MODES
from ..rules import AMOUNT, COUNT, NUMBER, STRING, TEXT, TRUTH, WHOLE, Rule
from ..threat import ThreatModel


def _is_threat(value: Any) -> bool:
    try:
        return bool(ThreatModel.of(value))
    except ValueError:
        return False


_DIGEST: Final = rules.matching("[0-9a-f]{16}", "16 hexadecimal digits")
_PICTURE: Final = rules.matching("[A-Za-z0-9+/]+=*", "a picture in base64")
_VERDICTS: Final = rules.matching("[01]+", "a text with a 0 or 1 for each image")

# The first entries are those that `mixed_surrogate_attack` always writes; it or evaluate.py may add others.
_PROTOCOL: Final = {
    **dict.fromkeys(("architecture", "device"), TEXT),
    **dict.fromkeys(("weights_digest", "data_digest"), _DIGEST),
    **dict.fromkeys(("num_images", "num_classes", "batch_size"), COUNT),
    "threat": Rule(_is_threat, "a threat model such as 'Linf:8/255'"),
    "inference": Rule(lambda value: value in (*INFERENCE_MODES, "none"), f"one of {', '.join(INFERENCE_MODES)}, none"),
    "mix": (NUMBER,),
    "prototypes_fitted": (TRUTH,),
    "surrogates": [TEXT],
    "attacks": {"*": {"iterations": COUNT, "targets?": COUNT, "restarts?": COUNT}},
    "seed": WHOLE,
    "versions": {"*": TEXT},
    **dict.fromkeys(("model?", "weights?", "dataset?", "split?", "class_subset?", "precision?", "protocol?",
                     "protocol_digest?"), TEXT),
    **dict.fromkeys(("clean_margin?", "attacked_scale?"), (NUMBER,)),
    **dict.fromkeys(("eot?", "surrogates_at_once?"), COUNT),
    "normalisation?": ({"mean": [NUMBER], "std": [NUMBER], "source?": STRING, "*": rules.ANYTHING},),
    "full_grid?": TRUTH,
    "neighbours?": ([COUNT],),
    "class_names?": ([STRING],),
    "options?": ({"*": rules.shallow(8)},),
    "*": rules.shallow(8),
}
_REPORT: Final = {
    "protocol": _PROTOCOL,
    "correct": {"clean": _VERDICTS, "*": _VERDICTS},
    "baseline_correct": {"*": _VERDICTS},
    "assembled": rules.matching("[01]*", _VERDICTS.words),
    "cost": {"*": dict.fromkeys(("seconds", "forward_passes", "backward_passes"), AMOUNT)},
    "flags": [{"name": TEXT, "text": STRING}],
    "examples": [{"image": AMOUNT, "label": AMOUNT, "predicted": WHOLE, "found_by": TEXT, "amplification": AMOUNT,
                  **dict.fromkeys(("clean", "perturbation", "adversarial"), _PICTURE)}],
    "neighbours": [{"batch_size": COUNT, "mix": NUMBER, "kind": TEXT, "targets": COUNT, "flipped": AMOUNT}],
    "date?": rules.matching(r"(\d{4}-\d\d-\d\d)?", "a day such as 2026-11-28, or nothing"),
    "convergence?": ({"fell_after": [(AMOUNT,)], "spent": AMOUNT, "margins": [AMOUNT], "clean_margin": (AMOUNT,)},),
}


def check_report(values: Mapping[str, Any], computed: Mapping[str, Any]) -> None:
    """Checks the fields of a report from a file, in JSON's types; `computed` are further entries of the file."""
    rules.check("", values, _REPORT)
    correct, baseline, assembled = values["correct"], values["baseline_correct"], values["assembled"]
    total = len(correct["clean"])
    rules.expect("clean" in baseline or not baseline, "baseline_correct", list(baseline), "the row clean among them")
    for name, row in [*correct.items(), *baseline.items(), *([("assembled", assembled)] if assembled else [])]:
        rules.expect(len(row) == total, f"the row {name}", row, f"{total} verdicts, as many as the row clean has")
        rules.expect(name in ("clean", "assembled") or all(name.partition("/")), "the name of a row", name,
                     "clean or <surrogate>/<attack>")
    convergence = values.get("convergence") or {}
    for name in convergence.keys() & {"fell_after", "margins"}:
        rules.expect(len(convergence[name]) == total, f"convergence.{name}", convergence[name],
                     f"{total} entries, one for each image")
    images = [example["image"] for example in values["examples"]]
    rules.expect(all(image < total for image in images), "examples", images, f"images below {total}")
    for name, given, right in (
            ("protocol.num_images", values["protocol"]["num_images"], total),
            ("num_images", computed.get("num_images", total), total),
            ("clean_accuracy", computed.get("clean_accuracy"), correct["clean"].count("1") / total)):
        rules.expect(given in (None, right), name, given, f"{right}, by its verdicts")
