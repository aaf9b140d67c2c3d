"""`Budget`: how much an attack may spend on a batch."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Budget:
    """How much an attack may spend: iterations, target classes where it has targets, rounds where it is run in rounds.

    No rounds given are those of the protocol.

    Raises:
        ValueError: no iterations, a negative number of targets or rounds, or what is no whole number.
    """

    iterations: int
    targets: int = 0
    rounds: int = 0

    def __post_init__(self) -> None:
        whole = all(type(number) is int for number in (self.iterations, self.targets, self.rounds))
        if not whole or self.iterations < 1 or self.targets < 0 or self.rounds < 0:
            raise ValueError(f"{self}: expected at least 1 iteration, and 0 or more targets or rounds, in "
                             "whole numbers")

    @classmethod
    def parse(cls, text: str, times: str = "targets") -> "Budget":
        """Returns the budget that `text` names: iterations, or iterations × `times` as `"100x9"`.

        `times` is `"targets"` or `"rounds"`.
        """
        try:
            iterations, *number = (int(number) for number in text.split("x", 1))
            return cls(iterations, **{times: number[0]} if number else {})
        except ValueError as error:
            raise ValueError(f"cannot read the budget {text!r} ({error}); expected iterations, such as 100, or "
                             f"iterations x {times}, such as 100x9") from error

    def for_classes(self, num_classes: int) -> "Budget":
        """Returns the budget with no more targets than there are wrong classes."""
        return replace(self, targets=min(self.targets, num_classes - 1))

    def queries(self) -> int:
        """Returns about how many queries the attack makes at most in a round, for a progress bar."""
        return max(self.targets, 1) * (self.iterations + 1)
