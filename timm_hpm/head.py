"""`HPMHead`, the classifier of Hybrid Prototype Mixing, its inference modes, and finding it in a model."""

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import functional
from .names import did_you_mean

INFERENCE_MODES: Final = ("batch", "sample", "dataset", "fc")


#: The meaning of an `UnfittedHeadWarning`.
UNFITTED: Final = ("predicts as its FC classifier until timm_hpm.fit_prototypes(model, loader, threat), or "
                   "fine-tuning, gives it some")


class UnfittedHeadWarning(UserWarning):
    """Weights without prototypes were loaded: the HPM head predicts as its FC classifier until it is fitted."""


def check_inference(mode: str) -> str:
    """Returns `mode`, or raises a ValueError with the inference modes if it is none of them."""
    if mode not in INFERENCE_MODES:
        raise ValueError(f"unknown inference mode {mode!r}; expected one of {', '.join(INFERENCE_MODES)}"
                         f"{did_you_mean(mode, INFERENCE_MODES)}")
    return mode


@torch.fx.wrap
def check_features(features: Tensor, width: int) -> None:
    """Raises a ValueError unless `features` have the shape (B, width)."""
    if not torch.jit.is_scripting() and (features.ndim != 2 or features.shape[1] != width):
        raise ValueError(f"features have the shape {tuple(features.shape)}; expected (B, {width}), the pooled input of "
                         "the head. Pool and flatten in front of the classifier, or name another one: "
                         "timm_hpm.add_hpm_head(model, classifier=...)")


