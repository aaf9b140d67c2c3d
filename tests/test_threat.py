"""`ThreatModel`: its text form and the geometry of its ball; PGD in it, whose end on a linear classifier is known."""

import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from timm_hpm import ThreatModel, pgd

LINF, L2 = ThreatModel("Linf", 0.1), ThreatModel("L2", 0.3)
both = pytest.mark.parametrize("threat", [LINF, L2], ids=str)


def norms(threat: ThreatModel, delta: torch.Tensor) -> torch.Tensor:
    return delta.flatten(1).abs().amax(dim=1) if threat.norm == "Linf" else delta.flatten(1).square().sum(dim=1).sqrt()


@pytest.mark.parametrize(("text", "norm", "eps"), [
    ("Linf:1", "Linf", 1.0), ("L2:1e-3", "L2", 1e-3), (" Linf : 8 / 255 ", "Linf", 8 / 255)])
def test_parse_reads_fractions_and_numbers(text, norm, eps):
    assert ThreatModel.of(text) == ThreatModel(norm, eps)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_every_radius_has_a_text_that_is_read_back_as_it_was(norm):
    for text in (f"{norm}:8/255", f"{norm}:0.5", f"{norm}:128/255", f"{norm}:0.1"):
        assert str(ThreatModel.of(text)) == text
    random.seed(0)
    for eps in [*(k / 255 for k in range(1, 256)), *(random.random() for _ in range(200)), 0.1 + 0.2, 1 / 3, 1e-300,
                np.float64(0.3), np.float32(0.3), np.int64(1), 1]:
        threat = ThreatModel(norm, eps)
        assert ThreatModel.of(str(threat)) == threat and threat.eps == float(eps)


@pytest.mark.parametrize("eps", [64, 127.5])
def test_an_l2_radius_in_units_of_255_warns(eps):
    for make in (lambda: ThreatModel("L2", eps), lambda: ThreatModel.of(f"L2:{eps}")):
        with pytest.warns(UserWarning, match=f"eps is {eps:g} for L2.*Did you mean {eps:g}/255"):
            assert make().eps == eps
    assert ThreatModel("L2", 8).eps == 8


TEXT = r"expected NORM:EPS such as Linf:8/255 or L2:0\.5.*Linf, L2"


@pytest.mark.parametrize(("threat", "message"), [
    *((value, "or a ThreatModel") for value in (None, 0.3, ("Linf", 0.3))),
    *((text, f"'{text}'.*{TEXT}") for text in (
        "", "8/255", "Linf:eight", "Linf:8/255/2", "Linf:8/0", "Linf=8/255")),
    *((f"{norm}:0.1", f"unknown norm '{norm}'; expected one of Linf, L2") for norm in ("L1", "linf")),
    *((f"{norm}:{eps}", f"eps is {eps}; expected a finite number above 0") for norm in ("Linf", "L2")
      for eps in (0.0, "nan", "inf")),
    ("L2:1e308", "eps is 1e"), ("Linf:8", r"eps is 8\.0 for Linf.*at most 1\. Did you mean 8/255\?"),
])
def test_a_value_that_is_no_threat_model_is_refused(threat, message):
    with pytest.raises(ValueError, match=message):
        ThreatModel.of(threat)


@both
def test_project_ends_in_the_ball_and_in_the_box_and_on_the_sphere_in_the_direction_of_the_perturbation(threat):
    clean = torch.rand(50, 3, 4, 4)
    clean[0], clean[1] = 0.0, 1.0
    for size in (0.01, 0.3, 30.0):
        x = threat.project(clean + size * torch.randn_like(clean), clean)
        assert (norms(threat, x - clean) <= threat.eps * (1 + 1e-5)).all()
        assert x.min() >= 0 and x.max() <= 1
        assert threat is L2 or torch.equal(threat.project(x, clean), x)
    clean, direction = torch.full((5, 1, 4, 4), 0.5), torch.randn(5, 1, 4, 4)
    unit = (1000 * direction).clamp(-1, 1) if threat is LINF else direction / norms(L2, direction).view(-1, 1, 1, 1)
    torch.testing.assert_close(threat.project(clean + 100 * direction, clean) - clean, threat.eps * unit, rtol=1e-4,
                               atol=1e-6)


@both
def test_random_start_is_in_the_ball_and_the_box_and_follows_the_seed(threat):
    clean = torch.rand(200, 3, 4, 4)
    torch.manual_seed(1)
    x = threat.random_start(clean)
    distances = norms(threat, x - clean)
    assert (distances <= threat.eps * (1 + 1e-5)).all() and distances.max() > 0.8 * threat.eps
    assert x.min() >= 0 and x.max() <= 1
    torch.manual_seed(1)
    assert torch.equal(threat.random_start(clean), x)
    assert not torch.equal(threat.random_start(clean), x)


@both
@pytest.mark.parametrize("size", [1e-3, 2.0])
def test_scaled_has_the_norm_asked_for_and_is_the_steepest(threat, size):
    gradient = torch.randn(10, 3, 4, 4)
    step = threat.scaled(gradient, size)
    torch.testing.assert_close(norms(threat, step), torch.full((10,), size))
    # By duality no step of that norm gains more than size times the dual norm of the gradient.
    dual = gradient.flatten(1).norm(p=1 if threat is LINF else 2, dim=1)
    torch.testing.assert_close((step * gradient).flatten(1).sum(dim=1), size * dual)
    # Also of a confident model's gradients, whose squares underflow.
    tiny = 1e-30 * torch.tensor([[3.0, -4.0]]).view(1, 1, 1, 2)
    unit = torch.tensor([1.0, -1.0] if threat is LINF else [0.6, -0.8])
    torch.testing.assert_close(threat.scaled(tiny, size).flatten(), size * unit)


