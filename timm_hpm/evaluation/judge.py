"""`judge`: the only verdict that counts, by the model itself on whole batches; `rejudge` repeats a saved one."""

import json
import os
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .. import data, rules
from ..attacks import predicted_classes
from ..head import find_head, head_mode, mode_if_any, own_mode
from ..report import data_digest
from ..report.shell import AUTOCAST
from ..seeding import seeded_verdict
from ..threat import ThreatModel

# Images whose candidates are checked at once.
_AT_ONCE: Final = 256
# Entries of a saved protocol that `rejudge` needs.
_SAVED: Final = dict.fromkeys(("threat", "data_digest", "inference"), rules.TEXT) | {
    "batch_size": rules.COUNT, "mix": (rules.NUMBER,), "normalisation": ({"*": rules.ANYTHING},), "*": rules.ANYTHING}


class NonFiniteLogitsError(ValueError):
    """A classifier's logits of images that are not under attack are NaN or infinite, so that they predict no class."""


def check_finite(logits: Tensor, first_image: int = 0) -> None:
    """Raises a NonFiniteLogitsError that names the first of the images, from `first_image` on, with such logits."""
    if not logits.isfinite().all():
        first = int((~logits.isfinite()).any(dim=1).nonzero()[0])
        raise NonFiniteLogitsError(
            f"the logits of image {first_image + first} are not finite: {logits[first].tolist()[:10]}. An image with "
            "such logits must not count as robust; look for a division by zero, a logarithm or an overflow in the "
            "model (timm_hpm/report/flags.md#non-finite-logits)")


def judge(
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        *,
        first_image: int = 0,
        allow_non_finite: bool = False,
) -> Tensor:
    """Returns the verdicts (N,) of the model in whole batches: whether each image is classified correctly.

    Takes `labels` (N,), class indices; the other arguments and the errors are those of `predictions`.
    """
    images = data.check_pixels(images, labels)
    labels = labels.cpu().long()
    classes, _ = predictions(model, images, batch_size, labels, first_image=first_image,
                             allow_non_finite=allow_non_finite)
    return classes == labels


@torch.no_grad()
def predictions(model: nn.Module, images: Tensor, batch_size: int, labels: Tensor | None = None, *,
                first_image: int = 0, allow_non_finite: bool = False) -> tuple[Tensor, Tensor]:
    """Returns the classes (N,) that a model predicts in whole batches, and how far their logits lead (N,).

    The `labels` (N,), int64 on the CPU, must be below the number of logits. `first_image` is the number of the first
    image in messages. With `allow_non_finite`, for images under attack, logits that are NaN or infinite get the class
    −1, which is never correct; without it they raise a NonFiniteLogitsError that names the image.
    """
    batch_size = data.checked_integer("batch_size", batch_size, 1)
    data.check_eval_mode(model)
    model = pixel_model_for(model, images)
    device = device_of(model, images)
    classes, ahead = [], []
    for first in range(0, len(images), batch_size):
        batch = images[first:first + batch_size].to(device, torch.float32)
        logits = data.check_logits(data.ask(model, batch), len(batch))
        if labels is not None:
            data.check_range(labels, logits.shape[1])
        if not allow_non_finite:
            check_finite(own_logits(model, batch, logits), first_image + first)
        classes.append(predicted_classes(logits).cpu())
        best = logits.float().topk(2, dim=1).values.cpu()
        ahead.append(torch.where(classes[-1] < 0, 0.0, best[:, 0] - best[:, 1]))
    return torch.cat(classes), torch.cat(ahead)


def own_logits(model: nn.Module, images: Tensor, logits: Tensor) -> Tensor:
    """Returns the `logits` (B, C) of `images`, or, if some are not finite, those of each image by itself."""
    # In batch mode one image with features that are not finite makes every logit of its batch NaN.
    if logits.isfinite().all() or own_mode(model) != "batch":
        return logits
    with head_mode(model, "sample"):
        alone = data.ask(model, images)
    return logits if alone.isfinite().all() else alone


