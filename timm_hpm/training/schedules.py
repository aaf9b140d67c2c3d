"""Learning rates as functions of the number of updates: timm's schedules, and the one-cycle policy."""

import math
from typing import Any, Final

from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler

from .config import TrainConfig

_LOW: Final = 0.04


class OneCycleScheduler(Scheduler):
    """A cosine from `low` times the peak up, then one down to `min_lr`. Source: Smith and Topin, arXiv 1708.07120.

    The learning rate rises in the fraction `rising` of the `total` updates.
    """

    def __init__(self, optimizer: Any, total: int, rising: float, low: float = _LOW, min_lr: float = 0.0):
        super().__init__(optimizer, "lr")
        self.total, self.rising, self.low, self.min_lr = total, rising, low, min_lr
        self.step(0)

    def _get_lr(self, t: int) -> list[float]:
        done = min(t / self.total, 1.0)
        if done < self.rising:
            part = self.low + (1 - self.low) * 0.5 * (1 - math.cos(math.pi * done / self.rising))
            return [peak * part for peak in self.base_values]
        part = 0.5 * (1 + math.cos(math.pi * (done - self.rising) / max(1 - self.rising, 1e-9)))
        return [self.min_lr + (peak - self.min_lr) * part for peak in self.base_values]


def create_schedule(config: TrainConfig, optimizer: Any, updates_per_epoch: int) -> Scheduler:
    """Returns the schedule of a run, which steps by the number of updates made."""
    total, warmup = config.epochs * updates_per_epoch, (config.warmup_epochs or 0.0) * updates_per_epoch
    if config.sched == "onecycle":
        low = _LOW if config.warmup_lr is None else config.warmup_lr / config.lr
        return OneCycleScheduler(optimizer, total, warmup / total, low, config.min_lr)
    return create_scheduler_v2(
        optimizer, config.sched,
        num_epochs=math.ceil(total - warmup) if config.warmup_prefix else total,
        decay_epochs=config.decay_epochs * updates_per_epoch,
        decay_milestones=[round(epoch * updates_per_epoch) for epoch in config.decay_milestones],
        decay_rate=config.decay_rate, min_lr=config.min_lr,
        warmup_lr=1e-5 if config.warmup_lr is None else config.warmup_lr, warmup_epochs=warmup,  # type: ignore[arg-type]
        warmup_prefix=config.warmup_prefix)[0]
