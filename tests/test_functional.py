"""The equations of `timm_hpm.functional`: closed forms, what they have in common, and their gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from timm_hpm import functional


def one_hot(labels: list[int], num_classes: int) -> Tensor:
    return F.one_hot(torch.tensor(labels), num_classes).float()


@pytest.mark.parametrize("size", [1.0, 1e4])
def test_straight_through_is_exactly_one_hot_with_the_gradient_of_the_softmax(size):
    logits = (size * torch.randn(64, 7)).requires_grad_()
    upstream = torch.randn(64, 7)
    assignment = functional.straight_through_assignment(logits)
    assert torch.equal(assignment, F.one_hot(logits.argmax(dim=1), 7).float())
    assert functional.straight_through_assignment(torch.zeros(3, 4)).sum(dim=1).tolist() == [1, 1, 1], "a tie, once"

    gradient, = torch.autograd.grad(assignment, logits, upstream)
    expected, = torch.autograd.grad(F.softmax(logits, dim=1), logits, upstream)
    assert torch.equal(gradient, expected)


def test_soft_presence_of_tiny_probabilities_is_their_sum():
    tiny = torch.tensor([[1e-10, 3e-20], [2e-10, 0.0]])
    torch.testing.assert_close(functional.soft_presence(tiny), torch.tensor([3e-10, 3e-20]), rtol=1e-5, atol=0)


def test_soft_presence_of_a_saturated_softmax_is_hard_with_finite_gradients():
    p = one_hot([2, 2, 0], 4).requires_grad_()
    presence = functional.soft_presence(p)
    torch.testing.assert_close(presence, functional.hard_presence(p), rtol=0, atol=2e-6)
    gradient, = torch.autograd.grad(presence.sum(), p)
    assert gradient.isfinite().all()
    # Nobody predicts classes 1 and 3: there each image's own probability counts in full.
    torch.testing.assert_close(gradient[:, [1, 3]], torch.ones(3, 2))


def test_a_class_that_nobody_predicts_passes_no_gradient():
    logits = (10 * one_hot([1, 3, 1, 1], 5) + torch.randn(4, 5)).requires_grad_()
    z = torch.randn(4, 3, requires_grad=True)
    prototypes = torch.randn(5, 3, requires_grad=True)
    assignment = functional.straight_through_assignment(logits)
    means = functional.batch_prototypes(z, assignment)
    mixed = functional.mix_prototypes(prototypes, means, functional.hard_presence(assignment), 0.5)
    for absent in (0, 2, 4):
        to_z, = torch.autograd.grad(means[absent].sum(), z, retain_graph=True)
        assert torch.equal(to_z, torch.zeros_like(z))
        to_z, to_logits, to_prototypes = torch.autograd.grad(
            mixed[absent].sum(), [z, logits, prototypes], retain_graph=True)
        assert torch.equal(to_z, torch.zeros_like(z)) and torch.equal(to_logits, torch.zeros_like(logits))
        assert torch.equal(to_prototypes, one_hot([absent], 5).t().expand(5, 3))
    # The gradient of the mass of an absent class must not be divided by something tiny.
    to_logits, = torch.autograd.grad(means.sum(), logits)
    assert to_logits.isfinite().all() and 0 < to_logits.abs().max() < 100


@pytest.mark.parametrize("mass", [0.0, 1e-42, 1e-38, 1e-13, 1e-6])
def test_batch_prototypes_of_hardly_any_mass_have_finite_gradients(mass):
    assignment = torch.full((3, 2), mass / 3, requires_grad=True)
    z = torch.randn(3, 4, requires_grad=True)
    means = functional.batch_prototypes(z, assignment)
    mixed = functional.mix_prototypes(torch.randn(2, 4), means, functional.soft_presence(assignment), 0.5)
    assert means.isfinite().all() and mixed.isfinite().all()
    to_means = torch.autograd.grad(means.sum(), [z, assignment], retain_graph=True)
    assert all(gradient.isfinite().all() for gradient in to_means)
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(mixed.square().sum(), [z, assignment]))


@pytest.mark.parametrize("mix", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("batch", [1, 2, 7])
def test_distances_by_inner_products_are_those_to_the_mixed_prototypes(batch, soft, mix):
    z, logits, prototypes, mean = (torch.randn(shape, dtype=torch.float64) for shape in
                                   [(batch, 9), (batch, 5), (5, 9), (9,)])
    logits[:, 2] = -100.0  # a class that is absent
    inputs = [tensor.requires_grad_() for tensor in (z + 10 * mean, 3 * logits, prototypes + 10 * mean)]
    z, logits, prototypes = inputs
    assignment = F.softmax(logits, dim=1) if soft else functional.straight_through_assignment(logits)
    presence = (functional.soft_presence if soft else functional.hard_presence)(assignment)
    by_products = functional.mixed_squared_distances_by_products(z, assignment, presence, prototypes, mix)
    mixed = functional.mix_prototypes(prototypes, functional.batch_prototypes(z, assignment), presence, mix)
    expected = (z[:, None] - mixed[None]).square().sum(dim=2)
    torch.testing.assert_close(by_products, expected)
    upstream = torch.randn(batch, 5, dtype=torch.float64)
    for gradient, other in zip(torch.autograd.grad(by_products, inputs, upstream, retain_graph=True),
                               torch.autograd.grad(expected, inputs, upstream), strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("classes", [5, 250])
def test_several_batches_are_answered_as_each_by_itself(classes):
    # With 250 classes by inner products, with 5 by the mixed prototypes.
    z, logits = torch.randn(3, 6, 256), 3 * torch.randn(3, 6, classes)
    prototypes, scale = torch.randn(classes, 256), torch.tensor(0.3)

    def answers(z: Tensor, logits: Tensor) -> Tensor:
        hard, soft = functional.straight_through_assignment(logits), F.softmax(logits, dim=-1)
        return torch.stack([functional.batch_logits(z, assignment, presence(assignment), prototypes, scale, 0.5)
                            for assignment, presence in ((hard, functional.hard_presence),
                                                         (soft, functional.soft_presence))])

    each = [answers(*batch) for batch in zip(z, logits, strict=True)]
    torch.testing.assert_close(answers(z, logits), torch.stack(each, dim=1), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("batch", [1, 4])
def test_gradcheck_of_the_soft_path(batch):
    def soft(z: Tensor, weight: Tensor, prototypes: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
        assignment = F.softmax(z @ weight.t(), dim=1)
        presence = functional.soft_presence(assignment)
        return (functional.batch_logits(z, assignment, presence, prototypes, log_scale.exp(), 0.5),
                functional.sample_logits(z, assignment, prototypes, log_scale.exp(), 0.5))

    shapes = [(batch, 3), (4, 3), (4, 3), ()]
    assert torch.autograd.gradcheck(soft, [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes])
