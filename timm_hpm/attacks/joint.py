"""Attacks on what is special about an HPM head: several surrogates of an image, a batch that answers as a whole."""

import math
from functools import partial
from typing import Final

import torch
from torch import Tensor

from ..threat import ThreatModel
from .components import AttackBatch, Budget, Notes, apgd_points, margin_loss, predicted_classes
from .surrogates import SURROGATES, soft_logits

#: Attacks that are run on a batch in rounds, each for what the rounds before have left, and judged by itself.
IN_ROUNDS: Final = ("joint-rest",)

#: The surrogates in whose gradient an image's answer depends on its neighbours' pixels.
JOINT_SURROGATES: Final = ("soft", "ste")

# Of the soft assignment at the end, where it is nearly the head's own; at the beginning 1.
_LAST_TEMPERATURE: Final = 0.05
_NEW_STEP: Final = 0.75

# Of the images that are left, those nearest to an error, and how many of all a round is for. Fewer rounds for more of
# them break less: the neighbours cannot serve all.
_NEAREST: Final = 0.5
_SERVED: Final = 0.1


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
    everything = torch.ones_like(batch.sought)
    return torch.cat([_ascend_together(batch, s, threat, budget.iterations, points, everything)[0]
                      for s, points in enumerate(batch.points.split(batch.size))])


def joint_rest(batch: AttackBatch, threat: ThreatModel, budget: Budget, notes: Notes) -> Tensor:
    """Returns the candidates (S·B, ...) of the same for a few of the images that are sought: one round of it.

    All others move for their sake. The few are drawn from those that are nearest to an error where the batch stands. It
    begins at random points of the ball, and each surrogate is after what the ones before it have left. Where nothing is
    left the images stay where they stand.
    """
    found, sought = [], batch.sought
    margins = margin_loss(batch.clean_logits, batch.labels)
    for s, (points, margin) in enumerate(zip(batch.points.split(batch.size), margins.split(batch.size), strict=True)):
        if sought.any():
            start = threat.random_start(batch.clean[:batch.size])
            points, wrong = _ascend_together(batch, s, threat, budget.iterations, start, a_few(sought, margin))
            sought = sought & ~wrong
        found.append(points)
    return torch.cat(found)


def a_few(sought: Tensor, margin: Tensor) -> Tensor:
    """Returns which (B,) of the `sought` images (B,) a round is for, at least one, by their margins (B,)."""
    rows = sought.nonzero().squeeze(1)
    nearest = rows[margin[rows].argsort(descending=True)][:math.ceil(_NEAREST * len(rows))]
    few = nearest[torch.randperm(len(nearest), device=rows.device)[:math.ceil(_SERVED * len(rows))]]
    return torch.zeros_like(sought).index_fill(0, few, True)


def _ascend_together(batch: AttackBatch, s: int, threat: ThreatModel, iterations: int, x: Tensor,
                     sought: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the best whole batch (B, ...) found from `x` through the surrogate of number `s`, and its errors (B,).

    Only errors among the images that are `sought` (B,) count.
    """
    model, surrogate = batch.model, batch.surrogates[s]
    assert model.head is not None
    rows = slice(s * batch.size, (s + 1) * batch.size)
    clean, labels = batch.clean[rows], batch.labels[rows]
    before, best, most, wrong_there = x, x, -1, sought
    for i in range(iterations + 1):
        temperature = _LAST_TEMPERATURE ** (i / iterations)
        logits_of = partial(soft_logits, temperature=temperature) if surrogate == "soft" else (
            SURROGATES[surrogate].logits)
        x = x.detach().requires_grad_(i < iterations)
        with torch.set_grad_enabled(i < iterations):
            features = model.features(x)
            answer = logits_of(model.head, features)
            logits = batch.finite(batch.rows[rows], x, answer)
            loss = margin_loss(logits, labels).sigmoid()[sought].sum()
        with torch.no_grad():
            # The head's own answer, which one of the surrogates has given already.
            own = answer if surrogate == model.twin() else model.logits(model.twin(), features.detach())
            wrong = predicted_classes(own) != labels
            errors = int(wrong[sought].sum())
        batch.on_query()
        # The later of two: it was found nearer to the head's own assignment.
        if errors >= most:
            best, most, wrong_there = x.detach(), errors, wrong
        if i == iterations:
            break
        gradient, = torch.autograd.grad(loss, x)
        with torch.no_grad():
            size = threat.eps * (1 + math.cos(math.pi * i / iterations)) / 2
            moved = threat.project(x + threat.scaled(gradient, size), clean)
            moved = threat.project(x + _NEW_STEP * (moved - x) + (1 - _NEW_STEP) * (x - before), clean)
            before, x = x.detach(), moved
    return best, wrong_there


#: Attacks on a whole batch, in which every image moves.
JOINT_ATTACKS: Final = {"joint": joint, "joint-rest": joint_rest}
