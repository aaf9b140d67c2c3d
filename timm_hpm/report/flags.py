"""`Flag`: a named warning of an evaluation; docs/flags.md has a paragraph for each name."""

from dataclasses import dataclass
from typing import Final, NamedTuple


class FlagKind(NamedTuple):
    """Whether a flag makes a report unreliable, and what it means in a sentence."""

    unreliable: bool
    meaning: str


#: Every name that a flag may have.
FLAGS: Final = {
    "no-gradient": FlagKind(True, "The logits do not depend on the pixels in a way that can be differentiated, so only "
                                  "attacks without gradients were run."),
    "zero-gradient": FlagKind(True, "The gradient by which attacks find their way is zero or not finite, so what they "
                                    "do not break proves nothing."),
    "random-forward": FlagKind(True, "The model answers the same images differently when asked again."),
    "batch-dependent": FlagKind(True, "An image's answer depends on the other images of its batch, and the attacks do "
                                      "not expect it to."),
    "changes-state": FlagKind(True, "The model changes its own buffers when it answers, so it is not the same model "
                                    "throughout."),
    "black-box-stronger": FlagKind(True, "Square, which needs no gradient, broke images that no attack with gradients "
                                         "broke: the gradients mislead."),
    "rough-gradient": FlagKind(True, "At images that were not broken, small steps up the gradient do not do what it "
                                     "says they will: it leads attacks astray."),
    "non-finite-logits": FlagKind(True, "The model, or a surrogate of it, answered NaN or infinity under attack. Such "
                                        "an answer of the model counts as an error; a search that meets one might have "
                                        "found more."),
    "saturated-softmax": FlagKind(False, "The softmax of some answers is one-hot in float32, which leaves the "
                                         "cross-entropy no gradient; the other losses still have one."),
    "zero-loss-gradient": FlagKind(False, "At some step the loss of some image had a gradient of zero."),
}


@dataclass(frozen=True)
class Flag:
    """A named warning of an evaluation.

    Arguments:
        name: one of `FLAGS`.
        text: what was seen, with its numbers.

    Raises:
        ValueError: an unknown name.
    """

    name: str
    text: str

    def __post_init__(self) -> None:
        if self.name not in FLAGS:
            raise ValueError(f"unknown flag {self.name!r}; expected one of {', '.join(FLAGS)}")

    @property
    def unreliable(self) -> bool:
        """Whether a report with this flag is not to be relied on."""
        return FLAGS[self.name].unreliable

    @property
    def link(self) -> str:
        """Where its paragraph is, from the project's root."""
        return f"docs/flags.md#{self.name}"

    def to_markdown(self) -> str:
        """Returns the flag as Markdown, its name a link to its paragraph."""
        return f"[{self.name}]({self.link}): {self.text}"
