"""Checks for false robustness: signs that an attack's failure proves little. report/flags.md explains each flag.

Source: Athalye et al., arXiv 1802.00420; Croce and Hein, arXiv 2003.01690 (the checks of AutoAttack).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import torch
from torch import Tensor, nn

from ..attacks import margin_loss
from ..data import ask
from ..head import head_name, mode_if_any
from ..report import TRUE_MODEL, Flag
from ..report.metrics import attack_of, right_in_all
from ..surgery import HPMMixin
from ..threat import ThreatModel
from .attacked import differs
from .table import ATTACKS

# Rounding between batches of two sizes, or two calls; see `differs`.
_ROUNDING: Final = 1e-3
_ROUNDING_IN_HALF: Final = 1e-1
# Share of images at which dead units may leave an honest network without a gradient.
_FEW: Final = 0.05
# Distance from 1 of a sum of probabilities in half precision.
_OF_PROBABILITIES: Final = 1e-2
# Fewer images give no meaningful share.
_FEWEST_SURVIVORS: Final = 8


def check_model(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int) -> list[Flag]:
    """Returns the flags of a model's outputs for some images (N, channels, H, W) with `labels` (N,).

    Costs two passes forward and one backward, and up to six more forward with one batch; one check doubles the batch.
    """
    batch = images[:batch_size]
    with restored(model) as before:
        checks = (gradient_flag(model, images, labels, batch_size), random_flag(model, batch), batch_flag(model, batch))
        return [flag for flag in (*checks, _state_flag(model, before)) if flag is not None]


@contextmanager
def restored(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Yields copies of a model's parameters and buffers by name, and restores changed values afterwards."""
    before = {name: tensor.clone() for name, tensor in _state(model).items()}
    try:
        yield before
    finally:
        with torch.no_grad():
            for name, tensor in _state(model).items():
                # A buffer that was made anew in another shape is a cache.
                if name in before and tensor.shape == before[name].shape and not _same(tensor, before[name]):
                    tensor.copy_(before[name])


def clean_flags(predicted: Tensor, labels: Tensor, num_classes: int) -> list[Flag]:
    """Returns the flags of the classes (N,) predicted for at least 8 clean images with `labels` (N,).

    `clean-near-chance`: the accuracy is at most twice that of guessing, or a tenth of the way from it to 1, if that is
    less. `labels-off-by-one`: for more than a third of the images, of two or more classes, the next (or previous) class
    is predicted more often than their own, and for most of them.
    """
    if len(predicted) < _FEWEST_SURVIVORS:
        return []
    flags, chance, right = [], 1 / num_classes, int((predicted == labels).sum())
    if right <= len(predicted) * (chance + min(chance, 0.1 * (1 - chance))):
        flags.append(Flag("clean-near-chance", f"{right} of {len(predicted)} clean images are right; guessing among "
                                               f"{num_classes} classes gets {100 * chance:.3g} %"))
    for step, name in ((1, "after"), (-1, "before")):
        shifted = predicted == (labels + step) % num_classes
        per_class = [torch.bincount(labels[which], minlength=num_classes) for which in (shifted, predicted == labels)]
        classes = per_class[0] > per_class[1]
        images, hits = int(classes[labels].sum()), int(per_class[0][classes].sum())
        if classes.sum() >= 2 and images > len(labels) / 3 and hits >= max(
                8, images * min(0.8, max(1 / 3, 2.5 * chance))):
            flags.append(Flag("labels-off-by-one", f"{hits} of {images} clean images, of {int(classes.sum())} classes, "
                                                   f"are predicted as the class {name} their label"))
            break
    return flags


