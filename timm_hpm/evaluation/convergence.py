"""`measured_convergence`: when each image fell, and the margins of the others, from the steps of a run."""

from collections.abc import Sequence
from statistics import median

from ..report import Convergence
from ..report.metrics import right_in_all
from .resume import Step


def measured_convergence(steps: Sequence[Step]) -> Convergence:
    """Returns the `Convergence` of the steps of all batches, in order."""
    fell_after: list[float | None] = []
    margins: list[float] = []
    clean: list[float] = []
    spent = {True: 0.0, False: 0.0}  # by whether an image of the batch is left
    batches: list[list[Step]] = []
    for step in steps:
        if step.attack == "clean":
            batches.append([])
        batches[-1].append(step)
    for batch in batches:
        passes = 0.0
        clean += [margin for margin in batch[0].margins if margin > 0]
        fallen: list[float | None] = [None] * len(batch[0].margins)
        for step in batch:
            passes += (step.cost["forward_passes"] + step.cost["backward_passes"]) / max(step.attacked, 1)
            right = right_in_all(step.correct.values())
            fallen = [passes if before is None and not held else before
                      for before, held in zip(fallen, right, strict=True)]
        fell_after += fallen
        margins += [float(f"{min(row):.6g}") for row in zip(*(step.margins for step in batch), strict=True)]
        spent[None in fallen] = max(spent[None in fallen], passes)
    return Convergence(fell_after, spent[True] or spent[False], margins, median(clean) if clean else None)
