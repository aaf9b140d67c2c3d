"""`Budget`: the limits of an attack on a batch."""

import re
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Budget:
    """Limits of an attack: iterations, target classes if it is targeted, and restarts from other random numbers.

    Each restart has candidates of its own, which are judged by themselves.

    Raises:
        ValueError: if iterations or restarts are below 1, targets negative, or a number is not whole.
    """

    iterations: int
    targets: int = 0
    restarts: int = 1

    def __post_init__(self) -> None:
        whole = all(type(number) is int for number in (self.iterations, self.targets, self.restarts))
        if not whole or self.iterations < 1 or self.targets < 0 or self.restarts < 1:
            raise ValueError(f"{self!r}: expected at least 1 iteration and 1 restart, and 0 or more targets, in whole "
                             "numbers")

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """Returns the budget of a text: iterations, targets after an x, restarts after an r, such as `"100x9r2"`."""
        parts = re.fullmatch(r"(\d{1,9})(?:x(\d{1,9}))?(?:r(\d{1,9}))?", text)
        try:
            if parts is None:
                raise ValueError("it is malformed")
            return cls(int(parts[1]), int(parts[2] or 0), int(parts[3] or 1))
        except ValueError as error:
            raise ValueError(f"cannot read the budget {text!r:.100} ({error}); expected iterations, and targets after "
                             "an x or restarts after an r, such as 100, 100x9 or 100x9r2") from error

    def __str__(self) -> str:
        return (f"{self.iterations}" + (f"x{self.targets}" if self.targets else "")
                + (f"r{self.restarts}" if self.restarts > 1 else ""))

    def for_classes(self, num_classes: int) -> "Budget":
        """Returns the budget with no more targets than there are wrong classes."""
        return replace(self, targets=min(self.targets, num_classes - 1))

    def queries(self) -> int:
        """Returns about how many queries a restart makes at most, for a progress bar."""
        return max(self.targets, 1) * (self.iterations + 1)
