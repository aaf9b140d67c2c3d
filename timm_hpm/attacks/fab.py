"""FAB, which looks for the nearest point that is misclassified, in the ball or not.

Each step goes to the nearest point of a hyperplane that approximates the decision boundary. AutoAttack finds it by
sorting the pixels, ours by Newton's method in a few passes over them; both agree up to rounding.

Source: Croce and Hein, arXiv 1907.02044; pyautoattack (tests/test_autoattack.py).
"""

import math
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from ..threat import ThreatModel, per_image
from .losses import target_margin

#: How far beyond the hyperplane a step goes: the boundary is not flat.
_OVERSHOOT: Final = 1.05
#: Part of the way from the clean image that is left after a step back.
_STEP_BACK: Final = 0.9
#: Largest weight of the clean image's projection against the latest point's.
_LARGEST_BIAS: Final = 0.1
#: Steps of Newton's method between two looks whether it has ended.
_STEPS_A_LOOK: Final = 5


@torch.no_grad()
def fab(
        logits_fn: Callable[[Tensor], Tensor],
        clean: Tensor,
        labels: Tensor,
        targets: Tensor,
        threat: ThreatModel | str,
        iterations: int,
) -> Tensor:
    """Returns the nearest misclassified points found (R, ...), or the clean image if there is none.

    Every iteration costs two queries, one of them with a gradient.

    Arguments:
        logits_fn: pixels (R, ...) in [0, 1] to logits (R, C).
        clean: (R, ...), pixels in [0, 1].
        labels: (R,), class indices.
        targets: (R,), the classes whose boundaries are searched; a point of any wrong class counts.
        threat: a threat model or its text, of which only the norm matters.
        iterations: number of steps, at least 1.
    """
    threat = ThreatModel.of(threat)
    found, x = clean, clean
    nearest = torch.full_like(labels, math.inf, dtype=clean.dtype)
    both = torch.stack([clean, clean])
    for _ in range(iterations):
        lead, gradient = _target_lead(logits_fn, x, labels, targets)
        # Of both points the distance is to the plane on which the approximation at x has no lead.
        leads = torch.stack([lead, lead + (gradient * (clean - x)).flatten(1).sum(dim=1)])
        both[0] = x
        steps = step_to_plane(both, gradient, leads, threat.norm)
        size, clean_size = threat.size(steps.flatten(0, 1)).clamp(min=1e-8).chunk(2)
        bias = per_image((size / (size + clean_size)).clamp(max=_LARGEST_BIAS), x)
        moved, clean_moved = steps.mul_(_OVERSHOOT).add_(both)
        x = torch.lerp(moved, clean_moved, bias).clamp_(0, 1)
        fooled = logits_fn(x).argmax(dim=1) != labels
        distance = threat.distance(x, clean)
        nearer = fooled & (distance < nearest)
        nearest = torch.where(nearer, distance, nearest)
        found = torch.where(per_image(nearer, x), x, found)
        x = torch.lerp(clean, x, per_image(torch.where(fooled, _STEP_BACK, 1.0).to(x.dtype), x))
    return found


def step_to_plane(points: Tensor, normals: Tensor, offsets: Tensor, norm: str) -> Tensor:
    """Returns the shortest steps, in a norm, from `points` to hyperplanes, with pixels staying in [0, 1].

    If no image is on the plane, the step goes to the one nearest to it; along a normal of zeros there is no step.

    Arguments:
        points: (R, ...), pixels in [0, 1], or (K, R, ...): K points for each normal.
        normals: (R, ...), w of the planes, finite.
        offsets: (R,) or (K, R), o: a step d leads to the plane if w·d = −o.
        norm: `"Linf"` or `"L2"`.
    """
    w = normals.flatten(1)
    # The plane does not change with its normal's size, which can be such that its square underflows.
    largest = w.abs().amax(dim=1, keepdim=True)
    largest = torch.where(largest > 0, largest, 1)
    needed, w = offsets.abs() / largest.squeeze(1), w / largest
    slopes = w.abs()
    # The direction of each pixel: 1, −1, or 0 if it does not matter to the plane.
    way = w.sign() * (1 - 2 * (offsets > 0).to(w.dtype)).unsqueeze(-1)
    x = points.reshape(*offsets.shape, -1)
    room = torch.gt(way, 0, out=torch.empty_like(way)).sub_(x).abs_()
    if norm == "Linf":
        # All pixels go equally far, or to the end of their range.
        distance = _shared_size(slopes, room, needed)
    else:
        # All pixels go along the normal, or to the end of their range; those with a slope of 0 stay.
        asked = slopes > 0
        ends = torch.where(asked, room / slopes, 0).clamp_(max=torch.finfo(room.dtype).max)
        distance = _shared_size(slopes.square(), ends, needed)
        distance = torch.where(asked, slopes * distance, 0)
    return torch.minimum(distance, room).mul_(way).view_as(points)


def _shared_size(slopes: Tensor, ends: Tensor, needed: Tensor) -> Tensor:
    """Returns the smallest s ≥ 0 (..., R, 1) with Σ slopes · min(s, ends) = needed, or infinity.

    `slopes` (R, D), `ends` (..., R, D) and `needed` (..., R) are not negative.
    """
    # Masks of numbers and products: on a CPU torch.where takes several times as long.
    needed, whole, mask = needed.unsqueeze(-1), slopes * ends, torch.empty_like(ends)
    slope = torch.gt(ends, 0, out=mask).mul_(slopes).sum(dim=-1, keepdim=True)
    size = torch.where(needed > 0, needed / slope, 0)
    step = 0
    while True:
        step += 1
        # Newton's method on a concave function, from the left: sizes only grow, and in steps from end to end. Once the
        # slope stays, further steps change nothing; on a GPU it is cheaper to make some than to look after each.
        before, slope = slope, torch.gt(ends, size, out=mask).mul_(slopes).sum(dim=-1, keepdim=True)
        if (ends.is_cpu or step % _STEPS_A_LOOK == 0) and torch.equal(slope, before):
            return size
        gone = torch.le(ends, size, out=mask).mul_(whole).sum(dim=-1, keepdim=True)
        new = (needed - gone) / slope
        size = torch.where(new > size, new, size)


@torch.enable_grad()
def _target_lead(logits_fn: Callable[[Tensor], Tensor], x: Tensor, labels: Tensor,
                 targets: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the `target_margin` (R,) and its gradient (R, ...), with zeros for values that are not finite."""
    x = x.detach().requires_grad_()
    lead = target_margin(labels, targets)(logits_fn(x))
    gradient, = torch.autograd.grad(lead.sum(), x)
    return lead.detach(), gradient.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
