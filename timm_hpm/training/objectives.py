"""What adversarial training minimises, and what its attack maximises.

Every objective is a sum over the HPM head's logits and, weighted, its FC classifier's: the head's assignment is the FC
classifier's prediction, which must not be forgotten.
"""

from collections.abc import Callable
from typing import Final

import torch.nn.functional as F
from torch import Tensor

Answers = tuple[Tensor, Tensor, Tensor]  # features (B, d), HPM logits (B, C), FC logits (B, C)


def cross_entropy(answers: Answers, labels: Tensor, fc_weight: float, smoothing: float = 0.0) -> Tensor:
    """Returns the mean cross-entropy of the HPM logits plus `fc_weight` times that of the FC logits, in nats.

    `labels` (B,) are class indices; `smoothing` in [0, 1) gives that much of their weight to all classes alike.
    """
    _, hpm_logits, fc_logits = answers
    loss = F.cross_entropy(hpm_logits, labels, label_smoothing=smoothing)
    if fc_weight and fc_logits is not hpm_logits:
        loss = loss + fc_weight * F.cross_entropy(fc_logits, labels, label_smoothing=smoothing)
    return loss


def trades(clean: Answers, adversarial: Answers, labels: Tensor, beta: float, fc_weight: float,
           smoothing: float = 0.0) -> Tensor:
    """Returns the clean cross-entropy plus `beta` times the KL divergence of the adversarial answers from the clean.

    Source: Zhang et al., arXiv 1901.08573; with both of the head's classifiers, see `cross_entropy`.
    """
    loss = cross_entropy(clean, labels, fc_weight, smoothing)
    loss = loss + beta * kl_divergence(adversarial[1], clean[1]) / len(labels)
    if fc_weight and clean[2] is not clean[1]:
        loss = loss + beta * fc_weight * kl_divergence(adversarial[2], clean[2]) / len(labels)
    return loss


def kl_divergence(logits: Tensor, reference: Tensor) -> Tensor:
    """Returns the sum over the images of KL(softmax(`reference`) ‖ softmax(`logits`)) in nats; both are (B, C)."""
    return F.kl_div(F.log_softmax(logits, dim=1), F.log_softmax(reference, dim=1), reduction="sum", log_target=True)


def away_from(reference: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Returns TRADES' attack loss (of logits and labels): the divergence from the clean logits `reference` (B, C)."""
    return lambda logits, _: kl_divergence(logits, reference)


OBJECTIVES: Final = ("pgd-at", "trades", "clean")
