"""`Parser`: the command line of a command, whose help starts with examples."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..models.constructors import named_again
from ..names import did_you_mean
from ..report.shell import DOOR, shell_line


class Parser(argparse.ArgumentParser):
    """The parser of `python -m timm_hpm <command>`; an unknown option is answered with the nearest ones.

    `examples` are the options of some calls, for the help's first lines, and `about` is its text.
    """

    def __init__(self, command: str, examples: Sequence[str], about: str):
        self.call = " ".join([*DOOR, command])
        super().__init__(prog=self.call, description=about, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)
        self.examples = examples

    def format_help(self) -> str:
        """Returns the examples, and then argparse's own help."""
        self.format_usage()  # argparse's help shows `self.usage`
        calls = "".join(f"    {self.call} {example}".rstrip() + "\n" for example in self.examples)
        return f"examples:\n{calls}\n{super().format_help()}"

    def format_usage(self) -> str:
        """Returns the call in one line: the help lists the options."""
        words = [str(action.metavar or action.dest) for action in self._actions if not action.option_strings]
        self.usage = " ".join([self.call, *words, "[options]"])
        return super().format_usage()

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Returns the values; ends the process with the code 2 and a line that names the nearest options."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            known = [name for action in self._actions for name in action.option_strings]
            near = did_you_mean(unknown[0].partition("=")[0], known)
            self.error(f"unrecognized arguments: {' '.join(unknown)}{near}; see --help")
        return found


def resuming(command: str, config: Any, output: Path, *more: str) -> str:
    """Returns the call of a command that goes on with a stopped run, for as long again if it has a limit."""
    limit = ["--time-limit", config.time_limit] if config.time_limit else []
    named = named_again(config.model, {"model": config.model}, output)
    return shell_line([*DOOR, command, "--resume", str(output), *named, *more, *limit])
