"""`ThreatModel`: the perturbations that an adversary may make."""

import math
import re
import warnings
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

NORMS: Final = ("Linf", "L2")

# L2 radii: larger than any in use for pixels in [0, 1], and larger than the distance of any two images.
_UNUSUAL: Final = 20.0
_LARGEST: Final = 1e6


@dataclass(frozen=True)
class ThreatModel:
    """All images within `eps` of the clean one in a norm, with pixels in [0, 1].

    Arguments:
        norm: `"Linf"` or `"L2"`.
        eps: radius in units of the pixel range, above 0; for Linf at most 1, for L2 at most 1e6. An L2 radius above 20
            warns: it is probably in units of 0 to 255.

    Raises:
        ValueError: if the norm is unknown, or the radius out of range.
    """

    norm: str
    eps: float

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "eps", float(self.eps))  # NumPy's numbers have a repr that `of` cannot read
        except (TypeError, ValueError):
            raise ValueError(f"eps is {self.eps!r}; expected a number, in units of the pixel range. Texts such as "
                             "'Linf:8/255' are read by ThreatModel.of") from None
        if self.norm not in NORMS:
            raise ValueError(f"unknown norm {self.norm!r}; expected one of {', '.join(NORMS)}")
        if not (math.isfinite(self.eps) and self.eps > 0):
            raise ValueError(f"eps is {self.eps}; expected a finite number above 0")
        if self.norm == "Linf" and self.eps > 1:
            raise ValueError(f"eps is {self.eps} for Linf; pixels are in [0, 1], so at most 1. "
                             f"Did you mean {self.eps:g}/255?")
        if self.eps > _LARGEST:
            raise ValueError(f"eps is {self.eps} for L2; expected at most {_LARGEST:g}, of pixels in [0, 1]")
        if self.eps > _UNUSUAL:
            warnings.warn(f"eps is {self.eps:g} for L2, and pixels are in [0, 1]: almost any image is that near. Did "
                          f"you mean {self.eps:g}/255?", stacklevel=3)

    @classmethod
    def of(cls, threat: "str | ThreatModel") -> "ThreatModel":
        """Returns `threat`, or the threat model of a text such as `"Linf:8/255"` or `"L2:0.5"`.

        Raises a ValueError if the text is malformed or its values are out of range.
        """
        if isinstance(threat, cls):
            return threat
        match = re.fullmatch(r"([^:]+):(.+)", threat.strip()) if isinstance(threat, str) else None
        try:
            if match is None:
                raise ValueError
            eps = parse_number(match[2])
        except (ValueError, ZeroDivisionError):
            raise ValueError(f"cannot read the threat model {threat!r}; expected NORM:EPS such as Linf:8/255 or L2:0.5 "
                             f"(of {', '.join(NORMS)}), or a ThreatModel") from None
        return cls(match[1].strip(), eps)

    def __str__(self) -> str:
        """Returns a text that `of` reads back to an equal threat model."""
        number = round(self.eps * 255)
        # Short decimals stay decimals, although 0.2 is also 51/255.
        if number / 255 == self.eps and len(repr(self.eps)) > 5:
            return f"{self.norm}:{number}/255"
        return f"{self.norm}:{self.eps!r}"

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns the distances (B,) between the images of `x` (B, ...) and those of `y` (B, ...)."""
        return self.size(x - y)

    def contains(self, x: Tensor, clean: Tensor) -> Tensor:
        """Returns whether each image (B,) of `x` (B, ...) has pixels in [0, 1] and is in the ball around `clean`.

        The distance may exceed eps by float32's rounding: by 1e-5 of eps, and under Linf 2⁻²³, under L2 √d times that.
        """
        pixels = x[0].numel()
        rounding = 1e-5 * self.eps + 2 ** -23 * (1.0 if self.norm == "Linf" else math.sqrt(pixels))
        inside = ((x >= 0) & (x <= 1)).flatten(1).all(dim=1)
        return inside & (self.distance(x, clean) <= self.eps + rounding)

    def size(self, delta: Tensor) -> Tensor:
        """Returns the norm of each perturbation of `delta` (B, ...), as (B,)."""
        delta = delta.flatten(1)
        return delta.abs().amax(dim=1) if self.norm == "Linf" else delta.norm(dim=1)

    def project(self, x: Tensor, clean: Tensor) -> Tensor:
        """Returns the projection of `x` (B, ...) into the ball around `clean` (B, ...) and into [0, 1].

        The L2 projection scales the perturbation and then clamps the pixels, as AutoAttack does: clean pixels are in
        [0, 1], so clamping only brings each pixel nearer to its clean value.
        """
        if self.norm == "Linf":
            return torch.clamp(x, clean - self.eps, clean + self.eps).clamp(0, 1)
        delta = x - clean
        return (clean + delta * (self.eps / _norm(delta).clamp(min=self.eps))).clamp(0, 1)

    def scaled(self, direction: Tensor, size: float | Tensor) -> Tensor:
        """Returns the steepest step of norm `size` along `direction` (B, ...): its sign, or its unit vector.

        The step along a direction that is not finite is zero; under Linf, only of its NaN pixels.
        """
        if self.norm == "Linf":
            return size * direction.sign()
        # A confident model's gradient may be so small that its square underflows: divide by its size first.
        largest = per_image(direction.flatten(1).abs().amax(dim=1), direction)
        unit = (direction / torch.where(largest > 0, largest, 1)).masked_fill(~largest.isfinite(), 0)
        return size * unit / _norm(unit).clamp(min=1e-12)

    def random_start(self, clean: Tensor) -> Tensor:
        """Returns random points of the ball around `clean` (B, ...), in [0, 1], from the global random state.

        Linf: uniform in the ball; L2: a uniform direction with a radius uniform in [0, eps].
        """
        if self.norm == "Linf":
            return (clean + self.eps * (2 * torch.rand_like(clean) - 1)).clamp(0, 1)
        radius = self.eps * torch.rand_like(_norm(clean))
        return (clean + self.scaled(torch.randn_like(clean), radius)).clamp(0, 1)


def parse_number(text: str) -> float:
    """Returns the number of a text such as `"0.5"` or `"8/255"`; raises a ValueError or ZeroDivisionError."""
    numerator, slash, denominator = text.partition("/")
    return float(numerator) / (float(denominator) if slash else 1.0)


def per_image(values: Tensor, images: Tensor) -> Tensor:
    """Returns `values` (B,) shaped to broadcast over `images` (B, ...)."""
    return values.view(-1, *[1] * (images.ndim - 1))


def _norm(x: Tensor) -> Tensor:
    """Returns the L2 norm of each image of `x` (B, ...), shaped to broadcast over it."""
    return per_image(x.flatten(1).norm(dim=1), x)
