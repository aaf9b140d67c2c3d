"""AutoAttack's components, each run by itself on one fixed batch under one or more surrogates.

Where AutoAttack keeps only what fools the model it is given, and regroups what is left into new batches, a component
here yields a candidate for every image under every surrogate: the point that fools the surrogate, or the point of
largest loss where none does, never the clean image. The batch stays whole meanwhile: images that are not queried
keep their latest candidate, of which only the features are needed, so whole batches cost one more pass a candidate.
Where a surrogate's answers depend on the batch, what fooled it among one search's neighbours may not do so among all
final candidates: only the judge's verdict counts.

Source: Croce and Hein, arXiv 2003.01690 (APGD), 1907.02044 (FAB); Andriushchenko et al., arXiv 1912.00049 (Square).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..threat import ThreatModel
from .apgd import Ascent, apgd, cross_entropy, targeted_loss
from .fab import fab
from .pgd import pgd
from .square import square_search
from .surrogates import SplitModel


class NonFiniteLogitsError(ValueError):
    """A classifier answered NaN or infinity, which is no class, to images that are not under attack."""


def check_finite(logits: Tensor, image_of_row: Callable[[int], str]) -> None:
    """Raises a NonFiniteLogitsError that names the first row of `logits` (B, C) with NaN or infinity."""
    if not logits.isfinite().all():
        first = int((~logits.isfinite()).any(dim=1).nonzero()[0])
        raise NonFiniteLogitsError(
            f"the logits of {image_of_row(first)} are not finite: {logits[first].tolist()[:10]}. An image with such "
            "logits must not count as robust; look for a division by zero, a logarithm or an overflow in the model "
            "(docs/flags.md#non-finite-logits)")


def predicted_classes(logits: Tensor) -> Tensor:
    """Returns the classes (B,) of the largest of `logits` (B, C), and −1 where one of them is NaN or infinite."""
    # The arg-max of such an answer is an accident, and may be the right class.
    return torch.where(logits.isfinite().all(dim=1), logits.argmax(dim=1), -1)


def margin_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns max_{c≠y} z_c − z_y (B,) for `logits` (B, C): positive where the classifier is wrong."""
    others = logits.scatter(1, labels.unsqueeze(1), -math.inf)
    return others.amax(dim=1) - logits.gather(1, labels.unsqueeze(1)).squeeze(1)


