"""`AttackBatch`: one batch of images under attack through several surrogates side by side."""

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .attacked import AttackedModel

# Of logits: a lead that no search takes for progress.
_BEYOND_DOUBT: Final = 1e4


class AttackBatch:
    """One fixed batch of images under several surrogates side by side, a row for each (surrogate, image).

    Row s·B + i is image i under surrogate s. Each surrogate has a batch of its own, in which every image stands at
    its `points` row: the clean image at first, then its latest candidate. `clean_logits` (S·B, C) answer the first.

    Logits that are not finite tell a search nothing, and `not_finite` keeps the rows that had any. Where the surrogate
    is exact they count as an error, and the image needs no further search; through another one they count as right
    beyond all doubt, so that the search avoids them.

    Arguments:
        model: the split copy of the classifier.
        surrogates: names, S of them.
        images: pixels (B, channels, H, W) in [0, 1], contiguous.
        labels: (B,), class indices.
        start: (B, channels, H, W), where the images stand at first; None means clean.
        active: (B,), the images to attack, which must start clean; None means all. The others stay at their start.
        victims: (B,), the images that no attack has broken yet; None means all.
        on_query: called after each query, for a progress bar.
    """

    def __init__(
            self,
            model: AttackedModel,
            surrogates: Sequence[str],
            images: Tensor,
            labels: Tensor,
            *,
            start: Tensor | None = None,
            active: Tensor | None = None,
            victims: Tensor | None = None,
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
        self.victims = torch.ones_like(labels, dtype=torch.bool) if victims is None else victims
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
        is_exact = torch.tensor([name == self.model.exact_surrogate() for name in self.surrogates], device=rows.device)
        is_exact, labels = is_exact[rows // self.size], self.labels[rows]
        one_hot = F.one_hot(torch.where(is_exact, (labels + 1) % logits.shape[1], labels), logits.shape[1])
        others = one_hot * torch.where(is_exact, 1.0, _BEYOND_DOUBT).unsqueeze(1)
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

    def batch_dependent(self) -> bool:
        """Returns whether some surrogate's answers depend on the rest of its batch."""
        return any(map(self.model.batch_dependent, self.surrogates))

    def _parts(self, rows: Tensor) -> list["_Part"]:
        """Returns the parts of the ascending `rows` (R,), one for each surrogate that has some."""
        ends = torch.searchsorted(rows, self.size * torch.arange(len(self.surrogates) + 1, device=rows.device)).tolist()
        parts = []
        for s, surrogate in enumerate(self.surrogates):
            count = ends[s + 1] - ends[s]
            needs_others = self.model.batch_dependent(surrogate) and count < self.size
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
