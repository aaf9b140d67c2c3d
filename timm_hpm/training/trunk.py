"""`PixelTrunk`, a model cut in front of its HPM head, and `AveragedModel`, the moving average of a model's weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from ..data import as_pixel_model
from ..head import find_head, head_name, without_head
from ..surrogates import SURROGATES, ste_logits
from .distributed import reduced


class PixelTrunk(nn.Module):
    """A model that maps pixels in [0, 1] to features, HPM logits and FC logits: one pass serves all surrogates.

    It shares parameters, buffers and submodules with `model`, which stays whole. Without an HPM head all three are the
    model's logits.
    """

    def __init__(self, model: Any):
        super().__init__()
        self.head: Any = None if head_name(model) is None else find_head(model)
        self.backbone = as_pixel_model(model if self.head is None else without_head(model))
        self.train(model.training)

    @property
    def uses_prototypes(self) -> bool:
        """Returns whether the model predicts by prototypes, once it has some."""
        return self.head is not None and self.head.inference != "fc"

    @property
    def has_prototypes(self) -> bool:
        """Returns whether the model predicts by prototypes."""
        return self.uses_prototypes and self.head.is_fitted()

    def forward(self, *pixels: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Returns for each batch (B, channels, H, W) the features (B, d), and the HPM's and FC's logits (B, C).

        Several batches go into one call, because DistributedDataParallel takes one call per backward pass.
        """
        return [self._outputs(self.backbone(batch)) for batch in pixels]

    def surrogate_logits(self, surrogate: str, pixels: Tensor) -> Tensor:
        """Returns the logits (B, C) of one of `SURROGATES` for `pixels` (B, channels, H, W), or the model's own."""
        features = self.backbone(pixels)
        return features if self.head is None else SURROGATES[surrogate].logits(self.head, features)

    def _outputs(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        fc_logits = (features if self.head is None else self.head.fc_logits(features)).float()
        if not self.uses_prototypes:
            return features, fc_logits, fc_logits
        return features, ste_logits(self.head, features), fc_logits


@contextmanager
def inputs_only(module: nn.Module) -> Iterator[None]:
    """Turns off the gradients of all parameters inside the block, so that passes compute those of the inputs alone."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


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
