"""Attacks: pure functions on logits, of pixels in [0, 1]."""

from .apgd import Ascent, apgd
from .fab import fab
from .losses import cross_entropy, margin_loss, predicted_classes, probability_margin, target_margin, targeted_loss
from .pgd import pgd
from .search import margin_search, repeated_search
from .square import square_search

__all__ = [
    "Ascent", "apgd", "cross_entropy", "fab", "margin_loss", "margin_search", "pgd", "predicted_classes",
    "probability_margin", "repeated_search", "square_search", "target_margin", "targeted_loss",
]
