"""PGD against linear classifiers, whose worst case is known in closed form."""

import pytest
import torch
from torch import Tensor, nn

from timm_hpm import ThreatModel, pgd

LINF, L2 = ThreatModel("Linf", 0.1), ThreatModel("L2", 0.3)
both = pytest.mark.parametrize("threat", [LINF, L2], ids=str)


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


@both
def test_one_step_from_the_clean_image_is_the_scaled_gradient(threat):
    model, images, labels = linear(), interior_images(), torch.arange(20) % 2
    direction = -descent(model, labels)
    unit = direction.sign() if threat is LINF else direction / direction.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    small = pgd(model, images, labels, str(threat), steps=1, step_size=threat.eps / 4, random_start=False)
    torch.testing.assert_close(small, images + threat.eps / 4 * unit, rtol=0, atol=1e-6)
    # The default step of a single step is longer than eps, and projected.
    default = pgd(model, images, labels, threat, steps=1, random_start=False)
    torch.testing.assert_close(default, images + threat.eps * unit, rtol=0, atol=1e-6)


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
