"""`AttackedModel`, the frozen copy that attacks work on: what it takes, and that it leaves gradients to attack by."""

import copy

import pytest
import timm
import torch
from nets import with_statistics
from protocols import SMALL, run_attack
from torch import Tensor, nn

import timm_hpm
from timm_hpm import HPMHead, ThreatModel
from timm_hpm.evaluation import Budget
from timm_hpm.evaluation.attacked import AttackedModel, fold_batch_norms
from timm_hpm.training.trunk import PixelTrunk

NUM_DIGITS = 40

THREAT = ThreatModel("Linf", 0.15)


class Flattening(nn.Module):
    """A small convolutional classifier of pixels that flattens by a view, as many do."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, stride=2)
        self.fc = nn.Linear(27, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).relu()
        return self.fc(x.view(x.size(0), -1))


def test_a_network_that_flattens_by_a_view_is_attacked_in_its_own_memory_format_and_images_in_any_precision(digits):
    classifier = Flattening().eval()
    answers = AttackedModel(classifier, digits[0]).features(digits[0])
    torch.testing.assert_close(answers, classifier(digits[0]))
    labels = classifier(digits[0]).argmax(dim=1)
    single, double = (run_attack(classifier, images, labels, THREAT, budgets=SMALL)
                      for images in (digits[0], digits[0].double()))
    assert single.correct == double.correct and single.clean_accuracy == 1 > single.robust_accuracy
    assert timm_hpm.judge(classifier, digits[0].double(), labels, 4).all()


@pytest.mark.parametrize("inference", ["batch", "dataset"])
def test_a_huge_scale_makes_nothing_look_robust(model, digits, inference):
    """No answer depends on the scale, but at a huge one the cross-entropy of every right answer is 0."""
    head = timm_hpm.find_head(model)
    head.inference = inference
    attack = {"attacks": ["apgd-ce"], "budgets": {"apgd-ce": Budget(25)}, "surrogates": ["dataset", "soft", "ste"]}
    sane = run_attack(model, *digits, THREAT, **attack)
    nn.init.constant_(head.log_scale, 12.0)
    huge = run_attack(model, *digits, THREAT, **attack)
    assert huge.protocol["attacked_scale"] < 10 < head.scale()
    assert head.log_scale == 12 and not huge.flags
    for row in ("dataset/apgd-ce", "soft/apgd-ce", "ste/apgd-ce"):
        broken = [report.correct[row].count("0") for report in (sane, huge)]
        assert min(broken) >= 5 and abs(broken[0] - broken[1]) <= 3


#: What a forward needs one of its own modules to be, by name: a function of images and the network.
READS = {
    "norm's dtype": lambda x, net: x.to(net.bn.weight.dtype),
    "norm's buffers": lambda x, net: x + 0 * net.bn.running_mean.sum() + 0 * net.bn.num_features,
    "norm's kind": lambda x, net: x if isinstance(net.bn, nn.BatchNorm2d) else None,
    "head's dtype": lambda x, net: x.to(net.fc.weight.dtype),
    "head's kind": lambda x, net: x if type(net.fc) in (HPMHead, nn.Linear) else None,
    "conv's weight": lambda x, net: x * net.conv.weight.norm().clamp(max=2.0),
    "layout": lambda x, net: x if net.conv.weight.is_contiguous() else None,
    "nothing": lambda x, net: x,
}


class Reading(nn.Module):
    """A network of pixels that reads attributes of its own modules in its forward."""

    def __init__(self, what: str, head: nn.Module):
        super().__init__()
        self.conv, self.bn, self.fc, self.what = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), head, what

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.bn(self.conv(READS[self.what](x, self))).relu().flatten(1))


@pytest.mark.parametrize("kind", [nn.Linear, HPMHead])
@pytest.mark.parametrize("what", [what for what in READS if what != "nothing"])
def test_a_network_that_reads_its_own_modules_is_attacked_like_its_twin_that_does_not(digits, what, kind):
    torch.manual_seed(0)
    images = digits[0][:16]
    model = Reading(what, kind(288, 10))
    nn.init.uniform_(model.bn.running_var, 0.5, 2.0)
    twin = copy.deepcopy(model.eval())
    twin.what = "nothing"
    if what == "conv's weight":
        twin.conv.weight.data.mul_(model.conv.weight.norm().clamp(max=2.0))
    if kind is HPMHead:
        for net in (model, twin):
            timm_hpm.fit_prototypes(net, [digits])
    reports = [run_attack(net, images, twin(images).argmax(dim=1), THREAT, attacks=["apgd-ce", "square"], budgets=SMALL)
               for net in (model, twin)]
    assert reports[0].clean_accuracy == 1 > reports[0].robust_accuracy == reports[1].robust_accuracy
    assert reports[0].flags == reports[1].flags
    assert reports[0].correct.keys() == reports[1].correct.keys()
    if kind is HPMHead and what != "head's kind":
        model.pretrained_cfg = {"mean": (0.0,), "std": (1.0,)}
        torch.testing.assert_close(PixelTrunk(model)(images)[0][1], model(images), rtol=1e-4, atol=1e-4)


def test_answers_without_a_gradient_are_counted_in_a_warning(digits):
    classifier = Flattening().eval()
    labels = classifier(digits[0]).argmax(dim=1)
    saturated = copy.deepcopy(classifier)
    saturated.fc.weight.data.mul_(1e6)
    flags = [run_attack(net, digits[0], labels, THREAT, budgets=SMALL).flags for net in (classifier, saturated)]
    assert not any(flag.name == "saturated-softmax" for flag in flags[0])
    assert any(flag.name == "saturated-softmax" and flag.text.startswith("apgd-ce on model: the softmax of ")
               for flag in flags[1])


def frozen(model: nn.Module) -> nn.Module:
    return with_statistics(model).eval().requires_grad_(False)


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
    model = frozen(timm.create_model(name, pretrained=False))
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
    model, images = frozen(Odd()), torch.rand(3, 2, 4, 4)
    expected = model(images)
    assert fold_batch_norms(model, images) == 1
    assert [isinstance(norm, nn.BatchNorm2d) for norm in model.norms] == [True, True, True, False]
    torch.testing.assert_close(model(images), expected)


@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm,
                                  nn.utils.parametrizations.weight_norm])
def test_a_convolution_whose_weight_is_made_anew_at_each_call_is_left_as_it_is(norm):
    model = nn.Sequential(norm(nn.Conv2d(2, 3, 3)), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3),
                          nn.Flatten())
    model, images = frozen(model), torch.rand(3, 2, 6, 6)
    expected = model(images)
    assert fold_batch_norms(model, images) == 1
    torch.testing.assert_close(model(images), expected)