class WholeLoading(nn.Module):
    """Mixin whose `load_state_dict` restores the module if it raises; torch leaves it half loaded."""

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads as torch does, and keeps a copy of the old values in memory meanwhile."""
        entries = [(module, dict(module._parameters), dict(module._buffers)) for module in self.modules()]
        values = [(tensor, tensor.detach().clone()) for tensor in (*self.parameters(), *self.buffers())]
        try:
            return super().load_state_dict(state_dict, strict=strict, assign=assign)
        except BaseException:
            for module, parameters, buffers in entries:
                module._parameters.update(parameters)
                module._buffers.update(buffers)
            with torch.no_grad():
                for tensor, value in values:
                    tensor.copy_(value)
            raise


class HPMHead(WholeLoading, nn.Linear):
    """A classifier by ℓ2 distance to prototypes, mixed from those of the data set and those of the batch.

    It replaces a model's `nn.Linear` classifier and keeps its `weight` and `bias`: a plain timm checkpoint loads with
    only the head's own entries missing. Those are the buffers `prototypes` (num_classes, in_features), in float32 in a
    model of any dtype, and `num_updates` (num_classes,), the number of updates of each class, and the learnable
    `log_scale` (), whose exponential is the scale s of −s·‖z − Q_c‖².

    Until every class has a prototype, the head returns the logits of its FC classifier. Weights without prototypes,
    loaded by `load_state_dict(..., strict=False)`, reset the prototypes with an `UnfittedHeadWarning`: the old ones are
    means of another network's features.

    Arguments:
        in_features: width d of the features.
        num_classes: number of classes C; also `out_features`.
        bias: whether the FC classifier has a bias.
        mix: weight of the batch-level prototypes, in [0, 1]; 0 means only the dataset-level ones.
        ema_decay: weight β of the old prototype in an update, in [0, 1].
        inference: `"dataset"` (only dataset-level prototypes), `"batch"` (the paper's: logits depend on the other
            images of the batch), `"sample"` (each image is a batch of its own) or `"fc"` (the FC classifier).

    Raises:
        ValueError: if an argument is out of its range.

    Source: arXiv 2606.01746; docs/method.md lists our own readings of it.
    """

    def __init__(
            self,
            in_features: int,
            num_classes: int,
            bias: bool = True,
            *,
            mix: float = 0.5,
            ema_decay: float = 0.99,
            inference: str = "dataset",
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ):
        for name, value in (("in_features", in_features), ("num_classes", num_classes)):
            if value < 1:
                raise ValueError(f"{name} is {value}; an HPM head needs at least 1")
        for name, fraction in (("mix", mix), ("ema_decay", ema_decay)):
            if not 0 <= fraction <= 1:
                raise ValueError(f"{name} is {fraction}; expected a number in [0, 1]")
        super().__init__(in_features, num_classes, bias=bias, device=device, dtype=dtype)
        self.mix = float(mix)
        self.ema_decay = float(ema_decay)
        self.inference = check_inference(inference)
        self.log_scale = nn.Parameter(torch.zeros((), device=device, dtype=dtype))
        self.prototypes: Tensor
        self.num_updates: Tensor
        self.register_buffer("prototypes", torch.zeros(num_classes, in_features, device=device, dtype=torch.float32))
        self.register_buffer("num_updates", torch.zeros(num_classes, dtype=torch.long, device=device))

    def fc_logits(self, features: Tensor) -> Tensor:
        """Returns the logits (B, C) of the FC classifier, for `features` (B, d)."""
        return F.linear(features, self.weight, self.bias)

    def float_fc_logits(self, features: Tensor) -> Tensor:
        """Returns the logits (B, C) of the FC classifier in float32, also under autocast, for float32 `features`."""
        # Its arg-max selects prototypes: rounding of these logits could change the prediction.
        bias = None if self.bias is None else self.bias.float()
        return functional.linear_without_autocast(features, self.weight.float(), bias)

    def scale(self) -> Tensor:
        """Returns the positive scale s (), in float32."""
        return self.log_scale.float().exp()

    def forward(self, features: Tensor) -> Tensor:
        """Returns the logits (B, C) of `features` (B, d) in the mode `inference`; never changes the head's state.

        All modes but `"fc"` return float32, also under autocast.
        """
        check_features(features, self.in_features)
        if self.inference == "fc":
            return self.fc_logits(features)
        z, prototypes = features.float(), self.prototypes
        fc_logits = self.float_fc_logits(z)
        if self.inference == "dataset":
            logits = functional.l2_logits(z, prototypes, self.scale())
        elif self.inference == "sample":
            assignment = functional.straight_through_assignment(fc_logits)
            logits = functional.sample_logits(z, assignment, prototypes, self.scale(), self.mix)
        elif self.inference == "batch":
            assignment = functional.straight_through_assignment(fc_logits)
            presence = functional.hard_presence(assignment)
            logits = functional.batch_logits(z, assignment, presence, prototypes, self.scale(), self.mix)
        else:
            raise ValueError("unknown inference mode; expected one of batch, sample, dataset, fc")
        # Not a Python branch: it must export, and every parameter must have a gradient, fitted or not.
        return torch.where((self.num_updates > 0).all(), logits, fc_logits)

    def is_fitted(self) -> bool:
        """Returns whether every class has a prototype."""
        return bool((self.num_updates > 0).all())

    def config(self) -> dict[str, Any]:
        """Returns the keyword arguments of another head of the same kind: mix, ema_decay and inference."""
        return {"mix": self.mix, "ema_decay": self.ema_decay, "inference": self.inference}

    @torch.no_grad()
    def update_prototypes(self, features: Tensor, labels: Tensor) -> None:
        """Moves the prototypes of the classes in `labels` towards their mean feature (exponential moving average).

        `features` (B, d) are the head's input; `labels` (B,) are integers in [0, C), of any dtype. Raises a ValueError,
        and changes nothing, for other shapes or labels, or if features are not finite.
        """
        self.apply_class_sums(*self.class_sums(features, labels))

    @torch.no_grad()
    def class_sums(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the float32 sums (C, d) of `features` by label and the counts (C,), which processes can add."""
        self.check_update(features, labels)
        return functional.class_sums(features.float(), labels.long(), self.out_features)

    @torch.no_grad()
    def apply_class_sums(self, sums: Tensor, counts: Tensor) -> None:
        """Updates the prototypes by the mean features sums/counts of the classes with a count."""
        prototypes, num_updates = functional.ema_update(
            self.prototypes, self.num_updates, sums, counts, self.ema_decay)
        self.prototypes.copy_(prototypes)
        self.num_updates.copy_(num_updates)

    @torch.no_grad()
    def set_prototypes(self, prototypes: Tensor) -> None:
        """Sets the dataset-level prototypes (C, d) of all classes, which counts as one update of each.

        Raises a ValueError, and changes nothing, if the shape differs or values are not finite.
        """
        if prototypes.shape != self.prototypes.shape:
            raise ValueError(f"prototypes have the shape {tuple(prototypes.shape)}; "
                             f"expected (num_classes, in_features) = {tuple(self.prototypes.shape)}")
        if not prototypes.isfinite().all():
            raise ValueError("prototypes are not finite; a head with them would return NaN")
        self.prototypes.copy_(prototypes)
        self.num_updates.fill_(1)

    @torch.no_grad()
    def reset_prototypes(self) -> None:
        """Forgets the prototypes and their scale: the head predicts as its FC classifier until it is fitted again."""
        for entry in (self.prototypes, self.num_updates, self.log_scale):
            entry.zero_()

    def check_update(self, features: Tensor, labels: Tensor) -> None:
        """Raises the ValueErrors of `update_prototypes`."""
        check_features(features, self.in_features)
        if labels.shape != features.shape[:1] or labels.dtype.is_floating_point or labels.dtype == torch.bool:
            raise ValueError(f"labels have the shape {tuple(labels.shape)} and dtype {labels.dtype}; expected "
                             f"({len(features)},) class indices. Soft targets have no class mean")
        if not features.device == labels.device == self.prototypes.device:
            raise ValueError(f"features are on {features.device} and labels on {labels.device}, the prototypes on "
                             f"{self.prototypes.device}; move them to one device")
        labels = labels.long()  # few operations know the unsigned types
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.out_features:
            raise ValueError(f"labels span {int(labels.min())} to {int(labels.max())}; "
                             f"expected 0 to {self.out_features - 1}")
        if not features.isfinite().all():
            raise ValueError("features are not finite and would spoil the prototypes; look at loss and learning rate")

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        prototypes = self.prototypes
        super()._apply(fn, recurse)
        self._keep_float32(prototypes)
        return self

    def _keep_float32(self, prototypes: Tensor) -> None:
        """Restores `prototypes` in float32 if a cast changed its own: in half precision an EMA's steps round to 0."""
        if self.prototypes.dtype != torch.float32:
            self.prototypes = prototypes.to(self.prototypes.device, torch.float32)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._keep_float32(self.prototypes)
        if f"{prefix}weight" not in state_dict or f"{prefix}prototypes" in state_dict:
            return
        if not self.num_updates.is_meta and self.num_updates.any():
            warnings.warn(
                "the weights that were loaded hold no prototypes, and those of the HPM head were of other weights: it "
                f"is reset, and {UNFITTED}", UnfittedHeadWarning, stacklevel=2)
        self.reset_prototypes()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, mix={self.mix}, ema_decay={self.ema_decay}, inference={self.inference!r}"


