"""`AttackReport` and what is made of it: digests, flags, comparison, Markdown, HTML."""

from .compare import Comparison, PairedRow, mcnemar_p_value
from .flags import FLAGS, Flag
from .schema import SCHEMA_VERSION, TRUE_MODEL, AttackReport, data_digest, weights_digest

__all__ = [
    "FLAGS",
    "SCHEMA_VERSION",
    "TRUE_MODEL",
    "AttackReport",
    "Comparison",
    "Flag",
    "PairedRow",
    "data_digest",
    "mcnemar_p_value",
    "weights_digest",
]
