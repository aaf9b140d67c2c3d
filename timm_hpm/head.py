"""`HPMHead`, the classifier of Hybrid Prototype Mixing: finding it in a model, its modes, the network without it."""

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import functional

INFERENCE_MODES: Final = ("batch", "sample", "dataset", "fc")


class UnfittedHeadWarning(UserWarning):
    """Weights without prototypes were loaded: the HPM head answers as its FC classifier until it is given some."""


def check_inference(mode: str) -> str:
    """Returns `mode`, or raises a ValueError that lists the inference modes."""
    if mode not in INFERENCE_MODES:
        raise ValueError(f"unknown inference mode {mode!r}; expected one of {', '.join(INFERENCE_MODES)}")
    return mode


class WholeLoading(nn.Module):
    """Mixin of a module that a `load_state_dict` which raises leaves as it was; torch's own would be half loaded."""

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads as torch does, with a copy of the present values in memory meanwhile."""
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
    """An FC classifier that answers by ℓ2 distance to prototypes mixed from the data set's and the batch's.

    It stands in the slot of a model's `nn.Linear` classifier: `weight` and `bias` are that classifier's, so a plain
    timm checkpoint loads with only this head's own entries missing. Those are the buffers `prototypes`
    (num_classes, in_features), in float32 whatever the model's dtype, and `num_updates` (num_classes,), how often each
    class has been updated, and the learnable `log_scale` (), whose exponential is the scale s of −s·‖z − Q_c‖².

    Until every class has a prototype, the head answers exactly as its FC classifier. Weights that come without
    prototypes, by `load_state_dict(..., strict=False)`, reset what it has of them, with an `UnfittedHeadWarning`: those
    were means of another network's features.

    Arguments:
        in_features: width d of the features.
        num_classes: number of classes C; also `out_features`.
        bias: whether the FC classifier has a bias.
        mix: weight of the batch-level prototypes, in [0, 1]; 0 uses the dataset-level ones only.
        ema_decay: weight β of the old prototype in an update, in [0, 1].
        inference: `"batch"` (the paper's: an answer depends on the other images of the batch), `"sample"` (each image
            is a batch of its own), `"dataset"` (dataset-level prototypes only) or `"fc"` (the FC classifier).

    Source: arXiv 2606.01746; what is our own reading stands in docs/method.md.
    """

    def __init__(
            self,
            in_features: int,
            num_classes: int,
            bias: bool = True,
            *,
            mix: float = 0.5,
            ema_decay: float = 0.99,
            inference: str = "batch",
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
        """Returns the logits (B, C) of the FC classifier in float32, whatever the autocast, for float32 `features`."""
        # Its arg-max moves prototypes: what would be rounding of a logit elsewhere is another answer here.
        bias = None if self.bias is None else self.bias.float()
        return functional.linear_without_autocast(features, self.weight.float(), bias)

    def scale(self) -> Tensor:
        """Returns the positive scale s (), in float32."""
        return self.log_scale.float().exp()

    def forward(self, features: Tensor) -> Tensor:
        """Returns the logits (B, C) of `features` (B, d) in the mode `inference`; changes nothing.

        The modes other than `"fc"` answer in float32, whatever the autocast.
        """
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
        # A tensor's choice, not Python's: it must trace, and every parameter must have a gradient in every state.
        return torch.where((self.num_updates > 0).all(), logits, fc_logits)

    def is_fitted(self) -> bool:
        """Returns whether every class has a prototype."""
        return bool((self.num_updates > 0).all())

    def config(self) -> dict[str, Any]:
        """Returns the keyword arguments that make another head of the same kind: mix, ema_decay and inference."""
        return {"mix": self.mix, "ema_decay": self.ema_decay, "inference": self.inference}

    @torch.no_grad()
    def update_prototypes(self, features: Tensor, labels: Tensor) -> None:
        """Moves the prototypes of the classes in `labels` towards their mean feature (exponential moving average).

        Arguments:
            features: (B, d), the input of the head; no gradient is kept.
            labels: (B,), integers in [0, C), of any dtype.

        Raises:
            ValueError: shapes that do not fit, labels that are not integers in [0, C), or features that are not
                finite. The prototypes are then as before.
        """
        self.apply_class_sums(*self.class_sums(features, labels))

    @torch.no_grad()
    def class_sums(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the float32 sums (C, d) of `features` by label and the counts (C,); see `update_prototypes`.

        Several processes add up theirs before `apply_class_sums`.
        """
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
        """Sets the dataset-level prototypes of all classes, as (C, d), and counts that as one update of each.

        Raises:
            ValueError: another shape, or values that are not finite. The prototypes are then as before.
        """
        if prototypes.shape != self.prototypes.shape:
            raise ValueError(f"prototypes have the shape {tuple(prototypes.shape)}; "
                             f"expected (num_classes, in_features) = {tuple(self.prototypes.shape)}")
        if not prototypes.isfinite().all():
            raise ValueError("prototypes are not finite; a head with them would answer NaN")
        self.prototypes.copy_(prototypes)
        self.num_updates.fill_(1)

    @torch.no_grad()
    def reset_prototypes(self) -> None:
        """Forgets the prototypes and their scale: the head answers as its FC classifier until it is given others."""
        for entry in (self.prototypes, self.num_updates, self.log_scale):
            entry.zero_()

    def check_update(self, features: Tensor, labels: Tensor) -> None:
        """Raises the ValueErrors of `update_prototypes`."""
        if features.ndim != 2 or features.shape[1] != self.in_features:
            raise ValueError(f"features have the shape {tuple(features.shape)}; expected (B, {self.in_features}), "
                             "the pooled input of the head")
        if labels.shape != features.shape[:1] or labels.dtype.is_floating_point or labels.dtype == torch.bool:
            raise ValueError(f"labels have the shape {tuple(labels.shape)} and dtype {labels.dtype}; expected "
                             f"({len(features)},) class indices. Soft targets have no class mean")
        if features.device != self.prototypes.device or labels.device != self.prototypes.device:
            raise ValueError(f"features are on {features.device} and labels on {labels.device}, the prototypes on "
                             f"{self.prototypes.device}; move them to one device")
        labels = labels.long()  # few operations know the unsigned types
        if len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= self.out_features):
            raise ValueError(f"labels span {int(labels.min())} to {int(labels.max())}; "
                             f"expected 0 to {self.out_features - 1}")
        if not features.isfinite().all():
            raise ValueError("features are not finite; they would spoil the prototypes for good. Look at the loss and "
                             "the learning rate")

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        prototypes = self.prototypes
        super()._apply(fn, recurse)
        self._keep_float32(prototypes)
        return self

    def _keep_float32(self, prototypes: Tensor) -> None:
        """Takes `prototypes` in the place of its own if these have another dtype: in half an EMA's steps round to 0."""
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
                "is reset, and answers as its FC classifier until timm_hpm.fit_prototypes(model, loader, threat), or "
                "fine-tuning, gives it some", UnfittedHeadWarning, stacklevel=2)
        self.reset_prototypes()

    def extra_repr(self) -> str:
        """Returns the arguments that `print(model)` shows."""
        return (f"{super().extra_repr()}, mix={self.mix}, ema_decay={self.ema_decay}, "
                f"inference={self.inference!r}")