class AttackBatch:
    """One fixed batch of images under several surrogates side by side, a row for each (surrogate, image).

    Row s·B + i is image i under surrogate s. Each surrogate has a batch of its own, in which every image stands at
    its `points` row: the clean image at first, then its latest candidate. `clean_logits` (S·B, C) answer the first.

    Logits that are not finite tell a search nothing, and `not_finite` keeps the rows that had any. Where the surrogate
    answers as the true model does they count as an error, for which nothing more need be sought; through another one
    the search is to go round them, and they count as right beyond all doubt.

    Arguments:
        model: the split copy of the classifier.
        surrogates: names, S of them.
        images: pixels (B, channels, H, W) in [0, 1], contiguous.
        labels: (B,), class indices.
        start: (B, channels, H, W), where the images stand at first; None means clean.
        active: (B,), the images to attack, which must start clean; None means all. The others stay at their start.
        sought: (B,), the images that no attack has broken yet; None means all.
        on_query: called after each query, for a progress bar.
    """

    def __init__(
            self,
            model: SplitModel,
            surrogates: Sequence[str],
            images: Tensor,
            labels: Tensor,
            *,
            start: Tensor | None = None,
            active: Tensor | None = None,
            sought: Tensor | None = None,
            on_query: Callable[[], None] = lambda: None,
    ):
        self.model = model
        self.surrogates = tuple(surrogates)
        self.size = len(images)
        self.on_query = on_query
        copies = len(self.surrogates)
        self.clean = images.repeat(copies, 1, 1, 1)
        self.labels = labels.repeat(copies)
        self.rows = torch.arange(len(self.clean), device=images.device)
        self.active = self.rows if active is None else self.rows[active.repeat(copies)]
        self.sought = torch.ones_like(labels, dtype=torch.bool) if sought is None else sought
        self._start = images if start is None else start
        self.points = self._start.repeat(copies, 1, 1, 1)
        self.not_finite: set[int] = set()
        self._asked: tuple[Tensor, list[_Part]] = (self.rows, self._parts(self.rows))

    @cached_property
    @torch.no_grad()
    def _start_features(self) -> Tensor:
        """Features (B, d) of the images where they stand at first, which not every attack asks for."""
        return self.model.features(self._start)

    @cached_property
    def _features(self) -> Tensor:
        """Features (S·B, d) of the rows where they are."""
        return self._start_features.repeat(len(self.surrogates), 1)

    @cached_property
    def clean_logits(self) -> Tensor:
        """Logits (S·B, C) of the images where they stand at first, whenever they are asked for."""
        return self._logits_of([self._start_features] * len(self.surrogates))

    def query(self, rows: Tensor, pixels: Tensor) -> Tensor:
        """Returns the logits (R, C) of the ascending `rows` (R,) moved to `pixels`, with the others where they are.

        Differentiable with respect to `pixels` (R, channels, H, W).
        """
        if not len(rows):
            return self.clean_logits[:0]
        features = self.model.features(pixels)
        # A search asks for the same rows again and again.
        if rows is not self._asked[0]:
            self._asked = rows, self._parts(rows)
        parts = self._asked[1]
        batches = [self._with_its_batch(part, own) for part, own in
                   zip(parts, features.split([part.size for part in parts]), strict=True)]
        answers = [self.model.logits(part.surrogate, batch) for part, batch in zip(parts, batches, strict=True)]
        logits = torch.cat([answer if part.among is None else answer.index_select(0, part.among)
                            for part, answer in zip(parts, answers, strict=True)])
        self.on_query()
        return self.finite(rows, pixels, logits)

    def finite(self, rows: Tensor, pixels: Tensor, logits: Tensor) -> Tensor:
        """Returns the `logits` (R, C) that answered the `pixels` of `rows`, and others where they are not finite."""
        # The sum is not finite where one of them is not; where only the sum overflows, the longer way finds out.
        if math.isfinite(float(logits.detach().sum())) or logits.isfinite().all():
            return logits
        lost = ~logits.isfinite().all(dim=1)
        self.not_finite.update(rows[lost].tolist())
        is_twin = torch.tensor([name == self.model.twin() for name in self.surrogates], device=rows.device)
        is_twin, labels = is_twin[rows // self.size], self.labels[rows]
        one_hot = F.one_hot(torch.where(is_twin, (labels + 1) % logits.shape[1], labels), logits.shape[1])
        others = one_hot * torch.where(is_twin, 1.0, _BEYOND_DOUBT).unsqueeze(1)
        # A gradient there is, even if the model answers a constant.
        return torch.where(lost.unsqueeze(1), others, logits) + 0 * pixels.flatten(1).sum(dim=1, keepdim=True)

    def place(self, rows: Tensor, pixels: Tensor) -> None:
        """Makes `pixels` (R, channels, H, W) the latest candidates of `rows` (R,)."""
        if len(rows):
            self.points[rows] = pixels
            with torch.no_grad():
                self._features[rows] = self.model.features(pixels)

    def current_logits(self) -> Tensor:
        """Returns the logits (S·B, C) of all rows where they are, without a backbone pass."""
        return self._logits_of(self._features.split(self.size))

    @torch.no_grad()
    def _logits_of(self, features: Sequence[Tensor]) -> Tensor:
        """Returns the logits (S·B, C) of whole batches of features (B, d), one for each surrogate."""
        return self.finite(self.rows, self.points, torch.cat([
            self.model.logits(name, part) for name, part in zip(self.surrogates, features, strict=True)]))

    def not_fooled(self) -> Tensor:
        """Returns the active rows that their surrogate classifies correctly where they are."""
        right = self.current_logits().argmax(dim=1) == self.labels
        return self.active[right[self.active]]

    def couples(self) -> bool:
        """Returns whether some surrogate's answers depend on the rest of its batch."""
        return any(map(self.model.couples, self.surrogates))

    def _parts(self, rows: Tensor) -> list["_Part"]:
        """Returns the parts of the ascending `rows` (R,), one for each surrogate that has some."""
        ends = torch.searchsorted(rows, self.size * torch.arange(len(self.surrogates) + 1, device=rows.device)).tolist()
        parts = []
        for s, surrogate in enumerate(self.surrogates):
            count = ends[s + 1] - ends[s]
            needs_others = self.model.couples(surrogate) and count < self.size
            if count:
                parts.append(_Part(surrogate, count, s * self.size,
                                   rows[ends[s]:ends[s + 1]] - s * self.size if needs_others else None))
        return parts

    def _with_its_batch(self, part: "_Part", features: Tensor) -> Tensor:
        """Returns the part's `features` (r, d) among those of its batch, or as they are where no others are needed."""
        if part.among is None:
            return features
        return self._features[part.first:part.first + self.size].index_copy(0, part.among, features)


class _Part(NamedTuple):
    """The rows of one surrogate among those of a query.

    Arguments:
        surrogate: its name.
        size: how many they are, r.
        first: the surrogate's first row of all.
        among: (r,), their places in the surrogate's batch, whose other images its answers depend on; None where the
            answers depend on none, or the batch is whole.
    """

    surrogate: str
    size: int
    first: int
    among: Tensor | None


# Of logits: a lead that no search takes for progress.
_BEYOND_DOUBT: Final = 1e4


@dataclass(frozen=True)
class Budget:
    """How much an attack may spend: iterations, target classes where it has targets, rounds where it is run in rounds.

    No rounds given are those of the protocol.

    Raises:
        ValueError: no iterations, a negative number of targets or rounds, or what is no whole number.
    """

    iterations: int
    targets: int = 0
    rounds: int = 0

    def __post_init__(self) -> None:
        whole = all(type(number) is int for number in (self.iterations, self.targets, self.rounds))
        if not whole or self.iterations < 1 or self.targets < 0 or self.rounds < 0:
            raise ValueError(f"{self}: expected at least 1 iteration, and 0 or more targets or rounds, in "
                             "whole numbers")

    @classmethod
    def parse(cls, text: str, times: str = "targets") -> "Budget":
        """Returns the budget that `text` names: iterations, or iterations × `times` as `"100x9"`.

        `times` is `"targets"` or `"rounds"`.
        """
        try:
            iterations, *number = (int(number) for number in text.split("x", 1))
            return cls(iterations, **{times: number[0]} if number else {})
        except ValueError as error:
            raise ValueError(f"cannot read the budget {text!r} ({error}); expected iterations, such as 100, or "
                             f"iterations x {times}, such as 100x9") from error

    def for_classes(self, num_classes: int) -> "Budget":
        """Returns the budget with no more targets than there are wrong classes."""
        return replace(self, targets=min(self.targets, num_classes - 1))

    def queries(self) -> int:
        """Returns about how many queries the attack makes at most in a round, for a progress bar."""
        return max(self.targets, 1) * (self.iterations + 1)


def apgd_ce(batch: AttackBatch, threat: ThreatModel, budget: Budget, notes: "Notes") -> Tensor:
    """Returns the candidates (S·B, ...) of APGD on the cross-entropy, one start."""
    rows = batch.active
    wrong = F.softmax(batch.clean_logits[rows], dim=1).scatter(1, batch.labels[rows].unsqueeze(1), 0.0).sum(dim=1)
    notes.count("saturated-softmax", "the softmax of {} of {} clean answers is one-hot in float32, and the gradient of "
                "the cross-entropy 0: the candidates of this attack prove little", int((wrong == 0).sum()), len(wrong))
    return batch.points.index_copy(0, rows, apgd_points(batch, rows, threat, budget))


def apgd_t(batch: AttackBatch, threat: ThreatModel, budget: Budget, notes: "Notes") -> Tensor:
    """Returns the candidates (S·B, ...) of targeted APGD: on the targeted DLR loss, which needs 4 classes.

    With fewer classes it is the cross-entropy of the target.
    """
    targets = _targets(batch, budget)
    best_loss = torch.full_like(batch.clean_logits[:, 0], -math.inf)
    rows = batch.active
    for target in targets.t():
        labels = batch.labels[rows]
        found = apgd(_rows_model(batch, rows), batch.clean[rows], labels, threat, budget.iterations,
                     targeted_loss(labels, target[rows]))
        notes.count("zero-loss-gradient", "the targeted loss has no gradient at {} of {} starts",
                    found.without_gradient, len(rows))
        better = found.fooled | (found.loss > best_loss[rows])
        batch.place(rows[better], _candidates(found)[better])
        best_loss[rows[better]] = found.loss[better]
        rows = batch.not_fooled()
        if not len(rows):
            break
    return batch.points


def fab_t(batch: AttackBatch, threat: ThreatModel, budget: Budget, notes: "Notes") -> Tensor:
    """Returns the candidates (S·B, ...) of targeted FAB, which looks for the nearest boundary of each target.

    A boundary point is moved to the surface of the ball, out or in, where that has the larger loss. Where FAB finds
    no boundary the candidate is one gradient step from a random start.
    """
    targets = _targets(batch, budget)
    rows = batch.active
    batch.place(rows, pgd(_rows_model(batch, rows), batch.clean[rows], batch.labels[rows], threat, steps=1))
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


def square(batch: AttackBatch, threat: ThreatModel, budget: Budget, notes: "Notes") -> Tensor:
    """Returns the candidates (S·B, ...) of Square, a random search that needs no gradient."""
    keeps_whole_batches = batch.couples()
    active = labelled = batch.active
    labels = batch.labels[active]

    def margin(rows: Tensor, pixels: Tensor) -> Tensor:
        nonlocal labelled, labels
        # The search asks for the same rows until one of them is fooled.
        if rows is not labelled:
            labelled, labels = rows, batch.labels[rows]
        loss = margin_loss(batch.query(rows, pixels), labels)
        if keeps_whole_batches:
            # A row that is fooled is not queried again: from here on it stands in its batch as it is now.
            fooled = loss >= 0
            if fooled.any():
                batch.place(rows[fooled], pixels[fooled])
        return loss

    found = square_search(margin, active, batch.clean[active], threat, budget.iterations)
    return batch.points.index_copy(0, active, found)


class Notes:
    """Gathers what components warn of, as the number of images (a target each counts anew) that it is about."""

    def __init__(self, prefix: str = "") -> None:
        self.prefix = prefix
        #: Name of the flag and its text, which says how many by `{}` and of how many by the next, to these numbers.
        self.counts: dict[tuple[str, str], tuple[int, int]] = {}

    def count(self, name: str, text: str, affected: int, total: int) -> None:
        """Adds to what a flag of the attack that `prefix` names is about; where that is none there is no flag."""
        before = self.counts.get((name, self.prefix + text), (0, 0))
        self.counts[name, self.prefix + text] = before[0] + affected, before[1] + total


def _rows_model(batch: AttackBatch, rows: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda pixels: batch.query(rows, pixels)


def _targets(batch: AttackBatch, budget: Budget) -> Tensor:
    """Returns the wrong classes (S·B, targets) of largest clean logit, in AutoAttack's order."""
    wrong = batch.clean_logits.scatter(1, batch.labels.unsqueeze(1), -math.inf)
    return wrong.argsort(dim=1, descending=True)[:, :budget.targets]


def apgd_points(batch: AttackBatch, rows: Tensor, threat: ThreatModel, budget: Budget,
                start: Tensor | None = None) -> Tensor:
    """Returns the candidates (R, ...) of APGD on the cross-entropy for `rows`, from `start` (R, ...) or at random."""
    labels = batch.labels[rows]
    return _candidates(apgd(_rows_model(batch, rows), batch.clean[rows], labels, threat, budget.iterations,
                            cross_entropy(labels), start))


def _candidates(found: Ascent) -> Tensor:
    return torch.where(found.fooled.view(-1, 1, 1, 1), found.fooling, found.largest)