@torch.fx.wrap
def conv_without_autocast(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns the convolution of `x` (B, d, 1, 1), like `functional.linear_without_autocast`."""
    if functional.in_autocast(x):
        with torch.autocast(x.device.type, enabled=False):
            return F.conv2d(x, weight, bias)
    return F.conv2d(x, weight, bias)


@torch.fx.wrap
def shaped_like(logits: Tensor, features: Tensor) -> Tensor:
    """Returns logits (B, C) as (B, C, 1, 1) if the features are (B, d, 1, 1)."""
    return logits.view(*logits.shape, *(1,) * (features.ndim - 2))


class HPMConvHead(HPMHead):
    """An HPM head that replaces a 1x1 convolution and keeps its `weight` (num_classes, in_features, 1, 1).

    It maps features (B, in_features, 1, 1) to logits (B, C, 1, 1). Its FC classifier is that convolution, bit by bit.
    All functions but `forward` take features (B, in_features); see `HPMHead`.
    """

    def __init__(self, in_features: int, num_classes: int, bias: bool = True, **kwargs: Any):
        super().__init__(in_features, num_classes, bias, **kwargs)
        self.weight = nn.Parameter(self.weight.detach()[:, :, None, None])

    def fc_logits(self, features: Tensor) -> Tensor:
        return F.conv2d(features[:, :, None, None], self.weight, self.bias).flatten(1)

    def float_fc_logits(self, features: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        return conv_without_autocast(features[:, :, None, None], self.weight.float(), bias).flatten(1)

    def forward(self, features: Tensor) -> Tensor:
        """Returns the logits of `features`, both (B, ·) or (B, ·, 1, 1); see `HPMHead`."""
        return shaped_like(super().forward(features.flatten(1)), features)


def check_module(model: nn.Module) -> None:
    """Raises a ValueError unless `model` is an `nn.Module`."""
    if not isinstance(model, nn.Module):
        kind = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise ValueError(f"model is {kind}; expected an nn.Module: " + (
            "make one of it, such as model()" if isinstance(model, type) else
            "wrap a function in a module whose forward calls it, with its layers as attributes"))


def find_head(model: nn.Module) -> HPMHead:
    """Returns the HPM head of `model`, or `model` itself if it is one; raises a ValueError unless there is just one."""
    name = head_name(model)
    if name is None:
        raise ValueError(f"{type(model).__name__} has no HPM head; create an hpm_* model "
                         "(timm.list_models('hpm_*')) with num_classes > 0, or call timm_hpm.add_hpm_head(model)")
    return model.get_submodule(name)  # type: ignore[return-value]


def head_name(model: nn.Module) -> str | None:
    """Returns the dotted path of the HPM head in `model`, `""` if the model is the head, None if it has none."""
    check_module(model)
    names = [name for name, module in model.named_modules() if isinstance(module, HPMHead)]
    if len(names) > 1:
        raise ValueError(f"{type(model).__name__} has {len(names)} HPM heads, at {', '.join(names)}; expected one")
    return names[0] if names else None


def without_head(model: nn.Module) -> nn.Module:
    """Returns `model` with the identity in place of its HPM head: it outputs the head's input (B, d).

    Only the modules on the path to the head are copied, all others are shared; `model` itself does not change.
    """
    name = head_name(model)
    if not name:
        raise ValueError(f"{type(model).__name__} has no backbone in front of an HPM head; expected an hpm_* model, or "
                         "what timm_hpm.add_hpm_head returned")
    *parents, leaf = name.split(".")
    backbone = parent = _shallow_copy(model)
    for part in parents:
        child = _shallow_copy(parent.get_submodule(part))
        setattr(parent, part, child)
        parent = child
    setattr(parent, leaf, _HeadSlot(getattr(parent, leaf)))
    return backbone


class _HeadSlot(nn.Identity):
    """The identity in place of an HPM head, with the head's attributes: some models read its `weight.dtype`."""

    def __init__(self, head: nn.Module):
        super().__init__()
        self.__dict__["_head"] = head  # not a submodule: its parameters are not the backbone's

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_head"], name)


def _shallow_copy(module: nn.Module) -> nn.Module:
    twin = copy.copy(module)
    # Both share the dictionaries of parameters and buffers, so that `.to(device)` reaches both.
    twin._modules = dict(module._modules)
    return twin


def own_mode(model: nn.Module) -> str:
    """Returns the inference mode of a model's HPM head, `"none"` if it has no HPM head."""
    return "none" if head_name(model) is None else find_head(model).inference


@contextmanager
def head_mode(model: nn.Module, mode: str) -> Iterator[HPMHead]:
    """Switches the HPM head of `model` (a model or a head) to the inference mode `mode` within the block.

    Raises a ValueError if the mode is unknown, or there is no HPM head.
    """
    head = find_head(model)
    before, head.inference = head.inference, check_inference(mode)
    try:
        yield head
    finally:
        head.inference = before


def mode_if_any(model: nn.Module, mode: str | None) -> AbstractContextManager[Any]:
    """Returns `head_mode`, or a context that changes nothing if there is no head, or no mode (None, `"none"`)."""
    return nullcontext() if mode in (None, "none") or head_name(model) is None else head_mode(model, mode)
