"""`Flag`: a named warning of an evaluation. flags.md explains each name."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

#: The name of every flag, and whether it makes a report unreliable.
FLAGS: Final = dict.fromkeys((
    "clean-near-chance", "labels-off-by-one", "no-gradient", "zero-gradient", "random-forward", "batch-dependent",
    "changes-state", "black-box-stronger", "rough-gradient", "non-finite-logits", "batch-not-finite", "probabilities",
), True) | dict.fromkeys((
    "lost-head", "averaged-draws", "saturated-softmax", "zero-loss-gradient"), False)


@dataclass(frozen=True)
class Flag:
    """A named warning of an evaluation."""

    name: str  # one of `FLAGS`
    text: str  # the observation, with its numbers

    def __post_init__(self) -> None:
        if self.name not in FLAGS:
            raise ValueError(f"unknown flag {self.name!r}; expected one of {', '.join(FLAGS)}")

    @property
    def unreliable(self) -> bool:
        """Whether a report with this flag is unreliable."""
        return FLAGS[self.name]


def paragraph(name: str) -> str:
    """Returns the paragraph of flags.md on a flag, in Markdown: its meaning and the remedy."""
    text = Path(__file__).with_name("flags.md").read_text(encoding="utf-8")
    return dict(re.findall(r"^## ([a-z-]+)\n\n(.+?)\n(?=\n#|\Z)", text, re.MULTILINE | re.DOTALL))[name]
