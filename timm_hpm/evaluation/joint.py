"""Attacks on what is special about an HPM head: several surrogates of an image, a batch that answers as a whole."""

import math
from collections.abc import Callable
from functools import partial
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attacks import margin_loss, predicted_classes
from ..surrogates import SURROGATES
from ..threat import ThreatModel
from .batch import AttackBatch, Notes
from .budget import Budget
from .components import apgd_points

# Of the soft assignment at the end, where it is nearly the head's own; at the beginning 1.
_LAST_TEMPERATURE: Final = 0.05
_NEW_STEP: Final = 0.75

# Of the images that are left, those nearest to an error, and how many of all a round is for. Fewer rounds for more of
# them break less: the neighbours cannot serve all.
_NEAREST: Final = 0.5
_SERVED: Final = 0.1

# Of the sigmoid that softens an error, for margins in units of the median of their sizes at the start. With a flat one
# the images that are far from an error draw the batch to themselves, with a much steeper one the nearest alone does.
_STEEPNESS: Final = 16.0
_SMALLEST: Final = 1e-6


def apgd_chain(batch: AttackBatch, threat: ThreatModel, budget: Budget, notes: Notes) -> Tensor:
    """Returns the candidates (S·B, ...) of APGD on the cross-entropy of one surrogate after another.

    Each starts at the candidates of the surrogate before, the first one at random.
    """
    found, start = batch.points.clone(), None
    for s in range(len(batch.surrogates)):
        rows = batch.active[batch.active // batch.size == s]
        start = apgd_points(batch, rows, threat, budget, start)
        found[rows] = start
    return found


def joint(batch: AttackBatch, threat: ThreatModel, budget: Budget, notes: Notes) -> Tensor:
    """Returns the candidates (S·B, ...) of an ascent that moves all images of a batch at once, for one common loss.

    The loss is the number of errors in the batch, each softened by a steep sigmoid of its margin, so an image that is
    lost anyway moves the batch-level prototypes for the sake of those that are nearest to an error. Of the batches on
    the way the one counts in which the head itself errs most. It begins where the batch's images stand.
    """
    return _ascend_together(batch, threat, budget.iterations, batch.points,
                            partial(torch.ones_like, dtype=torch.bool))


def joint_subset(batch: AttackBatch, threat: ThreatModel, budget: Budget, notes: Notes) -> Tensor:
    """Returns the candidates (S·B, ...) of one round of the same ascent for a few victims.

    All other images are optimised to flip the victims. The round starts at random points of the ball, and draws its
    victims from the images that are nearest to an error there. If every image is broken, none moves.
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
    """Returns the logarithm (S,) of how many of the `victims` (S, B) are errors, each a sigmoid of its margin (S, B).

    Its gradient is that of the number, but for a factor that keeps it from vanishing where all are far from an error.
    """
    return F.logsigmoid(margins).masked_fill(~victims, -math.inf).logsumexp(dim=1)


def _ascend_together(batch: AttackBatch, threat: ThreatModel, iterations: int, x: Tensor,
                     choose: Callable[[Tensor], Tensor]) -> Tensor:
    """Returns each surrogate's best whole batch, all of them (S·B, ...), found from `x` side by side.

    Only errors among the images (B,) count that `choose` returns by a surrogate's margins (B,) at `x`.
    """
    model, head = batch.model, batch.model.head
    assert head is not None
    before, best, most = x, x, torch.full((len(batch.surrogates),), -1, device=x.device)
    for i in range(iterations + 1):
        temperature = _LAST_TEMPERATURE ** (i / iterations)
        x = x.detach().requires_grad_(i < iterations)
        with torch.set_grad_enabled(i < iterations):
            features = model.features(x).to(head.weight.dtype).split(batch.size)
            answers = [SURROGATES[name].at(temperature, head, part).float()
                       for name, part in zip(batch.surrogates, features, strict=True)]
            logits = batch.finite(batch.rows, x, torch.cat(answers))
            margins = margin_loss(logits, batch.labels).view(len(most), batch.size)
            if i == 0:
                victims = torch.stack([choose(part) for part in margins.detach()])
                unit = margins.detach().abs().median(dim=1, keepdim=True).values.clamp(min=_SMALLEST)
            loss = softened_errors(_STEEPNESS / unit * margins, victims).sum()
        with torch.no_grad():
            # The head's own answer, which one of the surrogates has given already.
            own = torch.cat([answer if name == model.exact_surrogate() else model.logits(model.exact_surrogate(), part)
                             for name, part, answer in zip(batch.surrogates, features, answers, strict=True)])
            wrong = (predicted_classes(own) != batch.labels).view_as(victims)
            errors = (wrong & victims).sum(dim=1)
            # The later of two: it was found nearer to the head's own assignment.
            better = (errors >= most).repeat_interleave(batch.size).view(-1, 1, 1, 1)
            best, most = torch.where(better, x, best), errors.maximum(most)
        batch.on_query()
        if i == iterations:
            break
        gradient, = torch.autograd.grad(loss, x)
        with torch.no_grad():
            size = threat.eps * (1 + math.cos(math.pi * i / iterations)) / 2
            moved = threat.project(x + threat.scaled(gradient, size), batch.clean)
            moved = threat.project(x + _NEW_STEP * (moved - x) + (1 - _NEW_STEP) * (x - before), batch.clean)
            before, x = x.detach(), moved
    return best
