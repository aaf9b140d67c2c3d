"""The data of a report. Its renderers are modules of their own, which import the data: markdown and html."""

from .compare import Comparison, PairedRow, compare, mcnemar_p_value, merge_reports
from .examples import NUM_EXAMPLES, Example, make_example
from .flags import FLAGS, Flag
from .schema import ASSEMBLED, SCHEMA_VERSION, TRUE_MODEL, AttackReport, Convergence, data_digest, weights_digest

__all__ = [
    "ASSEMBLED", "FLAGS", "NUM_EXAMPLES", "SCHEMA_VERSION", "TRUE_MODEL", "AttackReport", "Comparison", "Convergence",
    "Example", "Flag", "PairedRow", "compare", "data_digest", "make_example", "mcnemar_p_value", "merge_reports",
    "weights_digest",
]
