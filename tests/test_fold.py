"""Networks with folded BatchNorms answer and have gradients as before."""


import pytest
import timm
import torch
from torch import nn

from timm_hpm.evaluation.fold import fold_batch_norms


def with_statistics(model: nn.Module) -> nn.Module:
    """Returns the network with BatchNorms that do something."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                module.weight.data.uniform_(0.5, 1.5)
                module.bias.data.normal_()
    return model.eval().requires_grad_(False)


def answer(model: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = images.clone().requires_grad_()
    logits = model(x)
    return logits.detach(), torch.autograd.grad(logits.square().sum(), x)[0]


@pytest.mark.parametrize(("name", "size", "folded"), [
    # Pre-activation: the second BatchNorm of each of 3 blocks, and the first that follows the stem.
    ("hpm_wrn10_2", (1, 8, 8), 4), ("test_resnet", (3, 64, 64), 15), ("test_efficientnet", (3, 64, 64), 13),
    ("test_vit", (3, 160, 160), 0),
])
def test_a_folded_network_answers_as_before(name, size, folded):
    model = with_statistics(timm.create_model(name, pretrained=False))
    images = torch.rand(3, *size)
    expected = answer(model, images)
    assert fold_batch_norms(model, images[:2]) == folded
    for found, before in zip(answer(model, images), expected, strict=True):
        torch.testing.assert_close(found, before, rtol=1e-3, atol=1e-4 * float(before.abs().max()))


class Odd(nn.Module):
    """BatchNorms that must stay: what they take has another use, or they or it are asked twice."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(2, 2, 1) for _ in range(4))
        self.norms = nn.ModuleList(nn.BatchNorm2d(2, affine=i != 3) for i in range(4))

    def forward(self, x):
        x = self.convs[0](x)
        x = x + self.norms[0](x)
        x = self.norms[1](self.norms[1](self.convs[1](x)))
        x = self.norms[2](self.convs[2](x).relu())
        return self.norms[3](self.convs[3](x)).flatten(1)


def test_a_batchnorm_with_another_use_is_not_folded():
    model, images = with_statistics(Odd()), torch.rand(3, 2, 4, 4)
    expected = model(images)
    assert fold_batch_norms(model, images) == 1
    assert [isinstance(norm, nn.BatchNorm2d) for norm in model.norms] == [True, True, True, False]
    torch.testing.assert_close(model(images), expected)


@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm,
                                  nn.utils.parametrizations.weight_norm])
def test_a_convolution_whose_weight_is_made_anew_at_each_call_is_left_as_it_is(norm):
    model = nn.Sequential(norm(nn.Conv2d(2, 3, 3)), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3),
                          nn.Flatten())
    model, images = with_statistics(model), torch.rand(3, 2, 6, 6)
    expected = model(images)
    assert fold_batch_norms(model, images) == 1
    torch.testing.assert_close(model(images), expected)
