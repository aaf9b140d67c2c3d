"""Our APGD, Square and FAB against AutoAttack's, and FAB against what a linear classifier's boundary is known to be."""

import math

import pytest
import torch
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from pyautoattack.fab_projections import projection_l2, projection_linf
from pyautoattack.fab_pt import FABAttack_PT
from pyautoattack.square import SquareAttack
from torch import Tensor, nn

from timm_hpm import ThreatModel
from timm_hpm.attacks import apgd, cross_entropy, fab, margin_loss, square_search, targeted_loss
from timm_hpm.attacks.fab import step_to_plane

EPS = {"Linf": 0.12, "L2": 0.8}
norms = pytest.mark.parametrize("norm", EPS)


def problem(shape: tuple[int, ...], classes: int = 5, number: int = 30,
            hidden: bool = True) -> tuple[nn.Module, Tensor, Tensor]:
    """Returns a small classifier, images, and the classes that it predicts."""
    torch.manual_seed(0)
    size = math.prod(shape)
    layers = [nn.Linear(size, 16), nn.ReLU(), nn.Linear(16, classes)] if hidden else [nn.Linear(size, classes)]
    model, images = nn.Sequential(nn.Flatten(), *layers).requires_grad_(False), torch.rand(number, *shape)
    return model, images, model(images).argmax(dim=1)


@pytest.mark.parametrize("iterations", [1, 3, 60])
@norms
@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("from_clean", [False, True])
def test_every_point_of_apgd_is_autoattack_s(norm, iterations, targeted, from_clean):
    model, images, labels = problem((1, 6, 6))
    targets, threat = (labels + 1) % 5, ThreatModel(norm, EPS[norm] / 2)
    options = {"n_iter": iterations, "norm": norm, "eps": threat.eps, "device": "cpu"}
    theirs = APGDAttack_targeted(model, **options) if targeted else APGDAttack(model, **options)
    theirs.y_target = targets
    theirs.init_hyperparam(images)
    loss, start = targeted_loss(labels, targets) if targeted else cross_entropy(labels), images if from_clean else None
    torch.manual_seed(1)
    largest, correct, expected_loss, fooling = theirs.attack_single_run(images, labels, x_init=start)
    torch.manual_seed(1)
    found = apgd(model, images, labels, threat, iterations, loss, start)
    assert torch.equal(found.fooled, correct == 0) and torch.equal(found.loss, expected_loss)
    assert torch.equal(found.largest, largest) and torch.equal(found.fooling, fooling)
    if iterations == 60:
        assert 3 <= found.fooled.sum() <= 29, "the problem tests nothing"


def test_images_without_a_gradient_are_counted():
    model, images, labels = problem((1, 6, 6))
    for some, number in ((model, 0), (nn.Sequential(model, nn.Threshold(100.0, 0.0)), 30)):
        loss = targeted_loss(labels, (labels + 1) % 5)
        assert apgd(some, images, labels, ThreatModel("Linf", 0.1), 2, loss).without_gradient == number


def searched(model: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, queries: int) -> Tensor:
    def margin(rows: Tensor, pixels: Tensor) -> Tensor:
        return margin_loss(model(pixels), labels[rows])

    torch.manual_seed(1)
    return square_search(margin, torch.arange(len(images)), images, threat, queries)


@pytest.mark.parametrize("queries", [1, 300])
@pytest.mark.parametrize("shape", [(1, 5, 5), (3, 11, 10), (3, 16, 16)])
@norms
def test_every_point_of_square_is_autoattack_s(norm, shape, queries):
    model, images, labels = problem(shape)
    theirs = SquareAttack(model, norm=norm, eps=EPS[norm], n_queries=queries, p_init=0.8, resc_schedule=False,
                          device="cpu")
    theirs.init_hyperparam(images)
    torch.manual_seed(1)
    expected = theirs.attack_single_run(images, labels)[1]
    found = searched(model, images, labels, ThreatModel(norm, EPS[norm]), queries)
    assert torch.equal(found, expected)
    if queries == 300:
        assert 3 <= (model(found).argmax(dim=1) != labels).sum() <= 29, "the problem tests nothing"


@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 12, 12), (1, 14, 9), (2, 3, 2)])
def test_images_that_autoattack_cannot_tile_are_searched_too(shape):
    model, images, labels = problem(shape)
    threat = ThreatModel("L2", 0.5)
    found = searched(model, images, labels, threat, 50)
    assert threat.contains(found, images).all()
    start = searched(model, images, labels, threat, 0)
    assert (margin_loss(model(found), labels) >= margin_loss(model(start), labels)).all()
    assert (found != start).any()


@pytest.mark.parametrize("shape", [(1, 70, 10), (3, 70, 5), (2, 21, 3), (1, 64, 1), (1, 1, 64), (1, 1, 1)])
def test_narrow_images_begin_on_the_sphere(shape):
    model, images = problem(shape)[0], torch.full((6, *shape), 0.5)
    threat = ThreatModel("L2", 0.1)
    start = searched(model, images, torch.zeros(6, dtype=torch.long), threat, 0)
    torch.testing.assert_close(threat.distance(start, images), torch.full((6,), threat.eps))


@pytest.mark.parametrize("size", [7, 64, 784])
@norms
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


@pytest.mark.parametrize(("point", "normal", "offset", "linf", "l2"), [
    *(([0.5] * 3, [scale, -2 * scale, scale], offset * scale, linf, l2) for scale in (1.0, 1e-30, 1e30)
      for offset, linf, l2 in ((0.4, [-0.1, 0.1, -0.1], [-0.4 / 6, 0.8 / 6, -0.4 / 6]),
                               (-0.6, [0.15, -0.15, 0.15], [0.1, -0.2, 0.1]))),
    # At the end of the range the first pixel cannot fall: the second goes all the way.
    ([0.0, 0.75], [1.0, 1.0], 0.25, *[[0.0, -0.25]] * 2),
    ([0.5, 0.5], [1.0, 1e-40], 9.0, *[[-0.5, -0.5]] * 2),
    ([0.5, 1.0], [0.0, 0.0], 1.0, *[[0.0, 0.0]] * 2),  # no plane
])
def test_a_step_goes_to_the_plane_or_to_the_end_of_the_range(point, normal, offset, linf, l2):
    for norm, step in (("Linf", linf), ("L2", l2)):
        found = step_to_plane(torch.tensor([point]), torch.tensor([normal]), torch.tensor([offset]), norm)
        torch.testing.assert_close(found[0], torch.tensor(step))


@norms
def test_the_points_of_fab_are_autoattack_s(norm):
    model, images, labels = problem((3, 4, 4), number=40)
    threat = ThreatModel(norm, EPS[norm])
    theirs = FABAttack_PT(model, norm=norm, n_iter=20, eps=threat.eps, targeted=True, device="cpu")
    theirs.target_class = 3
    targets = model(images).sort(dim=1).indices[:, -3]
    expected = theirs.attack_single_run(images, labels, is_targeted=True)
    found = fab(model, images, labels, targets, threat, 20)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert (found != images).flatten(1).any(dim=1).sum() > 30, "the problem tests nothing"


@norms
def test_the_boundary_of_a_linear_classifier(norm):
    model, images, labels = problem((3, 4, 4), 2, 40, hidden=False)
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
