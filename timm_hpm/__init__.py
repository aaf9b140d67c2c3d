"""Adversarially robust image classifiers for timm, and their honest measurement.

Importing the package registers the `hpm_*` models with timm.
"""

__version__ = "0.1.0"

from importlib import import_module
from typing import Any

from . import models  # registers the models
from .attacks import pgd
from .checkpoints import CheckpointError, DroppedClassifierWarning, NormalisationWarning
from .data import PixelModel, load_split
from .evaluation import (
    PROTOCOLS,
    Budget,
    NonFiniteLogitsError,
    Protocol,
    attack,
    judge,
    measure_neighbours,
    mixed_surrogate_attack,
    rejudge,
    sweep,
)
from .evaluation.evaluate import evaluate
from .guards import TooLargeError
from .head import INFERENCE_MODES, HPMHead, UnfittedHeadWarning, find_head, head_mode
from .models import register_hpm
from .models.create import create_model, load_model
from .prototypes import PrototypeFit, fit_prototypes
from .report import AttackReport, compare, merge_reports
from .report.html import report_page, write_report
from .report.markdown import comparison_markdown, report_markdown
from .sensitivity import Sensitivity, measure_sensitivity
from .subset import keep_classes
from .surgery import UnsupportedHeadError, add_hpm_head, remove_hpm_head
from .threat import ThreatModel

#: The old name of `head_mode`, for one release.
inference_mode = head_mode

__all__ = [
    "INFERENCE_MODES", "PROTOCOLS", "AttackReport", "Budget", "CheckpointError", "DroppedClassifierWarning",
    "HPMHead", "NonFiniteLogitsError", "NormalisationWarning", "PixelModel", "Protocol", "PrototypeFit",
    "Sensitivity", "ThreatModel", "TooLargeError", "TrainConfig", "UnfittedHeadWarning", "UnsupportedHeadError",
    "add_hpm_head", "attack", "cards", "compare", "comparison_markdown", "create_model", "evaluate", "find_head",
    "fit_prototypes", "head_mode", "hub", "inference_mode", "judge", "keep_classes", "load_model", "load_split",
    "measure_neighbours", "measure_sensitivity", "merge_reports", "mixed_surrogate_attack", "models", "pgd",
    "register_hpm", "rejudge", "remove_hpm_head", "report_markdown", "report_page", "sweep", "train",
    "write_report",
]


def __getattr__(name: str) -> Any:
    # Imported on first use: they need the slow imports of huggingface_hub and accelerate.
    if name in ("cards", "hub"):
        return import_module(f".{name}", __name__)
    if name in ("TrainConfig", "train"):
        return getattr(import_module(".training", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
