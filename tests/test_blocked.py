"""Networks in oneDNN's layout answer as before, and those that cannot are left as they are."""

import pytest
import timm
import torch
from test_fold import with_statistics
from torch import nn

from timm_hpm import PixelModel
from timm_hpm.attacks.blocked import blocked_copy
from timm_hpm.attacks.surrogates import SplitModel

onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")


@onednn
@pytest.mark.parametrize(("name", "size"), [("hpm_wrn10_2", (1, 8, 8)), ("hpm_preact_resnet18", (3, 32, 32)),
                                            ("test_resnet", (3, 64, 64))])
def test_a_network_in_that_layout_answers_as_before(name, size):
    split = SplitModel(PixelModel(with_statistics(timm.create_model(name, pretrained=False))), torch.rand(4, *size))
    blocked = blocked_copy(split.backbone, torch.rand(2, *size))
    # Also of fewer images, or more, than it was tried with.
    for number in (1, 2, 7):
        images = torch.rand(number, *size)
        expected = split.backbone(images)
        found = blocked(images)
        assert not found.is_mkldnn and not found.requires_grad
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
        torch.testing.assert_close(blocked(images.contiguous(memory_format=torch.channels_last)), found)


class Own(nn.Module):
    """An operation that does not know the layout follows a convolution."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3)

    def forward(self, x):
        return self.conv(x).sin().flatten(1)


class Strict(Own):
    """Looks at the layout itself."""

    def forward(self, x):
        z = self.conv(x)
        if z.is_mkldnn or not z.is_contiguous():
            raise ValueError("a layout that I do not know")
        return z.flatten(1)


@pytest.mark.parametrize("network", [
    Own(), Strict(), nn.Sequential(nn.Flatten(), nn.Linear(64, 3)),
    nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 3, 3)), nn.Flatten()),
    nn.Sequential(nn.Conv2d(1, 3, 3, padding=1, padding_mode="circular"), nn.Flatten())])
def test_a_network_that_does_not_know_the_layout_is_attacked_as_it_is(network):
    network, images = network.eval().requires_grad_(False), torch.rand(2, 1, 8, 8)
    assert blocked_copy(network, images) is None
    split = SplitModel(network, images)
    torch.testing.assert_close(split.features(images), network(images))


@onednn
def test_only_what_needs_no_gradient_goes_that_way():
    images = torch.rand(3, 1, 8, 8)
    split = SplitModel(PixelModel(timm.create_model("hpm_wrn10_2", pretrained=True)), images)
    kinds: list[bool] = []
    split.backbone.register_forward_hook(lambda module, inputs, output: kinds.append(output.requires_grad))
    x = images.clone().requires_grad_()
    torch.autograd.grad(split.features(x).sum(), x)
    with torch.no_grad():
        split.features(x)
    split.features(images)
    assert kinds == [True]
    assert (split.forward_passes, split.backward_passes) == (9, 3)


def test_weights_of_blocked_networks_are_their_own():
    images = torch.rand(3, 1, 8, 8)
    model = PixelModel(timm.create_model("hpm_wrn10_2", pretrained=True))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    SplitModel(model, images)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
