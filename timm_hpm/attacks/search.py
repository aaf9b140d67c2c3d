"""Margin search, a local search that spends its steps on the images and classes nearest to a decision boundary.

Ten steps towards each target find the nearest one. From then on an ascent starts at the best point of its image with
a fifth of the pixels at random again (L2: a few pixels, anywhere in [0, 1]); the images that are far from a boundary
leave the search one after another. Ascents from random points alone break fewer images at equal cost.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from ..threat import ThreatModel, per_image
from .apgd import NEW_STEP, Ball, put, query
from .losses import target_margin

#: Steps of an ascent from a random start towards each target, and of an ascent from a changed best point.
FIRST_STEPS: Final = 10
NEXT_STEPS: Final = 20
#: Part of the pixels of a best point that are drawn anew under Linf; under L2, how many radii they are from the clean
#: image before their projection.
_REDRAWN: Final = 0.2
_REDRAWN_RADII: Final = 2.0
#: The targets that all images are led to; the others, and the first round, are for the nearest part of the images left.
#: Later rounds serve fewer and fewer, as only images near a boundary fall in them: this part times the cube of the part
#: of the rounds that is left.
_FOR_ALL: Final = 3
_NEAR: Final = 0.5
_MEAN_CUBE: Final = 0.25
#: Of the repeated search: the steps of a repetition, their fewest, and how many times those to the last success.
_REPEATED_STEPS: Final = 400
_FEWEST: Final = 6
_PATIENCE: Final = 2


def margin_search(
        logits_fn: Callable[[Tensor, Tensor], Tensor],
        rows: Tensor,
        clean: Tensor,
        labels: Tensor,
        targets: Tensor,
        threat: ThreatModel | str,
        steps: int,
) -> Tensor:
    """Returns a misclassified point (R, ...) of each image, or its point of largest margin if none is found.

    Arguments:
        logits_fn: some of the `rows` (r,), the images' names, and pixels (r, ...) for them, to logits (r, C).
        clean: (R, ...), pixels in [0, 1], with `labels` (R,).
        targets: (R, T), wrong classes, the most promising first.
        steps: steps per image, on average over the images that are not broken; an ascent costs one query more.
    """
    search = _Search(logits_fn, rows, clean, labels, targets, ThreatModel.of(threat))
    search.run(steps)
    return search.points


def repeated_search(logits_fn: Callable[[Tensor, Tensor], Tensor], rows: Tensor, clean: Tensor, labels: Tensor,
                    targets: Tensor, threat: ThreatModel | str, steps: int) -> Tensor:
    """Returns points as `margin_search`, by searches of 400 steps, each from new random points for the images left.

    Ends if the later half of at least six searches broke no image. `steps` limits the steps per image.
    """
    search = _Search(logits_fn, rows, clean, labels, targets, ThreatModel.of(threat))
    last_success = _FEWEST // _PATIENCE
    for number in range(1, max(steps // _REPEATED_STEPS, 1) + 1):
        left = search.nearest(1.0)
        if not len(left) or number > _PATIENCE * last_success:
            break
        again = replace(search, rows=rows[left], clean=clean[left], labels=labels[left], targets=targets[left])
        again.run(min(steps, _REPEATED_STEPS))
        search.keep(left, again.points, again.best, again.fooled)
        last_success = max(number, last_success) if again.fooled.any() else last_success
    return search.points


@dataclass
class _Search:
    """The images of a search: their best points and margins, and whether they are fooled."""

    logits_fn: Callable[[Tensor, Tensor], Tensor]
    rows: Tensor
    clean: Tensor
    labels: Tensor
    targets: Tensor
    threat: ThreatModel

    def __post_init__(self) -> None:
        self.points = self.clean.clone()
        self.fooled = torch.zeros_like(self.labels, dtype=torch.bool)
        self.best = torch.full_like(self.labels, -math.inf, dtype=self.clean.dtype)
        self.margins = torch.full_like(self.targets, -math.inf, dtype=self.clean.dtype)

    def run(self, steps: int) -> None:
        """Ascends from a random point to each target, then from changed best points to the nearest targets."""
        parts = [1.0 if number < _FOR_ALL else _NEAR for number in range(self.targets.shape[1])]
        for number, part in enumerate(parts):
            left = self.nearest(part)
            self.ascend(left, torch.full_like(left, number), self.random_start(left), FIRST_STEPS)
        rounds = math.ceil(max(steps - FIRST_STEPS * sum(parts), 0) / (_NEAR * _MEAN_CUBE * NEXT_STEPS))
        for done in range(rounds):
            left = self.nearest(_NEAR * (1 - done / rounds) ** 3)
            self.ascend(left, self.margins[left].argmax(dim=1), self.near_best(left), NEXT_STEPS)

    def nearest(self, part: float) -> Tensor:
        """Returns the images (r,) of largest margin, ascending: a `part` of those that are not fooled."""
        left = (~self.fooled).nonzero().squeeze(1)
        served = math.ceil(part * len(left))
        return left[self.best[left].argsort(descending=True, stable=True)[:served]].sort().values

    def random_start(self, images: Tensor) -> Tensor:
        return Ball(self.clean[images], self.threat).random_start().clamp_(0, 1)

    def near_best(self, images: Tensor) -> Tensor:
        """Returns starts (r, ...): the best points with some pixels at random, under Linf on the surface."""
        clean, best = self.clean[images], self.points[images]
        ball = Ball(clean, self.threat)
        drawn, part = torch.rand_like(best), torch.full_like(per_image(self.best[images], best), _REDRAWN)
        if self.threat.norm == "Linf":
            drawn = torch.where(drawn > 0.5, ball.high, ball.low)
        else:  # small changes of many pixels seldom leave the basin of the best point
            part = (_REDRAWN_RADII * self.threat.eps) ** 2 / per_image(
                (drawn - clean).square().flatten(1).sum(dim=1), best)
        return ball.project(torch.where(torch.rand_like(best) < part, drawn, best))

    def ascend(self, images: Tensor, numbers: Tensor, start: Tensor, steps: int) -> None:
        """Raises the margins of the targets of those `numbers` (r,), with shorter and shorter steps."""
        if not len(images):
            return
        rows, labels = self.rows[images], self.labels[images]
        ball = Ball(self.clean[images], self.threat)
        loss_fn = target_margin(labels, self.targets[images, numbers])
        x = before = start
        margins, points, fooled = torch.full_like(self.best[images], -math.inf), start.clone(), self.fooled[images]
        for i in range(steps + 1):
            margin, gradient, wrong = query(lambda pixels: self.logits_fn(rows, pixels), loss_fn, x, labels,
                                            with_gradient=i < steps)
            # The first misclassified point counts, or else the point of largest margin.
            put(points, ~fooled & (wrong | (margin > margins)), x)
            margins, fooled = margins.maximum(margin), fooled | wrong
            if i == steps:
                break
            size = torch.full_like(per_image(margin, x), self.threat.eps * (1 + math.cos(math.pi * i / steps)))
            moved = ball.project(ball.step(gradient, size).add_(x))
            if i:
                moved = ball.project(moved.sub_(x).mul_(NEW_STEP).add_(x).add_(x - before, alpha=1 - NEW_STEP))
            before, x = x, moved
        self.margins[images, numbers] = self.margins[images, numbers].maximum(margins)
        self.keep(images, points, margins, fooled)

    def keep(self, images: Tensor, points: Tensor, margins: Tensor, fooled: Tensor) -> None:
        """Takes the `points` (r, ...) that fool, or have larger margins, for the `images` (r,)."""
        better = per_image(fooled | (margins > self.best[images]), points)
        self.points[images] = torch.where(better, points, self.points[images])
        self.best[images] = self.best[images].maximum(margins)
        self.fooled[images] = fooled