@pytest.mark.parametrize(("norm", "eps"), [("Linf", 1 / 255), ("Linf", 0.3), ("L2", 0.05), ("L2", 3.0)])
@pytest.mark.parametrize("shape", [(4, 1, 2, 2), (4, 3, 128, 128)])
def test_a_threat_model_contains_its_projections_and_nothing_farther(norm, eps, shape):
    threat, clean = ThreatModel(norm, eps), 0.4 + 0.2 * torch.rand(shape)
    step = threat.scaled(torch.randn(shape), eps)
    assert threat.contains(threat.project(clean + 5 * step, clean), clean).all() and threat.contains(clean, clean).all()
    assert not threat.contains(clean + step * 1.01, clean).any()
    far = ThreatModel("Linf", 1.0) if norm == "Linf" else ThreatModel("L2", 15.0)
    for value in (-1e-6, 1 + 1e-6, float("nan")):
        outside = clean.clone()
        outside[1, 0, 0, 0] = value
        assert far.contains(outside, clean).tolist() == [True, False, True, True]


def linear(num_classes: int = 2) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, num_classes))


def interior_images(number: int = 20) -> Tensor:
    """Returns images that every ball of these tests leaves inside [0, 1]."""
    return 0.4 + 0.2 * torch.rand(number, 1, 4, 4)


def descent(model: nn.Module, labels: Tensor) -> Tensor:
    """Returns the gradient (B, 1, 4, 4) of the logit of the label minus that of the other class, of two."""
    weight = model[1].weight.detach()
    return (weight[labels] - weight[1 - labels]).view(-1, 1, 4, 4)


@both
@pytest.mark.parametrize("random_start", [True, False])
def test_pgd_reaches_the_worst_case_of_a_linear_classifier(threat, random_start):
    model, labels = linear(), torch.arange(50) % 2
    # Under Linf also at the edge of the box.
    images = torch.rand(50, 1, 4, 4) if threat is LINF else interior_images(50)
    unit = descent(model, labels)
    unit = unit.sign() if threat is LINF else unit / unit.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    x = pgd(model, images, labels, threat, steps=40, step_size=threat.eps, random_start=random_start)
    torch.testing.assert_close(x, (images - threat.eps * unit).clamp(0, 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 4, 10])
def test_the_default_step_is_two_and_a_half_radii_over_the_steps(steps):
    model, labels = linear(), torch.zeros(1).long()
    images, seen = interior_images(1), []

    def logits_fn(x: Tensor) -> Tensor:
        seen.append(x.detach().clone())
        return model(x)

    x = pgd(logits_fn, images, labels, LINF, steps=steps, random_start=False)
    assert len(seen) == steps
    moved = LINF.distance(torch.cat([*seen[1:], x]), images.expand(steps, -1, -1, -1))
    expected = [min(LINF.eps, step * min(2.5 / steps, 1.25) * LINF.eps) for step in range(1, steps + 1)]
    assert moved.tolist() == pytest.approx(expected, abs=1e-6)


@both
@pytest.mark.parametrize("steps", [1, 5])
def test_the_result_is_in_the_ball_and_in_the_box_and_depends_on_no_other_image(threat, steps):
    model, images, labels = linear(3), torch.rand(60, 1, 4, 4), torch.arange(60) % 3
    images[0], images[1] = 0.0, 1.0
    before = images.clone()
    for step_size in (None, 10.0):
        x = pgd(model, images, labels, threat, steps=steps, step_size=step_size)
        assert x.shape == images.shape and not x.requires_grad
        assert (threat.distance(x, images) <= threat.eps * (1 + 1e-5)).all()
        assert x.min() >= 0 and x.max() <= 1
    assert torch.equal(images, before)
    x = pgd(model, images, labels, threat, steps=steps, random_start=False)
    alone = [pgd(model, images[i:i + 1], labels[i:i + 1], threat, steps=steps, random_start=False) for i in range(60)]
    torch.testing.assert_close(x, torch.cat(alone), rtol=0, atol=1e-5)


def test_parameters_and_images_gather_no_gradient_and_no_grad_does_not_matter():
    model, images, labels = linear(), interior_images(), torch.arange(20) % 2
    x = pgd(model, images, labels, LINF, random_start=False)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert images.grad is None and not images.requires_grad
    with torch.no_grad():
        assert torch.equal(pgd(model, images, labels, LINF, random_start=False), x)


@pytest.mark.parametrize(("value", "steps", "message"), [
    *((value, 1, r"expected pixels in \[0, 1\]") for value in (1.5, float("nan"))),
    *((0.5, steps, r"steps is .*(; expected at least 1|, of the type .*; expected an integer)") for steps in (0, 2.0))])
def test_images_that_are_no_pixels_and_steps_that_are_no_positive_integer_are_refused(value, steps, message):
    images, labels = interior_images(4), torch.arange(4) % 2
    images[2, 0, 1, 1] = value
    with pytest.raises(ValueError, match=message):
        pgd(linear(), images, labels, LINF, steps=steps)
    assert pgd(linear(), images[:0], labels[:0], LINF).shape == (0, 1, 4, 4)
