"""The reports of one model in several modes and at several radii, as a table in Markdown and as an HTML page."""

from collections.abc import Sequence
from html import escape

from ..threat import ThreatModel
from . import markdown, svg
from .flags import Flag
from .html import flag_section, page, table, unreliable_banner
from .schema import AttackReport
from .tables import INTERVAL, UNRELIABLE, pixels_note


def curves(reports: Sequence[AttackReport]) -> dict[str, list[svg.Point]]:
    """Returns robust accuracy against the radius, a curve for each mode; it begins with the clean accuracy, at 0.

    If `fc` is no mode of the `reports` (of one model on the same images), `"FC classifier"` is that of the same network
    under the attacks on it: `AttackReport.baseline`, of the first mode that has it.
    """
    found: dict[str, dict[float, svg.Point]] = {}
    baseline: dict[float, svg.Point] = {}
    for report in reports:
        eps, curve = ThreatModel.of(report.protocol["threat"]).eps, found.setdefault(_mode_name(report), {})
        curve.setdefault(0.0, svg.Point.measured(0.0, report.clean_accuracy, report.num_images))
        curve[eps] = svg.Point.measured(eps, report.robust_accuracy, report.num_images)
        if report.baseline:
            for x, name in ((0.0, "clean"), (eps, "worst")):
                baseline.setdefault(x, svg.Point.measured(x, report.baseline[name], report.num_images))
    if baseline and "fc" not in found:
        found["FC classifier"] = baseline
    return {name: [curve[eps] for eps in sorted(curve)] for name, curve in found.items()}


def sweep_markdown(reports: Sequence[AttackReport]) -> str:
    """Returns the robust accuracies in % as a table in Markdown, a row for each radius."""
    head, rows = _table(reports)
    unreliable = [f"- {_title(report)}: {', '.join(dict.fromkeys(flag.name for flag in report.flags))}"
                  for report in reports if report.unreliable]
    lines = [f"**Unreliable** (marked †): {UNRELIABLE}", "", *unreliable, ""] if unreliable else []
    lines += [*filter(None, [pixels_note(reports[0].protocol)]), ""]
    return "\n".join([*lines, *markdown.table(head, rows, numbers_from=0)]) + "\n"


def sweep_page(reports: Sequence[AttackReport], links: Sequence[str] = ()) -> str:
    """Returns the curves, the table and the flags of one model's reports as HTML, with `links` to their own pages."""
    head, rows = _table(reports)
    threat = ThreatModel.of(reports[0].protocol["threat"])
    flags = list(dict.fromkeys(
        Flag(flag.name, f"{_title(report)}: {flag.text}") for report in reports for flag in report.flags))
    items = [f"<li><a href='{escape(link, quote=True)}'>{escape(_title(report))}</a></li>"
             for report, link in zip(reports, links, strict=True)] if links else []
    return page(f"Mixed Surrogate Attack: {reports[0].name}, accuracy against eps", [
        *unreliable_banner(flags),
        f"<p>{escape(pixels_note(reports[0].protocol))}</p>",
        svg.curves(curves(reports), f"eps, {threat.norm}, pixels in [0, 1]",
                   "robust accuracy against eps, a curve for each inference mode"),
        f"<p>Robust accuracy, worst case over all attacks, of {reports[0].num_images} images; bars are {INTERVAL}s. At "
        "eps 0 is the clean accuracy. FC classifier: that of the same network, under the attacks on it.</p>",
        table(head, rows, numbers_from=0),
        "<p>† unreliable: see the warnings.</p>" if any(flag.unreliable for flag in flags) else "",
        *flag_section(flags),
        *(["<h2>Reports</h2><ul>", *items, "</ul>"] if items else []),
    ])


def _table(reports: Sequence[AttackReport]) -> tuple[list[str], list[list[str]]]:
    by_name = {name: {point.x: f"{100 * point.y:.1f}" for point in curve}
               for name, curve in curves(reports).items()}
    for report in reports:
        if report.unreliable:
            by_name[_mode_name(report)][ThreatModel.of(report.protocol["threat"]).eps] += "†"
    radii = sorted({eps for cells in by_name.values() for eps in cells})
    return ["eps", *by_name], [[f"{eps:.4g}", *(cells.get(eps, "") for cells in by_name.values())] for eps in radii]


def _title(report: AttackReport) -> str:
    return f"{_mode_name(report)}, {report.protocol['threat']}"


def _mode_name(report: AttackReport) -> str:
    mode = report.protocol["inference"]
    return "model" if mode == "none" else mode
