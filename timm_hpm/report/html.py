"""The files of a report. The page opens offline, without scripts; each part of it is one function of this file.

A new picture is a function that takes the report and returns parts of HTML, and a line in `report_page`.
"""

import os
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Final

from ..files import writable_folder, write_text
from . import svg, tables
from .flags import Flag, paragraph
from .markdown import report_markdown
from .schema import AttackReport
from .shell import evaluate_command, shell_lines
from .tables import INTERVAL, ROBUST, WORDS, Table, interval_text, percent

_STYLE: Final = Path(__file__).with_name("page.css").read_text(encoding="utf-8")


def write_report(report: AttackReport, folder: str | os.PathLike) -> None:
    """Writes report.md, report.html and, last, report.json, each whole or not at all; makes the folder if needed."""
    place = writable_folder(folder)
    write_text(place / "report.md", report_markdown(report))
    write_text(place / "report.html", report_page(report))
    report.save(place / "report.json")


def page(title: str, body: Iterable[str]) -> str:
    """Returns a whole HTML file of a title and parts of HTML."""
    return (f"<!DOCTYPE html>\n<html lang='en'>\n<head>\n<meta charset='utf-8'>\n<title>{escape(title)}</title>\n"
            "<meta name='viewport' content='width=device-width, initial-scale=1'>\n"
            "<link rel='icon' href='data:,'>\n"  # or a browser asks for one
            f"<style>\n{_STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n" + "\n".join(body)
            + "\n</body>\n</html>\n")


def report_page(report: AttackReport) -> str:
    """Returns a report as a whole HTML file."""
    neighbours = tables.neighbours_table(report)
    return page(f"Mixed Surrogate Attack: {report.name}", [
        *unreliable_banner(report.flags),
        *_head(report),
        *_headline(report),
        *flag_section(report.flags),
        *_by_surrogate(report),
        *(_section(neighbours) if neighbours.rows else []),
        *_convergence(report),
        *_examples(report),
        *_section(tables.protocol_table(report)),
        *_section(tables.cost_table(report)),
    ])


def unreliable_banner(flags: Iterable[Flag]) -> list[str]:
    """Returns the warning at the top of a page if a flag makes the numbers unreliable."""
    if not any(flag.unreliable for flag in flags):
        return []
    return [f"<p class='unreliable'><b>Unreliable</b>: {tables.UNRELIABLE}</p>"]


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
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))
    text = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", text)
    text = re.sub(r"\[(.+?)\]\(.+?\)", r"\1", text)
    return "".join(f"<p>{part}</p>" for part in text.split("\n\n"))


def _head(report: AttackReport) -> list[str]:
    protocol, command = report.protocol, evaluate_command(report.protocol)
    mode = protocol.get("inference", "none")
    facts = [" ".join(str(protocol[name]) for name in ("dataset", "split") if name in protocol),
             f"{report.num_images} images", str(protocol.get("class_subset", "")), str(protocol.get("threat", "")),
             "" if mode == "none" else f"inference mode {mode}", report.date]
    return [f"<p class='small'>{escape(' · '.join(filter(None, facts)))}</p>",
            *([f"<pre>{escape(shell_lines(command))}</pre>"] if command else []),
            f"<p class='small'>{escape(tables.pixels_note(protocol))}</p>"]


def _headline(report: AttackReport) -> list[str]:
    """Returns the number that a paper would quote, and the others, smaller, beneath it."""
    found, total = tables.accuracies(report), report.num_images
    robust = found.pop(ROBUST)
    under = f" under {report.protocol['threat']}" if "threat" in report.protocol else ""
    others = "".join(
        f"<div class='small'><b>{percent(value)} %</b>{escape(name)} ({interval_text(value, total)})<br>"
        f"{escape(meaning)}</div>" for name, (value, meaning) in found.items())
    return [f"<p class='headline'><b>{percent(robust.value)} %</b>robust accuracy{escape(under)} "
            f"({interval_text(robust.value, total)})<br><span class='small'>{escape(robust.meaning)} In brackets the "
            f"{INTERVAL}.</span></p>", f"<div class='others'>{others}</div>"]


