"""Attacks: functions on logits, of pixels in [0, 1]."""

from .components import COMPONENTS, Budget, NonFiniteLogitsError
from .judge import judge, rejudge
from .msa import mixed_surrogate_attack
from .pgd import pgd
from .protocols import ATTACKS, PROTOCOLS, Protocol
from .surrogates import SURROGATES

__all__ = [
    "ATTACKS",
    "COMPONENTS",
    "PROTOCOLS",
    "SURROGATES",
    "Budget",
    "NonFiniteLogitsError",
    "Protocol",
    "judge",
    "mixed_surrogate_attack",
    "pgd",
    "rejudge",
]
