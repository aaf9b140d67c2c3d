"""`RunState`: everything that the updates of a training run change, and its way into a checkpoint and back."""

from dataclasses import dataclass
from typing import Any

import torch

from ..models.saving import tensors_of
from .average import AveragedModel
from .config import FREE, TrainConfig
from .distributed import num_processes
from .recovery import Checkpoint, Progress


@dataclass
class RunState:
    """The model, its average, the optimizer, the schedule and the gradient scaler of a run, and its progress."""

    model: Any
    average: AveragedModel | None
    optimizer: Any
    schedule: Any
    scaler: Any
    progress: Progress

    def checkpoint(self, config: TrainConfig, metadata: dict[str, str]) -> Checkpoint:
        """Returns the state as a checkpoint; see `Checkpoint` for `metadata`."""
        optimizer = {"optimizer": self.optimizer.state_dict(), "schedule": self.schedule.state_dict(),
                     "scaler": {} if self.scaler is None else self.scaler.state_dict()}
        average = None
        if self.average is not None:
            average, optimizer["average"] = tensors_of(self.average.module), self.average.class_sums()
        return Checkpoint(tensors_of(self.model), average, optimizer, dict(vars(self.progress)), config.to_dict(),
                          metadata)

    def load(self, checkpoint: Checkpoint, config: TrainConfig) -> None:
        """Takes up the state of a checkpoint.

        Raises:
            ValueError: a checkpoint of other options, of another number of processes, or of another version.
        """
        own, processes = config.to_dict(), checkpoint.progress["processes"]
        place = f"the checkpoint after update {checkpoint.progress['updates']}"
        if any(checkpoint.config.get(name) != own[name] for name in own if name not in FREE):
            raise ValueError(f"{place} is of another run than args.yaml beside it; take one of them away")
        if processes != num_processes():
            raise ValueError(f"the run was trained by {processes} processes and is to be resumed by {num_processes()}; "
                             f"launch {processes}, or the batch and the schedule would be others")
        try:
            self.model.load_state_dict(checkpoint.model)
            if self.average is not None and checkpoint.average is not None:
                self.average.load(checkpoint.average, checkpoint.optimizer["average"])
            self.optimizer.load_state_dict(checkpoint.optimizer["optimizer"])
            self.schedule.load_state_dict(checkpoint.optimizer["schedule"])
            if self.scaler is not None:
                self.scaler.load_state_dict(checkpoint.optimizer["scaler"])
            vars(self.progress).update(vars(Progress(**checkpoint.progress)))
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"{place} does not fit this run ({error}); remove it if another version wrote it, or "
                             "start another run") from error

    def check_finite(self) -> None:
        """Raises a FloatingPointError if an update has left a weight that is not finite."""
        if not torch.stack([parameter.isfinite().all() for parameter in self.model.parameters()]).all():
            progress = self.progress
            raise FloatingPointError(
                f"update {progress.updates} (batch {progress.batches - 1} of epoch {progress.epoch}) "
                "left weights that are not finite; lower the learning rate (--lr), or clip the gradient (--clip-grad). "
                "The last checkpoint and the best epoch so far are in the output folder")
