"""`ThreatModel`: its text form, and the geometry of its ball."""

import random

import numpy as np
import pytest
import torch

from timm_hpm import ThreatModel

LINF, L2 = ThreatModel("Linf", 0.1), ThreatModel("L2", 0.5)
both = pytest.mark.parametrize("threat", [LINF, L2], ids=str)


def norms(threat: ThreatModel, delta: torch.Tensor) -> torch.Tensor:
    return delta.flatten(1).abs().amax(dim=1) if threat.norm == "Linf" else delta.flatten(1).square().sum(dim=1).sqrt()


# Text


@pytest.mark.parametrize(("text", "norm", "eps"), [
    ("Linf:8/255", "Linf", 8 / 255), ("Linf:1", "Linf", 1.0), ("L2:0.5", "L2", 0.5), ("L2:1e-3", "L2", 1e-3),
    (" Linf : 8 / 255 ", "Linf", 8 / 255)])
def test_parse_reads_fractions_and_numbers(text, norm, eps):
    assert ThreatModel.parse(text) == ThreatModel(norm, eps)


@pytest.mark.parametrize("text", ["Linf:8/255", "L2:0.5", "L2:128/255", "Linf:0.1", "Linf:3/255", "L2:3.0"])
def test_the_usual_texts_come_back_as_they_were(text):
    assert str(ThreatModel.parse(text)) == text


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_every_text_is_read_back_to_an_equal_threat_model(norm):
    random.seed(0)
    for eps in [k / 255 for k in range(1, 256)] + [random.random() for _ in range(200)] + [0.1 + 0.2, 1 / 3, 1e-300]:
        threat = ThreatModel(norm, eps)
        assert ThreatModel.parse(str(threat)) == threat


@pytest.mark.parametrize("eps", [64, 128, 127.5, 1275.0])
def test_an_l2_radius_in_units_of_255_warns(eps):
    for make in (lambda: ThreatModel("L2", eps), lambda: ThreatModel.parse(f"L2:{eps}")):
        with pytest.warns(UserWarning, match=f"eps is {eps:g} for L2.*Did you mean {eps:g}/255"):
            assert make().eps == eps


@pytest.mark.parametrize("threat", [None, 0.3, True, ("Linf", 0.3), b"Linf:0.3", "0.3", "L2:1e308", "L2:nan", "Linf:8"])
def test_a_value_that_is_no_threat_model_is_refused(threat):
    with pytest.raises(ValueError, match=r"expected a ThreatModel or a text|cannot read the threat|eps is "):
        ThreatModel.of(threat)

@pytest.mark.parametrize("eps", [np.float64(0.3), np.float32(0.3), np.int64(1), 1])
def test_a_radius_of_another_number_type_has_a_readable_text(eps):
    threat = ThreatModel("L2", eps)
    assert ThreatModel.parse(str(threat)) == threat and threat.eps == float(eps)


@pytest.mark.parametrize("text", ["", "Linf", "8/255", "Linf:", "Linf:8/", "Linf:eight", "Linf:8/255/2", "Linf:8/0",
                                  "Linf=8/255", "Linf:8:255"])
def test_parse_says_what_it_expected(text):
    with pytest.raises(ValueError, match=r"expected NORM:EPS such as Linf:8/255 or L2:0\.5.*Linf, L2") as error:
        ThreatModel.parse(text)
    assert repr(text) in str(error.value)


@pytest.mark.parametrize("norm", ["L1", "linf", ""])
def test_an_unknown_norm_is_refused(norm):
    with pytest.raises(ValueError, match=f"unknown norm '{norm}'; expected one of Linf, L2"):
        ThreatModel(norm, 0.1)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("eps", [0.0, -0.1, float("nan"), float("inf")])
def test_a_radius_that_is_no_positive_number_is_refused(norm, eps):
    for make in (lambda: ThreatModel(norm, eps), lambda: ThreatModel.parse(f"{norm}:{eps}")):
        with pytest.raises(ValueError, match=f"eps is {eps}; expected a finite number above 0"):
            make()


def test_an_linf_radius_in_grey_levels_is_refused_with_a_hint():
    with pytest.raises(ValueError, match=r"eps is 8\.0 for Linf.*at most 1\. Did you mean 8/255\?"):
        ThreatModel.parse("Linf:8")
    assert ThreatModel("L2", 8).eps == 8


# Geometry


@both
def test_project_ends_in_the_ball_and_in_the_box(threat):
    clean = torch.rand(50, 3, 4, 4)
    clean[0], clean[1] = 0.0, 1.0
    for size in (0.01, 0.3, 30.0):
        x = threat.project(clean + size * torch.randn_like(clean), clean)
        assert (norms(threat, x - clean) <= threat.eps * (1 + 1e-5)).all()
        assert x.min() >= 0 and x.max() <= 1
        assert threat is L2 or torch.equal(threat.project(x, clean), x)


@both
def test_project_reaches_the_sphere_in_the_direction_of_the_perturbation(threat):
    clean, direction = torch.full((5, 1, 4, 4), 0.5), torch.randn(5, 1, 4, 4)
    x = threat.project(clean + 100 * direction, clean)
    if threat is LINF:
        expected = (100 * direction).clamp(-threat.eps, threat.eps)
    else:
        expected = threat.eps * direction / norms(threat, direction).view(-1, 1, 1, 1)
    torch.testing.assert_close(x - clean, expected, rtol=1e-4, atol=1e-6)


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


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_scaled_is_a_full_step_however_small_the_direction(norm):
    # A confident model's gradients: their squares underflow.
    direction = 1e-30 * torch.tensor([[3.0, -4.0]]).view(1, 1, 1, 2)
    step = ThreatModel(norm, 0.5).scaled(direction, 0.5).flatten()
    expected = [0.3, -0.4] if norm == "L2" else [0.5, -0.5]
    torch.testing.assert_close(step, torch.tensor(expected))


def test_distance_is_the_norm_of_the_difference():
    x = torch.zeros(2, 1, 2, 2)
    y = torch.tensor([[0.3, -0.4, 0.0, 0.0], [0.1, 0.1, 0.1, 0.1]]).view(2, 1, 2, 2)
    torch.testing.assert_close(LINF.distance(x, y), torch.tensor([0.4, 0.1]))
    torch.testing.assert_close(L2.distance(x, y), torch.tensor([0.5, 0.2]))
    assert torch.equal(L2.distance(x, y), L2.distance(y, x))


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
