"""The page of one or more `Sensitivity` studies."""

from collections.abc import Mapping, Sequence
from html import escape

from ..sensitivity import Movement, Sensitivity
from . import markdown, svg
from .html import page, table

_HEAD = {"fc": "FC", "dataset": "ℓ2", "sample": "sample", "batch": "batch"}
_COLUMNS = ["accuracy, %", "naive, %", "feature shift", "margin", "margin lost", "part lost", "sensitivity"]


def sensitivity_markdown(study: Sensitivity) -> str:
    """Returns a study as a table in Markdown, a row for each head and radius."""
    return "\n".join(markdown.table(*_table(study))) + "\n"


def sensitivity_page(studies: Sequence[Sensitivity], class_names: Sequence[str] = ()) -> str:
    """Returns the curves and tables of studies of different names as HTML; without class names it shows indices."""
    body = [
        "<p>Each head of one backbone is attacked through its own logits. <b>Accuracy</b> is that under both attacks, "
        "on the margin and on the cross-entropy. <b>Naive</b> is the accuracy that the attack on the cross-entropy "
        "alone would claim: large logits saturate the cross-entropy, which leaves no gradient and hides how weak the "
        "head is. <b>Feature shift</b> is how far the attack moves the features, in units of the distance between two "
        "images of the split. <b>Part lost</b> is the part of the clean margin that the attack takes, and "
        "<b>sensitivity</b> that part for each unit of feature shift: neither depends on the scale of the logits.</p>"]
    for study in studies:
        norm = str(study.protocol["norm"])
        label = f"accuracy of {study.name} against eps, a curve for each head and attack"
        body += [f"<h2>{escape(study.name)}</h2>",
                 svg.curves(_curves(study), f"eps, {norm}, pixels in [0, 1]", label),
                 table(*_table(study)),
                 f"<h3>By class, at eps {_largest(study):.4g}</h3>",
                 table(*_by_class(study, class_names)),
                 f"<p>{escape(', '.join(f'{name} {value}' for name, value in study.protocol.items()))}</p>"]
    return page("Sensitivity of the heads", body)


def _largest(study: Sensitivity) -> float:
    return max(row.eps for row in study.rows)


def _curves(study: Sensitivity) -> dict[str, list[svg.Point]]:
    curves: dict[str, list[svg.Point]] = {}
    for mode, clean in study.clean.items():
        rows = sorted((row for row in study.rows if row.head == mode), key=lambda row: row.eps)
        for name, accuracies in ((_HEAD[mode], [row.overall.accuracy for row in rows]),
                                 (f"{_HEAD[mode]}, naive", [row.overall.naive_accuracy for row in rows])):
            points = zip([0.0, *(row.eps for row in rows)], [clean, *accuracies], strict=True)
            curves[name] = [svg.Point.measured(eps, y, study.protocol["images"]) for eps, y in points]
    return curves


def _cells(movement: Movement) -> list[str]:
    return [f"{100 * movement.accuracy:.1f}", f"{100 * movement.naive_accuracy:.1f}",
            *(f"{value:.3g}" for value in (movement.feature_shift, movement.margin, movement.margin_lost,
                                           movement.fraction_lost, movement.sensitivity))]


def _table(study: Sensitivity) -> tuple[list[str], list[list[str]]]:
    rows = sorted(study.rows, key=lambda row: (row.eps, list(study.clean).index(row.head)))
    return ["head", "eps", *_COLUMNS], [[_HEAD[row.head], f"{row.eps:.4g}", *_cells(row.overall)] for row in rows]


def _by_class(study: Sensitivity, names: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    rows: Mapping[str, Mapping[int, Movement]] = {row.head: row.by_class for row in study.rows
                                                  if row.eps == _largest(study)}
    return ["head", "class", *_COLUMNS], [
        [_HEAD[mode], names[label] if names else str(label), *_cells(movement)]
        for mode, by_class in rows.items() for label, movement in by_class.items()]
