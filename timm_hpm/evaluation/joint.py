"""Attacks that are special to an HPM head: through several surrogates of an image, and on whole batches."""

import math
from collections.abc import Callable
from functools import partial
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attacks import margin_loss, predicted_classes
from ..attacks.apgd import NEW_STEP
from ..threat import ThreatModel
from .batch import AttackBatch, Budget
from .components import apgd_points

# Temperature of the soft assignment at the end, nearly the head's own; it begins at 1.
_LAST_TEMPERATURE: Final = 0.05

# Victims of a round: this share of the unbroken images, drawn from the half nearest to an error. Fewer rounds with more
# victims break less: the neighbours cannot serve all.
_NEAREST: Final = 0.5
_SERVED: Final = 0.1

# Steepness of the sigmoid that softens an error, for margins in units of their median size at the start. A flat one
# lets images far from an error dominate, a much steeper one the nearest alone.
_STEEPNESS: Final = 16.0
_SMALLEST: Final = 1e-6


def apgd_chain(batch: AttackBatch, threat: ThreatModel, budget: Budget) -> Tensor:
    """Returns the candidates (S·B, ...) of APGD on one surrogate's cross-entropy, from those of the one before."""
    found, start = batch.points.clone(), None
    for s in range(len(batch.surrogates)):
        rows = batch.active[batch.active // batch.size == s]
        start = apgd_points(batch, rows, threat, budget, start)
        found[rows] = start
    return found


def joint(batch: AttackBatch, threat: ThreatModel, budget: Budget) -> Tensor:
    """Returns the candidates (S·B, ...) of an ascent that moves all images of a batch at once, for one common loss.

    The loss is the number of errors in the batch, each softened by a steep sigmoid of its margin, so that a broken
    image moves the batch-level prototypes in favour of those nearest to an error. The result is the visited batch with
    the most errors of the head itself.
    """
    return _ascend_together(batch, threat, budget.iterations, batch.points,
                            partial(torch.ones_like, dtype=torch.bool))


def joint_subset(batch: AttackBatch, threat: ThreatModel, budget: Budget) -> Tensor:
    """Returns the candidates (S·B, ...) of one round of the same ascent, from a random start, for a few victims.

    All other images are optimised to flip the victims, drawn from the images nearest to an error there.
    """
    if not batch.victims.any():
        return batch.points
    return _ascend_together(batch, threat, budget.iterations, threat.random_start(batch.clean),
                            partial(choose_victims, batch.victims))


def choose_victims(victims: Tensor, margin: Tensor) -> Tensor:
    """Returns the victims (B,) of one round, at least one of `victims` (B,), by their margins (B,)."""
    # Every image draws a number, broken or not, so that the draw depends little on the images that are left.
    order = torch.rand(len(victims), device=victims.device)
    rows = victims.nonzero().squeeze(1)
    nearest = rows[margin[rows].argsort(descending=True)][:math.ceil(_NEAREST * len(rows))]
    few = nearest[order[nearest].argsort()[:math.ceil(_SERVED * len(rows))]]
    return torch.zeros_like(victims).index_fill(0, few, True)


def softened_errors(margins: Tensor, victims: Tensor) -> Tensor:
    """Returns the logarithm (S,) of the errors among `victims` (S, B), each a sigmoid of its margin (S, B)."""
    # The logarithm keeps a gradient if all are far from an error.
    return F.logsigmoid(margins).masked_fill(~victims, -math.inf).logsumexp(dim=1)


def _ascend_together(batch: AttackBatch, threat: ThreatModel, iterations: int, x: Tensor,
                     choose: Callable[[Tensor], Tensor]) -> Tensor:
    """Returns each surrogate's best whole batch, all of them (S·B, ...), found from `x` side by side.

    `choose` maps a surrogate's margins (B,) at `x` to the images (B,) whose errors count.
    """
    model = batch.model
    exact = model.exact_surrogate()  # it asks the device
    before, best, most = x, x, torch.full((len(batch.surrogates),), -1, device=x.device)
    for i in range(iterations + 1):
        temperature = _LAST_TEMPERATURE ** (i / iterations)
        x = x.detach().requires_grad_(i < iterations)
        with torch.set_grad_enabled(i < iterations):
            features = model.features(x).split(batch.size)
            parts = [model.logits(name, part, temperature).float()
                     for name, part in zip(batch.surrogates, features, strict=True)]
            logits = batch.finite(batch.rows, x, torch.cat(parts))
            margins = margin_loss(logits, batch.labels).view(len(most), batch.size)
            if i == 0:
                victims = torch.stack([choose(part) for part in margins.detach()])
                unit = margins.detach().abs().median(dim=1, keepdim=True).values.clamp(min=_SMALLEST)
            loss = softened_errors(_STEEPNESS / unit * margins, victims).sum()
        with torch.no_grad():
            # The head's own logits, which the exact surrogate has computed already.
            own = torch.cat([part if name == exact else model.logits(exact, inputs)
                             for name, inputs, part in zip(batch.surrogates, features, parts, strict=True)])
            wrong = (predicted_classes(own) != batch.labels).view_as(victims)
            errors = (wrong & victims).sum(dim=1)
            # Of equally good batches the last: the temperature falls towards the head's own assignment.
            better = (errors >= most).repeat_interleave(batch.size).view(-1, 1, 1, 1)
            best, most = torch.where(better, x, best), errors.maximum(most)
        batch.on_query()
        if i == iterations:
            break
        gradient, = torch.autograd.grad(loss, x)
        with torch.no_grad():
            size = threat.eps * (1 + math.cos(math.pi * i / iterations)) / 2
            moved = threat.project(x + threat.scaled(gradient, size), batch.clean)
            moved = threat.project(x + NEW_STEP * (moved - x) + (1 - NEW_STEP) * (x - before), batch.clean)
            before, x = x.detach(), moved
    return best