def rejudge(model: nn.Module, path: str | os.PathLike) -> dict[str, str]:
    """Returns the verdicts (`AttackReport.verdicts`) on the images that `save_adversarial` saved, judged again.

    In the same batches, with the same draws of a randomised model and, for a model with an HPM head, in the inference
    mode of the saved protocol. Every candidate must be in the saved threat model, and of the images of that protocol.

    Raises:
        ValueError: if the file is damaged or of another origin, the images or labels are not the run's, a candidate is
            outside of the threat model, or the model's normalisation, draws, precision or mix differs from the saved
            protocol.
        OSError: if there is no such file.
    """
    data.check_eval_mode(model)
    protocol = saved_protocol(path)
    with safe_open(path, "pt") as file:
        names = [name for name in file.keys() if name != "labels"]  # noqa: SIM118  (it is no dict)
        clean, labels = file.get_tensor("clean"), file.get_tensor("labels")
    digest = data_digest(clean, labels)
    if digest != protocol["data_digest"]:
        raise ValueError(f"{path} holds images or labels that are not those of its run: their data_digest is {digest}, "
                         f"the protocol's {protocol['data_digest']}. Run the attack again with --save-adversarial")
    threat = ThreatModel.of(protocol["threat"])
    precision = precision_of(model, device_of(model, clean))
    for name, now, there, option in (
            ("mean and std", _mean_and_std(data.normalisation_of(pixel_model_for(model, clean))),
             _mean_and_std(protocol["normalisation"]), "--mean, --std; timm_hpm.PixelModel"),
            ("draws", getattr(model, "draws", 1), protocol.get("eot", 1), "--eot; timm_hpm.PixelModel"),
            ("precision", precision, protocol.get("precision", precision), "--amp, --amp-dtype; torch.autocast"),
            ("mix", None if own_mode(model) == "none" else find_head(model).mix, protocol["mix"],
             "--model-kwargs mix=")):
        if now != there:
            raise ValueError(f"the model's {name} is {now}, that of {path} is {there}; give the same (evaluate.py "
                             f"{option})")
    del clean  # candidates are in memory one set at a time
    size = protocol["batch_size"]
    with mode_if_any(model, protocol["inference"]):
        verdicts = dict.fromkeys(names, "")
        for name in names:
            with safe_open(path, "pt") as file:
                candidates = file.get_tensor(name)
            _check_candidates(path, name, candidates, threat)
            for first in range(0, len(candidates), size):
                with seeded_verdict(device_of(model, candidates), protocol.get("seed", 0), name, first):
                    verdicts[name] += as_row(judge(
                        model, candidates[first:first + size], labels[first:first + size], size, first_image=first,
                        allow_non_finite=name != "clean"))
        return verdicts


def _mean_and_std(normalisation: dict[str, Any] | None) -> Any:
    return normalisation and (normalisation["mean"], normalisation["std"])


def _check_candidates(path: str | os.PathLike, name: str, candidates: Tensor, threat: ThreatModel) -> None:
    """Raises a ValueError that names the first candidate outside of the ball around its clean image."""
    for first in range(0, len(candidates), _AT_ONCE):
        some = candidates[first:first + _AT_ONCE]
        # An open file keeps its read parts in memory.
        with safe_open(path, "pt") as file:
            whole = file.get_slice("clean")
            clean, shape = whole[first:first + _AT_ONCE], tuple(whole.get_shape())
        if some.shape != clean.shape or some.dtype != clean.dtype:
            raise ValueError(f"{name} in {path} has the shape {tuple(candidates.shape)} and dtype {candidates.dtype}; "
                             f"expected those of the clean images, {shape} and {clean.dtype}")
        outside = ~threat.contains(some, clean)
        if outside.any():
            row = int(outside.nonzero()[0])
            distance = float(threat.distance(some[row:row + 1], clean[row:row + 1]))
            raise ValueError(
                f"image {first + row} of {name} in {path} is outside of the threat model {threat}: its distance is "
                f"{distance:.6g} and its pixels go from {float(some[row].min()):.6g} to {float(some[row].max()):.6g}. "
                "Such a candidate proves nothing; run the attack again")


def saved_protocol(path: str | os.PathLike) -> dict[str, Any]:
    """Returns the protocol (`AttackReport.protocol`) of a `save_adversarial` file."""
    try:
        with safe_open(path, "pt") as file:
            metadata, names = file.metadata() or {}, set(file.keys())
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged, or no safetensors file ({error}); run the attack again") from error
    if "protocol" not in metadata or not {"clean", "labels"} <= names:
        raise ValueError(f"{path} holds no adversarial images of timm_hpm; expected the file that "
                         "evaluate.py --save-adversarial wrote")
    try:
        protocol = json.loads(metadata["protocol"])
        rules.check("", protocol, _SAVED)
        ThreatModel.of(protocol["threat"])
        return protocol
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"the protocol in {path} is damaged ({type(error).__name__}: {error}); run the attack "
                         "again") from error


def as_row(correct: Tensor) -> str:
    """Returns verdicts (N,) as a report keeps them: `1` for a correct image, `0` for a misclassified one."""
    return "".join("1" if right else "0" for right in correct.tolist())


def pixel_model_for(model: nn.Module, images: Tensor) -> nn.Module:
    """Returns `model` as a classifier of float32 pixels in [0, 1] with float32 logits."""
    pixel_model = data.as_pixel_model(model)
    in_float32 = all(p.dtype == torch.float32 for p in model.parameters())
    if isinstance(data.unwrapped(pixel_model), data.PixelModel) or (
            in_float32 and not isinstance(pixel_model, torch.jit.ScriptModule)):
        return pixel_model
    # A module of pixels in another precision needs a cast, not a normalisation; a ScriptModule takes no hooks.
    pixel_model = data.PixelModel(model, mean=[0.0] * images.shape[1], std=[1.0] * images.shape[1])
    pixel_model.source = f"{type(model).__name__}, a module of pixels"
    return pixel_model


def device_of(model: nn.Module, images: Tensor) -> torch.device:
    """Returns the device of the model's parameters, or that of the images if it has none."""
    parameter = next(model.parameters(), None)
    return images.device if parameter is None else parameter.device


def precision_of(model: nn.Module, device: torch.device) -> str:
    """Returns the dtype that the judge computes in."""
    dtype = next((str(p.dtype) for p in model.parameters() if p.is_floating_point()), "torch.float32")
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        dtype = f"{AUTOCAST}{torch.get_autocast_dtype(device.type)}"
    return dtype.replace("torch.", "")
