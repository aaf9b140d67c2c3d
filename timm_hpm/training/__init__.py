"""Adversarial training: options, objectives, the loop, and what it leaves on disk."""

from .config import TrainConfig
from .loop import Stopped, train

__all__ = ["Stopped", "TrainConfig", "train"]
