"""Training objectives: each one object, with the attack that crafts its images and the loss that it minimises.

The losses here are weighted means over the HPM head's logits and its FC classifier's: the head assigns images to
prototypes by the FC classifier's prediction, so that classifier must keep learning. If the model predicts by its FC
classifier alone, both parts are that classifier's loss.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attacks.pgd import ascend
from ..threat import ThreatModel
from .distributed import average_

Outputs = tuple[Tensor, Tensor, Tensor]  # features (B, d), HPM logits (B, C), FC logits (B, C)


@dataclass(frozen=True)
class TrainingAttack:
    """The attack of a training step: a surrogate of the model in eval mode, and the options of PGD."""

    logits: Callable[[Tensor], Tensor]  # pixels (B, channels, H, W) in [0, 1] to the surrogate's logits (B, C)
    threat: ThreatModel
    steps: int
    step_size: float | None = None  # in units of pixels in [0, 1]; None means PGD's default

    def pgd(self, images: Tensor, labels: Tensor, loss: Callable[[Tensor, Tensor], Tensor] | None = None) -> Tensor:
        """Returns adversarial images (B, ...) by PGD on a `loss` of logits and labels; None means cross-entropy."""
        return ascend(self.logits, images, labels, self.threat, self.steps, self.step_size, loss=loss)


@dataclass(frozen=True)
class Objective:
    """A training objective."""

    name: str  # the value of the option `objective`
    # The outputs for each batch (clean images, if the objective or the prototypes use them; then adversarial images, if
    # there is an attack), the labels (B,) and the run's `TrainConfig` to the scalar to minimise.
    loss: Callable[[Sequence[Outputs], Tensor, Any], Tensor]
    # An attack, clean images (B, ...) and labels (B,) to adversarial images; None trains on clean ones alone.
    craft: Callable[[TrainingAttack, Tensor, Tensor], Tensor] | None = TrainingAttack.pgd
    uses_clean: bool = False  # whether the loss uses the outputs for the clean images
    options: tuple[str, ...] = ()  # those of `TrainConfig` for its loss, which are refused elsewhere


def cross_entropy(outputs: Sequence[Outputs], labels: Tensor, options: Any) -> Tensor:
    """Returns the mean cross-entropy (nats) of the last batch: of the HPM logits, and of the FC logits."""
    return _over_both(lambda logits: F.cross_entropy(logits, labels, label_smoothing=options.smoothing), outputs[-1],
                      options.fc_loss_weight)


def trades(outputs: Sequence[Outputs], labels: Tensor, options: Any) -> Tensor:
    """Returns the clean cross-entropy plus β times the KL divergence of the adversarial outputs from the clean ones.

    Source: Zhang et al., arXiv 1901.08573; for both of the head's classifiers.
    """
    clean, adversarial = outputs
    divergence = _over_both(lambda logits, reference: kl_divergence(logits, reference) / len(labels), adversarial,
                            options.fc_loss_weight, clean)
    return cross_entropy([clean], labels, options) + options.trades_beta * divergence


def craft_trades(attack: TrainingAttack, images: Tensor, labels: Tensor) -> Tensor:
    """Returns images (B, ...) that maximise the divergence from the clean logits, by one forward pass more than PGD."""
    with torch.no_grad():
        reference = attack.logits(images)
    return attack.pgd(images, labels, away_from(reference))


def mart(outputs: Sequence[Outputs], labels: Tensor, options: Any) -> Tensor:
    """Returns MART's loss: `boosted_cross_entropy` of the adversarial outputs, plus λ times their divergence.

    That is the KL divergence from the clean outputs, weighted by 1 minus the clean probability of the label.
    Source: Wang et al., "Improving adversarial robustness requires revisiting misclassified examples", ICLR 2020.
    """
    clean, adversarial = outputs

    def loss(logits: Tensor, reference: Tensor) -> Tensor:
        doubt = 1 - reference.softmax(dim=1).gather(1, labels.unsqueeze(1)).squeeze(1)
        divergence = kl_divergence(logits, reference, reduction="none").sum(dim=1)
        return boosted_cross_entropy(logits, labels, options.smoothing) + options.mart_lambda * (
            divergence * doubt).mean()

    return _over_both(loss, adversarial, options.fc_loss_weight, clean)


def boosted_cross_entropy(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Returns the mean of −log p_y − log(1 − max p_k over the classes k other than y), for `logits` (B, C)."""
    others = logits.scatter(1, labels.unsqueeze(1), -torch.inf)
    rival = others.argmax(dim=1, keepdim=True)
    without_rival = logits.scatter(1, rival, -torch.inf).logsumexp(dim=1) - logits.logsumexp(dim=1)
    return F.cross_entropy(logits, labels, label_smoothing=smoothing) - without_rival.mean()


def kl_divergence(logits: Tensor, reference: Tensor, reduction: str = "sum") -> Tensor:
    """Returns the sum over the images of KL(softmax(`reference`) ‖ softmax(`logits`)) in nats; both are (B, C)."""
    return F.kl_div(F.log_softmax(logits, dim=1), F.log_softmax(reference, dim=1), reduction=reduction,
                    log_target=True)


def away_from(reference: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Returns TRADES' attack loss (of logits and labels): the divergence from the clean logits `reference` (B, C)."""
    return lambda logits, _: kl_divergence(logits, reference)


def _over_both(loss: Callable[..., Tensor], outputs: Outputs, fc_weight: float, *references: Outputs) -> Tensor:
    """Returns the weighted mean of a loss of the HPM logits (and those of the references) and one of the FC logits."""
    total = loss(outputs[1], *(reference[1] for reference in references))
    if fc_weight:
        total = total + fc_weight * loss(outputs[2], *(reference[2] for reference in references))
    return total / (1 + fc_weight)


@contextmanager
def perturbed_weights(module: nn.Module, loss: Callable[[], Tensor], gamma: float) -> Iterator[None]:
    """Moves the weights of `module` up the gradient of a `loss` of them within the block, and back exactly at its end.

    Each weight of two dimensions or more moves by `gamma` times its own norm; a `gamma` of 0 makes no pass. BatchNorm's
    running statistics do not change. With several processes all move alike, by the mean of their gradients. Source: Wu
    et al., adversarial weight perturbation, arXiv 2004.05884.
    """
    if not gamma:
        yield
        return
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    weights = [weight for weight in module.parameters() if weight.requires_grad and weight.ndim > 1]
    gradients = torch.autograd.grad(loss(), weights, allow_unused=True)
    used = [(weight, gradient.contiguous()) for weight, gradient in zip(weights, gradients, strict=True)
            if gradient is not None]
    average_([gradient for _, gradient in used])
    before = [weight.detach().clone() for weight, _ in used]
    with torch.no_grad():
        for buffer, value in buffers:
            buffer.copy_(value)
        for weight, gradient in used:
            length = gradient.norm()
            # An overflow of float16, or a gradient of 0, moves nothing.
            weight.add_(torch.where(length.isfinite() & (length > 0), gradient * (gamma * weight.norm() / length), 0.0))
    try:
        yield
    finally:
        with torch.no_grad():
            for (weight, _), value in zip(used, before, strict=True):
                weight.copy_(value)


#: The objectives by name. An objective of one's own is one more entry.
OBJECTIVES: Final = {
    objective.name: objective
    for objective in (
        Objective("pgd-at", cross_entropy),
        Objective("trades", trades, craft_trades, uses_clean=True, options=("trades_beta",)),
        Objective("mart", mart, uses_clean=True, options=("mart_lambda",)),
        Objective("clean", cross_entropy, craft=None),
    )
}
