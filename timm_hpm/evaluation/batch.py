"""The arguments of an attack: `AttackBatch`, images under several surrogates side by side, and its `Budget`."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .attacked import AttackedModel

# A lead of logits that no search mistakes for progress.
_BEYOND_DOUBT: Final = 1e4


@dataclass(frozen=True)
class Budget:
    """Limits of an attack: iterations, target classes if it is targeted, and restarts, each judged by itself."""

    iterations: int  # at least 1
    targets: int = 0  # 0 if the attack is not targeted
    restarts: int = 1  # at least 1

    def __post_init__(self) -> None:
        whole = all(type(number) is int for number in (self.iterations, self.targets, self.restarts))
        if not whole or self.iterations < 1 or self.targets < 0 or self.restarts < 1:
            raise ValueError(f"{self!r}: expected at least 1 iteration and 1 restart, and 0 or more targets, in whole "
                             "numbers")

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """Returns the budget of a text: iterations, targets after an x, restarts after an r, such as `"100x9r2"`."""
        parts = re.fullmatch(r"(\d{1,9})(?:x(\d{1,9}))?(?:r(\d{1,9}))?", text)
        try:
            if parts is None:
                raise ValueError("it is malformed")
            return cls(int(parts[1]), int(parts[2] or 0), int(parts[3] or 1))
        except ValueError as error:
            raise ValueError(f"cannot read the budget {text!r:.100} ({error}); expected iterations, and targets after "
                             "an x or restarts after an r, such as 100, 100x9 or 100x9r2") from error

    def __str__(self) -> str:
        return (f"{self.iterations}" + (f"x{self.targets}" if self.targets else "")
                + (f"r{self.restarts}" if self.restarts > 1 else ""))

    def for_classes(self, num_classes: int) -> "Budget":
        """Returns the budget with no more targets than there are wrong classes."""
        return replace(self, targets=min(self.targets, num_classes - 1))

    def queries(self) -> int:
        """Returns about how many queries a restart makes at most, for a progress bar."""
        return max(self.targets, 1) * (self.iterations + 1)


class AttackBatch:
    """One batch of B images under S surrogates side by side: row s·B + i is image i under surrogate s.

    Each surrogate has a batch of its own, which holds the `points` of its rows: the start at first, then each image's
    latest candidate. `clean_logits` (S·B, C) are those of the start.

    If the logits of a row are not finite, `not_finite` keeps it. Under the exact surrogate it counts as misclassified;
    under another one as correct beyond doubt, so that the search avoids such points.

    Arguments:
        model: the attacked copy of the classifier.
        surrogates: S names.
        images: pixels (B, channels, H, W) in [0, 1], contiguous.
        labels: (B,), class indices.
        start: (B, channels, H, W), the first points; None means the clean images.
        active: (S, B), the images to attack, which must start clean; None means all. The others stay at their start.
        victims: (B,), the images that no attack has broken yet; None means all.
        on_query: called after each query, for a progress bar.
    """

    def __init__(self, model: AttackedModel, surrogates: Sequence[str], images: Tensor, labels: Tensor, *,
                 start: Tensor | None = None, active: Tensor | None = None, victims: Tensor | None = None,
                 on_query: Callable[[], None] = lambda: None):
        self.model = model
        self.surrogates = tuple(surrogates)
        self.size = len(images)
        self.on_query = on_query
        copies = len(self.surrogates)
        self.clean = images.repeat(copies, 1, 1, 1)
        self.labels = labels.repeat(copies)
        self.rows = torch.arange(len(self.clean), device=images.device)
        self.active = self.rows if active is None else self.rows[active.flatten()]
        self.victims = torch.ones_like(labels, dtype=torch.bool) if victims is None else victims
        self._start = images if start is None else start
        self.points = self._start.repeat(copies, 1, 1, 1)
        self._lost = torch.zeros_like(self.rows, dtype=torch.bool)
        self._substitutes: Tensor | None = None
        #: Flags of the attack: the name and a text with two `{}`, for the images affected and all images.
        self.flags: dict[tuple[str, str], tuple[int, int]] = {}
        self._queried: tuple[Tensor, list[_Part]] = (self.rows, self._parts(self.rows))

    @cached_property
    @torch.no_grad()
    def _start_features(self) -> Tensor:
        """The features (B, d) of the start, which not every attack needs."""
        return self.model.features(self._start)

    @cached_property
    def _features(self) -> Tensor:
        """The features (S·B, d) of `points`."""
        return self._start_features.repeat(len(self.surrogates), 1)

    @cached_property
    def clean_logits(self) -> Tensor:
        """The logits (S·B, C) of the start, also after later candidates."""
        return self._logits_of([self._start_features] * len(self.surrogates))

    def query(self, rows: Tensor, pixels: Tensor) -> Tensor:
        """Returns the logits (R, C) of the ascending `rows` (R,) at `pixels` (R, ...), the others at their points.

        Differentiable with respect to `pixels`.
        """
        if not len(rows):
            return self.clean_logits[:0]
        features = self.model.features(pixels)
        # A search queries the same rows again and again.
        if rows is not self._queried[0]:
            self._queried = rows, self._parts(rows)
        parts = self._queried[1]
        logits = torch.cat([self._part_logits(part, own) for part, own in
                            zip(parts, features.split([part.size for part in parts]), strict=True)])
        self.on_query()
        return self.finite(rows, pixels, logits)

    def finite(self, rows: Tensor, pixels: Tensor, logits: Tensor) -> Tensor:
        """Returns the `logits` (R, C) of `rows` at `pixels`, with substitutes for rows that are not finite."""
        # A search calls it at each step: it must wait for no result of the device.
        lost = ~logits.isfinite().all(dim=1)
        self._lost = self._lost.index_copy(0, rows, self._lost.index_select(0, rows) | lost)
        if self._substitutes is None:
            self._substitutes = self._substitutes_of(logits.shape[1]).to(logits.dtype)
        logits = torch.where(lost.unsqueeze(1), self._substitutes.index_select(0, rows), logits)
        if logits.requires_grad or not pixels.requires_grad:
            return logits
        # The last term is a gradient even if the model outputs a constant.
        return logits + 0 * pixels.flatten(1).sum(dim=1, keepdim=True)

    @property
    def not_finite(self) -> set[int]:
        """The rows that had logits that are not finite."""
        return set(self._lost.nonzero().squeeze(1).tolist())

    def _substitutes_of(self, num_classes: int) -> Tensor:
        """Returns the logits (S·B, C) of rows whose own are not finite."""
        is_exact = torch.tensor([name == self.model.exact_surrogate() for name in self.surrogates])
        is_exact = is_exact.repeat_interleave(self.size).to(self.labels.device)
        one_hot = F.one_hot(torch.where(is_exact, (self.labels + 1) % num_classes, self.labels), num_classes)
        return one_hot * torch.where(is_exact, 1.0, _BEYOND_DOUBT).unsqueeze(1)

    def flag(self, name: str, text: str, affected: int, total: int) -> None:
        """Adds to a flag of this attack: its name, a text with two `{}`, and the numbers of images for them."""
        before = self.flags.get((name, text), (0, 0))
        self.flags[name, text] = before[0] + affected, before[1] + total

    def place(self, rows: Tensor, pixels: Tensor) -> None:
        """Makes `pixels` (R, channels, H, W) the latest candidates of `rows` (R,)."""
        if len(rows):
            self.points[rows] = pixels
            with torch.no_grad():
                self._features[rows] = self.model.features(pixels)

    def current_logits(self) -> Tensor:
        """Returns the logits (S·B, C) of `points`, without a backbone pass."""
        return self._logits_of(self._features.split(self.size))

    def not_fooled(self) -> Tensor:
        """Returns the active rows whose points their surrogate classifies correctly."""
        right = self.current_logits().argmax(dim=1) == self.labels
        return self.active[right[self.active]]

    @torch.no_grad()
    def _logits_of(self, features: Sequence[Tensor]) -> Tensor:
        return self.finite(self.rows, self.points, torch.cat([
            self.model.logits(name, part) for name, part in zip(self.surrogates, features, strict=True)]))

    def _parts(self, rows: Tensor) -> list["_Part"]:
        ends = torch.searchsorted(rows, self.size * torch.arange(len(self.surrogates) + 1, device=rows.device)).tolist()
        return [_Part(name, end - begin, s * self.size, rows[begin:end] - s * self.size
                      if self.model.batch_dependent(name) and end - begin < self.size else None)
                for s, (name, begin, end) in enumerate(zip(self.surrogates, ends, ends[1:], strict=False))
                if begin < end]

    def _part_logits(self, part: "_Part", features: Tensor) -> Tensor:
        if part.among is None:
            return self.model.logits(part.surrogate, features)
        whole = self._features[part.first:part.first + self.size].index_copy(0, part.among, features)
        return self.model.logits(part.surrogate, whole).index_select(0, part.among)


class _Part(NamedTuple):
    """The `size` queried rows of one surrogate."""

    surrogate: str
    size: int
    first: int  # the surrogate's first row of all
    among: Tensor | None  # (size,), their places in the surrogate's batch; None if the others are not needed
