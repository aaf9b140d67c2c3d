"""Networks that answer by a function or hide no mistake behind first values, and a file that runs code."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from timm_hpm import find_head


class Wrapped(nn.Module):
    """Answers by a function of a network and the images."""

    def __init__(self, net: nn.Module, answer: Callable[[nn.Module, torch.Tensor], torch.Tensor]):
        super().__init__()
        self.net, self.answer = net, answer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.answer(self.net, x)


def with_statistics(model: nn.Module) -> nn.Module:
    """Gives every BatchNorm random statistics and weights: at their first values they hide mistakes."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.1)
    return model


def with_prototypes(model: nn.Module, log_scale: float = -0.5) -> nn.Module:
    """Gives the HPM head random prototypes."""
    head = find_head(model)
    head.set_prototypes(torch.randn_like(head.prototypes))
    nn.init.constant_(head.log_scale, log_scale)
    return model


def same_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Returns whether two state dicts have the same names and the same bits."""
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


class Trap:
    """Makes a file if its pickle is run."""

    def __init__(self, file: Path):
        self.file = str(file)

    def __reduce__(self):
        return open, (self.file, "w")
