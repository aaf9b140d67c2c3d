"""`blocked_copy`: the same network in oneDNN's own memory layout, for those who only ask it for answers, on a CPU."""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .fold import keeps_its_weight, rest_of


def blocked_copy(model: nn.Module, example: Tensor) -> Callable[[Tensor], Tensor] | None:
    """Returns a function that answers as `model` up to rounding, without gradients, and faster on a CPU.

    Convolutions and BatchNorms keep their weights, and hand on what they compute, in the layout that oneDNN works in,
    instead of bringing both into it and back each time. What lies between them must know that layout too: activations,
    sums and pooling do.

    Arguments:
        model: in eval mode.
        example: (B, channels, H, W), by which it is tried.

    Returns:
        The function of images (B, channels, H, W), or None where the model has no convolution, has operations that do
        not know the layout, or is not on a CPU whose PyTorch has oneDNN.
    """
    if example.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return None
    blocked = copy.deepcopy(model)
    found = False
    with torch.no_grad():
        try:
            for parent in list(blocked.modules()):
                for name, child in list(parent.named_children()):
                    if type(child) is nn.Conv2d and child.padding_mode == "zeros" and keeps_its_weight(child):
                        found = True
                        setattr(parent, name, _BlockedConv(child))
                    elif isinstance(child, nn.BatchNorm2d) and child.running_mean is not None:
                        setattr(parent, name, nn.Sequential(_BlockedNorm(child), rest_of(child)))
            if not found:
                return None

            def answer(images: Tensor) -> Tensor:
                with torch.no_grad():
                    output = blocked(images)
                    return output.to_dense() if output.is_mkldnn else output

            answer(example)
        except Exception:  # of whatever operation does not know the layout, or looks at it
            return None
    return answer


def _in_layout(x: Tensor) -> Tensor:
    return x if x.is_mkldnn else x.contiguous().to_mkldnn()


class _BlockedConv(nn.Module):
    """A convolution in oneDNN's layout, of images in that layout or not."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.how: list[Any] = [conv.padding, conv.stride, conv.dilation, conv.groups]
        weight = conv.weight.detach().contiguous().to_mkldnn()
        self.weight = torch._C._nn.mkldnn_reorder_conv2d_weight(weight, *self.how)
        self.bias = None if conv.bias is None else conv.bias.detach().to_mkldnn()

    def forward(self, x: Tensor) -> Tensor:
        return torch.mkldnn_convolution(_in_layout(x), self.weight, self.bias, *self.how)


class _BlockedNorm(nn.Module):
    """A BatchNorm by its running statistics in oneDNN's layout."""

    def __init__(self, norm: nn.BatchNorm2d):
        super().__init__()
        assert norm.running_mean is not None and norm.running_var is not None
        weight = torch.ones_like(norm.running_var) if norm.weight is None else norm.weight.detach()
        bias = torch.zeros_like(norm.running_mean) if norm.bias is None else norm.bias.detach()
        self.mean, self.var = norm.running_mean.to_mkldnn(), norm.running_var.to_mkldnn()
        self.weight, self.bias, self.eps = weight.to_mkldnn(), bias.to_mkldnn(), norm.eps

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(_in_layout(x), self.mean, self.var, self.weight, self.bias, eps=self.eps)
