"""`fit_prototypes`: class means and the scale, from real digits, and nothing else in the model changed."""

import copy
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from nets import same_tensors
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from timm_hpm import HPMHead, PixelModel, ThreatModel, find_head, fit_prototypes, head_mode, load_split, pgd
from timm_hpm.prototypes import fit_log_scale

NUM_DIGITS, SPLIT = 240, "train"
LINF = ThreatModel("Linf", 0.1)


@pytest.fixture(scope="module")
def other_digits() -> tuple[Tensor, Tensor]:
    images, labels = load_split("digits", "val").tensors
    return images[:120], labels[:120]


def batches(tensors: tuple[Tensor, Tensor], size: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(*(t.split(size) for t in tensors), strict=True))


def pixel_net(**kwargs) -> nn.Sequential:
    """Returns a model of pixels in [0, 1] that ends in an HPM head, in eval mode."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), HPMHead(24, 10, **kwargs)).eval()


def features(model: nn.Module, images: Tensor) -> Tensor:
    """Returns the input of the head of a `pixel_net` or of a timm model."""
    with torch.no_grad():
        if isinstance(model, nn.Sequential):
            return model[:-1](images)
        return model.forward_head(model.forward_features(PixelModel(model).normalise(images)), pre_logits=True)


def class_means(z: Tensor, labels: Tensor) -> Tensor:
    return torch.stack([z[labels == c].double().mean(dim=0) for c in range(10)])


@pytest.mark.parametrize(("batch_size", "dtype"), [(1, torch.uint8), (64, torch.int32)])
def test_prototypes_are_the_class_means_at_any_batch_size(digits, batch_size, dtype):
    model = timm.create_model("hpm_wrn10_2", num_classes=10).eval()
    fit = fit_prototypes(model, DataLoader(TensorDataset(digits[0], digits[1].to(dtype)), batch_size))
    expected = class_means(features(model, digits[0]), digits[1])
    head = find_head(model)
    assert (head.prototypes - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert head.is_fitted() and head.num_updates.tolist() == [1] * 10
    assert torch.equal(fit.counts, digits[1].bincount(minlength=10))
    assert fit.scale == pytest.approx(head.scale().item(), rel=1e-6)


@pytest.mark.parametrize("threat", [LINF, ThreatModel("L2", 0.5)], ids=str)
@pytest.mark.parametrize("make", [lambda: pixel_net(), lambda: timm.create_model("hpm_wrn10_2", num_classes=10).eval()],
                         ids=["pixels", "timm"])
def test_with_a_threat_prototypes_are_the_means_of_clean_and_adversarial_features(digits, make, threat):
    model, loader = make(), batches(digits, 100)
    # The attack goes through the FC classifier all the same.
    find_head(model).set_prototypes(torch.randn(10, find_head(model).in_features))
    before = copy.deepcopy(model)
    torch.manual_seed(5)
    fit = fit_prototypes(model, loader, threat, attack_steps=3)

    torch.manual_seed(5)
    pixel_model = before if isinstance(before, nn.Sequential) else PixelModel(before)
    with head_mode(before, "fc"):
        attacked = torch.cat([pgd(pixel_model, images, labels, threat, steps=3) for images, labels in loader])
    z = torch.cat([features(before, digits[0]), features(before, attacked)])
    expected = class_means(z, torch.cat([digits[1], digits[1]]))
    assert (find_head(model).prototypes - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert torch.equal(fit.counts, 2 * digits[1].bincount(minlength=10))
    clean = class_means(features(before, digits[0]), digits[1])
    assert (expected - clean).abs().max() > 1e-3


@pytest.mark.parametrize("log_scale", [-120.0, float("nan")])
def test_fitting_again_forgets_the_former_prototypes_and_scale(digits, log_scale):
    fresh, used = pixel_net(), pixel_net()
    used.load_state_dict(fresh.state_dict())
    find_head(used).set_prototypes(torch.randn(10, 24))
    nn.init.constant_(find_head(used).log_scale, log_scale)
    assert fit_prototypes(used, [digits]).scale == fit_prototypes(fresh, [digits]).scale
    assert same_tensors(fresh.state_dict(), used.state_dict())


@pytest.mark.parametrize("size", [0.1, 1.0, 30.0])
def test_fit_log_scale_finds_the_minimum_of_a_grid(size):
    distances, labels = size * torch.rand(300, 5), torch.randint(0, 5, (300,))
    distances[torch.arange(300), labels] *= 0.7
    log_scale, nll = fit_log_scale(distances, labels)

    def loss(log_scale: float, smoothing: float = 0.0) -> float:
        return F.cross_entropy(-math.exp(log_scale) * distances.double(), labels, label_smoothing=smoothing).item()

    # One image in 301 has every label at once: label smoothing by 1/301.
    best = min((i / 200 for i in range(-1600, 1600)), key=lambda found: loss(found, 1 / 301))
    assert -8 < best < 7.9 and abs(log_scale - best) <= 5e-3 and nll == pytest.approx(loss(log_scale))


def test_fit_log_scale_stays_usable_where_every_image_is_right():
    labels = torch.arange(10) % 2
    right = F.one_hot(1 - labels, 2).float()
    log_scale, nll = fit_log_scale(right, labels)
    # Ten images and the one of both labels: 21 to 1, of which the logits are log 21 apart.
    assert math.exp(log_scale) == pytest.approx(math.log(21)) and nll == pytest.approx(math.log(22 / 21))
    log_scale, nll = fit_log_scale(1 - right, labels)
    assert log_scale == pytest.approx(-20) and nll == pytest.approx(math.log(2))


@pytest.mark.parametrize("inference", ["batch", "sample", "dataset", "fc"])
def test_the_scale_minimises_the_nll_of_the_model_in_its_own_mode(digits, inference):
    model, loader = pixel_net(inference=inference), batches(digits, 60)
    fit = fit_prototypes(model, loader)
    assert find_head(model).inference == inference

    def nll(factor: float) -> float:
        # In fc mode the scale is that of the default mode.
        with torch.no_grad(), head_mode(model, "dataset" if inference == "fc" else inference):
            logits = factor * torch.cat([model(images) for images, _ in loader])
        return F.cross_entropy(logits.double(), digits[1]).item()

    assert fit.nll == pytest.approx(nll(1.0), rel=1e-5)
    assert nll(1.0) < min(nll(0.9), nll(1.1), math.log(10))


@pytest.mark.parametrize("threat", [None, LINF])
def test_held_out_images_choose_the_scale_under_the_same_threat(digits, other_digits, threat):
    model, without = pixel_net(), pixel_net()
    without.load_state_dict(model.state_dict())
    before = copy.deepcopy(model)
    torch.manual_seed(5)
    fit = fit_prototypes(model, [digits], threat, held_out=batches(other_digits, 50), attack_steps=2)

    variants = []
    torch.manual_seed(5)
    with head_mode(before, "fc"):
        if threat is not None:
            pgd(before, *digits, threat, steps=2)
        for images, labels in batches(other_digits, 50):
            variants.append((images, labels))
            if threat is not None:
                variants.append((pgd(before, images, labels, threat, steps=2), labels))
    with torch.no_grad():
        distances = torch.cat([-model(images) / find_head(model).scale() for images, _ in variants])
    log_scale, nll = fit_log_scale(distances, torch.cat([labels for _, labels in variants]))
    assert math.log(fit.scale) == pytest.approx(log_scale, abs=1e-4)
    assert fit.nll == pytest.approx(nll, rel=1e-4)
    torch.manual_seed(5)
    assert abs(math.log(fit_prototypes(without, [digits], threat, attack_steps=2).scale) - log_scale) > 1e-3
    assert torch.equal(find_head(model).prototypes, find_head(without).prototypes)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("threat", [None, LINF])
def test_only_the_own_entries_of_the_head_change_and_the_mode_comes_back(digits, threat, training):
    model = timm.create_model("hpm_wrn10_2", num_classes=10, inference="sample").train(training)
    model.stages.eval()  # as if its BatchNorms were frozen
    other, modes = copy.deepcopy(model).eval(), [module.training for module in model.modules()]
    before = copy.deepcopy(model.state_dict())
    for net in (model, other):
        torch.manual_seed(0)
        fit_prototypes(net, batches(digits, 120), threat, attack_steps=1)
    after = model.state_dict()
    changed = {key for key in after if not torch.equal(after[key], before[key])}
    assert changed == {"fc.prototypes", "fc.num_updates", "fc.log_scale"}
    assert same_tensors(after, other.state_dict()), "running statistics, also in train mode"
    assert [module.training for module in model.modules()] == modes
    assert find_head(model).inference == "sample" and not find_head(model)._forward_pre_hooks
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(("loader", "message"), [
    (lambda x, y: [(x[:100], y[:100]), (2 * x[100:], y[100:])],
     r"image 0 has values from 0 to 2, .*; expected pixels in \[0, 1\]"),
    (lambda x, y: [(x, y + 1)], "label 10 of image .* is out of range"),
    (lambda x, y: [(x[(y != 3) & (y != 7)], y[(y != 3) & (y != 7)])],
     r"no image of 2 of the 10 classes \(\[3, 7\] first\)"),
    (lambda x, y: [(x, y)], "features are not finite"),
    (None, "held_out yields no image"),
])
@pytest.mark.parametrize("fitted_before", [False, True])
def test_a_bad_loader_is_refused_and_leaves_the_model_as_it_was(digits, loader, message, fitted_before):
    model = pixel_net(inference="dataset").train()
    if fitted_before:
        fit_prototypes(model, [(digits[0].flip(0), digits[1])])
    if message == "features are not finite":
        nn.init.constant_(model[1].bias, float("inf"))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        if loader is None:
            fit_prototypes(model, [digits], held_out=[])
        else:
            fit_prototypes(model, loader(*digits), LINF, attack_steps=1)
    assert same_tensors(model.state_dict(), before)
    assert model.training and find_head(model).inference == "dataset" and not find_head(model)._forward_pre_hooks
