"""Our APGD against AutoAttack's, bit by bit."""

import pytest
import torch
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from torch import nn

from timm_hpm import ThreatModel
from timm_hpm.attacks import apgd, cross_entropy, targeted_loss


@pytest.fixture
def problem() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.ReLU(), nn.Linear(16, 5)).eval()
    images = torch.rand(30, 1, 6, 6)
    return model, images, model(images).argmax(dim=1)


def ours_and_theirs(problem, norm, iterations, targeted, start=None):
    model, images, labels = problem
    eps = {"Linf": 0.1, "L2": 0.4}[norm]
    targets = (labels + 1) % 5
    options = {"n_iter": iterations, "norm": norm, "eps": eps, "device": "cpu"}
    theirs = APGDAttack_targeted(model, **options) if targeted else APGDAttack(model, **options)
    theirs.y_target = targets
    theirs.init_hyperparam(images)
    loss = targeted_loss(labels, targets) if targeted else cross_entropy(labels)
    torch.manual_seed(1)
    expected = theirs.attack_single_run(images, labels, x_init=start)
    torch.manual_seed(1)
    return apgd(model, images, labels, ThreatModel(norm, eps), iterations, loss, start), expected


@pytest.mark.parametrize("iterations", [1, 2, 3, 10, 60])
@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("from_clean", [False, True])
def test_every_point_is_autoattack_s(problem, norm, iterations, targeted, from_clean):
    found, (largest, correct, loss, fooling) = ours_and_theirs(problem, norm, iterations, targeted,
                                                               problem[1] if from_clean else None)
    assert torch.equal(found.fooled, correct == 0) and torch.equal(found.loss, loss)
    assert torch.equal(found.largest, largest) and torch.equal(found.fooling, fooling)
    if iterations == 60:
        assert 3 <= found.fooled.sum() <= 29, "the problem tests nothing"


def test_images_without_a_gradient_are_counted(problem):
    model, images, labels = problem
    dead = nn.Sequential(model, nn.Threshold(100.0, 0.0))
    found = apgd(dead, images, labels, ThreatModel("Linf", 0.1), 2, targeted_loss(labels, (labels + 1) % 5))
    assert found.without_gradient == 30
    assert apgd(model, images, labels, ThreatModel("Linf", 0.1), 2, cross_entropy(labels)).without_gradient == 0
