"""Adversarial training: options, objectives, the loop, and what it leaves on disk."""

from .config import TrainConfig
from .loop import Run, train
from .signals import Stopped

__all__ = ["Run", "Stopped", "TrainConfig", "train"]
