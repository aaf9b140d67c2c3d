"""`quicken_grey_convs`: convolutions of one channel, with gradients that oneDNN is slow to give."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .fold import keeps_its_weight


def quicken_grey_convs(model: nn.Module) -> int:
    """Gives convolutions of one input channel a faster gradient, in place, on a CPU; returns how many.

    That is the stem of a network of grey images. oneDNN has no fast kernel for the gradient with respect to a single
    channel: where the rest of the network is small, it takes longer than that of any other convolution. As a product
    of matrices it takes a half to a tenth (`python benchmarks/grey.py`). Answers are the same bit by bit, gradients up
    to rounding.

    Arguments:
        model: its parameters without gradients.
    """
    found = [module for module in model.modules()
             if type(module) is nn.Conv2d and module.in_channels == 1 and module.padding_mode == "zeros"
             and not isinstance(module.padding, str) and keeps_its_weight(module)
             and module.weight.device.type == "cpu" and not module.weight.requires_grad]
    for conv in found:
        # Not another module in its place: hooks stay, and so does what reads its attributes.
        conv.__class__ = _GreyConv2d
    return len(found)


class _GreyConv2d(nn.Conv2d):
    """A convolution of one channel whose weight is constant."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if x.ndim != 4:
            return super()._conv_forward(x, weight, bias)
        return _GreyConvolution.apply(x, weight, bias, self.stride, self.padding, self.dilation)


class _GreyConvolution(torch.autograd.Function):
    """The convolution of images (B, 1, H, W), differentiable with respect to these alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int],
                padding: tuple[int, int], dilation: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.size, ctx.how = x.shape[2:], (dilation, padding, stride)
        return F.conv2d(x, weight, bias, stride, padding, dilation)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        weight, = ctx.saved_tensors
        # What each output has of each pixel of its window, then the sum over the windows that a pixel lies in. Under
        # autocast the output is of another precision than the weight.
        parts = weight.flatten(1).t().to(gradient.dtype) @ gradient.flatten(2)
        return F.fold(parts, ctx.size, weight.shape[2:], *ctx.how), None, None, None, None, None
