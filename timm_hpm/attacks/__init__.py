"""Attacks: functions on logits, of pixels in [0, 1]."""

from .components import COMPONENTS, STANDARD_BUDGETS, Budget, NonFiniteLogitsError
from .msa import judge, mixed_surrogate_attack, rejudge
from .pgd import pgd
from .surrogates import SURROGATES

__all__ = [
    "COMPONENTS",
    "STANDARD_BUDGETS",
    "SURROGATES",
    "Budget",
    "NonFiniteLogitsError",
    "judge",
    "mixed_surrogate_attack",
    "pgd",
    "rejudge",
]
