"""Pixels in [0, 1]: `PixelModel`, their boundary to a model's normalised inputs, checks and augmentation."""

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Integral, Real
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..head import WholeLoading, check_module, head_name

#: The source of a mean and std that the caller names.
GIVEN: Final = "given as mean and std"

_SEVERAL_DEVICES: Final = (nn.DataParallel, nn.parallel.DistributedDataParallel)


class PixelModel(WholeLoading):
    """A classifier of pixels in [0, 1]: normalises, calls the model, returns float32 logits.

    Arguments:
        model: takes images normalised by `mean` and `std`.
        mean, std: one value a channel; None takes the model's `pretrained_cfg`.
        draws: number of forward passes whose logits are averaged, for a randomised model: attacks then follow the mean
            of the gradients (expectation over transformation, Athalye et al., arXiv 1707.07397).

    Raises:
        ValueError: if there is no mean or std, the std is not positive, `draws` is below 1, or the model is a
            `PixelModel` that gets another mean or std.
    """

    def __init__(self, model: nn.Module, mean: Iterable[float] | None = None, std: Iterable[float] | None = None,
                 draws: int = 1):
        check_module(model)
        if isinstance(unwrapped(model), PixelModel) and (mean is not None or std is not None):
            raise ValueError("the model normalises pixels itself (PixelModel), and would do so twice; leave out mean "
                             "and std, or give its .model")
        super().__init__()
        self.draws = checked_integer("draws", draws, 1)
        cfg = getattr(unwrapped(model), "pretrained_cfg", None) or {}
        values = {}
        for name, given in (("mean", mean), ("std", std)):
            given = cfg.get(name) if given is None else given
            if given is None:
                raise ValueError(f"{type(model).__name__} has no pretrained_cfg that says its {name}; "
                                 f"give it: PixelModel(model, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))")
            values[name] = _per_channel(name, given)
        if not (values["std"] > 0).all() or len(values["std"]) != len(values["mean"]):
            raise ValueError(f"std is {tuple(values['std'].flatten().tolist())}; expected positive numbers, as many as "
                             f"the mean has, {len(values['mean'])}")
        if (values["mean"] > 1).any():
            raise ValueError(f"mean is {tuple(values['mean'].flatten().tolist())}; expected that of pixels in [0, 1], "
                             "at most 1. Of bytes, divide mean and std by 255")
        named = getattr(unwrapped(model), "normalisation_source", None)
        if named is None:
            named = f"the pretrained_cfg of {cfg.get('architecture') or type(unwrapped(model)).__name__}"
            named += f", tag {cfg['tag']}" if cfg.get("tag") else ""
        # The origin of mean and std, in words.
        both = {name: GIVEN if given is not None else named for name, given in (("mean", mean), ("std", std))}
        self.source = both["mean"] if both["mean"] == both["std"] else "; ".join(f"{k}: {v}" for k, v in both.items())
        self.model = model
        self.training = is_training(model)
        parameter = next(model.parameters(), None)
        device = None if parameter is None else parameter.device
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", values["mean"].to(device), persistent=False)
        self.register_buffer("std", values["std"].to(device), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Returns the logits (B, C) of `pixels` (B, channels, H, W) in [0, 1]."""
        if self.draws > 1:
            return torch.stack([self.model(self.normalise(pixels)).float() for _ in range(self.draws)]).mean(dim=0)
        logits = self.model(self.normalise(pixels))
        # `check_logits` names another output.
        return logits.float() if isinstance(logits, Tensor) else logits

    def normalise(self, pixels: Tensor) -> Tensor:
        """Returns the model's input, in its parameters' dtype, for `pixels` (B, channels, H, W) in [0, 1].

        Raises a ValueError if `pixels` have another number of channels than mean and std.
        """
        if pixels.shape[1] != len(self.mean):
            raise ValueError(f"images have {pixels.shape[1]} channels, the model's mean and std {len(self.mean)}; "
                             "convert the images, or give mean and std for them: PixelModel(model, mean=..., std=...)")
        parameter = next(self.model.parameters(), None)
        normalised = (pixels - self.mean) / self.std
        return normalised if parameter is None else normalised.to(parameter.dtype)


def _per_channel(name: str, given: Any) -> Tensor:
    """Returns a mean or std as a tensor (channels, 1, 1); raises a ValueError unless it is one number a channel."""
    numbers = given.tolist() if isinstance(given, Tensor) else given
    if not isinstance(numbers, Iterable) or isinstance(numbers, str | bytes | Mapping) or not (
            numbers := tuple(numbers)) or not all(
            isinstance(one, Real) and not isinstance(one, bool) and math.isfinite(one) for one in numbers):
        raise ValueError(f"{name} is {given!r:.100}; expected finite numbers, one a channel, such as (0.5, 0.5, 0.5)")
    return torch.tensor([float(one) for one in numbers], dtype=torch.float32).view(-1, 1, 1)


def random_shift(images: Tensor, pixels: int) -> Tensor:
    """Returns `images` (B, channels, H, W), each shifted by up to `pixels` in both directions, with zeros moved in."""
    height, width = images.shape[-2:]
    padded = F.pad(images, [pixels] * 4)
    down, right = torch.randint(0, 2 * pixels + 1, (2, len(images), 1, 1), device=images.device)
    index = torch.arange(len(images), device=images.device).view(-1, 1, 1)
    y = down + torch.arange(height, device=images.device).view(1, -1, 1)
    x = right + torch.arange(width, device=images.device).view(1, 1, -1)
    return padded.permute(0, 2, 3, 1)[index, y, x].permute(0, 3, 1, 2).contiguous()


def random_flip(images: Tensor, probability: float = 0.5) -> Tensor:
    """Returns `images` (B, channels, H, W), each mirrored left to right with `probability`, on its own."""
    flipped = torch.rand(len(images), 1, 1, 1, device=images.device) < probability
    return torch.where(flipped, images.flip(-1), images)


def as_pixel_model(model: nn.Module, mean: Iterable[float] | None = None, std: Iterable[float] | None = None,
                   draws: int = 1) -> nn.Module:
    """Returns `model` as a classifier of pixels in [0, 1]; `draws` is that of `PixelModel`.

    A timm model is normalised by `mean` and `std`, one value a channel, or those of its `pretrained_cfg`; another
    module takes pixels as they are, unless mean and std are given. DataParallel is taken off: predictions may depend on
    the whole batch.
    """
    while isinstance(model, _SEVERAL_DEVICES):
        model = model.module
    given = mean is not None or std is not None or draws > 1
    if isinstance(unwrapped(model), PixelModel):
        if given:
            raise ValueError("the model normalises pixels itself (PixelModel); give that the mean, std and draws")
        return model
    return PixelModel(model, mean, std, draws) if given or getattr(unwrapped(model), "pretrained_cfg", None) else model


def normalisation_of(model: nn.Module) -> dict[str, Any] | None:
    """Returns `mean` and `std`, one value a channel, and their `source` of a model of pixels; None if it has none."""
    model = unwrapped(model)
    if not isinstance(model, PixelModel):
        return None
    return {"mean": model.mean.flatten().tolist(), "std": model.std.flatten().tolist(), "source": model.source}


def unwrapped(model: nn.Module) -> nn.Module:
    """Returns a model without the wrappers of `torch.compile`, DataParallel and DistributedDataParallel."""
    while True:
        if isinstance(model, _SEVERAL_DEVICES):
            model = model.module
        # Nothing is compiled before torch._dynamo, a slow import, is there.
        elif "torch._dynamo" in sys.modules and isinstance(model, torch._dynamo.OptimizedModule):
            model = model._orig_mod
        else:
            return model


def ask(model: Callable[[Tensor], Any], pixels: Tensor) -> Any:
    """Returns the output of `model` for `pixels` (B, channels, H, W), of which it gets a copy that it may write into.
    """
    # A PixelModel makes its model's input itself.
    own = type(model) is PixelModel and not model._forward_pre_hooks
    try:
        return model(pixels if own else pixels.clone())
    except torch.cuda.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError) as error:
        if pixels.ndim == 4 and pixels.shape[3] in (1, 3, 4) and pixels.shape[1] not in (1, 3, 4):
            raise ValueError(f"the model fails on images of the shape {tuple(pixels.shape)}; expected (N, channels, "
                             "height, width). Of (N, height, width, channels), give images.permute(0, 3, 1, 2). "
                             f"{type(error).__name__}: {error}") from error
        raise


def check_logits(output: Any, rows: int) -> Tensor:
    """Returns the output of a model for `rows` images; raises a ValueError unless it is logits (rows, C)."""
    if not isinstance(output, Tensor):
        raise ValueError(f"the model returns a {type(output).__name__}; expected logits (B, C), a tensor: wrap it in a "
                         "module that returns them alone")
    if output.ndim != 2 or len(output) != rows or output.shape[1] < 2 or not (
            output.is_floating_point() and output.layout == torch.strided):
        raise ValueError(f"the model returns for {rows} images the shape {tuple(output.shape)} and dtype "
                         f"{output.dtype}, {output.layout}; expected logits (B, C) in floating point, dense, C above 1")
    return output


def head_logits(pixel_model: nn.Module, pixels: Tensor) -> Tensor:
    """Returns the logits (B, C) of a model for `pixels` (B, channels, H, W); raises if they are not its HPM head's."""
    outputs: list[Tensor] = []
    name = head_name(pixel_model)
    head = nn.Identity() if name is None else pixel_model.get_submodule(name)
    with head.register_forward_hook(lambda module, inputs, output: outputs.append(output.flatten(1).clone())):
        logits = check_logits(ask(pixel_model, pixels), len(pixels))
    # Those of the last draws: a randomised model may be called several times.
    own = outputs[-getattr(pixel_model, "draws", 1):]
    if name is not None and not (own and torch.stack(own).float().mean(dim=0).allclose(
            logits.float(), rtol=0, atol=0, equal_nan=True)):
        raise ValueError(f"the model's logits are not those of its HPM head ({name}): another layer follows the head, "
                         "which surrogates and training would not see. Use the model without its HPM head")
    return logits


def check_weights(model: nn.Module) -> None:
    """Raises a ValueError unless `model` is a module whose weights hold values and let gradients through."""
    check_module(model)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise ValueError(f"{name} is on the device meta, which holds no values; load the weights onto another")
        if tensor.is_inference():
            raise ValueError(f"{name} was made inside torch.inference_mode(): no gradient passes it; make it outside")


def check_eval_mode(model: nn.Module) -> None:
    """Raises a ValueError unless `model` passes `check_weights` and is in eval mode."""
    check_weights(model)
    in_training = [name for name, module in model.named_modules() if is_training(module)]
    if in_training:
        raise ValueError(f"the model is in train mode (at {in_training[0] or 'its top'}), and its predictions "
                         "would change from call to call; call model.eval()")


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Puts a model into eval mode within the block, and each of its modules back into its own mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:  # one by one: a frozen BatchNorm of a model in train mode stays frozen
            module.training = mode


def is_training(module: nn.Module) -> bool:
    """Returns whether a module is in train mode; a frozen one of TorchScript, which has no mode, is not.

    A compiled one is in the mode of its original: before torch 2.5 it says that it is in train mode.
    """
    return getattr(getattr(module, "_orig_mod", module), "training", False)


def for_gradients(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Returns checked images in contiguous float32 and labels in int64, from which gradients can be taken."""
    pair = check_pixels(images, labels), labels
    images, labels = (x.clone() if x.is_inference() else x for x in pair)
    return images.detach().float().contiguous(), labels.detach().long()


def class_indices(labels: Tensor, images: Tensor) -> Tensor:
    """Returns `labels` (N,) as int64; raises a ValueError unless they are class indices of `images` (N, ...)."""
    for name, value in (("images", images), ("labels", labels)):
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} is of the type {type(value).__name__}; expected a tensor, as of torch.from_numpy")
        if value.layout != torch.strided or value.is_quantized or value.is_meta:
            raise ValueError(f"{name} is a tensor of the layout {value.layout} and dtype {value.dtype} on "
                             f"{value.device}; expected a plain one that holds values")
    if not images.ndim or not images.is_floating_point():
        raise _no_images(images)
    if labels.shape != images.shape[:1] or labels.is_floating_point() or labels.is_complex() or (
            labels.dtype == torch.bool):
        raise ValueError(f"labels have the shape {tuple(labels.shape)} and dtype {labels.dtype}; expected "
                         f"({len(images)},) class indices, one an image")
    return labels.long()


def _no_images(images: Tensor) -> ValueError:
    return ValueError(f"images have the shape {tuple(images.shape)} and dtype {images.dtype}; expected "
                      "(N, channels, height, width) in floating point, each above 0; bytes divided by 255")


def check_pixels(images: Tensor, labels: Tensor, num_classes: int | None = None) -> Tensor:
    """Returns `images` (N, C, H, W), clamped to [0, 1] if rounding took them out of it, and checks `labels` (N,).

    Normalising and denormalising in float32 leaves values such as -3e-8. They are clamped up to an excess of 1e-6, or
    two units in the last place of a coarser dtype.
    """
    if isinstance(images, Tensor) and (images.ndim != 4 or not images.numel()):
        raise _no_images(images)
    labels = class_indices(labels, images)
    lowest, highest = images.amin(dim=(1, 2, 3)), images.amax(dim=(1, 2, 3))
    excess = torch.maximum(-lowest, highest - 1)
    bad = ~(excess <= max(1e-6, 2 * torch.finfo(images.dtype).eps))  # NaN is neither below nor above
    if bad.any():
        first = int(bad.nonzero()[0])
        raise ValueError(f"image {first} has values from {lowest[first]:.7g} to {highest[first]:.7g}, up to "
                         f"{excess[first]:.2g} outside of [0, 1]; expected pixels in [0, 1]. Normalisation belongs "
                         "into the model: see timm_hpm.PixelModel")
    if num_classes is not None:
        check_range(labels, num_classes)
    return images.clamp(0, 1) if (excess > 0).any() else images


def check_range(labels: Tensor, num_classes: int) -> None:
    """Raises a ValueError unless all `labels` (N,) are from 0 to `num_classes` − 1."""
    wrong = (labels < 0) | (labels >= num_classes)
    if wrong.any():
        first = int(wrong.nonzero()[0])
        raise ValueError(f"label {int(labels[first])} of image {first} is out of range; "
                         f"the model has the classes 0 to {num_classes - 1}")


def checked_integer(name: str, value: int, least: int) -> int:
    """Returns `value` as an int; raises a ValueError unless it is one of at least `least`. True and 2.0 are none."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{name} is {value!r}, of the type {type(value).__name__}; expected an integer")
    if value < least:
        raise ValueError(f"{name} is {value}; expected at least {least}")
    return int(value)
