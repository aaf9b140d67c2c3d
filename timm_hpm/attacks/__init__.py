"""Attacks: functions on logits, of pixels in [0, 1]."""

from .components import Budget, NonFiniteLogitsError
from .judge import judge, rejudge
from .msa import mixed_surrogate_attack
from .pgd import pgd
from .protocols import PROTOCOLS, Protocol
from .surrogates import SURROGATES, Surrogate
from .table import ATTACKS, Attack

__all__ = [
    "ATTACKS",
    "PROTOCOLS",
    "SURROGATES",
    "Attack",
    "Budget",
    "NonFiniteLogitsError",
    "Protocol",
    "Surrogate",
    "judge",
    "mixed_surrogate_attack",
    "pgd",
    "rejudge",
]