def _by_surrogate(report: AttackReport) -> list[str]:
    content, total = tables.attack_table(report), report.num_images
    if not content.rows:
        return ["<p>No attack was run.</p>"]
    rows = dict(report.by_surrogate)
    if report.baseline:
        rows["FC classifier"] = {attack: value for attack, value in report.baseline.items() if attack != "clean"}
    groups = {surrogate: {attack: svg.Point.measured(0, value, total) for attack, value in row.items()}
              for surrogate, row in rows.items()}
    attacks = [*dict.fromkeys(attack for group in groups.values() for attack in group if attack != "worst"), "worst"]
    content.rows.extend([surrogate, *(percent(row[attack]) if attack in row else "" for attack in content.head[1:])]
                        for surrogate, row in list(rows.items())[len(content.rows):])
    lines = {"clean": report.clean_accuracy, "robust": report.robust_accuracy}
    return [f"<h2>{content.title}</h2>", f"<p>{content.note} Bars are {INTERVAL}s.</p>",
            svg.dots(groups, attacks, lines, content.note), _legend(attacks, groups), table(*content[2:])]


def _legend(attacks: Sequence[str], surrogates: Iterable[str]) -> str:
    """Returns the colours of the attacks, and a few words on each attack and surrogate."""
    rows = [f"<i style='background:{colour}'></i>{_with_words(name)}" for name, colour in svg.colours(attacks).items()]
    rows += map(_with_words, surrogates)
    return f"<ul class='legend'>{''.join(f'<li>{row}</li>' for row in rows)}</ul>"


def _with_words(name: str) -> str:
    return f"<b>{escape(name)}</b>" + (f": {WORDS[name]}" if name in WORDS else "")


def _convergence(report: AttackReport) -> list[str]:
    steps = tables.falls(report)
    if not steps:
        return []
    return ["<h2>Has it converged?</h2>",
            svg.stairs(report.clean_accuracy, steps, "passes for each image (doubling has one width)",
                       "robust accuracy against the passes spent"),
            f"<p>{tables.convergence_note(report)} The curve is the accuracy in the worst case over all attacks so "
            "far, against the forward and backward passes for each image. The last doubling of the passes is "
            "shaded.</p>"]


def _examples(report: AttackReport) -> list[str]:
    if not report.examples:
        return []
    names = report.protocol.get("class_names") or []

    def class_name(number: int) -> str:
        name = names[number] if 0 <= number < len(names) else ""
        return "not finite" if number < 0 else escape(str(number) if name in ("", str(number)) else f"{number} {name}")

    parts = ["<h2>Misclassified images</h2>", "<div class='examples'>"]
    for example in report.examples:
        label, predicted = class_name(example.label), class_name(example.predicted)
        pictures = "".join(
            f"<span><img src='data:image/png;base64,{escape(data, quote=True)}' alt='{alt} of image {example.image}'>"
            f"{caption}</span>"
            for data, alt, caption in (
                (example.clean, "clean", f"clean: {label}"),
                (example.perturbation, "perturbation", f"perturbation × {example.amplification:.1f}"),
                (example.adversarial, "adversarial", f"adversarial: {predicted}")))
        parts.append(f"<figure><div class='three'>{pictures}</div><figcaption>image {example.image}, class "
                     f"{label}, predicted {predicted}; found by {escape(example.found_by)}</figcaption></figure>")
    return [*parts, "</div><p>The first images that an attack flipped. Captions are predictions of the true model; the "
                    "perturbation is amplified as written, around a mid grey.</p>"]


def _section(content: Table) -> list[str]:
    return [f"<h2>{content.title}</h2>", f"<p>{content.note}</p>" if content.note else "", table(*content[2:])]


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers_from: int = 1) -> str:
    """Returns a table; columns from `numbers_from` on are right-aligned, and known names explained under the mouse."""
    lines = ""
    for tag, row in [("th", head), *(("td", row) for row in rows)]:
        cells = []
        for i, text in enumerate(row):
            kind = " class='number'" if i >= numbers_from and head[i] else ""
            named = text in WORDS and (tag == "th" or i == 0)
            shown = f"<abbr title='{escape(WORDS[text], quote=True)}'>{text}</abbr>" if named else escape(text)
            cells.append(f"<{tag}{kind}>{shown}</{tag}>")
        lines += f"<tr>{''.join(cells)}</tr>"
    return f"<div class='wide'><table>{lines}</table></div>"
