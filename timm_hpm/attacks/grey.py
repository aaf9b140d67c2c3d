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
    of matrices, and a sum over windows that PyTorch makes on one thread, it is faster where there is a stride or where
    the outputs have 16 channels or more, and only there it is done (`python benchmarks/grey.py`). Answers are the same
    bit by bit, gradients up to rounding. It takes up to four times the memory of the output's gradient.

    Arguments:
        model: its parameters without gradients.
    """
    found = [module for module in model.modules() if type(module) is nn.Conv2d and _gains(module)]
    for conv in found:
        # Not another module in its place: hooks stay, and so does what reads its attributes.
        conv.__class__ = _GreyConv2d
    return len(found)


def _gains(conv: nn.Conv2d) -> bool:
    """Returns whether the gradient of a convolution is such, and faster as a product."""
    return (conv.in_channels == 1 and conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
            and keeps_its_weight(conv) and conv.weight.device.type == "cpu"
            and (conv.out_channels >= 16 or min(conv.stride) > 1)
            and conv.weight[0, 0].numel() <= 4 * conv.out_channels)


class _GreyConv2d(nn.Conv2d):
    """A convolution of one channel, faster where only its images need a gradient."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # A model may adapt its weights while it answers.
        if x.ndim != 4 or weight.requires_grad or (bias is not None and bias.requires_grad):
            return super()._conv_forward(x, weight, bias)
        return _GreyConvolution.apply(x, weight, bias, self.stride, self.padding, self.dilation)


class _GreyConvolution(torch.autograd.Function):
    """The convolution of images (B, 1, H, W), differentiable with respect to these alone."""

    # Models may map and differentiate by torch.func while they answer.
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int], padding: tuple[int, int],
                dilation: tuple[int, int]) -> Tensor:
        return F.conv2d(x, weight, bias, stride, padding, dilation)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, stride, padding, dilation = inputs
        ctx.save_for_backward(weight)
        ctx.save_for_forward(weight)
        ctx.size, ctx.how = x.shape[2:], (stride, padding, dilation)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        weight, = ctx.saved_tensors
        stride, padding, dilation = ctx.how
        # What each output has of each pixel of its window, then the sum over the windows that a pixel lies in: of
        # numbers in half precision in single, as PyTorch's own.
        half = gradient.dtype in (torch.float16, torch.bfloat16)
        dtype = torch.float32 if half else gradient.dtype
        parts = weight.flatten(1).t().to(dtype) @ gradient.flatten(2).to(dtype)
        summed = F.fold(parts, ctx.size, weight.shape[2:], dilation, padding, stride)
        return summed.to(gradient.dtype), None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, x: Tensor, *_: Any) -> Tensor:
        weight, = ctx.saved_tensors
        return F.conv2d(x, weight, None, *ctx.how)
