"""How the commands of this package print and end."""

import errno
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, Final, NoReturn

from .files import use_any_console, writing
from .guards import last_words

_OF_PRINTING: Final = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EPIPE)


def run_command(name: str, main: Callable[[], int]) -> NoReturn:
    """Runs a command's `main` and exits with its code, or with one line on standard error that names the error."""
    sys.stdout, sys.stderr = (_usable(number, stream) for number, stream in ((1, sys.stdout), (2, sys.stderr)))
    use_any_console()
    code: int | str
    try:
        code = main()
    except (ValueError, OSError, ModuleNotFoundError, FloatingPointError) as error:
        # An error of a file names it, one of printing does not.
        printing = isinstance(error, OSError) and error.filename is None and error.errno in _OF_PRINTING
        code = last_words(name, OSError(f"cannot write standard output: {error}") if printing else error)
    except KeyboardInterrupt:
        print(f"{name}: stopped", file=sys.stderr)
        code = 128 + signal.SIGINT
    try:
        with writing("standard output"):
            sys.stdout.flush()
    except OSError as error:
        code = f"{name}: {error}"
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