@torch.fx.wrap
def conv_without_autocast(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns the convolution of `x` (B, d, 1, 1), like `functional.linear_without_autocast`."""
    if functional.in_autocast(x):
        with torch.autocast(x.device.type, enabled=False):
            return F.conv2d(x, weight, bias)
    return F.conv2d(x, weight, bias)


class HPMConvHead(HPMHead):
    """An HPM head in the place of a 1x1 convolution, whose `weight` (num_classes, in_features, 1, 1) it has.

    Its FC classifier is that convolution, bit by bit, on features (B, in_features); see `HPMHead` for all else.
    """

    def __init__(self, in_features: int, num_classes: int, bias: bool = True, **kwargs: Any):
        super().__init__(in_features, num_classes, bias, **kwargs)
        self.weight = nn.Parameter(self.weight.detach()[:, :, None, None])

    def fc_logits(self, features: Tensor) -> Tensor:
        """Returns the logits (B, C) of the FC classifier, for `features` (B, d)."""
        return F.conv2d(features[:, :, None, None], self.weight, self.bias).flatten(1)

    def float_fc_logits(self, features: Tensor) -> Tensor:
        """Returns the logits (B, C) of the FC classifier in float32, whatever the autocast, for float32 `features`."""
        bias = None if self.bias is None else self.bias.float()
        return conv_without_autocast(features[:, :, None, None], self.weight.float(), bias).flatten(1)


def check_module(model: nn.Module) -> None:
    """Raises a ValueError unless `model` is an `nn.Module`."""
    if not isinstance(model, nn.Module):
        kind = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise ValueError(f"model is {kind}; expected an nn.Module: " + (
            "make one of it, such as model()" if isinstance(model, type) else
            "wrap a function in a module whose forward calls it, with its layers as attributes"))


def find_head(model: nn.Module) -> HPMHead:
    """Returns the HPM head of `model` (or `model` itself where it is one).

    Raises:
        ValueError: no HPM head, or more than one.
    """
    name = head_name(model)
    if name is None:
        raise ValueError(f"{type(model).__name__} has no HPM head; create an hpm_* model "
                         "(timm.list_models('hpm_*')) with num_classes > 0, or call timm_hpm.add_hpm_head(model)")
    return model.get_submodule(name)  # type: ignore[return-value]


def head_name(model: nn.Module) -> str | None:
    """Returns the dotted path of the HPM head in `model`, `""` where the model is the head, None where it has none.

    Raises:
        ValueError: more than one HPM head, or no module.
    """
    check_module(model)
    names = [name for name, module in model.named_modules() if isinstance(module, HPMHead)]
    if len(names) > 1:
        raise ValueError(f"{type(model).__name__} has {len(names)} HPM heads, at {', '.join(names)}; expected one")
    return names[0] if names else None


def without_head(model: nn.Module) -> nn.Module:
    """Returns `model` with the identity in the place of its HPM head: it answers with the head's input (B, d).

    Only the modules on the way to the head are copied, all else is shared; `model` itself stays as it is.

    Raises:
        ValueError: no HPM head, several, or nothing in front of it.
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
    """Stands in the place of an HPM head; what the model reads of it, such as `weight.dtype`, is the head's."""

    def __init__(self, head: nn.Module):
        super().__init__()
        self.__dict__["_head"] = head  # no submodule: its parameters are not the backbone's

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_head"], name)


def _shallow_copy(module: nn.Module) -> nn.Module:
    twin = copy.copy(module)
    # The parameters and buffers stay in one dictionary, so that what replaces one (`.to(device)`) reaches both.
    twin._modules = dict(module._modules)
    return twin


@contextmanager
def head_mode(model: nn.Module, mode: str) -> Iterator[HPMHead]:
    """Switches the HPM head of `model` (a model or a head) to an inference mode, and back at the end of the block.

    Raises:
        ValueError: an unknown mode, or no HPM head.
    """
    head = find_head(model)
    before, head.inference = head.inference, check_inference(mode)
    try:
        yield head
    finally:
        head.inference = before
