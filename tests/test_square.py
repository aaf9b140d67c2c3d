"""Our Square against AutoAttack's, bit by bit."""

import math

import pytest
import torch
from pyautoattack.square import SquareAttack
from torch import Tensor, nn

from timm_hpm import ThreatModel
from timm_hpm.attacks import margin_loss, square_search

EPS = {"Linf": 0.12, "L2": 0.8}


def problem(shape: tuple[int, ...]) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(torch.Size(shape).numel(), 16), nn.ReLU(), nn.Linear(16, 5))
    images = torch.rand(30, *shape)
    with torch.no_grad():
        return model, images, model(images).argmax(dim=1)


def ours(model: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, queries: int) -> Tensor:
    def margin(rows: Tensor, pixels: Tensor) -> Tensor:
        return margin_loss(model(pixels), labels[rows])

    torch.manual_seed(1)
    return square_search(margin, torch.arange(len(images)), images, threat, queries)


@pytest.mark.parametrize("queries", [1, 12, 300])
@pytest.mark.parametrize("shape", [(1, 5, 5), (3, 11, 10), (3, 16, 16)])
@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_every_point_is_autoattack_s(norm, shape, queries):
    model, images, labels = problem(shape)
    theirs = SquareAttack(model, norm=norm, eps=EPS[norm], n_queries=queries, p_init=0.8, resc_schedule=False,
                          device="cpu")
    theirs.init_hyperparam(images)
    torch.manual_seed(1)
    expected = theirs.attack_single_run(images, labels)[1]
    found = ours(model, images, labels, ThreatModel(norm, EPS[norm]), queries)
    assert torch.equal(found, expected)
    if queries == 300:
        assert 3 <= (model(found).argmax(dim=1) != labels).sum() <= 29, "the problem tests nothing"


@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 12, 12), (1, 14, 9), (2, 3, 2)])
def test_images_that_autoattack_cannot_tile_are_searched_too(shape):
    model, images, labels = problem(shape)
    threat = ThreatModel("L2", 0.5)
    found = ours(model, images, labels, threat, 50)
    # The start is on the sphere but where the pixels' bounds are in the way.
    assert threat.distance(found, images).max() <= threat.eps + 1e-5
    assert found.min() >= 0 and found.max() <= 1
    start = ours(model, images, labels, threat, 0)
    assert (margin_loss(model(found), labels) >= margin_loss(model(start), labels)).all()
    assert (found != start).any()


@pytest.mark.parametrize("shape", [(1, 70, 10), (3, 70, 5), (2, 21, 3), (1, 64, 1), (1, 1, 64), (1, 1, 1)])
def test_narrow_images_begin_on_the_sphere(shape):
    torch.manual_seed(0)
    model, images = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), 3)), torch.full((6, *shape), 0.5)
    threat = ThreatModel("L2", 0.1)
    start = ours(model, images, torch.zeros(6, dtype=torch.long), threat, 0)
    torch.testing.assert_close(threat.distance(start, images), torch.full((6,), threat.eps))
