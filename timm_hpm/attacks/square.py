"""Square, the random search that needs no gradient, bit by bit the same as pyautoattack's.

A query moves a window of all images at once. Under Linf only that window is computed, and written back if it was of no
use. Source: Andriushchenko et al., arXiv 1912.00049 (tests/test_autoattack.py).
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..threat import ThreatModel

#: Part of the image that the first windows cover, and after how many queries it halves.
_FIRST_PART = 0.8
_HALVINGS = (10, 50, 200, 500, 1_000, 2_000, 4_000, 6_000, 8_000)


@torch.no_grad()
def square_search(
        margin_fn: Callable[[Tensor, Tensor], Tensor],
        rows: Tensor,
        clean: Tensor,
        threat: ThreatModel | str,
        queries: int,
        on_fooled: Callable[[Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Returns the points (R, ...) of largest margin that random changes find; a fooled image is left alone.

    Arguments:
        margin_fn: some of the `rows` (r,), the images' names, and pixels (r, ...) for them, to the margins (r,),
            max_{c≠y} z_c − z_y. An image is fooled if its margin is not negative.
        clean: (R, channels, H, W), pixels in [0, 1].
        queries: changes to try on each image; the start costs one more.
        on_fooled: is called with the rows (r,) that are fooled and their pixels (r, ...) before the others go on.
    """
    threat = ThreatModel.of(threat)
    search = (_LinfSearch if threat.norm == "Linf" else _L2Search)(clean, threat.eps)
    found = search.points.clone()
    margin = margin_fn(rows, found)
    places = torch.arange(len(rows), device=rows.device)
    for query in range(queries):
        gone = (margin >= 0).nonzero().squeeze(1)  # the one result of the device that a query waits for
        if len(gone):
            found[places[gone]] = search.points[gone]
            if on_fooled is not None:
                on_fooled(rows[gone], search.points[gone])
            kept = (~(margin >= 0)).nonzero().squeeze(1)
            rows, places, margin = rows[kept], places[kept], margin[kept]
            search.keep(kept)
        if not len(rows):
            return found
        part = _FIRST_PART / 2 ** sum(query > end for end in _HALVINGS)
        search.propose(part)
        new_margin = margin_fn(rows, search.points)
        better = new_margin > margin
        search.accept(better.view(-1, 1, 1, 1))
        margin = torch.where(better, new_margin, margin)
    found[places] = search.points
    return found


class _LinfSearch:
    """Moves a window to one of the two faces of the ball, channel by channel.

    `keep` drops images, `propose` changes a window of that part of all `points`, `accept` reverts it unless `better`.
    """

    def __init__(self, clean: Tensor, eps: float):
        count, channels, _, width = clean.shape
        self.eps = eps
        self.low, self.high = (clean - eps).clamp_(min=0), (clean + eps).clamp_(max=1)
        self.points = (clean + eps * _signs([count, channels, 1, width], clean)).clamp_(0, 1)

    def keep(self, kept: Tensor) -> None:
        self.points, self.low, self.high = self.points[kept], self.low[kept], self.high[kept]

    def propose(self, part: float) -> None:
        _, channels, height, width = self.points.shape
        side = min(max(round(math.sqrt(part * height * width)), 1), height, width)
        window = _window(height, width, side)
        self.changed = self.points[window]
        self.before = self.changed.clone()
        self.changed += _signs([channels, 1, 1], self.points).mul_(2.0 * self.eps)
        self.changed.clamp_(self.low[window], self.high[window])

    def accept(self, better: Tensor) -> None:
        self.changed.copy_(torch.where(better, self.changed, self.before))


