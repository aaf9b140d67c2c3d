"""A report as Markdown. Foreign text (names, folders, flags) is escaped: none of it becomes markup."""

import re
from collections.abc import Iterable, Sequence
from typing import Any, Final

from . import tables
from .compare import Comparison
from .flags import paragraph
from .schema import AttackReport
from .shell import evaluate_command, shell_lines
from .tables import INTERVAL, ROBUST, Table, cell, interval_text, percent

# The character after a bracket makes it a link, and an underscore between letters begins no emphasis.
_MARKUP: Final = re.compile(r"[&<>|`*\\~$]|\](?=[\[(:])|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")


def escaped(value: Any) -> str:
    """Returns a text on one line that Markdown renders as it is, in a table's cell, too.

    Markup becomes character references, line breaks spaces, and characters that cannot be printed U+FFFD.
    """
    text = "".join(char if char.isprintable() else "\ufffd" for char in " ".join(str(value).split()))
    return _MARKUP.sub(lambda match: f"&#{ord(match[0])};", text)


def fenced(text: str, language: str = "") -> str:
    """Returns a code block, whose fence is longer than every row of backticks in the text."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def table(head: Sequence[Any], rows: Iterable[Sequence[Any]], numbers_from: int = 1) -> list[str]:
    """Returns the lines of a table with escaped cells; columns from `numbers_from` on are right-aligned."""
    return ["| " + " | ".join(map(escaped, head)) + " |",
            "|" + "".join("---|" if i < numbers_from else "---:|" for i in range(len(head))),
            *("| " + " | ".join(map(escaped, row)) + " |" for row in rows)]


def section(content: Table) -> list[str]:
    return ["", f"## {content.title}", "", *([content.note, ""] if content.note else []), *table(*content[2:])]


def results(report: AttackReport) -> list[str]:
    """Returns the lines of the tables: accuracy by surrogate and attack, the worst cases, neighbours."""
    attacks = tables.attack_table(report)
    accuracy = "\n".join(table(*tables.accuracy_table(report)[2:])).replace(f"| {ROBUST} |", f"| **{ROBUST}** |")
    neighbours = tables.neighbours_table(report)
    return [attacks.note, "", *table(*attacks[2:]), "", accuracy, *(section(neighbours) if neighbours.rows else [])]


def report_markdown(report: AttackReport) -> str:
    """Returns a report as Markdown: flags, accuracies, the command that repeats them, the protocol and cost."""
    lines = [f"# Mixed Surrogate Attack: {escaped(report.name)}", ""]
    if report.flags:
        lines += [f"**Unreliable**: {tables.UNRELIABLE}", ""] if report.unreliable else []
        lines += [*(f"- [{flag.name}](#{flag.name}): {escaped(flag.text)}" for flag in report.flags), ""]
    if tables.pixels_note(report.protocol):
        lines += [escaped(tables.pixels_note(report.protocol)), ""]
    lines += results(report)
    if tables.convergence_note(report):
        lines += ["", "## Has it converged?", "", tables.convergence_note(report)]
    command = evaluate_command(report.protocol)
    if command:
        lines += ["", "## Command", "", fenced(shell_lines(command), "sh")]
    lines += [*section(tables.protocol_table(report)), *section(tables.cost_table(report))]
    if report.flags:
        lines += ["", "## Warnings"]
        for name in dict.fromkeys(flag.name for flag in report.flags):
            lines += ["", f"### {name}", "", paragraph(name)]
    return "\n".join(lines) + "\n"


def comparison_markdown(comparison: Comparison) -> str:
    """Returns a comparison as Markdown: a table of the accuracies, and one of the differences of the protocols."""
    lines = [f"**Report {name} is unreliable**: see its warnings.\n" for name in comparison.unreliable]
    lines += table(
        ["accuracy", "a % (interval)", "b % (interval)", "b − a (interval)", "right only in a", "right only in b",
         "McNemar p"],
        ([row.name, *(f"{percent(value)} ({interval_text(value, row.num_images)})" for value in (row.a, row.b)),
          f"{100 * row.difference:+.1f} ({100 * row.difference_interval[0]:+.1f} to "
          f"{100 * row.difference_interval[1]:+.1f})", row.only_a, row.only_b, f"{row.p_value:.2g}"]
         for row in comparison.rows))
    lines += ["", f"The same {comparison.rows[0].num_images} images, paired; in brackets the {INTERVAL}, of the "
                  "difference Newcombe's paired one; p is that of McNemar's exact two-sided test."]
    if comparison.differing:
        lines += ["", *table(["protocol", "a", "b"], (
            [name, cell(a), cell(b)] for name, (a, b) in comparison.differing.items()), numbers_from=3)]
    return "\n".join(lines) + "\n"
