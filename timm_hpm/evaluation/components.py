"""AutoAttack's components, each run by itself on one fixed batch under one or more surrogates.

AutoAttack keeps only points that fool its model, and regroups the other images into new batches. Here the batch stays
whole, and each image gets a candidate under each surrogate: the point that fools the surrogate, or else the point of
largest loss, never the clean image. Images that are not queried stay at their latest candidates.

Source: Croce and Hein, arXiv 2003.01690 (APGD), 1907.02044 (FAB); Andriushchenko et al., arXiv 1912.00049 (Square).
"""

import math
from collections.abc import Callable
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attacks import Ascent, apgd, cross_entropy, fab, margin_loss, square_search, targeted_loss
from ..attacks.pgd import ascend
from ..attacks.search import margin_search, repeated_search
from ..threat import ThreatModel
from .batch import AttackBatch, Budget

#: Of labels (R,), a function of logits (R, C) to the loss (R,).
Loss = Callable[[Tensor], Callable[[Tensor], Tensor]]
#: Targets of the margin search, as many as those of AutoAttack's targeted attacks.
_SEARCHED_TARGETS: Final = 9
#: Margin by which the label wins a tie, smaller than any other.
_TIE: Final = torch.finfo(torch.float32).tiny


def apgd_untargeted(batch: AttackBatch, threat: ThreatModel, budget: Budget, loss: Loss = cross_entropy) -> Tensor:
    """Returns the candidates (S·B, ...) of APGD on a loss of probabilities, one start."""
    rows = batch.active
    wrong = F.softmax(batch.clean_logits[rows], dim=1).scatter(1, batch.labels[rows].unsqueeze(1), 0.0).sum(dim=1)
    batch.flag("saturated-softmax", "the softmax of {} of {} clean predictions is one-hot in float32, and the gradient "
               "of the loss 0: the candidates of this attack prove little", int((wrong == 0).sum()),
               len(wrong))
    return batch.points.index_copy(0, rows, apgd_points(batch, rows, threat, budget, loss=loss))


def apgd_t(batch: AttackBatch, threat: ThreatModel, budget: Budget) -> Tensor:
    """Returns the candidates (S·B, ...) of targeted APGD, on the `targeted_loss`."""
    targets = _targets(batch, budget)
    best_loss = torch.full_like(batch.clean_logits[:, 0], -math.inf)
    rows = batch.active
    for target in targets.t():
        labels = batch.labels[rows]
        found = apgd(_rows_model(batch, rows), batch.clean[rows], labels, threat, budget.iterations,
                     targeted_loss(labels, target[rows]))
        batch.flag("zero-loss-gradient", "the targeted loss has no gradient at {} of {} starts",
                   found.without_gradient, len(rows))
        better = found.fooled | (found.loss > best_loss[rows])
        batch.place(rows[better], _candidates(found)[better])
        best_loss[rows[better]] = found.loss[better]
        rows = batch.not_fooled()
        if not len(rows):
            break
    return batch.points


def fab_t(batch: AttackBatch, threat: ThreatModel, budget: Budget) -> Tensor:
    """Returns the candidates (S·B, ...) of targeted FAB, which looks for the nearest boundary of each target.

    A boundary point is moved to the surface of the ball, out or in, if that has the larger loss. If FAB finds no
    boundary, the candidate is one gradient step from a random start.
    """
    targets = _targets(batch, budget)
    rows = batch.active
    batch.place(rows, ascend(_rows_model(batch, rows), batch.clean[rows], batch.labels[rows], threat))
    loss = margin_loss(batch.current_logits(), batch.labels)
    for target in targets.t():
        rows = batch.not_fooled()
        if not len(rows):
            break
        clean = batch.clean[rows]
        boundary = fab(_rows_model(batch, rows), clean, batch.labels[rows], target[rows], threat, budget.iterations)
        distance = threat.distance(boundary, clean)
        usable = (distance > 0) & boundary.flatten(1).isfinite().all(dim=1)
        rows, boundary, clean, distance = rows[usable], boundary[usable], clean[usable], distance[usable]
        surface = threat.project(clean + (boundary - clean) * (threat.eps / distance).view(-1, 1, 1, 1), clean)
        inside = distance <= threat.eps
        nearest = torch.where(inside.view(-1, 1, 1, 1), boundary, surface)
        for some, points in ((rows, nearest), (rows[inside], surface[inside])):
            with torch.no_grad():
                new_loss = margin_loss(batch.query(some, points), batch.labels[some])
            better = new_loss > loss[some]
            batch.place(some[better], points[better])
            loss[some[better]] = new_loss[better]
    return batch.points


def search(batch: AttackBatch, threat: ThreatModel, budget: Budget, repeated: bool = False) -> Tensor:
    """Returns the candidates (S·B, ...) of `margin_search` or `repeated_search`, `budget.iterations` steps an image."""
    rows = batch.active
    targets = _targets(batch, Budget(1, _SEARCHED_TARGETS).for_classes(batch.clean_logits.shape[1]))
    function = repeated_search if repeated else margin_search
    found = function(batch.query, rows, batch.clean[rows], batch.labels[rows], targets[rows], threat,
                     budget.iterations)
    return batch.points.index_copy(0, rows, found)


def square(batch: AttackBatch, threat: ThreatModel, budget: Budget) -> Tensor:
    """Returns the candidates (S·B, ...) of Square, a random search that needs no gradient."""
    active = labelled = batch.active
    labels = batch.labels[active]

    def margin(rows: Tensor, pixels: Tensor) -> Tensor:
        nonlocal labelled, labels
        # The search queries the same rows until one of them is fooled.
        if rows is not labelled:
            labelled, labels = rows, batch.labels[rows]
        logits = batch.query(rows, pixels)
        margins = margin_loss(logits, labels)
        # Coarse logits tie, and a tie that the label wins fools nobody.
        return torch.where((margins == 0) & (logits.argmax(dim=1) == labels), -_TIE, margins)

    # A fooled row is queried no more: from then on its batch holds this point, if its neighbours' logits depend on it.
    found = square_search(margin, active, batch.clean[active], threat, budget.iterations,
                          on_fooled=batch.place if any(map(batch.model.batch_dependent, batch.surrogates)) else None)
    return batch.points.index_copy(0, active, found)


def apgd_points(batch: AttackBatch, rows: Tensor, threat: ThreatModel, budget: Budget,
                start: Tensor | None = None, loss: Loss = cross_entropy) -> Tensor:
    """Returns the candidates (R, ...) of APGD for `rows`, from `start` (R, ...) or at random."""
    labels = batch.labels[rows]
    return _candidates(apgd(_rows_model(batch, rows), batch.clean[rows], labels, threat, budget.iterations,
                            loss(labels), start))


def _rows_model(batch: AttackBatch, rows: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda pixels: batch.query(rows, pixels)


def _targets(batch: AttackBatch, budget: Budget) -> Tensor:
    """Returns the wrong classes (S·B, targets) of largest clean logit, in AutoAttack's order."""
    wrong = batch.clean_logits.scatter(1, batch.labels.unsqueeze(1), -math.inf)
    return wrong.argsort(dim=1, descending=True)[:, :budget.targets]


def _candidates(found: Ascent) -> Tensor:
    return torch.where(found.fooled.view(-1, 1, 1, 1), found.fooling, found.largest)
