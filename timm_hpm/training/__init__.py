"""Adversarial training: options, objectives, the loop, and the files of a run."""

from .config import TrainConfig
from .loop import Run
from .objectives import OBJECTIVES, Objective, TrainingAttack
from .signals import Stopped
from .train import train

__all__ = ["OBJECTIVES", "Objective", "Run", "Stopped", "TrainConfig", "TrainingAttack", "train"]
