"""Adversarially robust image classifiers for timm, and their honest measurement.

Importing the package registers the `hpm_*` models with timm.
"""

__version__ = "0.1.0"

from .head import INFERENCE_MODES, HPMHead, find_head, inference_mode
from .threat import ThreatModel

__all__ = [
    "INFERENCE_MODES",
    "HPMHead",
    "ThreatModel",
    "find_head",
    "inference_mode",
]
