"""`PixelTrunk`: a model cut in front of its HPM head, so that one pass serves the head and every surrogate."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..data import as_pixel_model
from ..head import find_head, head_name, without_head
from ..surrogates import SURROGATES, ste_logits


class PixelTrunk(nn.Module):
    """A model that maps pixels in [0, 1] to features, HPM logits and FC logits.

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
