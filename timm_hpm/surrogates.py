"""The differentiable surrogates through which the Mixed Surrogate Attack sees an HPM model.

A surrogate turns the features of a whole batch (B, d) into logits (B, C). The head itself is discontinuous in the
batch mode (its assignment is one-hot) and its straight-through gradient is not the gradient of what it computes, so
no single one of them is enough (arXiv 2606.01746; docs/method.md).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from . import functional
from .head import HPMHead
from .names import did_you_mean

# The one surrogate of a classifier without an HPM head: the classifier.
PLAIN: Final = "model"


def fc_logits(head: HPMHead, features: Tensor) -> Tensor:
    """Returns the logits (B, C) of the FC classifier alone."""
    return head.fc_logits(features).float()


def dataset_logits(head: HPMHead, features: Tensor) -> Tensor:
    """Returns the ℓ2 logits (B, C) on the dataset-level prototypes alone."""
    return functional.l2_logits(features.float(), head.prototypes.float(), head.scale())


def soft_logits(head: HPMHead, features: Tensor, temperature: float = 1.0) -> Tensor:
    """Returns the head's logits (B, C) with the softmax at a `temperature` instead of the one-hot assignment.

    In the modes without an assignment (`dataset`, `fc`) these are that mode's own logits.
    """
    if head.inference in ("dataset", "fc"):
        return ste_logits(head, features)
    z, prototypes, scale = features.float(), head.prototypes.float(), head.scale()
    assignment = F.softmax(fc_logits(head, features) / temperature, dim=1)
    if head.inference == "sample":
        return functional.sample_logits(z, assignment, prototypes, scale, head.mix)
    return functional.batch_logits(z, assignment, functional.soft_presence(assignment), prototypes, scale, head.mix)


def ste_logits(head: HPMHead, features: Tensor) -> Tensor:
    """Returns the head's own logits (B, C), with the straight-through gradient of its assignment."""
    # A hook of the head may write into its input.
    return head(features.clone()).float()


def mixed_logits(head: HPMHead, features: Tensor) -> Tensor:
    """Returns the mean (B, C) of the log-softmax of fc, dataset and soft."""
    parts = [logits(head, features) for logits in (fc_logits, dataset_logits, soft_logits)]
    return torch.stack([F.log_softmax(part, dim=1) for part in parts]).mean(dim=0)


@dataclass(frozen=True)
class Surrogate:
    """A differentiable stand-in for an HPM model."""

    name: str  # in protocols and reports
    logits: Callable[[HPMHead, Tensor], Tensor]  # an HPM head and features (B, d) of a whole batch to logits (B, C)
    batch_dependent: bool = False  # whether logits depend on the batch's other images if the head's mode is "batch"
    exact_in: tuple[str, ...] = ()  # inference modes in which the logits are the head's own
    # The logits at a temperature from 1 to nearly 0, its third argument, for attacks that anneal.
    annealed: Callable[[HPMHead, Tensor, float], Tensor] | None = None
    in_joint: bool = True  # whether attacks on a whole batch use it if it is batch-dependent

    def at(self, temperature: float, head: HPMHead, features: Tensor) -> Tensor:
        """Returns the logits (B, C) at a temperature, or as they are if the surrogate is not annealed."""
        return self.logits(head, features) if self.annealed is None else self.annealed(head, features, temperature)


#: The surrogates by name. A surrogate of one's own is one more entry.
SURROGATES: Final = {
    surrogate.name: surrogate
    for surrogate in (
        Surrogate("fc", fc_logits, exact_in=("fc",)),
        Surrogate("dataset", dataset_logits, exact_in=("dataset",)),
        Surrogate("soft", soft_logits, batch_dependent=True, annealed=soft_logits),
        Surrogate("ste", ste_logits, batch_dependent=True, exact_in=("batch", "sample")),
        # Its batch-dependent part is `soft`, which the attacks on a whole batch use already.
        Surrogate("mixed", mixed_logits, batch_dependent=True, in_joint=False),
    )
}


def exact_surrogate(inference: str, fitted: bool = True) -> str:
    """Returns the surrogate that computes the true model's own logits, in a mode (`"none"`: without an HPM head)."""
    if inference == "none":
        return PLAIN
    mode = inference if fitted else "fc"
    return next(surrogate.name for surrogate in SURROGATES.values() if mode in surrogate.exact_in)


def check_names(kind: str, names: Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    """Returns `names` without repetitions, or raises a ValueError that lists the `known` ones of their kind."""
    if isinstance(names, str | Tensor) or not isinstance(names, Iterable):
        raise ValueError(f"{kind}s is {names!r}; expected a list of names, such as {list(known[:1])}")
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        near = did_you_mean(unknown[0], known) if unknown else ""
        raise ValueError(f"unknown {kind} {', '.join(map(repr, unknown)) or '(none given)'}; "
                         f"expected some of {', '.join(known)}{near}")
    return tuple(dict.fromkeys(names))
