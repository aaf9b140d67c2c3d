"""`Convergence`: whether more attacks would have broken more images."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Convergence:
    """When each image fell, and how near the others are to a boundary.

    Arguments:
        fell_after: for each image the forward and backward passes that its attacks spent on it until it fell; 0 if it
            is misclassified when clean, None if it is robust.
        spent: passes that the attacks spent on an image that did not fall; the largest number of all batches.
        margins: for each image the smallest lead of the right logit over all others under attack; 0 if it fell.
        clean_margin: the median lead on clean images that are classified correctly; None without one.
    """

    fell_after: list[float | None]
    spent: float
    margins: list[float]
    clean_margin: float | None

    @property
    def fell_lately(self) -> int:
        """Number of images that fell in the last doubling of the passes."""
        return sum(passes is not None and passes > self.spent / 2 for passes in self.fell_after)

    @property
    def survivors(self) -> list[float]:
        """The margins of the robust images, in ascending order."""
        return sorted(margin for margin, passes in zip(self.margins, self.fell_after, strict=True) if passes is None)
