"""Our FAB against AutoAttack's, and against what a linear classifier's boundary is known to be."""

import pytest
import torch
from pyautoattack.fab_projections import projection_l2, projection_linf
from pyautoattack.fab_pt import FABAttack_PT
from torch import Tensor, nn

from timm_hpm import ThreatModel
from timm_hpm.attacks import fab
from timm_hpm.attacks.fab import step_to_plane

EPS = {"Linf": 0.12, "L2": 0.8}


@pytest.mark.parametrize("size", [7, 64, 784])
@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_steps_to_planes_are_autoattack_s(norm, size):
    torch.manual_seed(0)
    points, normals = torch.rand(200, size), torch.randn(200, size)
    points[:, ::5] = points[:, ::5].round()  # pixels at an end of their range
    normals[::3, ::4] = 0
    offsets = torch.randn(200) * torch.logspace(-3, 0, 200) * size
    project = projection_linf if norm == "Linf" else projection_l2
    expected = project(points, normals.clone(), (normals * points).sum(dim=1) - offsets)
    steps = step_to_plane(points, normals, offsets, norm)
    torch.testing.assert_close(steps, expected, atol=3e-5, rtol=0)
    reached = ((normals * steps).sum(dim=1) + offsets).abs() < 1e-3
    assert 100 < reached.sum() < 190, "the problem tests nothing"


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_a_step_without_bounds_in_the_way(scale):
    points, normals = torch.full((2, 3), 0.5), torch.tensor([[1.0, -2.0, 1.0]]).expand(2, 3) * scale
    offsets = torch.tensor([0.4, -0.6]) * scale
    expected = {"Linf": [[-0.1, 0.1, -0.1], [0.15, -0.15, 0.15]],
                "L2": [[-0.4 / 6, 0.8 / 6, -0.4 / 6], [0.1, -0.2, 0.1]]}
    for norm, steps in expected.items():
        torch.testing.assert_close(step_to_plane(points, normals, offsets, norm), torch.tensor(steps))


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize(("point", "normal", "offset", "step"), [
    ([0.0, 0.75], [1.0, 1.0], 0.25, [0.0, -0.25]),  # the first pixel cannot fall: the second goes all the way
    ([0.0, 0.75], [1.0, -1.0], 9.0, [0.0, 0.25]),  # out of reach
    ([0.5, 0.5], [1.0, 1e-40], 9.0, [-0.5, -0.5]),
    ([0.5, 1.0], [0.0, 0.0], 1.0, [0.0, 0.0]),  # no plane
    ([0.5, 1.0], [1.0, 0.0], 0.0, [0.0, 0.0]),  # no distance
])
def test_steps_at_the_end_of_the_range(norm, point, normal, offset, step):
    found = step_to_plane(torch.tensor([point]), torch.tensor([normal]), torch.tensor([offset]), norm)
    assert found[0].tolist() == step


def problem(classes: int, hidden: bool = True) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    layers = [nn.Linear(48, 16), nn.Tanh(), nn.Linear(16, classes)] if hidden else [nn.Linear(48, classes)]
    model = nn.Sequential(nn.Flatten(), *layers).requires_grad_(False)
    images = torch.rand(40, 3, 4, 4)
    return model, images, model(images).argmax(dim=1)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_the_points_found_are_autoattack_s(norm):
    model, images, labels = problem(5)
    threat = ThreatModel(norm, EPS[norm])
    theirs = FABAttack_PT(model, norm=norm, n_iter=20, eps=threat.eps, targeted=True, device="cpu")
    theirs.target_class = 3
    targets = model(images).sort(dim=1).indices[:, -3]
    expected = theirs.attack_single_run(images, labels, is_targeted=True)
    found = fab(model, images, labels, targets, threat, 20)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert (found != images).flatten(1).any(dim=1).sum() > 30, "the problem tests nothing"


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_the_boundary_of_a_linear_classifier(norm):
    model, images, labels = problem(2, hidden=False)
    threat = ThreatModel(norm, EPS[norm])
    found = fab(model, images, labels, 1 - labels, threat, 20)
    assert (model(found).argmax(dim=1) != labels).all()
    assert found.min() >= 0 and found.max() <= 1
    # Bisection on the size of the step, as a pixel that reaches its end stays there.
    normal = (model[1].weight[1] - model[1].weight[0]).view(1, 3, 4, 4) * (1 - 2 * labels).view(-1, 1, 1, 1)
    direction = normal.sign() if norm == "Linf" else normal
    low, high = torch.zeros(40), torch.full((40,), 100.0)
    for _ in range(60):
        size = (low + high) / 2
        wrong = model((images + size.view(-1, 1, 1, 1) * direction).clamp(0, 1)).argmax(dim=1) != labels
        low, high = torch.where(wrong, low, size), torch.where(wrong, size, high)
    nearest = threat.distance((images + high.view(-1, 1, 1, 1) * direction).clamp(0, 1), images)
    distance = threat.distance(found, images)
    assert (distance >= nearest - 1e-4).all()
    assert (distance <= 1.05 * nearest + 1e-4).all()


def test_where_nothing_is_misclassified_the_image_stays_clean():
    images, labels = torch.rand(3, 1, 4, 4), torch.zeros(3, dtype=torch.long)

    def logits(x: Tensor) -> Tensor:
        mean = x.flatten(1).mean(dim=1)
        return torch.stack([mean + 1.0, mean * 0, mean * 0], dim=1)

    assert torch.equal(fab(logits, images, labels, labels + 1, ThreatModel("Linf", 0.1), 10), images)
