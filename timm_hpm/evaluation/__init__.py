"""The Mixed Surrogate Attack: its attacks, protocols, verdicts and flags."""

from ..surrogates import SURROGATES, Surrogate
from .attacked import AttackedModel
from .batch import AttackBatch, Notes
from .budget import Budget
from .judge import NonFiniteLogitsError, judge, rejudge
from .msa import mixed_surrogate_attack
from .protocols import PROTOCOLS, Protocol
from .table import ATTACKS, Attack

__all__ = [
    "ATTACKS",
    "PROTOCOLS",
    "SURROGATES",
    "Attack",
    "AttackBatch",
    "AttackedModel",
    "Budget",
    "NonFiniteLogitsError",
    "Notes",
    "Protocol",
    "Surrogate",
    "judge",
    "mixed_surrogate_attack",
    "rejudge",
]
