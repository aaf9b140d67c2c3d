"""Adversarial training: options, objectives, the loop, and what it leaves on disk."""

from .config import TrainConfig
from .loop import Run, train
from .objectives import OBJECTIVES, LossOptions, Objective, TrainingAttack
from .signals import Stopped

__all__ = ["OBJECTIVES", "LossOptions", "Objective", "Run", "Stopped", "TrainConfig", "TrainingAttack", "train"]
