"""What adversarial training minimises, and what its attack maximises.

Every objective is a weighted mean over the HPM head's logits and its FC classifier's: the head's assignment is the FC
classifier's prediction, which must not be forgotten. Of a head that answers as its FC classifier it is that
classifier's own loss.
"""

from collections.abc import Callable
from typing import Final

import torch.nn.functional as F
from torch import Tensor

Answers = tuple[Tensor, Tensor, Tensor]  # features (B, d), HPM logits (B, C), FC logits (B, C)


def cross_entropy(answers: Answers, labels: Tensor, fc_weight: float, smoothing: float = 0.0) -> Tensor:
    """Returns the mean cross-entropy of the HPM logits (weight 1) and the FC logits (weight `fc_weight`), in nats.

    `labels` (B,) are class indices; `smoothing` in [0, 1) gives that much of their weight to all classes alike.
    """
    return _over_both(lambda logits: F.cross_entropy(logits, labels, label_smoothing=smoothing), answers, fc_weight)


def trades(clean: Answers, adversarial: Answers, labels: Tensor, beta: float, fc_weight: float,
           smoothing: float = 0.0) -> Tensor:
    """Returns the clean cross-entropy plus `beta` times the KL divergence of the adversarial answers from the clean.

    Source: Zhang et al., arXiv 1901.08573; with both of the head's classifiers, see `cross_entropy`.
    """
    divergence = _over_both(lambda logits, reference: kl_divergence(logits, reference) / len(labels), adversarial,
                            fc_weight, clean)
    return cross_entropy(clean, labels, fc_weight, smoothing) + beta * divergence


def kl_divergence(logits: Tensor, reference: Tensor) -> Tensor:
    """Returns the sum over the images of KL(softmax(`reference`) ‖ softmax(`logits`)) in nats; both are (B, C)."""
    return F.kl_div(F.log_softmax(logits, dim=1), F.log_softmax(reference, dim=1), reduction="sum", log_target=True)


def away_from(reference: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Returns TRADES' attack loss (of logits and labels): the divergence from the clean logits `reference` (B, C)."""
    return lambda logits, _: kl_divergence(logits, reference)


def _over_both(loss: Callable[..., Tensor], answers: Answers, fc_weight: float, *references: Answers) -> Tensor:
    """Returns the weighted mean of a loss of the HPM logits (and those of the references) and one of the FC logits."""
    total = loss(answers[1], *(reference[1] for reference in references))
    if fc_weight:
        total = total + fc_weight * loss(answers[2], *(reference[2] for reference in references))
    return total / (1 + fc_weight)


OBJECTIVES: Final = ("pgd-at", "trades", "clean")
