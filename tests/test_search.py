"""The margin search and its losses, against answers in closed form."""

import math
from dataclasses import replace

import pytest
import torch
from protocols import run_attack
from safetensors.torch import load_file
from torch import nn

import timm_hpm
from timm_hpm import ThreatModel
from timm_hpm.attacks import margin_loss, margin_search, probability_margin, repeated_search, target_margin
from timm_hpm.attacks.search import _Search


def test_the_margin_of_a_target_is_a_difference_and_that_of_the_probabilities_of_two_classes_a_hyperbolic_tangent():
    logits = torch.tensor([[3.0, 1.0, -2.0], [0.5, 0.0, 4.0]])
    loss = target_margin(torch.tensor([0, 2]), torch.tensor([2, 1]))
    assert loss(logits).tolist() == [-5.0, -4.0]
    found = probability_margin(torch.tensor([0, 0]))(torch.tensor([[0.0, 1.5], [2.0, -1.0]]))
    assert found.tolist() == pytest.approx([math.tanh(0.75), math.tanh(-1.5)])


@pytest.fixture
def problem() -> tuple[nn.Module, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A linear model of grey images that no perturbation of size 0.1 takes out of [0, 1], and all wrong classes."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 4)).double()
    images = 0.4 + 0.2 * torch.rand(12, 1, 4, 4, dtype=torch.float64)
    labels = model(images).argmax(dim=1)
    return model, images, labels, torch.stack([(labels + k) % 4 for k in (1, 2, 3)], dim=1)


def largest_margins(model, images, labels, threat) -> torch.Tensor:
    """The largest margins (B,) within the threat model of a linear model: margin + eps · dual norm of the weights."""
    weight = model[1].weight
    differences = weight.unsqueeze(0) - weight[labels].unsqueeze(1)
    logits = model(images)
    margins = logits - logits.gather(1, labels.unsqueeze(1)) + threat.eps * differences.norm(
        p=1 if threat.norm == "Linf" else 2, dim=2)
    return margins.scatter(1, labels.unsqueeze(1), -math.inf).amax(dim=1)


@pytest.mark.parametrize("threat", [ThreatModel("Linf", 0.02), ThreatModel("L2", 0.08)], ids=str)
def test_of_a_linear_model_the_nearest_boundary_is_found(problem, threat):
    model, images, labels, targets = problem
    found = margin_search(lambda rows, pixels: model(pixels), torch.arange(12), images, labels, targets, threat, 200)
    expected = largest_margins(model, images, labels, threat)
    margins = margin_loss(model(found), labels)
    assert threat.contains(found, images).all()
    assert 2 <= (expected > 0).sum() <= 10, "the problem tests nothing"
    assert torch.equal(margins > 0, expected > 0)
    assert margins[expected <= 0].tolist() == pytest.approx(expected[expected <= 0].tolist(), abs=2e-3)


def counted(search, problem, threat, steps):
    model, images, labels, targets = problem
    count = 0

    def logits(rows, pixels):
        nonlocal count
        count += len(rows)
        return model(pixels)

    search(logits, torch.arange(12), images, labels, targets, threat, steps)
    return count / 12


def test_the_steps_are_those_of_the_budget_and_a_repeated_search_without_success_ends_early(problem):
    robust = ThreatModel("Linf", 1e-4)
    # A round serves at least one of the 12 images.
    assert 600 <= counted(margin_search, problem, robust, 600) <= 950
    assert 6 * 400 <= counted(repeated_search, problem, robust, 100_000) <= 6 * 600


def test_a_point_that_only_a_local_search_reaches_is_found():
    """Each pixel has a shallow slope to the wrong side: an ascent from a random point gets one pixel in two right."""
    class Wells(nn.Module):
        def forward(self, pixels):
            delta = 40 * (pixels.flatten(1) - 0.5)
            margin = torch.where(delta > 0, delta, 0.8 * -delta).sum(dim=1) - 0.93 * delta.shape[1]
            return torch.stack([-margin, margin], dim=1)

    images, labels = torch.full((8, 1, 6, 6), 0.5), torch.zeros(8, dtype=torch.long)
    targets, threat = torch.ones(8, 1, dtype=torch.long), ThreatModel("Linf", 1 / 40)
    model = Wells()
    breaks = {steps: (margin_loss(model(margin_search(lambda rows, pixels: model(pixels), torch.arange(8), images,
                                                      labels, targets, threat, steps)), labels) > 0).sum()
              for steps in (10, 400)}
    assert breaks[10] < 4 and breaks[400] == 8


def test_under_l2_the_pixels_drawn_anew_are_two_radii_from_the_clean_image():
    images, labels = torch.zeros(50, 1, 28, 28), torch.zeros(50, dtype=torch.long)
    for eps in (1.0, 2.0):
        search = _Search(lambda rows, pixels: pixels, labels, images, labels, labels.unsqueeze(1),
                         ThreatModel("L2", eps))
        start = search.near_best(torch.arange(50))
        assert search.threat.contains(start, images).all()
        # A pixel uniform in [0, 1] has a mean square of 1/3.
        assert (start > 0).sum().item() / 50 == pytest.approx((2 * eps) ** 2 * 3, rel=0.15)


@pytest.mark.parametrize("name", ["fast", "standard", "thorough"])
def test_a_plain_classifier_is_searched(name):
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 3)).eval()
    images = torch.rand(6, 3, 4, 4)
    labels = model(images).argmax(dim=1)
    # Within so large a ball little is left for the long searches.
    threat = ThreatModel("Linf", 0.01 if name == "fast" else 0.5)
    report = timm_hpm.mixed_surrogate_attack(model, images, labels, threat, protocol=name)
    further = {"fast": set(), "standard": {"apgd-t", "square-on"}, "thorough": {"apgd-t", "square-on", "search-on"}}
    assert report.by_surrogate["model"].keys() == {"apgd-ce", "search", "square", "worst"} | further[name]
    assert report.protocol["protocol"] == name and not report.protocol["full_grid"]
    found = timm_hpm.attack(model, images, labels, "Linf:0.01", "search-on", budget=200)
    assert ThreatModel("Linf", 0.01).contains(found, images).all()


