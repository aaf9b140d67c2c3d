"""Attacks on what is special about an HPM head: several surrogates of an image, a batch that answers as a whole."""

import math
from functools import partial
from typing import Final

import torch
from torch import Tensor

from ..threat import ThreatModel
from .components import AttackBatch, Budget, Notes, apgd_points, margin_loss, predicted_classes
from .surrogates import SURROGATES, soft_logits

#: The surrogates in whose gradient an image's answer depends on its neighbours' pixels.
JOINT_SURROGATES: Final = ("soft", "ste")

# Of the soft assignment at the end, where it is nearly the head's own; at the beginning 1.
_LAST_TEMPERATURE: Final = 0.05
_NEW_STEP: Final = 0.75


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

    The loss is the number of errors in the batch, each softened by a sigmoid of its margin, so an image that is lost
    anyway moves the batch-level prototypes for the sake of the others. Of the batches on the way the one counts in
    which the head itself errs most. It begins where the batch's images stand.
    """
    return torch.cat([_ascend_together(batch, s, threat, budget.iterations) for s in range(len(batch.surrogates))])


def _ascend_together(batch: AttackBatch, s: int, threat: ThreatModel, iterations: int) -> Tensor:
    """Returns the best whole batch (B, ...) found through the surrogate of number `s`."""
    model, surrogate = batch.model, batch.surrogates[s]
    assert model.head is not None
    rows = slice(s * batch.size, (s + 1) * batch.size)
    clean, labels, x = batch.clean[rows], batch.labels[rows], batch.points[rows]
    before, best, most = x, x, -1
    for i in range(iterations + 1):
        temperature = _LAST_TEMPERATURE ** (i / iterations)
        logits_of = partial(soft_logits, temperature=temperature) if surrogate == "soft" else (
            SURROGATES[surrogate].logits)
        x = x.detach().requires_grad_(i < iterations)
        with torch.set_grad_enabled(i < iterations):
            features = model.features(x)
            logits = batch.finite(batch.rows[rows], x, logits_of(model.head, features))
            loss = margin_loss(logits, labels).sigmoid().sum()
        with torch.no_grad():
            errors = int((predicted_classes(model.logits(model.twin(), features.detach())) != labels).sum())
        batch.on_query()
        # The later of two: it was found nearer to the head's own assignment.
        if errors >= most:
            best, most = x.detach(), errors
        if i == iterations:
            break
        gradient, = torch.autograd.grad(loss, x)
        with torch.no_grad():
            size = threat.eps * (1 + math.cos(math.pi * i / iterations)) / 2
            moved = threat.project(x + threat.scaled(gradient, size), clean)
            moved = threat.project(x + _NEW_STEP * (moved - x) + (1 - _NEW_STEP) * (x - before), clean)
            before, x = x.detach(), moved
    return best
