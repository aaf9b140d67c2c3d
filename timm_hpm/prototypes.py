"""`fit_prototypes` computes the dataset-level prototypes and the scale of an HPM head from a data loader."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import functional
from .attacks.pgd import pgd
from .data import as_pixel_model, ask, check_pixels, check_weights, in_eval_mode
from .head import HPMHead, find_head, head_mode
from .threat import ThreatModel

# Number of features that choose the scale: enough for one number, and a large data set would not fit into memory.
_MAX_SCALE_FEATURES = 10_000


@dataclass(frozen=True)
class PrototypeFit:
    """Result of `fit_prototypes`: the number of features of each class (C,), the scale s, and its NLL in nats."""

    counts: Tensor
    scale: float
    nll: float


def fit_prototypes(
        model: nn.Module,
        loader: Iterable,
        threat: ThreatModel | str | None = None,
        *,
        held_out: Iterable | None = None,
        attack_steps: int = 10,
        attack_step_size: float | None = None,
        reduce: Callable[[Tensor], Tensor] | None = None,
) -> PrototypeFit:
    """Sets the prototypes of the model's HPM head to the class means of a loader, then the scale by NLL.

    One streaming pass over the loader, with sums in float64 and the model in eval mode; only its head changes, at the
    end. Costs one forward pass an image; with a threat, 2 + `attack_steps` forward and `attack_steps` backward passes.

    Arguments:
        model: a model with an HPM head: a timm model, or one that takes pixels in [0, 1].
        loader: yields (images, labels): pixels (B, channels, H, W) in [0, 1] and class indices (B,).
        threat: a threat model, or its text such as `"Linf:8/255"`. A prototype is then the mean feature of clean images
            and of PGD adversarial ones, crafted through the FC classifier. None means only clean images.
        held_out: a loader whose first 10,000 features choose the scale, under the same threat; None means `loader`.
        attack_steps: PGD steps for the adversarial images.
        attack_step_size: in units of the pixel range; see `pgd`.
        reduce: returns the sum of a tensor over all processes, each with a loader of its share of the images; None
            means one process. Each process chooses a scale of its own.

    Raises:
        ValueError: if there is no HPM head, images or labels are malformed, features are not finite, or a class has no
            image. The head does not change then.
    """
    check_weights(model)
    head = find_head(model)
    threat = None if threat is None else ThreatModel.of(threat)
    with in_eval_mode(model):
        pixel_model = as_pixel_model(model)
        attack = None if threat is None else partial(
            pgd, pixel_model, threat=threat, steps=attack_steps, step_size=attack_step_size)
        features_of = partial(_labelled_features, pixel_model, head, attack)
        sums = torch.zeros_like(head.prototypes, dtype=torch.float64)
        counts = torch.zeros_like(sums[:, 0])
        kept: list[tuple[Tensor, Tensor]] = []  # whole batches of features, that choose the scale

        def is_full() -> bool:
            return sum(len(labels) for _, labels in kept) >= _MAX_SCALE_FEATURES

        for features, labels in features_of(loader):
            batch_sums, batch_counts = functional.class_sums(features.double(), labels, head.out_features)
            sums += batch_sums
            counts += batch_counts
            if held_out is None and not is_full():
                kept.append((features, labels))
        if reduce is not None:
            sums, counts = reduce(sums), reduce(counts)
        missing = (counts == 0).nonzero().flatten().tolist()
        if missing:
            raise ValueError(f"the loader has no image of {len(missing)} of the {head.out_features} classes "
                             f"({missing[:10]} first); every class needs one for its prototype")
        for features, labels in features_of(() if held_out is None else held_out):
            if is_full():
                break
            kept.append((features, labels))
        fitted = copy.deepcopy(head)
        fitted.set_prototypes((sums / counts.unsqueeze(1)).to(head.prototypes.dtype))
        fitted.log_scale.data.zero_()  # the old scale, perhaps NaN, must not enter the distances
        log_scale, nll = fit_log_scale(*_distances(fitted, kept))
        fitted.log_scale.data.fill_(log_scale)
        head.load_state_dict(fitted.state_dict())
    return PrototypeFit(counts.long().cpu(), math.exp(log_scale), nll)


def fit_log_scale(distances: Tensor, labels: Tensor) -> tuple[float, float]:
    """Returns the log of the scale s > 0 that minimises the NLL of the logits −s·D, and that NLL in nats.

    The sum includes one more image that has every label, with weight 1/C each: if all N images are right, the best
    scale would be infinite, and leave attacks and training without a gradient. The sum is convex in s, so bisection on
    its derivative finds the minimum, within e^±20. D is `distances` (N, C), squared.
    """
    d = distances.double()
    share = 1 / (len(d) + 1)
    d_label = d.gather(1, labels.unsqueeze(1)).squeeze(1)
    d_label = d_label + share * (d.mean(dim=1) - d_label)
    low, high = -20.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        expected = (F.softmax(-math.exp(middle) * d, dim=1) * d).sum(dim=1)
        slope = (d_label - expected).mean()
        if slope >= 0:
            high = middle
        if slope <= 0:  # both if all scales are equally good, as with one class: it stays 1
            low = middle
    return low, F.cross_entropy(-math.exp(low) * d, labels).item()


@torch.no_grad()
def _distances(head: HPMHead, batches: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Returns the squared distances (N, C) of the head's logits, batch by batch of features, and the labels (N,)."""
    if not batches:
        raise ValueError("held_out yields no image; the scale needs some")
    # The FC mode has no distances; the default mode chooses its scale.
    with head_mode(head, "dataset" if head.inference == "fc" else head.inference):
        distances = torch.cat([-head(features) / head.scale() for features, _ in batches])
    return distances, torch.cat([labels for _, labels in batches])


def _labelled_features(pixel_model: nn.Module, head: HPMHead, attack: Callable[[Tensor, Tensor], Tensor] | None,
                       loader: Iterable) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the head's input (B, d) and the labels (B,) of each batch of a loader, clean and then adversarial."""
    captured: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, inputs: captured.append(inputs[0].detach().flatten(1).clone()))
    try:
        for images, labels in loader:
            images = check_pixels(images, labels, head.out_features)
            images, labels = images.to(head.weight.device), labels.to(head.weight.device).long()
            variants = [images]
            if attack is not None:
                with head_mode(head, "fc"):
                    variants.append(attack(images, labels))
            for variant in variants:
                captured.clear()
                with torch.no_grad():
                    ask(pixel_model, variant)
                head.check_update(captured[0], labels)
                yield captured[0], labels
    finally:
        hook.remove()
