"""A report as one HTML file that opens offline, without scripts. Each picture is one function of this file.

A new picture is a function that takes the report and returns parts of HTML, and a line in `report_page`.
"""

import re
from collections.abc import Iterable, Sequence
from html import escape
from typing import Final

from . import svg
from .command import evaluate_command, shell_lines
from .flags import Flag, paragraph
from .metrics import attack_of, wilson_interval, worst_accuracy
from .schema import AttackReport
from .tables import (
    INTERVAL,
    NEIGHBOURS_NOTE,
    NEIGHBOURS_TITLE,
    UNRELIABLE,
    accuracies,
    cell,
    interval_text,
    neighbours_table,
    pixels_note,
)

_STYLE: Final = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 800px; margin: 2em auto;
       padding: 0 1em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; margin: 1em 0; font-size: 13px; }
th, td { padding: 2px 10px; border-bottom: 1px solid #eee; text-align: left; vertical-align: top;
         overflow-wrap: anywhere; }
th, td:first-child { overflow-wrap: normal; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
svg { max-width: 100%; height: auto; } pre { overflow-x: auto; }
.large { display: flex; flex-wrap: wrap; gap: 1em 2.5em; }
.large div { font-size: 13px; color: #555; width: 220px; }
.large b { display: block; font-size: 26px; color: #111; }
.unreliable { background: #fdecea; border-left: 5px solid #c62828; padding: .5em 1em; }
.examples { display: grid; grid-template-columns: repeat(auto-fill, minmax(370px, 1fr)); gap: 1em; }
.examples figure { margin: 0; } .examples figcaption { font-size: 12px; }
.examples .three { display: flex; gap: 5px; } .examples .three span { width: 118px; font-size: 11px; color: #555; }
.examples img { display: block; width: 118px; image-rendering: pixelated; border: 1px solid #ccc; }
"""


def page(title: str, body: Iterable[str]) -> str:
    """Returns a whole HTML file of a title and parts of HTML."""
    return (f"<!DOCTYPE html>\n<html lang='en'>\n<head>\n<meta charset='utf-8'>\n<title>{escape(title)}</title>\n"
            "<link rel='icon' href='data:,'>\n"  # or a browser asks for one
            f"<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n" + "\n".join(body)
            + "\n</body>\n</html>\n")


def report_page(report: AttackReport) -> str:
    """Returns a report as a whole HTML file."""
    return page(f"Mixed Surrogate Attack: {report.name}", [
        *unreliable_banner(report.flags),
        f"<p>{escape(pixels_note(report.protocol))}</p>",
        _summary(report),
        *flag_section(report.flags),
        "<h2>Accuracy under each attack</h2>", *_by_surrogate(report),
        *_neighbours(report),
        *_progress(report),
        *_examples(report),
        *_command(report),
        "<h2>Protocol</h2>", table(["", ""], [[name, cell(value)] for name, value in report.protocol.items()]),
        "<h2>Cost</h2>", *_cost(report),
    ])


def unreliable_banner(flags: Iterable[Flag]) -> list[str]:
    """Returns the warning at the top of a page if a flag makes the numbers unreliable."""
    if not any(flag.unreliable for flag in flags):
        return []
    return [f"<p class='unreliable'><b>Unreliable</b>: {UNRELIABLE}</p>"]


def flag_section(flags: Sequence[Flag]) -> list[str]:
    """Returns the flags, each with a link to its paragraph of flags.md, which follows."""
    if not flags:
        return []
    parts = ["<h2>Warnings</h2><ul>"]
    parts += [f"<li><a href='#{flag.name}'>{flag.name}</a>: {escape(flag.text)}</li>" for flag in flags]
    parts.append("</ul><dl>")
    for name in dict.fromkeys(flag.name for flag in flags):
        parts.append(f"<dt id='{name}'><b>{name}</b></dt><dd>{_from_markdown(paragraph(name))}</dd>")
    return [*parts, "</dl>"]


def _from_markdown(text: str) -> str:
    """Returns paragraphs of Markdown as HTML; a link becomes its text, as the page may lack its target."""
    text = re.sub(r"`(.+?)`", r"<code>\1</code>", escape(text))
    text = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", text)
    text = re.sub(r"\[(.+?)\]\(.+?\)", r"\1", text)
    return "".join(f"<p>{part}</p>" for part in text.split("\n\n"))


def _point(accuracy: float, report: AttackReport, x: float = 0.0) -> svg.Point:
    return svg.Point(x, accuracy, *wilson_interval(accuracy, report.num_images))


def _summary(report: AttackReport) -> str:
    shown = "".join(f"<div><b>{100 * value:.1f} %</b> ({interval_text(value, report.num_images)})<br>"
                    f"{escape(name)}</div>" for name, value in accuracies(report).items())
    return (f"<div class='large'>{shown}</div><p>Accuracies on {report.num_images} images, "
            f"{escape(str(report.protocol.get('threat', '')))}; in brackets the {INTERVAL}.</p>")


def _command(report: AttackReport) -> list[str]:
    command = evaluate_command(report.protocol)
    return ["<h2>Command</h2>", f"<pre>{escape(shell_lines(command))}</pre>"] if command else []


def _by_surrogate(report: AttackReport) -> list[str]:
    if not report.by_surrogate:
        return ["<p>No attack was run.</p>"]
    groups = {surrogate: {attack: _point(value, report) for attack, value in row.items()}
              for surrogate, row in report.by_surrogate.items()}
    if report.baseline:
        groups["FC classifier"] = {
            attack: _point(value, report) for attack, value in report.baseline.items() if attack != "clean"}
    lines = {"clean": report.clean_accuracy, "robust": report.robust_accuracy}
    attacks = list(dict.fromkeys(attack for group in groups.values() for attack in group))
    attacks.sort(key=lambda attack: attack == "worst")
    rows = [[surrogate, *(f"{100 * row[attack].y:.1f}" if attack in row else "" for attack in attacks)]
            for surrogate, row in groups.items()]
    note = "FC classifier: that of the same network, under the attacks on it." if report.baseline else ""
    if report.protocol.get("survivors_only"):
        note += (" This protocol attacks an image no more once it is misclassified: later rows keep its successful "
                 "candidate, so that rows do not compare attacks.")
    shown = "Accuracy of the true model on the candidates of each attack on each surrogate"
    return [svg.dots(groups, attacks, lines, shown), f"<p>{shown}; bars are {INTERVAL}s. {note}</p>",
            table(["surrogate, %", *attacks], rows)]


def _progress(report: AttackReport) -> list[str]:
    by_attack: dict[str, list[str]] = {}
    for name, row in report.correct.items():
        by_attack.setdefault(attack_of(name), []).append(row)
    seen, seconds = by_attack.pop("clean"), 0.0
    if not by_attack or not by_attack.keys() <= report.cost.keys():
        return []
    after = {}
    for attack, cost in report.cost.items():
        if attack in by_attack:
            seen += by_attack[attack]
            seconds += cost["seconds"]
            after[attack] = _point(worst_accuracy(seen), report, seconds)
    return ["<h2>Progress over time</h2>",
            svg.steps(report.clean_accuracy, after, "seconds spent on attacks",
                      "robust accuracy after each attack, over time"),
            "<p>Accuracy in the worst case over the clean images and all attacks so far, against the seconds of these "
            "attacks, summed over surrogates, batches and processes. Attacks are in the order of their first start; a "
            "run repeats them for each batch, and for surrogates that are not attacked side by side.</p>"]


def _neighbours(report: AttackReport) -> list[str]:
    if not report.neighbours:
        return []
    return [f"<h2>{NEIGHBOURS_TITLE}</h2>", f"<p>{NEIGHBOURS_NOTE}</p>",
            table(*neighbours_table(report), numbers_from=0)]


def _examples(report: AttackReport) -> list[str]:
    if not report.examples:
        return []
    parts = ["<h2>Misclassified images</h2>", "<div class='examples'>"]
    for example in report.examples:
        pictures = "".join(
            f"<span><img src='data:image/png;base64,{escape(data, quote=True)}' alt='{alt} of image {example.image}'>"
            f"{caption}</span>"
            for data, alt, caption in (
                (example.clean, "clean", f"clean: {example.label}"),
                (example.perturbation, "perturbation", f"perturbation × {example.amplification:.1f}"),
                (example.adversarial, "adversarial", f"adversarial: {example.answer}")))
        parts.append(f"<figure><div class='three'>{pictures}</div><figcaption>image {example.image}, class "
                     f"{example.label}, predicted {example.answer}; found by {escape(example.found_by)}</figcaption>"
                     "</figure>")
    return [*parts, "</div><p>The first images that an attack flipped. Captions are predictions of the true model; the "
                    "perturbation is amplified as written, around a mid grey.</p>"]


def _cost(report: AttackReport) -> list[str]:
    seconds = {name: row["seconds"] for name, row in report.cost.items() if name != "all"}
    rows = [[name, f"{row['seconds']:,.1f}", f"{row['forward_passes']:,.0f}", f"{row['backward_passes']:,.0f}"]
            for name, row in report.cost.items()]
    plot = [svg.bars(seconds, "s", "seconds by attack")] if seconds else []
    return [*plot, table(["attack", "seconds", "images forward", "images backward"], rows)]


def table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers_from: int = 1) -> str:
    """Returns a table; its columns from `numbers_from` on are right-aligned if they have a title."""
    kinds = ["" if not title or i < numbers_from else " class='number'" for i, title in enumerate(head)]
    lines = ["".join(f"<{tag}{kind}>{escape(text)}</{tag}>" for text, kind in zip(row, kinds, strict=True))
             for tag, row in [("th", head), *(("td", row) for row in rows)]]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"
