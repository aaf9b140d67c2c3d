"""`python -m timm_hpm <command>`, and the console script `timm-hpm`."""

import sys
from importlib import import_module
from typing import Final, NoReturn

from .console import run_command
from .names import did_you_mean
from .report.shell import DOOR

#: The commands: the function that runs each, in a module of `timm_hpm.commands`, and a line about it.
COMMANDS: Final = {
    "evaluate": ("evaluate:main", "measure the robust accuracy of a model"),
    "sweep": ("evaluate:sweep", "measure it at several radii"),
    "compare": ("evaluate:compare", "print two reports side by side, image by image"),
    "rejudge": ("evaluate:rejudge", "judge the saved candidates of a run again"),
    "sensitivity": ("sensitivity:main", "measure how features and margins of each head move under attack"),
    "train": ("train:main", "train a model adversarially"),
    "convert": ("hub:convert", "convert a public checkpoint into timm's format"),
    "push": ("hub:push", "push a model and its card to the Hugging Face Hub"),
    "pull": ("hub:pull", "download a model from the Hub"),
    "card": ("hub:card", "write the model card of a tag"),
}


def help_text() -> str:
    """Returns the help: examples, and a line for each command."""
    call = " ".join(DOOR)
    lines = "".join(f"    {name:12}{about}\n" for name, (_, about) in COMMANDS.items())
    return (f"examples:\n    {call} evaluate\n    {call} train --pretrained --epochs 5 --lr 0.01\n"
            f"    {call} compare output/a output/b\n\nusage: {call} COMMAND [options]\n\n{lines}\n"
            f"{call} COMMAND --help lists the options of a command.\n")


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns the exit code."""
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] in ("-h", "--help"):
        print(help_text(), end="", file=sys.stdout if words else sys.stderr)
        return 0 if words else 2
    name, *options = words
    if name not in COMMANDS:
        raise ValueError(f"unknown command {name!r}; expected one of {', '.join(COMMANDS)}"
                         f"{did_you_mean(name, COMMANDS)}")
    module, _, function = COMMANDS[name][0].partition(":")
    return getattr(import_module(f".commands.{module}", __package__), function)(options)


def run() -> NoReturn:
    """Runs the command line of this process."""
    run_command("timm_hpm", main)


if __name__ == "__main__":
    run()