def gradient_flag(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int) -> Flag | None:
    """Returns `no-gradient` or `zero-gradient` if the margin max_{c≠y} z_c − z_y has no usable gradient."""
    useless = 0
    for some, truth in zip(images.split(batch_size), labels.split(batch_size), strict=True):
        pixels = some.detach().clone().requires_grad_()
        with torch.enable_grad():
            loss = margin_loss(ask(model, pixels), truth).sum()
        gradient = torch.autograd.grad(loss, pixels, allow_unused=True)[0] if loss.requires_grad else None
        if gradient is None:
            return Flag("no-gradient", "the logits have no gradient with respect to the pixels")
        size = gradient.flatten(1).abs().sum(dim=1)
        useless += int(((size == 0) | ~size.isfinite()).sum())
    if useless <= _FEW * len(images):
        return None
    return Flag("zero-gradient", f"the gradient of the margin is zero or not finite at {useless} of {len(images)} "
                                 "clean images")


@torch.no_grad()
def random_flag(model: nn.Module, images: Tensor) -> Flag | None:
    """Returns `random-forward` if a second call gives other logits, `averaged-draws` if the model averages draws."""
    difference = _difference(model, ask(model, images), ask(model, images))
    if (draws := getattr(model, "draws", 1)) > 1:
        return Flag("averaged-draws", f"predictions are by the mean logits of {draws} draws, and attacks follow the "
                    f"mean gradient; two such means for {len(images)} images: {difference or 'equal up to rounding'}")
    return Flag("random-forward", f"two calls with {len(images)} images: {difference}") if difference else None


@torch.no_grad()
def batch_flag(model: nn.Module, images: Tensor) -> Flag | None:
    """Returns `batch-dependent` if images among others get other logits, in batch mode those of the FC classifier."""
    with mode_if_any(model, "fc"):
        alone = ask(model, images)
        if _difference(model, alone, ask(model, images)):
            return None  # random logits prove nothing about the batch
        among_others = ask(model, torch.cat([images, 1 - images]))[:len(images)]
    difference = _difference(model, alone, among_others)
    if not difference:
        return None
    return Flag("batch-dependent", f"{len(images)} images by themselves and with as many others: {difference}")


def probability_flag(logits: Tensor) -> Flag | None:
    """Returns `probabilities` if the outputs (B, C) are those of a softmax, and no logits."""
    logits = logits.float()
    if (logits < 0).any() or ((logits.sum(dim=1) - 1).abs() > _OF_PROBABILITIES).any():
        return None
    return Flag("probabilities", f"the outputs of {len(logits)} images are at least 0 and sum up to 1 each")


def head_flag(model: nn.Module) -> Flag | None:
    """Returns `lost-head` if a part of the model has lost its HPM head, so that another layer predicts."""
    lost = [] if head_name(model) is not None else [
        type(module).__name__ for module in model.modules() if isinstance(module, HPMMixin)]
    return Flag("lost-head", f"{type(model).__name__} holds {', '.join(lost)} without the HPM head, and predicts by "
                             "another layer") if lost else None


def rough_flag(logits_fn: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, threat: ThreatModel,
               batch_size: int) -> Flag | None:
    """Returns `rough-gradient` if small steps up the gradient of the margin do not change it as predicted.

    Or `non-finite-logits`. The gain of a step of a fifth of eps from a random start (global random state) over the
    gradient's prediction is below a half or above 2 for more than a fifth of at least 8 `images` (N, ...), which no
    attack broke. Costs two passes forward and one backward.
    """
    if len(images) < _FEWEST_SURVIVORS:
        return None
    ratios, lost = [], 0
    for some, truth in zip(images.split(batch_size), labels.split(batch_size), strict=True):
        start = threat.random_start(some).requires_grad_()
        with torch.enable_grad():
            logits = logits_fn(start)
            before = margin_loss(logits, truth)
        # The last term keeps a gradient even if the model outputs a constant.
        gradient, = torch.autograd.grad(before.sum() + 0 * start.sum(), start)
        step = threat.scaled(gradient, threat.eps / 5)
        with torch.no_grad():
            moved = logits_fn(start + step)
            gain = margin_loss(moved, truth) - before
        lost += int((~(logits.isfinite() & moved.isfinite())).any(dim=1).sum())
        ratios.append(gain / (gradient * step).flatten(1).sum(dim=1))
    if lost:
        return Flag("non-finite-logits", f"at random points of the ball around {len(images)} images that no attack "
                                         f"broke, the logits of {lost} are not finite")
    ratio = torch.cat(ratios)
    rough = len(ratio) - int(((ratio > 0.5) & (ratio < 2)).sum())
    if rough <= 0.2 * len(ratio):
        return None
    return Flag("rough-gradient", f"at {rough} of {len(ratio)} images that no attack broke, a fifth of eps up the "
                                  "gradient changes the margin by less than half or more than twice as much as it says")


