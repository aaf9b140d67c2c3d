"""`sweep`: one model in several inference modes and at several radii, a report for each."""

import os
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, Final

from accelerate import Accelerator
from torch import Tensor, nn

from ..console import images_bar
from ..deadline import is_over
from ..files import write_text
from ..head import check_inference, find_head, head_mode, head_name
from ..report import AttackReport
from ..report.sweep_page import sweep_page
from ..report.write import write_report
from ..threat import ThreatModel
from .msa import PARTIAL, REPORT, STOPPED, mixed_surrogate_attack
from .neighbours import check_neighbours, check_one_draw, measure_neighbours
from .processes import gathered, is_first, rank_of

#: The page of all reports.
SWEEP: Final = "sweep.html"
#: The page of one report.
PAGE: Final = "report.html"

# More would be a typing error: a sweep costs as many evaluations.
_MOST_RADII: Final = 1_000


def parse_radii(text: str) -> list[float]:
    """Returns the radii of a text `"first:last:step"` such as `"0:0.2:0.02"` or `"0:8/255:2/255"`, `last` included."""
    try:
        first, last, step = (_fraction(part) for part in text.split(":"))
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"cannot read the radii {reprlib.repr(text)}; expected FIRST:LAST:STEP such as 0:0.2:0.02 or "
                         "0:8/255:2/255") from None
    if first < 0 or step <= 0 or last <= 0 or last < first or (last - first) / step >= _MOST_RADII:
        raise ValueError(f"the radii {text!r} go from {first} to {last} by {step}; expected from 0 or more upwards, "
                         f"by a step above 0, and fewer than {_MOST_RADII} of them")
    return [float(first + i * step) for i in range(int((last - first) / step) + 1)]


def sweep(
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        norm: str,
        radii: Sequence[float],
        modes: Sequence[str] | None = None,
        *,
        folder: str | os.PathLike | None = None,
        accelerator: Accelerator | None = None,
        neighbours: Sequence[int] = (),
        neighbours_mixes: Sequence[float] | None = None,
        about: Mapping[str, Any] | None = None,
        **options: Any,
) -> Iterator[AttackReport]:
    """Yields the report of each inference mode at each radius above 0, as soon as it is there.

    A report that a `time_limit` cut is the last one.

    At radius 0 there is nothing to attack: the robust accuracy is the clean one, which every report holds.

    Arguments:
        model, images, labels: as in `mixed_surrogate_attack`. The model's mode is restored.
        norm: of the threat models.
        radii: in units of the pixel range.
        modes: inference modes of the HPM head; None means the model's own.
        folder: keeps each report, and the results of a stopped sweep. A finished report is not made again, and refused
            if it is of another run. A single report is in the folder itself, several in folders named by mode and
            radius (`report_folder`).
        accelerator: of several processes; the first one writes.
        neighbours: batch sizes for `measure_neighbours`, which is called for a fitted head in batch mode.
        neighbours_mixes: values of the head's `mix` for it; None means the head's own.
        about: further entries of each report's protocol.
        **options: the other arguments of `mixed_surrogate_attack`.

    Raises:
        ValueError: if a mode is unknown, the model has no HPM head for it, no radius is above 0, an argument is
            malformed, or the folder holds a report of another run. Nothing was attacked then.
        OutOfTime: as `mixed_surrogate_attack`.
    """
    threats = [ThreatModel(norm, eps) for eps in radii if eps != 0]
    if not threats:
        raise ValueError(f"the radii are {list(radii)}; expected at least one above 0")
    for mode in modes or ():
        check_inference(mode)
        find_head(model)
    if neighbours or neighbours_mixes is not None:
        check_neighbours(neighbours, neighbours_mixes, len(images))
        check_one_draw(model)
    if options.get("save_adversarial") and folder is None:
        raise ValueError("save_adversarial needs a folder to write into")
    plan = [(mode, threat) for mode in dict.fromkeys(modes or [own_mode(model)]) for threat in threats]
    places = {} if folder is None else {
        entry: Path(folder) / (report_folder(*entry) if len(plan) > 1 else "") for entry in plan}

    def one(mode: str, threat: ThreatModel) -> AttackReport:
        place = places.get((mode, threat))
        with nullcontext() if mode == "none" else head_mode(model, mode):
            pairs = _pairs(model, neighbours, neighbours_mixes)
            asked = {"neighbours": list(neighbours), "neighbours_mixes": neighbours_mixes and list(neighbours_mixes)}
            report = mixed_surrogate_attack(model, images, labels, threat, folder=place, accelerator=accelerator,
                                            about={**(about or {}), **(asked if pairs else {})}, **options)
            measure = partial(measure_neighbours, model, images, labels, threat, seed=options.get("seed", 0))
            if STOPPED not in report.protocol:
                shown = bool(pairs and options.get("progress") and is_first(accelerator))
                with images_bar(model, "neighbours", shown):
                    report = _with_neighbours(report, pairs, measure, place, accelerator)
        if place is not None and is_first(accelerator):
            if STOPPED in report.protocol:
                write_report(report, place / PARTIAL)
            elif not (place / PAGE).exists():
                write_report(report, place)
        return report

    def all_reports() -> Iterator[AttackReport]:
        for entry in plan:
            report = there[entry] if entry in there else one(*entry)
            yield report
            if STOPPED in report.protocol:
                return

    # Not a generator itself, so that wrong arguments raise at once.
    there = {entry: one(*entry) for entry, place in places.items() if (place / REPORT).exists()}
    return all_reports()