class _L2Search:
    """Moves the perturbation's energy from one window into a bump in another."""

    def __init__(self, clean: Tensor, eps: float):
        self.clean, self.eps = clean, eps
        self.eps_squared = (torch.tensor(eps, dtype=clean.dtype) ** 2).item()  # as rounded as AutoAttack's
        count, channels, height, width = clean.shape
        tile = max(min(height // 5, width), 1)
        margin = max(height - 5 * tile, 0) // 2
        start = min(margin, width - tile)
        delta = torch.zeros_like(clean)
        for top in range(margin, margin + height // tile * tile, tile):
            # AutoAttack begins at the margin from above, which may lie outside of a narrow image.
            for left in range(start, start + width // tile * tile, tile):
                # AutoAttack's needs whole tiles, and fails on images that these do not fit.
                here = delta[:, :, top:top + tile, left:left + tile]
                bump = _bump(tile, clean) * _signs([count, channels, 1, 1], clean)
                here += bump[:, :, :here.shape[2], :here.shape[3]]
        self.points = self._on_the_sphere(delta)

    def keep(self, kept: Tensor) -> None:
        self.points, self.clean = self.points[kept], self.clean[kept]

    def propose(self, part: float) -> None:
        count, channels, height, width = self.points.shape
        side = max(round(math.sqrt(part * height * width)), 3)
        side = min(side + (side % 2 == 0), height, width)
        self.before = self.points
        delta = self.points - self.clean
        to = _window(height, width, side)
        length = _length(delta[to], (-2, -1))
        source = _window(height, width, side)
        both = torch.zeros_like(delta)
        both[to] = both[source] = 1.0
        room = torch.clamp(self.eps_squared - _image_length(delta) ** 2, min=0)
        energy = (room / channels + _length(delta * both, (-2, -1)) ** 2).sqrt()
        bump = _bump(side, delta) * _signs([count, channels, 1, 1], delta) + delta[to] / (1e-12 + length)
        bump = bump / (1e-12 + _length(bump, (-2, -1))) * energy
        delta[source] = 0.0
        delta[to] = bump
        self.points = self._on_the_sphere(delta)

    def accept(self, better: Tensor) -> None:
        self.points = torch.where(better, self.points, self.before)

    def _on_the_sphere(self, delta: Tensor) -> Tensor:
        return (self.clean + delta / (_image_length(delta) + 1e-12) * self.eps).clamp_(0, 1)


def _length(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    return (x ** 2).sum(dim=dims, keepdim=True).sqrt()


def _image_length(x: Tensor) -> Tensor:
    # Summed in this order, rounding is AutoAttack's.
    return (x.flatten(1) ** 2).sum(dim=1).sqrt().view(-1, 1, 1, 1)


def _signs(shape: list[int], like: Tensor) -> Tensor:
    return torch.rand(shape, dtype=like.dtype, device=like.device).mul_(2).sub_(1).sign_()


def _window(height: int, width: int, side: int) -> tuple[Any, slice, slice]:
    top, left = (int((size - side) * _chance()) for size in (height, width))
    return ..., slice(top, top + side), slice(left, left + side)


def _chance() -> np.float32:
    """Returns a uniform random number in [0, 1), drawn by the host, which needs it."""
    return torch.rand(1).numpy()[0]


def _bump(side: int, like: Tensor) -> Tensor:
    """Returns two halves of opposite sign (side, side), each largest in its middle, upright or lying; of length 1."""
    bump = _upright_bump(side, like.dtype, like.device)
    # Laid out alike either way, it is summed in AutoAttack's order.
    return bump.t().contiguous() if _chance() > 0.5 else bump


@lru_cache(maxsize=32)
def _upright_bump(side: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    bump = torch.zeros(side, side, dtype=dtype)
    bump[:side // 2] = _half_bump(side // 2, side, dtype)
    bump[side // 2:] = -_half_bump(side - side // 2, side, dtype)
    return (bump / _length(bump, (0, 1))).to(device)


def _half_bump(height: int, width: int, dtype: torch.dtype) -> Tensor:
    bump = torch.zeros(height, width, dtype=dtype)
    top, left = height // 2, width // 2
    for ring in range(max(height, width) // 2 + 1):
        rows, columns = (slice(max(first - ring, 0), first + ring + 1) for first in (top, left))
        bump[rows, columns] += 1.0 / (ring + 1) ** 2
    return bump / _length(bump, (0, 1))
