"""Adversarial weight perturbation, which any objective can be trained with. Source: Wu et al., arXiv 2004.05884."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .distributed import average_


@contextmanager
def perturbed_weights(module: nn.Module, loss: Callable[[], Tensor], gamma: float) -> Iterator[None]:
    """Moves the weights of `module` up the gradient of a `loss` of them within the block, and back exactly at its end.

    Each weight of two dimensions or more moves by `gamma` times its own norm; a `gamma` of 0 makes no pass. BatchNorm's
    running statistics do not change. With several processes all move alike, by the mean of their gradients.
    """
    if not gamma:
        yield
        return
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    weights = [weight for weight in module.parameters() if weight.requires_grad and weight.ndim > 1]
    gradients = torch.autograd.grad(loss(), weights, allow_unused=True)
    used = [(weight, gradient.contiguous()) for weight, gradient in zip(weights, gradients, strict=True)
            if gradient is not None]
    average_([gradient for _, gradient in used])
    before = [weight.detach().clone() for weight, _ in used]
    with torch.no_grad():
        for buffer, value in buffers:
            buffer.copy_(value)
        for weight, gradient in used:
            length = gradient.norm()
            # An overflow of float16, or a gradient of 0, moves nothing.
            weight.add_(torch.where(length.isfinite() & (length > 0), gradient * (gamma * weight.norm() / length), 0.0))
    try:
        yield
    finally:
        with torch.no_grad():
            for (weight, _), value in zip(used, before, strict=True):
                weight.copy_(value)
