"""Texts and tables that Markdown and HTML share."""

from collections.abc import Mapping
from typing import Any, Final

from .metrics import wilson_interval
from .schema import AttackReport

#: The name of the robust accuracy among the `accuracies`.
ROBUST: Final = "robust, worst case over all rows"

#: The name of the interval beside an accuracy.
INTERVAL: Final = "95 % Wilson interval"

#: The first sentence if a flag makes the numbers unreliable.
UNRELIABLE: Final = "these numbers should not be quoted; the warnings say why."

NEIGHBOURS_TITLE: Final = "Neighbours in the batch"
NEIGHBOURS_NOTE: Final = (
    "How often a correctly classified clean image flips if an adversary controls the rest of its batch, and how often "
    "a prediction changes if all images are reshuffled. None of this enters the accuracies above.")


def accuracies(report: AttackReport) -> dict[str, float]:
    """Returns the accuracies of a report by name, fractions in [0, 1]."""
    found = {"clean": report.clean_accuracy, ROBUST: report.robust_accuracy}
    if report.assembled:
        found["robust, in the judged batches with most errors"] = report.realised_robust_accuracy
        found["robust, in batches assembled of what broke each image"] = report.assembled_robust_accuracy
    if report.baseline:
        found["FC classifier of the same network, clean"] = report.baseline["clean"]
        found["FC classifier of the same network, under AutoAttack's components"] = report.baseline["worst"]
    return found


def pixels_note(protocol: Mapping[str, Any]) -> str:
    """Returns a sentence on the normalisation of a report's model; empty if the protocol has no entry for it."""
    normalisation = protocol.get("normalisation", "")
    if normalisation is None:
        return "Pixels go to the model as they are, in [0, 1]: it is a module without normalisation of its own."
    if not isinstance(normalisation, Mapping):
        return ""
    values = {name: normalisation.get(name) for name in ("mean", "std")}
    mean, std = (", ".join(f"{x:.4g}" if isinstance(x, float) else str(x) for x in value)
                 if isinstance(value, list) else str(value) for value in values.values())
    return (f"Pixels in [0, 1] are normalised by mean ({mean}) and std ({std}); source: "
            f"{normalisation.get('source', 'the report does not say')}.")


def neighbours_table(report: AttackReport) -> tuple[list[str], list[list[str]]]:
    """Returns the head and the rows of the table of neighbours in a batch."""
    return ["batch size", "mix", "neighbours", "flipped", "of", "%"], [
        [str(row["batch_size"]), str(row["mix"]), str(row["kind"]), str(row["flipped"]), str(row["targets"]),
         f"{100 * row['flipped'] / row['targets']:.1f}"] for row in report.neighbours]


def interval_text(accuracy: float, num_images: int) -> str:
    """Returns the `INTERVAL` of an accuracy, in %."""
    low, high = wilson_interval(accuracy, num_images)
    return f"{100 * low:.1f} to {100 * high:.1f}"


def cell(value: Any) -> str:
    """Returns a protocol's value in words; of a long list, such as 1,000 class names, the first ones and the number."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {cell(part)}" for name, part in value.items())
    if not isinstance(value, list | tuple):
        return str(value)
    rest = f", ... ({len(value)} in all)" if len(value) > 20 else ""
    return ", ".join(map(str, value[:10] if rest else value)) + rest
