"""`AveragedModel`: the moving average of a model's weights, with prototypes of its own features."""

from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor

from .distributed import reduced
from .trunk import PixelTrunk


class AveragedModel:
    """Averages the weights and buffers of a model over its updates, by timm's `ModelEmaV3` with its warm-up.

    The decay rises with the updates up to `decay`, so a short run does not keep its initial weights. The average's
    prototypes are the class means of its own features over this epoch's images, weighted by the head's `ema_decay`. A
    class without an image in this epoch keeps its prototype.
    """

    def __init__(self, model: Any, decay: float):
        self.average = ModelEmaV3(model, decay=decay, use_warmup=True)
        self.module: Any = self.average.module
        self.trunk = PixelTrunk(self.module)
        self.head = self.trunk.head
        prototypes = torch.zeros(0, 0) if self.head is None else self.head.prototypes
        self.sums, self.counts = torch.zeros_like(prototypes), prototypes.new_zeros(len(prototypes))
        self._new: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def see(self, pixels: Tensor, labels: Tensor) -> None:
        """Adds the features of a batch (B, channels, H, W) in [0, 1] to the prototypes of the next update."""
        self._new.append(self.head.class_sums(self.trunk.backbone(pixels), labels))

    def begin_epoch(self) -> None:
        """Forgets the features of the last epoch."""
        self.sums.zero_()
        self.counts.zero_()

    @torch.no_grad()
    def update(self, model: Any, step: int) -> None:
        """Moves the average towards `model` after its update number `step`, from 1, and updates the prototypes."""
        prototypes = None if self.head is None else self.head.prototypes.clone()
        self.average.update(model, step=step)
        if prototypes is None:
            return
        for total, parts in zip((self.sums, self.counts), zip(*self._new, strict=True), strict=False):
            total.mul_(self.head.ema_decay).add_(reduced(sum(parts)))  # type: ignore[arg-type]
        self._new.clear()
        means = self.sums / self.counts.clamp(min=1e-12).unsqueeze(1)
        self.head.prototypes.copy_(torch.where((self.counts > 0).unsqueeze(1), means, prototypes))

    def class_sums(self) -> dict[str, Tensor]:
        """Returns the sums of features (C, d) and the counts (C,) of this epoch, for a checkpoint."""
        return {"sums": self.sums, "counts": self.counts}

    def load(self, state: dict[str, Tensor], class_sums: dict[str, Tensor]) -> None:
        """Restores the state dict of the average and its `class_sums`."""
        self.module.load_state_dict(state)
        for name, tensor in self.class_sums().items():
            tensor.copy_(class_sums[name])
