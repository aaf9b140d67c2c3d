"""The files of a report: JSON for programs, Markdown and HTML for readers."""

import os

from ..files import writable_folder, write_text
from .html import report_page
from .markdown import report_markdown
from .schema import AttackReport


def write_report(report: AttackReport, folder: str | os.PathLike) -> None:
    """Writes report.md, report.html and, last, report.json, each whole or not at all.

    Makes the folder if it is missing.
    """
    place = writable_folder(folder)
    write_text(place / "report.md", report_markdown(report))
    write_text(place / "report.html", report_page(report))
    report.save(place / "report.json")