def _pairs(model: nn.Module, sizes: Sequence[int], mixes: Sequence[float] | None) -> list[tuple[int, float]]:
    """Returns the batch sizes and mixes for which neighbours are measured: none unless they can flip an image."""
    if own_mode(model) != "batch" or not find_head(model).is_fitted():
        return []
    return [(size, mix) for mix in mixes or [find_head(model).mix] for size in sizes]


def _with_neighbours(report: AttackReport, pairs: Sequence[tuple[int, float]], measure: Callable[..., Any],
                     place: Path | None, accelerator: Accelerator | None) -> AttackReport:
    """Returns the report with the rows of `measure_neighbours` for the pairs that it lacks.

    Each process measures one pair at a time, and the report is saved after each round of them. A `time_limit` cuts the
    rounds, which the returned report says.
    """
    done = {(row["batch_size"], row["mix"]) for row in report.neighbours}
    missing = [pair for pair in pairs if pair not in done]
    rank, processes = rank_of(accelerator)
    for i in range(0, len(missing), processes):
        if any(gathered(accelerator, [is_over()])):
            stopped = f"by a time limit, after {len(pairs) - len(missing) + i} of {len(pairs)} studies of neighbours"
            return replace(report, protocol={**report.protocol, STOPPED: stopped})
        rows = [row for size, mix in missing[i + rank:i + rank + 1]
                for row in measure(batch_sizes=[size], mixes=[mix])]
        report = replace(report, neighbours=[*report.neighbours, *gathered(accelerator, rows)])
        if place is not None and is_first(accelerator):
            report.save(place / REPORT)
    return report


def own_mode(model: nn.Module) -> str:
    """Returns the inference mode of a model's HPM head, `"none"` if it has no HPM head."""
    return "none" if head_name(model) is None else find_head(model).inference


def report_folder(mode: str, threat: ThreatModel) -> str:
    """Returns the name of the folder of one report among several, such as `"batch-Linf-0.1"`."""
    return "-".join([*([] if mode == "none" else [mode]), threat.norm, f"{threat.eps:.6g}"])


def save_sweep(reports: Sequence[AttackReport], folder: str | os.PathLike) -> None:
    """Writes sweep.html beside the reports of a `sweep`; it links to their pages."""
    folders = [report_folder(report.protocol["inference"], ThreatModel.parse(report.protocol["threat"])) + "/"
               for report in reports] if len(reports) > 1 else [""]
    write_text(Path(folder) / SWEEP, sweep_page(reports, [f"{place}{PAGE}" for place in folders]))


def _fraction(text: str) -> Fraction:
    """Returns the exact number of a text; its float first, since a large exponent would take for ever."""
    numerator, _, denominator = text.partition("/")
    parts = [numerator, denominator or "1"]
    if any(part.strip("0.+- ") and not 1e-12 < abs(float(part)) < 1e12 for part in parts):
        raise ValueError
    return Fraction(parts[0]) / Fraction(parts[1])
