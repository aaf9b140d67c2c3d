"""`Convergence`: whether more attacks would have broken more images."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Convergence:
    """When each image fell, and how near the others are to a boundary."""

    # For each image the passes, forward and backward, until it fell: 0 if misclassified when clean, None if robust.
    fell_after: list[float | None]
    spent: float  # passes on an image that did not fall; the largest number of all batches
    margins: list[float]  # for each image the smallest lead of the right logit under attack; 0 if it fell
    clean_margin: float | None  # the median lead on clean images that are classified correctly

    @property
    def fell_lately(self) -> int:
        """Number of images that fell in the last doubling of the passes."""
        return sum(passes is not None and passes > self.spent / 2 for passes in self.fell_after)

    @property
    def survivors(self) -> list[float]:
        """The margins of the robust images, in ascending order."""
        return sorted(margin for margin, passes in zip(self.margins, self.fell_after, strict=True) if passes is None)
