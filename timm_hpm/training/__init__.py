"""Adversarial training: options, objectives, the loop, and the files of a run."""

from .command import train
from .config import TrainConfig
from .loop import Run
from .objectives import OBJECTIVES, Objective, TrainingAttack
from .signals import Stopped

__all__ = ["OBJECTIVES", "Objective", "Run", "Stopped", "TrainConfig", "TrainingAttack", "train"]
