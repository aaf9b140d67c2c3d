"""Convolutions of grey images answer as before, and have the gradients that PyTorch gives them."""

import copy

import pytest
import timm
import torch
from torch import nn

from timm_hpm import PixelModel
from timm_hpm.attacks.grey import quicken_grey_convs
from timm_hpm.attacks.surrogates import SplitModel


def frozen(module: nn.Module) -> nn.Module:
    return module.eval().requires_grad_(False)


def gradient(module: nn.Module, images: torch.Tensor) -> torch.Tensor:
    x = images.clone().requires_grad_()
    return torch.autograd.grad(module(x).square().sum(), x)[0]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("kernel", "how"), [
    (3, {"padding": 1}), (3, {"stride": 4, "padding": 1}), (7, {"stride": 2, "padding": 3, "bias": False}),
    (4, {"stride": 4}), (1, {"stride": 2}), (3, {"stride": (1, 2), "padding": (2, 0), "dilation": (1, 3)}),
    ((2, 5), {"dilation": 2, "padding": (0, 4)})])
def test_gradients_are_those_of_pytorch_and_answers_the_same(kernel, how, memory_format):
    conv = frozen(nn.Conv2d(1, 16, kernel, **how).double().to(memory_format=memory_format))
    images = torch.rand(3, 1, 13, 15, dtype=torch.float64).contiguous(memory_format=memory_format)
    answer, expected = conv(images), gradient(conv, images)
    assert quicken_grey_convs(conv) == 1
    assert torch.equal(conv(images), answer)
    torch.testing.assert_close(gradient(conv, images), expected, rtol=1e-12, atol=1e-12)


def test_one_image_without_a_batch_is_answered_too():
    conv, image = frozen(nn.Conv2d(1, 16, 3)), torch.rand(1, 5, 6)
    expected = gradient(conv, image)
    assert quicken_grey_convs(conv) == 1
    torch.testing.assert_close(gradient(conv, image), expected)


def test_hooks_and_what_reads_a_convolution_find_what_they_know():
    conv, shapes = frozen(nn.Conv2d(1, 16, 3)), []
    conv.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape)))
    assert quicken_grey_convs(nn.Sequential(conv)) == 1
    copy.deepcopy(conv)(torch.rand(4, 1, 5, 5))
    assert shapes == [(4, 16, 3, 3)]
    assert isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3) and conv.state_dict().keys() == {"weight", "bias"}


@pytest.mark.parametrize("module", [
    frozen(nn.Conv2d(3, 16, 3)), frozen(nn.Conv2d(1, 16, 3, padding="same")),
    frozen(nn.Conv2d(1, 16, 3, padding=1, padding_mode="reflect")),
    frozen(nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 16, 3))), frozen(nn.Conv2d(1, 16, 3, device="meta")),
    frozen(nn.Conv2d(1, 1, 5)), frozen(nn.Conv2d(1, 15, 3)), frozen(nn.Conv2d(1, 32, 15, stride=2))],
    ids=["colours", "same", "reflect", "weight norm", "another device", "blur", "few channels", "large windows"])
def test_others_are_left_as_they_are(module):
    kind = type(module)
    assert quicken_grey_convs(module) == 0 and type(module) is kind


# PyTorch scripts its own decompositions when it first differentiates forward.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning", "ignore:.*torch.jit.script:DeprecationWarning")
def test_what_a_model_does_by_torch_func_while_it_answers_is_as_before():
    conv, images = frozen(nn.Conv2d(1, 16, 3, stride=2)), torch.rand(3, 1, 9, 9)

    def by_vmap(x):
        return torch.func.vmap(lambda image: conv(image[None])[0])(x)

    def by_grad(x):
        return torch.func.grad(lambda pixels: conv(pixels).square().sum())(x)

    def by_jvp(x):
        return torch.func.jvp(conv, (x,), (x.square(),))[1]

    functions = [by_vmap, by_grad, by_jvp]
    expected = [(function(images), gradient(function, images)) for function in functions]
    assert quicken_grey_convs(conv) == 1
    for function, (answer, wanted) in zip(functions, expected, strict=True):
        torch.testing.assert_close(function(images), answer, msg=function.__name__)
        torch.testing.assert_close(gradient(function, images), wanted, msg=function.__name__)


@pytest.mark.parametrize("trained", ["weight", "bias"])
def test_weights_that_a_model_adapts_while_it_answers_have_gradients(trained):
    conv, images = frozen(nn.Conv2d(1, 16, 3)), torch.rand(3, 1, 9, 9)
    values = dict(conv.named_parameters())

    def loss(parameter):
        return torch.func.functional_call(conv, values | {trained: parameter}, (images,)).square().sum()

    def both():
        parameter = values[trained].detach().clone().requires_grad_()
        return *torch.autograd.grad(loss(parameter), parameter), torch.func.grad(loss)(values[trained].detach())

    expected = both()
    assert quicken_grey_convs(conv) == 1
    for found, wanted in zip(both(), expected, strict=True):
        assert wanted.abs().max() > 0
        torch.testing.assert_close(found, wanted)


class Casting(nn.Module):
    """Opens an autocast region by itself."""

    def __init__(self):
        super().__init__()
        self.net = nn.Conv2d(1, 16, 7, padding=3)

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.net(x)


def test_a_network_that_casts_by_itself_loses_no_more_than_by_pytorch():
    model, images = frozen(Casting()), torch.rand(5, 1, 12, 12)
    upstream = torch.randn(5, 16, 12, 12).bfloat16()

    def error():
        x = images.clone().requires_grad_()
        found, = torch.autograd.grad(model(x), x, upstream)
        assert found.dtype == torch.float32
        return float((found - exact).norm() / exact.norm())

    exact = torch.nn.grad.conv2d_input(images.shape, model.net.weight.double(), upstream.double(), padding=3)
    before = error()
    assert quicken_grey_convs(model) == 1
    assert error() < 1.2 * before < 0.01


@pytest.mark.parametrize(("channels", "quickened"), [(1, True), (3, False)])
def test_the_attacked_copy_has_a_quick_stem_and_the_gradient_of_the_model(channels, quickened):
    model = PixelModel(frozen(timm.create_model("hpm_wrn10_2.untrained", in_chans=channels, num_classes=0)),
                       mean=[0.4] * channels, std=[0.3] * channels)
    images = torch.rand(4, channels, 12, 12)
    split = SplitModel(model, images)
    assert [type(net.get_submodule("model.conv1")) is nn.Conv2d for net in (model, split.backbone)] == [
        True, not quickened]
    expected, found = gradient(model, images), gradient(split.features, images)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
