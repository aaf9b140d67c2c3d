"""`sweep`: one model in several inference modes and at several radii, a report for each."""

import os
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from ..head import check_inference, find_head, mode_if_any, own_mode
from ..report import AttackReport
from ..report.html import write_report
from ..report.sweep_page import sweep_page
from ..threat import ThreatModel
from .msa import PARTIAL, REPORT, STOPPED, mixed_surrogate_attack
from .neighbours import check_neighbours, measure_neighbours
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
        # Of an exponent only one digit: a large one would take for ever.
        parts = [part if re.fullmatch(r"-?[\d./]{1,20}(e-?\d)?", part) else "" for part in text.split(":")]
        first, last, step = (Fraction(top) / Fraction(bottom if slash else 1)
                             for top, slash, bottom in (part.partition("/") for part in parts))
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
        about: Mapping[str, Any] | None = None,
        **options: Any,
) -> Iterator[AttackReport]:
    """Yields the report of each inference mode at each radius above 0, as soon as it is there.

    At radius 0 the robust accuracy is the clean one, which every report holds. A report that a `time_limit` cut is the
    last one.

    Arguments:
        model, images, labels: as in `mixed_surrogate_attack`. The model's mode is restored.
        norm: of the threat models.
        radii: in units of the pixel range.
        modes: inference modes of the HPM head; None means the model's own.
        folder: as in `mixed_surrogate_attack`, for a single report. Several are in folders below, named by mode and
            radius (`report_folder`).
        accelerator: of several processes; the first one writes.
        neighbours: batch sizes for `measure_neighbours`, which is called for a fitted head in batch mode.
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
    if neighbours:
        check_neighbours(model, neighbours, len(images))
    if options.get("save_adversarial") and folder is None:
        raise ValueError("save_adversarial needs a folder to write into")
    plan = [(mode, threat) for mode in dict.fromkeys(modes or [own_mode(model)]) for threat in threats]
    places = {} if folder is None else {
        entry: Path(folder) / (report_folder(*entry) if len(plan) > 1 else "") for entry in plan}
    if len(set(places.values())) < len(places):
        raise ValueError(f"{len(plan)} reports would share {len(set(places.values()))} folders, named by six digits of "
                         "the radius; expected radii that differ in these: take a larger step")

    def one(mode: str, threat: ThreatModel) -> AttackReport:
        place = places.get((mode, threat))
        with mode_if_any(model, mode):
            is_loaded = place is not None and (place / REPORT).exists()
            sizes = list(neighbours) if own_mode(model) == "batch" and find_head(model).is_fitted() else []
            report = mixed_surrogate_attack(model, images, labels, threat, folder=place, accelerator=accelerator,
                                            about={**(about or {}), **({"neighbours": sizes} if sizes else {})},
                                            **options)
            measure = partial(measure_neighbours, model, images, labels, threat, seed=options.get("seed", 0))
            if STOPPED not in report.protocol:
                shown = bool(sizes and options.get("progress") and is_first(accelerator))
                with images_bar(model, "neighbours", shown):
                    report = _with_neighbours(report, sizes, measure, place, accelerator, is_loaded)
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


def _with_neighbours(report: AttackReport, sizes: Sequence[int], measure: Callable[..., Any],
                     place: Path | None, accelerator: Accelerator | None, has_no_progress: bool) -> AttackReport:
    """Returns the report with the rows of `measure_neighbours` for the batch sizes that it lacks, a size a process.

    It is saved after each round of them. A `time_limit` cuts the rounds, but with `has_no_progress` not the first one.
    """
    missing = [size for size in sizes if size not in {row["batch_size"] for row in report.neighbours}]
    rank, processes = rank_of(accelerator)
    for i in range(0, len(missing), processes):
        if any(gathered(accelerator, [is_over()])) and not (has_no_progress and i == 0):
            stopped = f"by a time limit, after {len(sizes) - len(missing) + i} of {len(sizes)} studies of neighbours"
            return replace(report, protocol={**report.protocol, STOPPED: stopped})
        rows = [row for size in missing[i + rank:i + rank + 1] for row in measure(batch_sizes=[size])]
        report = replace(report, neighbours=[*report.neighbours, *gathered(accelerator, rows)])
        if place is not None and is_first(accelerator):
            report.save(place / REPORT)
    return report


def report_folder(mode: str, threat: ThreatModel) -> str:
    """Returns the name of the folder of one report among several, such as `"batch-Linf-0.1"`."""
    return "-".join([*([] if mode == "none" else [mode]), threat.norm, f"{threat.eps:.6g}"])


def save_sweep(reports: Sequence[AttackReport], folder: str | os.PathLike) -> None:
    """Writes sweep.html beside the reports of a `sweep`; it links to their pages."""
    folders = [report_folder(report.protocol["inference"], ThreatModel.of(report.protocol["threat"])) + "/"
               for report in reports] if len(reports) > 1 else [""]
    write_text(Path(folder) / SWEEP, sweep_page(reports, [f"{place}{PAGE}" for place in folders]))
