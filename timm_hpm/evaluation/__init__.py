"""The Mixed Surrogate Attack: its attacks, protocols, verdicts and flags."""

from ..surrogates import SURROGATES, Surrogate
from .attack import attack
from .attacked import AttackedModel
from .batch import AttackBatch, Budget
from .judge import NonFiniteLogitsError, judge, rejudge
from .msa import mixed_surrogate_attack
from .neighbours import measure_neighbours
from .protocols import PROTOCOLS, Protocol
from .sweep import sweep
from .table import ATTACKS, Attack

__all__ = [
    "ATTACKS", "PROTOCOLS", "SURROGATES", "Attack", "AttackBatch", "AttackedModel", "Budget", "NonFiniteLogitsError",
    "Protocol", "Surrogate", "attack", "judge", "measure_neighbours", "mixed_surrogate_attack", "rejudge", "sweep",
]
