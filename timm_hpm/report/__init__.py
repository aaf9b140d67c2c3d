"""`AttackReport` and what is made of it: digests, flags, comparison, Markdown, HTML."""

from .flags import FLAGS, Flag
from .schema import SCHEMA_VERSION, TRUE_MODEL, AttackReport, data_digest, weights_digest

__all__ = [
    "FLAGS",
    "SCHEMA_VERSION",
    "TRUE_MODEL",
    "AttackReport",
    "Flag",
    "data_digest",
    "weights_digest",
]
