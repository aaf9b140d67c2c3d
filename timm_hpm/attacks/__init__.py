"""Attacks: pure functions on logits, of pixels in [0, 1]."""

from .apgd import Ascent, apgd
from .fab import fab
from .losses import cross_entropy, margin_loss, predicted_classes, targeted_loss
from .pgd import pgd
from .square import square_search

__all__ = [
    "Ascent",
    "apgd",
    "cross_entropy",
    "fab",
    "margin_loss",
    "pgd",
    "predicted_classes",
    "square_search",
    "targeted_loss",
]
