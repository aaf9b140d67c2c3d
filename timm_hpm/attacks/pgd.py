"""Projected gradient descent, for training and for quick looks; a measurement wants `mixed_surrogate_attack`."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import ask, check_range, check_weights, checked_integer, class_indices
from ..threat import ThreatModel

# Of a normalisation that was undone, also in half precision.
_ROUNDING = 1e-2


def pgd(
        logits_fn: Callable[[Tensor], Tensor],
        images: Tensor,
        labels: Tensor,
        threat: ThreatModel | str,
        *,
        steps: int = 10,
        step_size: float | None = None,
        random_start: bool = True,
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """Returns adversarial images (B, ...) within `threat`, by steps up the gradient of a loss.

    Each step costs one forward and one backward pass, for the inputs only: parameters gather no gradient.

    Arguments:
        logits_fn: pixels (B, ...) in [0, 1] to logits (B, C).
        images: clean pixels (B, ...) in [0, 1].
        labels: (B,), class indices, of any integer dtype.
        threat: the threat model, or a text such as `"Linf:8/255"`.
        steps: number of steps, at least 1.
        step_size: in units of the pixel range; None means 2.5·eps/steps, at most 1.25·eps.
        random_start: from a random point of the ball (global random state) rather than the clean image.
        loss: of logits (B, C) and labels (B,), summed over the images; None means the cross-entropy.

    Raises:
        ValueError: no function or module, images that are no pixels in [0, 1], or labels, threat or steps of another
            type.

    Source: Madry et al., arXiv 1706.06083; Wong et al., arXiv 2001.03994 for the single step.
    """
    checked_integer("steps", steps, 1)
    if not callable(logits_fn):
        raise ValueError(f"logits_fn is {logits_fn!r:.100}; expected a function of pixels, or a module")
    if isinstance(logits_fn, nn.Module):
        check_weights(logits_fn)
    threat, labels = ThreatModel.of(threat), class_indices(labels, images)
    low, high = (images.amin().item(), images.amax().item()) if images.numel() else (0, 1)
    if not (low >= -_ROUNDING and high <= 1 + _ROUNDING):
        raise ValueError(f"images have values from {low:.4g} to {high:.4g}; expected pixels in [0, 1]. Normalisation "
                         "belongs into the model: see timm_hpm.PixelModel")
    return ascend(logits_fn, images, labels, threat, steps, step_size, random_start, loss or _checked_cross_entropy)


def ascend(logits_fn: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, threat: ThreatModel, steps: int = 1,
           step_size: float | None = None, random_start: bool = True,
           loss: Callable[[Tensor, Tensor], Tensor] | None = None) -> Tensor:
    """Returns the images of `pgd`, without its checks, which wait for the device."""
    size = default_step_size(threat, steps) if step_size is None else step_size
    loss = _summed_cross_entropy if loss is None else loss
    x = threat.random_start(images) if random_start else images.clone()
    for _ in range(steps):
        x.requires_grad_()
        with torch.enable_grad():
            gradient, = torch.autograd.grad(loss(ask(logits_fn, x), labels), x)
        x = threat.project(x.detach() + threat.scaled(gradient, size), images)
    return x


def default_step_size(threat: ThreatModel, steps: int) -> float:
    """Returns the step size of `steps` PGD steps, in units of the pixel range: 2.5·eps/steps, at most 1.25·eps."""
    return min(2.5 / steps, 1.25) * threat.eps


def _checked_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    check_range(labels, logits.shape[1])
    return _summed_cross_entropy(logits, labels)


def _summed_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="sum")
