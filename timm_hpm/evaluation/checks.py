"""Checks for false robustness: what in a model or in its verdicts says that an attack's failure proves little.

Source: Athalye et al., arXiv 1802.00420 (the symptoms of obfuscated gradients); Croce and Hein, arXiv 2003.01690 (the
checks of AutoAttack). timm_hpm/report/flags.md has the meaning and the remedy of each.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Final

import torch
from torch import Tensor, nn

from ..attacks import margin_loss
from ..data import ask
from ..head import head_mode, head_name
from ..report import TRUE_MODEL, Flag
from ..report.metrics import attack_of
from ..surgery import HPMMixin
from ..threat import ThreatModel
from .attacked import differs
from .table import ATTACKS

# That a batch of another size, or the same one again, may cause; see `differs`.
_ROUNDING: Final = 1e-3
_ROUNDING_IN_HALF: Final = 1e-1
# Of the images: a dead unit or two may leave an honest network without a gradient at an image.
_FEW: Final = 0.05
# From 1, of a sum of probabilities in half precision.
_OF_PROBABILITIES: Final = 1e-2
# Below that a share of the images says little.
_FEWEST_SURVIVORS: Final = 8


def check_model(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int) -> list[Flag]:
    """Returns what is suspicious in how a model answers some images.

    Costs two passes forward and one backward, and up to six more forward with one batch.

    Arguments:
        model: pixels (B, channels, H, W) in [0, 1] to logits (B, C), in eval mode. Its parameters and buffers are as
            before.
        images: (N, channels, H, W), pixels in [0, 1]; a few dozen are enough.
        labels: (N,), class indices.
        batch_size: images that the model is to answer at once; one check asks for twice as many.
    """
    batch = images[:batch_size]
    with restored(model) as before:
        checks = (gradient_flag(model, images, labels, batch_size), random_flag(model, batch), batch_flag(model, batch))
        return [flag for flag in (*checks, _state_flag(model, before)) if flag is not None]


@contextmanager
def restored(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Yields copies of a model's parameters and buffers by name, and puts back afterwards the values that changed."""
    before = {name: tensor.clone() for name, tensor in _state(model)}
    try:
        yield before
    finally:
        with torch.no_grad():
            for name, tensor in _state(model):
                # A buffer that was made anew in another shape is a cache.
                if name in before and tensor.shape == before[name].shape and not _same(tensor, before[name]):
                    tensor.copy_(before[name])


def clean_flags(answers: Tensor, labels: Tensor, num_classes: int) -> list[Flag]:
    """Returns what the answers (N,) to at least 8 clean images say of normalisation and labels (N,), class indices.

    `clean-near-chance`: the accuracy is at most twice that of guessing, or a tenth of the way from it to 1, if that is
    less. `labels-off-by-one`: in more than a third of the images, of two or more classes, the next (or previous) class
    is answered more often than their own, and mostly so.
    """
    if len(answers) < _FEWEST_SURVIVORS:
        return []
    flags, chance, right = [], 1 / num_classes, int((answers == labels).sum())
    if right <= len(answers) * (chance + min(chance, 0.1 * (1 - chance))):
        flags.append(Flag("clean-near-chance", f"{right} of {len(answers)} clean images are right; guessing among "
                                               f"{num_classes} classes gets {100 * chance:.3g} %"))
    for step, name in ((1, "after"), (-1, "before")):
        shifted = answers == (labels + step) % num_classes
        per_class = [torch.bincount(labels[which], minlength=num_classes) for which in (shifted, answers == labels)]
        classes = per_class[0] > per_class[1]
        images, hits = int(classes[labels].sum()), int(per_class[0][classes].sum())
        if classes.sum() >= 2 and images > len(labels) / 3 and hits >= max(
                8, images * min(0.8, max(1 / 3, 2.5 * chance))):
            flags.append(Flag("labels-off-by-one", f"{hits} of {images} clean images, of {int(classes.sum())} classes, "
                                                   f"are answered with the class {name} their label"))
            break
    return flags


def gradient_flag(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int) -> Flag | None:
    """Returns `no-gradient` or `zero-gradient` where the margin max_{c≠y} z_c − z_y has no usable gradient."""
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
    """Returns `random-forward` where the same images, asked again, get other logits."""
    difference = _difference(model, ask(model, images), ask(model, images))
    return Flag("random-forward", f"{len(images)} images, asked twice: {difference}") if difference else None


@torch.no_grad()
def batch_flag(model: nn.Module, images: Tensor) -> Flag | None:
    """Returns `batch-dependent` where images among others get other logits than by themselves.

    An HPM head's batch mode is meant to, and attacked as what it is: there the network below it is checked.
    """
    with head_mode(model, "fc") if head_name(model) is not None else nullcontext():
        alone = ask(model, images)
        if _difference(model, alone, ask(model, images)):
            return None  # a random answer says nothing of the batch
        among_others = ask(model, torch.cat([images, 1 - images]))[:len(images)]
    difference = _difference(model, alone, among_others)
    if not difference:
        return None
    return Flag("batch-dependent", f"{len(images)} images by themselves and with as many others: {difference}")


def probability_flag(logits: Tensor) -> Flag | None:
    """Returns `probabilities` if the outputs (B, C) are no logits but what a softmax makes of them."""
    logits = logits.float()
    if (logits < 0).any() or ((logits.sum(dim=1) - 1).abs() > _OF_PROBABILITIES).any():
        return None
    return Flag("probabilities", f"the outputs of {len(logits)} images are at least 0 and sum up to 1 each")


