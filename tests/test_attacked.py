"""`AttackedModel`, the frozen copy that attacks work on: what it takes, and that it leaves gradients to attack by."""

import copy

import pytest
import torch
from protocols import run_attack
from torch import Tensor, nn

import timm_hpm
from timm_hpm import HPMHead, PixelModel, ThreatModel
from timm_hpm.evaluation import Budget
from timm_hpm.evaluation.attacked import AttackedModel
from timm_hpm.surrogates import SURROGATES
from timm_hpm.training.trunk import PixelTrunk

NUM_DIGITS = 40

THREAT = ThreatModel("Linf", 0.15)
SMALL = {"apgd-ce": Budget(10), "apgd-t": Budget(5, targets=2), "fab-t": Budget(5, targets=2), "square": Budget(30),
         "apgd-chain": Budget(2), "joint": Budget(2), "joint-subset": Budget(2, restarts=2)}


class Flattening(nn.Module):
    """A small convolutional classifier of pixels that flattens by a view, as many do."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, stride=2)
        self.fc = nn.Linear(27, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).relu()
        return self.fc(x.view(x.size(0), -1))


def test_a_network_that_flattens_by_a_view_is_attacked_in_its_own_memory_format(digits):
    classifier = Flattening().eval()
    answers = AttackedModel(classifier, digits[0]).features(digits[0])
    torch.testing.assert_close(answers, classifier(digits[0]))
    report = run_attack(classifier, digits[0], classifier(digits[0]).argmax(dim=1), THREAT, budgets=SMALL)
    assert report.clean_accuracy == 1 and report.robust_accuracy < 1


def test_images_of_double_precision_are_attacked_like_the_same_in_single(digits):
    classifier = Flattening().eval()
    labels = classifier(digits[0]).argmax(dim=1)
    reports = [run_attack(classifier, images, labels, THREAT, budgets=SMALL).correct
               for images in (digits[0], digits[0].double())]
    assert reports[0] == reports[1]


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


def reads(what: str, x: Tensor, conv: nn.Module, norm: nn.Module, head: nn.Module) -> Tensor:
    """Returns `x`, for which a forward needs one of its own modules to be what it is."""
    if what == "norm's dtype":
        return x.to(norm.weight.dtype)
    if what == "norm's buffers":
        return x + 0 * norm.running_mean.sum() + 0 * norm.num_features
    if what == "norm's kind":
        assert isinstance(norm, nn.BatchNorm2d)
    elif what == "head's dtype":
        return x.to(head.weight.dtype)
    elif what == "head's kind":
        assert isinstance(head, nn.Linear) and type(head).__name__ in ("HPMHead", "Linear")
    elif what == "conv's weight":
        return x * conv.weight.norm().clamp(max=2.0)
    elif what == "layout":
        assert conv.weight.is_contiguous()
    return x


class Reading(nn.Module):
    """A network of pixels that reads attributes of its own modules in its forward."""

    def __init__(self, what: str, head: nn.Module):
        super().__init__()
        self.conv, self.bn, self.fc, self.what = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), head, what

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(reads(self.what, x, self.conv, self.bn, self.fc)))
        return self.fc(x.relu().flatten(1))


@pytest.mark.parametrize("kind", [nn.Linear, HPMHead])
@pytest.mark.parametrize("what", ["norm's dtype", "norm's buffers", "norm's kind", "head's dtype", "head's kind",
                                  "conv's weight", "layout"])
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
    flags = [run_attack(net, digits[0], labels, THREAT, budgets=SMALL).flags
             for net in (classifier, saturated)]
    assert not any(flag.name == "saturated-softmax" for flag in flags[0])
    assert any(flag.name == "saturated-softmax" and flag.text.startswith("apgd-ce on model: the softmax of ")
               for flag in flags[1])


def test_nothing_done_to_the_copy_reaches_the_model(model, digits):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    split = AttackedModel(PixelModel(model), digits[0])
    split.head.set_prototypes(torch.zeros_like(split.head.prototypes))
    split.head.log_scale.fill_(5.0)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert set(SURROGATES) >= set(split.surrogates())
