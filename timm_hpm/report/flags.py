"""`Flag`: a named warning of an evaluation. flags.md explains each name."""

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

#: The name of every flag, and whether it makes a report unreliable.
FLAGS: Final = {
    "clean-near-chance": True,
    "labels-off-by-one": True,
    "no-gradient": True,
    "zero-gradient": True,
    "random-forward": True,
    "batch-dependent": True,
    "changes-state": True,
    "black-box-stronger": True,
    "rough-gradient": True,
    "non-finite-logits": True,
    "batch-not-finite": True,
    "probabilities": True,
    "lost-head": False,
    "saturated-softmax": False,
    "zero-loss-gradient": False,
}


@dataclass(frozen=True)
class Flag:
    """A named warning of an evaluation.

    Arguments:
        name: one of `FLAGS`.
        text: the observation, with its numbers.

    Raises:
        ValueError: if the name is unknown.
    """

    name: str
    text: str

    def __post_init__(self) -> None:
        if self.name not in FLAGS:
            raise ValueError(f"unknown flag {self.name!r}; expected one of {', '.join(FLAGS)}")

    @property
    def unreliable(self) -> bool:
        """Whether a report with this flag is unreliable."""
        return FLAGS[self.name]


def paragraph(name: str) -> str:
    """Returns the paragraph of flags.md on a flag, in Markdown: its meaning and the remedy."""
    return _paragraphs()[name]


@cache
def _paragraphs() -> dict[str, str]:
    text = Path(__file__).with_name("flags.md").read_text(encoding="utf-8")
    parts = re.findall(r"^## ([a-z-]+)\n\n(.+?)\n(?=\n#|\Z)", text, re.MULTILINE | re.DOTALL)
    return dict(parts)