def head_flag(model: nn.Module) -> Flag | None:
    """Returns `lost-head` if a part of the model has lost its HPM head, so that something else predicts."""
    lost = [] if head_name(model) is not None else [
        type(module).__name__ for module in model.modules() if isinstance(module, HPMMixin)]
    return Flag("lost-head", f"{type(model).__name__} holds {', '.join(lost)} without the HPM head, and predicts by "
                             "another layer") if lost else None


def rough_flag(
        logits_fn: Callable[[Tensor], Tensor],
        images: Tensor,
        labels: Tensor,
        threat: ThreatModel,
        batch_size: int,
) -> Flag | None:
    """Returns `rough-gradient` where small steps up the gradient of the margin do not do what it says they will.

    Or `non-finite-logits`, where the logits at the step's start or its end are NaN or infinite.

    The gain of a step of a fifth of eps, from a random start (global random state), over what the gradient predicts: at
    more than a fifth of at least 8 images below a half or above 2. Costs two passes forward and one backward.

    Arguments:
        logits_fn: pixels (B, ...) in [0, 1] to float32 logits (B, C).
        images: (N, ...), images that no attack broke. Of a network that is not robust none are left, and whether its
            gradient is rough does not matter.
        labels: (N,), class indices.
        threat: what the adversary may do.
        batch_size: images that are to be answered at once.
    """
    if len(images) < _FEWEST_SURVIVORS:
        return None
    ratios, lost = [], 0
    for some, truth in zip(images.split(batch_size), labels.split(batch_size), strict=True):
        start = threat.random_start(some).requires_grad_()
        with torch.enable_grad():
            logits = logits_fn(start)
            before = margin_loss(logits, truth)
        # A gradient there is, even if the model answers NaN by itself.
        gradient, = torch.autograd.grad(before.sum() + 0 * start.sum(), start)
        step = threat.scaled(gradient, threat.eps / 5)
        with torch.no_grad():
            moved = logits_fn(start + step)
            gain = margin_loss(moved, truth) - before
        lost += int((~(logits.isfinite() & moved.isfinite())).any(dim=1).sum())
        ratios.append(gain / (gradient * step).flatten(1).sum(dim=1))
    if lost:
        return Flag("non-finite-logits", f"at random points of the ball around {len(images)} images that no attack "
                                         f"broke, {lost} answers are not finite")
    ratio = torch.cat(ratios)
    rough = len(ratio) - int(((ratio > 0.5) & (ratio < 2)).sum())
    if rough <= 0.2 * len(ratio):
        return None
    return Flag("rough-gradient", f"at {rough} of {len(ratio)} images that no attack broke, a fifth of eps up the "
                                  "gradient changes the margin by less than half or more than twice what that says")


@torch.no_grad()
def change_flag(model: nn.Module, images: Tensor, before: Tensor) -> Flag | None:
    """Returns `changes-state` where a model answers images (B, ...) no longer as it did, by the logits `before` (B, C).

    A random model is to be asked from the same random state as then.
    """
    difference = _difference(model, before, ask(model, images))
    return Flag("changes-state", f"after the evaluation {len(images)} images are answered otherwise than before it: "
                                 f"{difference}") if difference else None


def verdict_flag(correct: dict[str, str], survivors_only: bool = False) -> Flag | None:
    """Returns `black-box-stronger` where Square broke images that no attack with gradients broke by itself.

    More than 2 % of the images, and at least 3. `correct` are the verdicts of `AttackReport.correct`, `survivors_only`
    whether an image that was broken stayed there (`Protocol`).
    """
    attacked = {name: ATTACKS[attack_of(name)] for name in correct if "/" in name}
    # In the rows of the other attacks an image may stand where Square has brought it.
    with_gradients = [correct[name] for name, attack in attacked.items() if attack.needs_gradient
                      and not attack.whole_batch and not (survivors_only and attack.chained)]
    without = {name: correct[name] for name, attack in attacked.items() if not attack.needs_gradient}
    if not with_gradients or not without:
        return None
    survive = [all(row[i] == "1" for row in (correct["clean"], *with_gradients)) for i in range(len(correct["clean"]))]
    broken = sum(survives and any(row[i] == "0" for row in without.values()) for i, survives in enumerate(survive))
    if broken < 3 or broken <= 0.02 * len(survive):
        return None
    where = ", ".join(name.rpartition("/")[0] for name in without if not name.startswith(f"{TRUE_MODEL}/"))
    return Flag("black-box-stronger", f"Square (on {where or 'the true model'}) broke {broken} of the {sum(survive)} "
                                      "images that the attacks with gradients left")


def _state_flag(model: nn.Module, before: dict[str, Tensor]) -> Flag | None:
    after = dict(_state(model))
    changed = sorted(name for name in before.keys() | after.keys()
                     if name not in before or name not in after or not _same(after[name], before[name]))
    return Flag("changes-state", f"answering changed {', '.join(changed[:5])}") if changed else None


def _state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields parameters and buffers, also those that a state dict leaves out, with their names."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool(((one == other) | (one.isnan() & other.isnan())).all())


def _difference(model: nn.Module, one: Tensor, other: Tensor) -> str:
    """Returns how far two answers (B, C) to the same images are apart, or nothing where it may be rounding."""
    parameter = next(model.parameters(), one)
    in_half = parameter.dtype in (torch.float16, torch.bfloat16) or torch.is_autocast_enabled(one.device.type)
    one, other = one.float(), other.float()
    where = differs(one, other, _ROUNDING_IN_HALF if in_half else _ROUNDING)
    if not where.any():
        return ""
    apart, changed = (one - other).abs()[where].max(), int((one.argmax(dim=1) != other.argmax(dim=1)).sum())
    return (f"logits differ by up to {apart:.2g} (the median one is {one.abs().median():.2g}), {changed} predictions "
            "change")