@pytest.mark.parametrize("full_grid", [False, True])
def test_square_goes_on_with_the_images_nearest_to_an_error_only(tmp_path, full_grid):
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 3)).eval()
    images = torch.rand(60, 3, 4, 4)
    labels = model(images).argmax(dim=1)
    before, after = (run_attack(model, images, labels, "Linf:0.02", attacks=["apgd-ce", *more], folder=tmp_path / name,
                                budgets={"apgd-ce": 1, "square-on": 30}, batch_size=60, save_adversarial=True,
                                full_grid=full_grid)
                     for name, more in (("before", []), ("after", ["square-on"])))
    left = [number for number, robust in enumerate(before.robust) if robust]
    nearest = sorted(left, key=before.convergence.margins.__getitem__)[:math.ceil(len(left) / 16)]
    found = load_file(tmp_path / "after" / "adversarial.safetensors")["model/square-on"]
    moved = (found != images).flatten(1).any(dim=1)
    # In a full grid the candidates of other attacks are no part of the set.
    broken = [] if full_grid else sorted({*range(60)} - {*left})
    assert len(left) > 32 and moved.nonzero().squeeze(1).tolist() == sorted(nearest + broken)
    assert after.cost["square-on"]["forward_passes"] <= len(nearest) * 31 + 60 * full_grid
    # The passes count over all images that were left.
    spent = after.convergence.spent - before.convergence.spent
    assert spent == pytest.approx(after.cost["square-on"]["forward_passes"] / (60 if full_grid else len(left)))


def test_attacks_that_are_given_hold_for_every_classifier_and_those_of_plain_ones_for_them_only():
    standard = timm_hpm.PROTOCOLS["standard"]
    assert standard.changed().for_classifier(plain=True).attacks.keys() == {
        "apgd-ce", "search", "apgd-t", "square", "square-on"}
    assert standard.changed(budgets={"apgd-ce": 3}).for_classifier(plain=True).attacks["apgd-ce"].iterations == 3
    assert "fab-t" in standard.changed(budgets={"apgd-ce": 3}).for_classifier(plain=True).attacks
    fast = timm_hpm.PROTOCOLS["fast"]
    digests = [[protocol.for_classifier(plain).digest() for plain in (False, True)]
               for protocol in (fast, replace(fast, plain={"search": 1}))]
    assert digests[0][0] == digests[1][0] and digests[0][1] != digests[1][1]
