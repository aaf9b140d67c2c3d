#!/usr/bin/env python3
"""What the faster gradient of a grey stem saves, as ratios, each the median of paired runs on one thread of a CPU.

    python benchmarks/grey.py

- convolutions of one channel, forward and backward, over the same by PyTorch.
- hpm_wrn10_2 as attacks take it, forward and backward, over the same with PyTorch's gradient of its stem.
"""

import copy
from collections.abc import Callable
from functools import partial

import timm
import torch
from _timing import paired_ratio
from torch import Tensor, nn

from timm_hpm import PixelModel
from timm_hpm.attacks.grey import quicken_grey_convs
from timm_hpm.attacks.surrogates import SplitModel

RUNS = 31
#: Images, their size, output channels, kernel size, stride and padding.
STEMS = ((500, 28, 16, 3, 4, 1), (600, 8, 16, 3, 2, 1), (100, 28, 16, 3, 1, 1), (100, 32, 160, 3, 1, 1),
         (8, 224, 64, 7, 2, 3), (8, 224, 192, 16, 16, 0))
#: Images, their size and the stem's stride: five surrogates side by side, of Fashion-MNIST and of the digits.
NETS = ((500, 28, 4), (600, 8, 2))


def gradient(forward: Callable[[Tensor], Tensor], images: Tensor, weights: Tensor) -> Tensor:
    """Returns the gradient of the answers' sum, each times its weight."""
    x = images.clone().requires_grad_()
    return torch.autograd.grad(forward(x), x, weights)[0]


def print_ratio(name: str, quick: nn.Module, plain: nn.Module, images: Tensor) -> None:
    """Prints the ratio of the times that two networks take, forward and backward."""
    weights = torch.rand_like(plain(images))
    ratio = paired_ratio(partial(gradient, quick, images, weights), partial(gradient, plain, images, weights), RUNS)
    print(f"{name}, {len(images)} images of {images.shape[-1]}²: {ratio:.2f}", flush=True)


def main() -> None:
    """Prints the ratios."""
    torch.set_num_threads(1)
    for number, size, channels, kernel, stride, padding in STEMS:
        images = torch.rand(number, 1, size, size)
        conv = nn.Conv2d(1, channels, kernel, stride, padding).requires_grad_(False)
        conv.to(memory_format=torch.channels_last)
        quick = copy.deepcopy(conv)
        assert quicken_grey_convs(quick) == 1
        print_ratio(f"{kernel}x{kernel} convolution to {channels} channels, stride {stride}", quick, conv, images)
    for number, size, stride in NETS:
        model = timm.create_model("hpm_wrn10_2.untrained", in_chans=1, stem_stride=stride)
        images = torch.rand(number, 1, size, size)
        split = SplitModel(PixelModel(model.eval(), mean=[0.3], std=[0.3]), images[:8])
        plain = copy.deepcopy(split.backbone)
        plain.model.conv1.__class__ = nn.Conv2d
        print_ratio(f"hpm_wrn10_2, stem of stride {stride}", split.backbone, plain, images)


if __name__ == "__main__":
    main()
