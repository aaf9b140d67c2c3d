"""APGD, the gradient ascent with a step size that adapts itself, bit by bit the same as pyautoattack's.

Source: Croce and Hein, arXiv 2003.01690, section 4 (tests/test_autoattack.py).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..threat import ThreatModel, per_image

#: Part of a step that is new; the rest is the step before it.
NEW_STEP = 0.75
#: Part of the steps since the last checkpoint that must have raised the loss, or the step size is halved.
_RAISING = 0.75


class Ascent(NamedTuple):
    """The result of APGD for R images."""

    largest: Tensor  # (R, ...), the points of largest loss on the way
    loss: Tensor  # (R,), that loss
    fooling: Tensor  # (R, ...), the last misclassified points on the way, or the start if there was none
    fooled: Tensor  # (R,), whether there was one
    without_gradient: int  # images whose gradient was zero at the start


def apgd(
        logits_fn: Callable[[Tensor], Tensor],
        clean: Tensor,
        labels: Tensor,
        threat: ThreatModel | str,
        iterations: int,
        loss_fn: Callable[[Tensor], Tensor],
        start: Tensor | None = None,
) -> Ascent:
    """Returns the result of `iterations` steps up the gradient; costs one query more than that.

    Arguments:
        logits_fn: pixels (R, ...) in [0, 1] to logits (R, C).
        clean: (R, ...), pixels in [0, 1].
        labels: (R,), class indices.
        threat: the threat model, or a text such as `"Linf:8/255"`.
        iterations: number of steps, at least 1.
        loss_fn: logits (R, C) to the loss (R,) to maximise.
        start: (R, ...), pixels; None means a random point on the surface of the ball.
    """
    threat = ThreatModel.of(threat)
    ball = Ball(clean, threat)
    x = (ball.random_start() if start is None else start.clone()).clamp_(0, 1)
    loss, gradient, wrong = query(logits_fn, loss_fn, x, labels)
    without_gradient = int((gradient.flatten(1).abs().sum(dim=1) == 0).sum())
    fooling, fooled = x.clone(), wrong
    best, best_loss, best_gradient = x.clone(), loss, gradient.clone()
    step_size = torch.full_like(per_image(loss, x), 2 * threat.eps)
    # At the first checkpoint the last row, all zeros, precedes the first.
    losses = loss.new_zeros(iterations, len(x))
    checkpoint, last_check = max(int(0.22 * iterations), 1), 0
    shorter, shortest = max(int(0.03 * iterations), 1), max(int(0.06 * iterations), 1)
    best_loss_then, halved_then = best_loss, torch.ones_like(wrong)
    before = x
    for i in range(iterations):
        moved = ball.project(ball.step(gradient, step_size).add_(x))
        # The first step is all new; written so, its rounding is AutoAttack's.
        new = NEW_STEP if i else 1.0
        moved = ball.project(moved.sub_(x).mul_(new).add_(x).add_((x - before).mul_(1 - new)))
        before, x = x, moved
        loss, gradient, wrong = query(logits_fn, loss_fn, x, labels, with_gradient=i + 1 < iterations)
        fooled = fooled | wrong
        put(fooling, wrong, x)
        losses[i] = loss
        larger = loss > best_loss
        best_loss = torch.where(larger, loss, best_loss)
        put(best, larger, x)
        if i + 1 == iterations:
            break
        put(best_gradient, larger, gradient)
        if i + 1 - last_check == checkpoint:
            raising = (losses > losses.roll(1, dims=0))[i + 1 - checkpoint:i + 1].sum(dim=0)
            halved = (raising <= checkpoint * _RAISING) | (~halved_then & (best_loss_then >= best_loss))
            step_size = torch.where(per_image(halved, x), step_size / 2, step_size)
            x = torch.where(per_image(halved, x), best, x)
            gradient = torch.where(per_image(halved, x), best_gradient, gradient)
            best_loss_then, halved_then, last_check = best_loss, halved, i + 1
            checkpoint = max(checkpoint - shorter, shortest)
    return Ascent(best, best_loss, fooling, fooled, without_gradient)


def put(into: Tensor, mask: Tensor, values: Tensor) -> None:
    """Copies the images of `values` (R, ...) in the `mask` (R,) `into` (R, ...), without a sync of the device."""
    torch.where(per_image(mask, values), values, into, out=into)


class Ball:
    """The ball of a threat model around clean images, in the arithmetic of AutoAttack."""

    def __init__(self, clean: Tensor, threat: ThreatModel):
        self.clean, self.eps, self.norm = clean, threat.eps, threat.norm
        self.low, self.high = (clean - threat.eps).clamp_(min=0), (clean + threat.eps).clamp_(max=1)

    def random_start(self) -> Tensor:
        """Returns random points (R, ...) on the surface of the ball, not clamped to [0, 1] (global random state)."""
        if self.norm == "Linf":
            noise = 2 * torch.rand_like(self.clean) - 1
            size = noise.flatten(1).abs().amax(dim=1)
        else:
            noise = torch.randn_like(self.clean)
            size = noise.square().flatten(1).sum(dim=1).sqrt()
        return self.clean + self.eps * (noise / (per_image(size, noise) + 1e-12))

    def step(self, gradient: Tensor, size: Tensor) -> Tensor:
        """Returns the steps (R, ...) of the given `size` (R, 1, ...) along the sign or the unit of the gradient."""
        return (gradient.sign() if self.norm == "Linf" else _unit(gradient)).mul_(size)

    def project(self, x: Tensor) -> Tensor:
        """Returns `x` moved into the ball, in place."""
        if self.norm == "Linf":
            return x.clamp_(self.low, self.high)
        delta = x.sub_(self.clean)
        length = per_image(delta.square().flatten(1).sum(dim=1).sqrt(), delta)
        return delta.div_(length + 1e-12).mul_(length.clamp(max=self.eps)).add_(self.clean).clamp_(0, 1)


def query(logits_fn: Callable[[Tensor], Tensor], loss_fn: Callable[[Tensor], Tensor], x: Tensor, labels: Tensor,
          with_gradient: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the loss (R,), its gradient (R, ...), and whether images are misclassified (R,)."""
    x = x.detach().requires_grad_(with_gradient)
    with torch.set_grad_enabled(with_gradient):
        logits = logits_fn(x)
        loss = loss_fn(logits)
        gradient, = torch.autograd.grad(loss.sum(), x) if with_gradient else (x,)
    return loss.detach(), gradient, logits.detach().argmax(dim=1) != labels


def _unit(x: Tensor) -> Tensor:
    """Returns `x` (R, ...) over its length, and zero if that is not finite."""
    length = per_image(x.square().flatten(1).sum(dim=1).sqrt(), x)
    return (x / (length + 1e-12)).masked_fill_(~length.isfinite(), 0)
