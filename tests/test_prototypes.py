"""`fit_prototypes`: class means and the scale, from real digits, and nothing else in the model changed."""

import copy
import itertools
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from timm_hpm import HPMHead, PixelModel, ThreatModel, find_head, fit_prototypes, head_mode, load_split, pgd
from timm_hpm.prototypes import fit_log_scale

LINF = ThreatModel("Linf", 0.1)


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    images, labels = load_split("digits", "train").tensors
    return images[:240], labels[:240]


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


def same_tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# Prototypes


@pytest.mark.parametrize("batch_size", [1, 7, 64, 240])
def test_prototypes_are_the_class_means_at_any_batch_size(digits, batch_size):
    model = timm.create_model("hpm_wrn10_2", num_classes=10).eval()
    fit = fit_prototypes(model, DataLoader(TensorDataset(*digits), batch_size))
    expected = class_means(features(model, digits[0]), digits[1])
    head = find_head(model)
    assert (head.prototypes - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert head.is_fitted() and head.num_updates.tolist() == [1] * 10
    assert torch.equal(fit.counts, digits[1].bincount(minlength=10))
    assert fit.scale == pytest.approx(head.scale().item(), rel=1e-6)


@pytest.mark.parametrize("fitted_before", [False, True])
@pytest.mark.parametrize("threat", [LINF, ThreatModel("L2", 0.5)], ids=str)
@pytest.mark.parametrize("make", [lambda: pixel_net(), lambda: timm.create_model("hpm_wrn10_2", num_classes=10).eval()],
                         ids=["pixels", "timm"])
def test_with_a_threat_prototypes_are_the_means_of_clean_and_adversarial_features(digits, make, threat, fitted_before):
    model, loader = make(), batches(digits, 100)
    if fitted_before:
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


@pytest.mark.parametrize("log_scale", [-120.0, 3.0, 100.0, float("nan")])
def test_fitting_again_forgets_the_former_prototypes_and_scale(digits, log_scale):
    fresh, used = pixel_net(), pixel_net()
    used.load_state_dict(fresh.state_dict())
    find_head(used).set_prototypes(torch.randn(10, 24))
    nn.init.constant_(find_head(used).log_scale, log_scale)
    assert fit_prototypes(used, [digits]).scale == fit_prototypes(fresh, [digits]).scale
    assert same_tensors(fresh.state_dict(), used.state_dict())


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_labels_may_be_of_any_integer_dtype(digits, dtype):
    model, other = pixel_net(), pixel_net()
    other.load_state_dict(model.state_dict())
    for net, labels in ((model, digits[1]), (other, digits[1].to(dtype))):
        torch.manual_seed(0)
        fit_prototypes(net, [(digits[0], labels)], LINF, attack_steps=1)
    assert same_tensors(model.state_dict(), other.state_dict())


# The scale


@pytest.mark.parametrize("size", [0.1, 1.0, 30.0])
def test_fit_log_scale_finds_the_minimum_of_a_grid(size):
    distances, labels = size * torch.rand(300, 5), torch.randint(0, 5, (300,))
    distances[torch.arange(300), labels] *= 0.7
    log_scale, nll = fit_log_scale(distances, labels)
    grid = torch.arange(-8, 8, 5e-3, dtype=torch.float64)
    # One image in 301 has every label at once: label smoothing by 1/301.
    losses = [F.cross_entropy(-math.exp(g) * distances.double(), labels, label_smoothing=1 / 301).item()
              for g in grid.tolist()]
    best = min(range(len(grid)), key=losses.__getitem__)
    assert 0 < best < len(grid) - 1
    assert abs(log_scale - grid[best]) <= 5e-3
    assert nll == pytest.approx(F.cross_entropy(-math.exp(log_scale) * distances.double(), labels).item())


def test_fit_log_scale_stays_usable_where_every_image_is_right():
    labels = torch.arange(10) % 2
    right = F.one_hot(1 - labels, 2).float()
    log_scale, nll = fit_log_scale(right, labels)
    # Ten images and the one of both labels: 21 to 1, of which the logits are log 21 apart.
    assert math.exp(log_scale) == pytest.approx(math.log(21)) and nll == pytest.approx(math.log(22 / 21))
    log_scale, nll = fit_log_scale(1 - right, labels)
    assert log_scale == pytest.approx(-20) and nll == pytest.approx(math.log(2))


def test_fit_log_scale_leaves_the_scale_at_1_where_none_is_better():
    assert fit_log_scale(torch.rand(8, 1), torch.zeros(8, dtype=torch.long)) == (0, 0)


@pytest.mark.parametrize("inference", ["batch", "sample", "dataset"])
def test_the_scale_minimises_the_nll_of_the_model_in_its_own_mode(digits, inference):
    model, loader = pixel_net(inference=inference), batches(digits, 60)
    fit = fit_prototypes(model, loader)
    head = find_head(model)

    def nll(factor: float) -> float:
        with torch.no_grad():
            logits = factor * torch.cat([model(images) for images, _ in loader])
        return F.cross_entropy(logits.double(), digits[1]).item()

    assert head.inference == inference
    assert fit.nll == pytest.approx(nll(1.0), rel=1e-5)
    assert nll(1.0) < min(nll(0.9), nll(1.1))
    assert nll(1.0) < math.log(10)


def test_in_fc_mode_the_scale_is_that_of_the_batch_mode(digits):
    fc, batch = pixel_net(inference="fc"), pixel_net()
    batch.load_state_dict(fc.state_dict())
    assert fit_prototypes(fc, [digits]).scale == fit_prototypes(batch, [digits]).scale
    assert find_head(fc).inference == "fc"


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


def test_only_the_first_ten_thousand_features_choose_the_scale():
    def batch(noise: float) -> tuple[Tensor, Tensor]:
        labels = torch.arange(5000) % 2
        return (0.5 + (labels - 0.5)[:, None, None, None] / 4 + noise * torch.randn(5000, 1, 1, 1)).clamp(0, 1), labels

    model = nn.Sequential(nn.Flatten(), HPMHead(1, 2, inference="dataset"))
    first, second, much_noisier = batch(0.2), batch(0.2), batch(3.0)
    expected = fit_prototypes(model, [first], held_out=[first, second])
    # An endless loader is left once it has given enough.
    endless = itertools.chain([first, second], itertools.repeat(much_noisier))
    assert fit_prototypes(model, [first], held_out=endless).scale == expected.scale
    assert fit_prototypes(model, [first], held_out=[first, much_noisier]).scale < 0.9 * expected.scale
    # Without a held-out loader it is the first 10,000 of the loader's, though its prototypes are the means of all.
    fit = fit_prototypes(model, [first, second, much_noisier])
    assert fit.counts.tolist() == [7500, 7500]
    head, images = find_head(model), torch.cat([first[0], second[0]])
    distances = -model(images).detach() / head.scale().detach()
    log_scale, _ = fit_log_scale(distances, torch.cat([first[1], second[1]]))
    assert math.log(fit.scale) == pytest.approx(log_scale, abs=1e-5)


# What is left alone


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("threat", [None, LINF])
def test_only_the_own_entries_of_the_head_change_and_the_mode_comes_back(digits, threat, training):
    model = timm.create_model("hpm_wrn10_2", num_classes=10, inference="sample").train(training)
    before = copy.deepcopy(model.state_dict())
    fit_prototypes(model, batches(digits, 120), threat, attack_steps=1)
    after = model.state_dict()
    assert after.keys() == before.keys()
    changed = {key for key in after if not torch.equal(after[key], before[key])}
    assert changed == {"fc.prototypes", "fc.num_updates", "fc.log_scale"}
    assert all(module.training == training for module in model.modules())
    assert find_head(model).inference == "sample"
    assert not find_head(model)._forward_pre_hooks
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_fitting_in_train_mode_uses_the_running_statistics(digits):
    model, other = timm.create_model("hpm_wrn10_2", num_classes=10), timm.create_model("hpm_wrn10_2", num_classes=10)
    other.load_state_dict(model.state_dict())
    fit_prototypes(model.train(), [digits])
    fit_prototypes(other.eval(), [digits])
    assert same_tensors(model.state_dict(), other.state_dict())


def too_bright(images: Tensor, labels: Tensor):
    return [(images[:100], labels[:100]), (2 * images[100:], labels[100:])]


def label_too_large(images: Tensor, labels: Tensor):
    return [(images, labels + 1)]


def labels_too_few(images: Tensor, labels: Tensor):
    return [(images, labels[:-1])]


def classes_missing(images: Tensor, labels: Tensor):
    kept = (labels != 3) & (labels != 7)
    return [(images[kept], labels[kept])]


def nothing(images: Tensor, labels: Tensor):
    return []


@pytest.mark.parametrize("fitted_before", [False, True])
@pytest.mark.parametrize(("loader", "message"), [
    (too_bright, r"image 0 has values from 0 to 2, .*; expected pixels in \[0, 1\]"),
    (label_too_large, "label 10 of image .* is out of range"),
    (labels_too_few, r"labels have the shape \(239,\)"),
    (classes_missing, r"no image of 2 of the 10 classes \(\[3, 7\] first\)"),
    (nothing, "no image of 10 of the 10 classes"),
    (lambda *tensors: [tensors], "features are not finite"),
])
def test_a_bad_loader_is_refused_and_leaves_the_model_as_it_was(digits, loader, message, fitted_before):
    model = pixel_net(inference="dataset").train()
    if message == "features are not finite":
        nn.init.constant_(model[1].bias, float("inf"))
    elif fitted_before:
        fit_prototypes(model, [(digits[0].flip(0), digits[1])])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        fit_prototypes(model, loader(*digits), LINF, attack_steps=1)
    assert same_tensors(model.state_dict(), before)
    assert model.training and find_head(model).inference == "dataset" and not find_head(model)._forward_pre_hooks


@pytest.mark.parametrize(("held_out", "message"), [
    (nothing, "held_out yields no image"),
    (too_bright, "expected pixels"),
    (label_too_large, "out of range"),
])
def test_a_bad_held_out_loader_is_refused_and_leaves_the_model_as_it_was(digits, held_out, message):
    model = pixel_net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        fit_prototypes(model, [digits], held_out=held_out(*digits))
    assert same_tensors(model.state_dict(), before) and not find_head(model)._forward_pre_hooks


def test_a_batchnorm_that_was_frozen_in_train_mode_stays_frozen(digits):
    model = timm.create_model("hpm_wrn10_2.digits_linf").train()
    frozen = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for module in frozen:
        module.eval()
    fit_prototypes(model, [digits])
    assert model.training and model.fc.training
    assert frozen and not any(module.training for module in frozen)