@torch.no_grad()
def change_flag(model: nn.Module, images: Tensor, before: Tensor) -> Flag | None:
    """Returns `changes-state` if the logits of images, in the same random state, differ from `before` (B, C)."""
    difference = _difference(model, before, ask(model, images))
    return Flag("changes-state", f"after the evaluation the logits of {len(images)} images are others than before it: "
                                 f"{difference}") if difference else None


def copy_flag(copy: nn.Module, before: Tensor, after: Tensor) -> Flag | None:
    """Returns `changes-state` if the outputs (B, ...) of the copy that attacks search differ `before` and `after`."""
    if not _difference(copy, before, after):
        return None
    return Flag("changes-state", "the attacks have changed the copy of the model that they search: its outputs for "
                                 f"{len(before)} clean images differ from those before")


def verdict_flag(correct: dict[str, str]) -> Flag | None:
    """Returns `black-box-stronger` if Square broke images that no attack with gradients broke by itself.

    More than 2 % of the images, and at least 3. `correct` are the report's verdicts.
    """
    attacked = {name: ATTACKS[attack_of(name)] for name in correct if "/" in name}
    # Attacks on whole batches begin at images that Square may have broken.
    with_gradients = [correct[name] for name, attack in attacked.items() if attack.needs_gradient
                      and not attack.whole_batch]
    without = {name: correct[name] for name, attack in attacked.items() if not attack.needs_gradient}
    if not with_gradients or not without:
        return None
    survive = right_in_all([correct["clean"], *with_gradients])
    broken = sum(left and not held for left, held in zip(survive, right_in_all(without.values()), strict=True))
    if broken < 3 or broken <= 0.02 * len(survive):
        return None
    where = ", ".join(dict.fromkeys(name.rpartition("/")[0] for name in without
                                    if not name.startswith(f"{TRUE_MODEL}/")))
    return Flag("black-box-stronger", f"Square (on {where or 'the true model'}) broke {broken} of the {sum(survive)} "
                                      "images that the attacks with gradients left")


def _state_flag(model: nn.Module, before: dict[str, Tensor]) -> Flag | None:
    after = _state(model)
    changed = sorted(name for name in before.keys() | after.keys()
                     if name not in before or name not in after or not _same(after[name], before[name]))
    return Flag("changes-state", f"a forward pass changed {', '.join(changed[:5])}") if changed else None


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Returns the parameters and buffers by name, also those that a state dict leaves out."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool(((one == other) | (one.isnan() & other.isnan())).all())


def _difference(model: nn.Module, one: Tensor, other: Tensor) -> str:
    """Returns a text on the difference of two logits (B, C) of the same images, "" if it may be rounding."""
    parameter = next(model.parameters(), one)
    in_half = parameter.dtype in (torch.float16, torch.bfloat16) or torch.is_autocast_enabled(one.device.type)
    one, other = one.float(), other.float()
    where = differs(one, other, _ROUNDING_IN_HALF if in_half else _ROUNDING)
    if not where.any():
        return ""
    apart, changed = (one - other).abs()[where].max(), int((one.argmax(dim=1) != other.argmax(dim=1)).sum())
    return (f"logits differ by up to {apart:.2g} (the median one is {one.abs().median():.2g}), {changed} predictions "
            "change")
