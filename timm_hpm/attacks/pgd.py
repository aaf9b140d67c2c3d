"""Projected gradient descent, for training and for quick looks; a measurement wants `mixed_surrogate_attack`."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..threat import ThreatModel


def pgd(
        logits_fn: Callable[[Tensor], Tensor],
        images: Tensor,
        labels: Tensor,
        threat: ThreatModel,
        *,
        steps: int = 10,
        step_size: float | None = None,
        random_start: bool = True,
) -> Tensor:
    """Returns adversarial images (B, ...) within `threat`, by steps up the gradient of the cross-entropy.

    Each step costs one forward and one backward pass, for the inputs only: parameters gather no gradient. One step
    from a random start is FGSM with random start.

    Arguments:
        logits_fn: pixels (B, ...) in [0, 1] to logits (B, C).
        images: clean pixels (B, ...) in [0, 1].
        labels: (B,), class indices.
        steps: number of steps, at least 1.
        step_size: in units of the pixel range; None means 2.5·eps/steps, at most 1.25·eps.
        random_start: from a random point of the ball (global random state) rather than the clean image.

    Source: Madry et al., arXiv 1706.06083; Wong et al., arXiv 2001.03994 for the single step.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}; expected at least 1")
    size = min(2.5 / steps, 1.25) * threat.eps if step_size is None else step_size
    x = threat.random_start(images) if random_start else images.clone()
    for _ in range(steps):
        x.requires_grad_()
        with torch.enable_grad():
            loss = F.cross_entropy(logits_fn(x), labels, reduction="sum")
        gradient, = torch.autograd.grad(loss, x)
        x = threat.project(x.detach() + threat.scaled(gradient, size), images)
    return x
