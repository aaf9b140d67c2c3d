"""How the commands of this package print and end."""

import errno
import html
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, NoReturn

import torch
from torch import nn
from tqdm import tqdm

from .files import writing
from .guards import without_tokens

_OF_PRINTING: Final = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EPIPE)
_READER_GONE: Final = 128 + 13  # SIGPIPE, which Windows has not


def run_command(name: str, main: Callable[[], int]) -> NoReturn:
    """Runs a command's `main` and exits with its code, or with one line on standard error that names the error."""
    # If the reader of the output has gone, such as `| head -1`, it ends without a word, as a process by SIGPIPE.
    sys.stdout, sys.stderr = (_usable(number, stream) for number, stream in ((1, sys.stdout), (2, sys.stderr)))
    for stream in (sys.stdout, sys.stderr):  # an encoding such as cp1252 lacks the "−"
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")
    code: int | str
    try:
        code = main()
    except (ValueError, OSError, ModuleNotFoundError, FloatingPointError) as error:
        # An error of a file names it, one of printing does not.
        printing = isinstance(error, OSError) and error.filename is None and error.errno in _OF_PRINTING
        code = _READER_GONE if isinstance(error, BrokenPipeError) and printing else (
            f"{name}: " + without_tokens(f"cannot write standard output: {error}" if printing else str(error)))
    except KeyboardInterrupt:
        print(f"{name}: stopped", file=sys.stderr)
        code = 128 + signal.SIGINT
    try:
        with writing("standard output"):
            sys.stdout.flush()
    except OSError as error:
        code = _READER_GONE if isinstance(error.__cause__, BrokenPipeError) else f"{name}: {error}"
        # Python would try once more as it exits, and print a traceback.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def _usable(number: int, stream: Any) -> Any:
    """Returns a standard stream of the file descriptor `number`, or one that discards all if that is closed (None)."""
    if stream is not None:
        return stream
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.fstat(number)
    except OSError:
        os.dup2(null, number)  # or the next file that is opened would get the output of libraries
    return open(null, "w", encoding="utf-8")


def facts(values: Mapping[str, str]) -> str:
    """Returns names and values, a line each, in two columns."""
    width = max(map(len, values))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in values.items())


def duration(seconds: float) -> str:
    """Returns a time as people say it, such as `"40 s"`, `"12 min"` or `"3.5 h"`."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 72 * 3600 else f"{seconds / 86400:.1f} days"


def device_text(device: torch.device, processes: int = 1) -> str:
    """Returns the device, with a GPU's name or a CPU's threads, and the number of processes if there are several."""
    if device.type == "cuda":
        text = f"{device}, {torch.cuda.get_device_name(device)}"
    else:
        threads = torch.get_num_threads()
        text = f"{device}, {threads} thread{'s' * (threads > 1)}"
    return text if processes == 1 else f"{text}, {processes} processes"


def show(markdown: str) -> None:
    """Prints a text in Markdown: as it is into a file, with aligned tables and without its marks in a terminal."""
    print(rendered(markdown) if sys.stdout.isatty() else markdown)


def rendered(markdown: str) -> str:
    """Returns a text in Markdown for a terminal: tables in columns, code indented, headings without marks."""
    lines: list[str] = []
    table: list[str] = []
    fence = ""
    for line in [*markdown.splitlines(), ""]:
        if line.startswith("|") and not fence:
            table.append(line)
            continue
        if table:
            lines += _columns(table)
            table = []
        if line.startswith("```") and (not fence or line == fence):
            fence = "" if fence else line.rstrip("abcdefghijklmnopqrstuvwxyz")
        else:
            lines.append(f"    {line}" if fence else _unmarked(line))
    return "\n".join(lines[:-1])


def _columns(rows: Sequence[str]) -> list[str]:
    """Returns the rows of a table in Markdown in columns, numbers to the right."""
    parts = [[_unmarked(cell) for cell in re.split(r"(?<!\\)\|", row.strip()[1:-1])] for row in rows]
    right = [cell.endswith(":") for cell in parts[1]]
    cells = [parts[0], *parts[2:]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.rjust(width) if number else cell.ljust(width)
                       for cell, width, number in zip(row, widths, right, strict=True)).rstrip() for row in cells]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]] if any(parts[0]) else lines[1:]


def _unmarked(text: str) -> str:
    """Returns a line or cell of Markdown without marks and escapes, and without characters that move a terminal."""
    text = re.sub(r"^#+ +|\*\*|(?<!\\)`", "", text.strip())
    text = re.sub(r"(?<!\\)\[([^\]]+)\]\(([^)]+)\)", r"\1 (\2)", text)
    text = html.unescape(re.sub(r"\\([^\w\s])", r"\1", text))
    return "".join(character if character.isprintable() else "?" for character in text)


@contextmanager
def images_bar(model: nn.Module, text: str, shown: bool) -> Iterator[None]:
    """Shows a bar of the images that go through a model in the block; its total is unknown."""
    if not shown:
        yield
        return
    with tqdm(desc=text, unit="image", leave=False) as bar, model.register_forward_pre_hook(
            lambda module, inputs: bar.update(sum(map(len, inputs[:1]))) and None):
        yield
