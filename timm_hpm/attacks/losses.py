"""Losses of logits that attacks maximise, one value an image, and the classes that logits predict."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(labels: Tensor) -> Callable[[Tensor], Tensor]:
    """Returns the cross-entropy (R,) of logits (R, C) with `labels` (R,), as a function of the logits."""
    return lambda logits: F.cross_entropy(logits, labels, reduction="none")


def targeted_loss(labels: Tensor, targets: Tensor) -> Callable[[Tensor], Tensor]:
    """Returns the targeted DLR loss (R,) as a function of logits (R, C).

    With fewer than 4 classes it is minus the cross-entropy of the `targets` (R,).
    """
    def loss(logits: Tensor) -> Tensor:
        if logits.shape[1] < 4:
            return -F.cross_entropy(logits, targets, reduction="none")
        largest = logits.topk(4, dim=1).values
        lead = logits.gather(1, labels.unsqueeze(1)) - logits.gather(1, targets.unsqueeze(1))
        return -lead.squeeze(1) / (largest[:, 0] - 0.5 * (largest[:, 2] + largest[:, 3]) + 1e-12)

    return loss


def target_margin(labels: Tensor, targets: Tensor) -> Callable[[Tensor], Tensor]:
    """Returns the margin (R,) of the `targets` (R,) over the labels, z_t − z_y, as a function of logits (R, C)."""
    return lambda logits: (logits.gather(1, targets.unsqueeze(1)) - logits.gather(1, labels.unsqueeze(1))).squeeze(1)


def probability_margin(labels: Tensor) -> Callable[[Tensor], Tensor]:
    """Returns the probability margin (R,), max_{c≠y} p_c − p_y, as a function of logits (R, C); arXiv 2411.15210."""
    return lambda logits: margin_loss(F.softmax(logits, dim=1), labels)


def margin_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns max_{c≠y} z_c − z_y (B,) for `logits` (B, C): positive if it is misclassified."""
    others = logits.scatter(1, labels.unsqueeze(1), -math.inf)
    return others.amax(dim=1) - logits.gather(1, labels.unsqueeze(1)).squeeze(1)


def predicted_classes(logits: Tensor) -> Tensor:
    """Returns the classes (B,) of the largest of `logits` (B, C), and −1 if one of them is NaN or infinite."""
    # The arg-max of such logits is an accident, and may be the right class.
    return torch.where(logits.isfinite().all(dim=1), logits.argmax(dim=1), -1)
