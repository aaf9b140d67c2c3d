"""`add_hpm_head` replaces the classifier of a timm model by an HPM head, `remove_hpm_head` restores it.

The model's class becomes a subclass of the old one (`HPMResNet` of `ResNet`) whose `reset_classifier` makes HPM heads.
No key of its state dict changes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from timm.layers import AttentionPool2d, RotAttentionPool2d, SelectAdaptivePool2d
from timm.layers import Linear as ScriptableLinear
from timm.models import register_notrace_module
from torch import Tensor, nn

from .head import HPMConvHead, HPMHead, WholeLoading, head_name

# Linear layers that only compute F.linear; any other subclass may compute more.
_LINEAR_TYPES = (nn.Linear, ScriptableLinear)
# The registries of an nn.Module.
_REGISTRIES = ("_modules", "_parameters", "_buffers")


class UnsupportedHeadError(ValueError):
    """An HPM head cannot replace the model's classifier; the message names the classifier and the reason."""


class HPMMixin(WholeLoading):
    """Mixin that `add_hpm_head` adds to a timm model's class: its `reset_classifier` makes HPM heads.

    Instances keep the arguments of their head in the attribute `head_config`, also while they have no head.
    """

    # No annotations in the class: TorchScript would read them instead of the model's.

    def reset_classifier(self, num_classes: int, *args: Any, **kwargs: Any) -> None:
        """Replaces the head by a fresh one of the same kind (mix, ema_decay, inference), or by none.

        Device, dtype and training mode stay.

        Arguments:
            num_classes: number of classes; 0 for no head.
            args, kwargs: as the model's own `reset_classifier` takes them, `global_pool` first.

        Raises:
            UnsupportedHeadError: if an HPM head cannot replace the new classifier, such as without pooling. The model
                does not change then, nor after any other error.
        """
        base: Any = super()
        with _all_or_nothing(self):
            if head_name(self) is not None:
                self.head_config = _take_head(self)
            parameter = next(self.parameters())
            base.reset_classifier(num_classes, *args, **kwargs)
            if num_classes > 0:
                fresh = self.get_submodule(find_classifier(self)).train(self.training)
                # Older versions of timm create it on the CPU and in float32.
                if len(args) < 2 and kwargs.keys().isdisjoint(("device", "dtype")):
                    fresh.to(parameter.device, parameter.dtype)
                _put_head(self, self.head_config)

    def no_weight_decay(self) -> set[str]:
        """Returns the names of the parameters without weight decay: the model's own, and the scale of the head."""
        inherited: Any = getattr(super(), "no_weight_decay", set)()
        name = head_name(self)
        return set(inherited) | (set() if name is None else {f"{name}.log_scale"})

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickles the class as a function of its base, which any process can import."""
        reduced: Any = super().__reduce_ex__(max(protocol, 2))
        return _blank_instance, (_base_class(type(self)),), *reduced[2:]


@cache
def _hpm_class(base: type) -> Any:
    """Returns the subclass with an HPM head of a model's class, always the same one."""
    return type(f"HPM{base.__name__}", (HPMMixin, base), {"__module__": __name__, "__doc__": base.__doc__})


def _base_class(hpm_class: type) -> Any:
    """Returns the argument of `_hpm_class`: the second base, after the mixin."""
    return hpm_class.__bases__[1]


def _blank_instance(base: type) -> nn.Module:
    """Returns an instance for unpickling to fill."""
    hpm_class = _hpm_class(base)
    return hpm_class.__new__(hpm_class)


class _ProjectPooled(nn.Module):
    """Mixin of an attention pooling that only projects the pooled token; timm's projects every token, then pools."""

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Returns the logits (B, C) of a map `x` (B, channels, H, W), or the head's input (B, d) if `pre_logits`."""
        x = super().forward(x, pre_logits=True)  # type: ignore[misc]
        return x if pre_logits else self.proj(x)  # type: ignore[operator]


@register_notrace_module  # as timm's own are
class HPMAttentionPool2d(_ProjectPooled, AttentionPool2d):
    """timm's `AttentionPool2d` with an HPM head as its projection."""


@register_notrace_module
class HPMRotAttentionPool2d(_ProjectPooled, RotAttentionPool2d):
    """timm's `RotAttentionPool2d` with an HPM head as its projection."""


_ATTENTION_POOLS: dict[type, Any] = {
    AttentionPool2d: HPMAttentionPool2d,
    RotAttentionPool2d: HPMRotAttentionPool2d,
}


def is_equipped(model: nn.Module) -> bool:
    """Returns whether a model's `reset_classifier` makes HPM heads, also if it has none now (`num_classes=0`)."""
    return hasattr(model, "head_config") or head_name(model) is not None


def add_hpm_head(
        model: nn.Module,
        *,
        mix: float = 0.5,
        ema_decay: float = 0.99,
        inference: str = "batch",
) -> nn.Module:
    """Replaces the classifier of a timm model by an HPM head, in place, and returns the model.

    The head keeps the classifier's weight and bias: until it is fitted, the model returns the same logits as before.
    Its `reset_classifier` makes HPM heads of the same kind from now on; a model without classes (`num_classes=0`) gets
    its head from it.

    Arguments:
        model: a timm model with one linear classifier (or a 1x1 convolution) on pooled features.
        mix: see `HPMHead`.
        ema_decay: see `HPMHead`.
        inference: see `HPMHead`.

    Raises:
        UnsupportedHeadError: if the model's classifier is of another kind. The model does not change then.
        ValueError: if `HPMHead` refuses an argument, or the model has an HPM head already, as the `hpm_*` models.
    """
    kind = type(model).__name__
    if is_equipped(model):
        raise ValueError(f"{kind} has an HPM head already, or will have one after reset_classifier(num_classes); to "
                         "change it, set find_head(model).mix, .ema_decay or .inference, or call remove_hpm_head first")
    if not hasattr(type(model), "reset_classifier"):
        raise UnsupportedHeadError(f"{kind} is no timm classifier: it has no reset_classifier. Expected a timm model "
                                   f"that classifies, itself, before it is wrapped or compiled{_by_hand(model)}")
    num_classes: Any = getattr(model, "num_classes", 0)
    config = HPMHead(1, 1, mix=mix, ema_decay=ema_decay, inference=inference).config()
    if num_classes > 0:
        _put_head(model, config)
    base: Any = type(model)
    model.__class__ = _hpm_class(base)
    model.head_config = config  # type: ignore[assignment]
    return model


def _by_hand(model: nn.Module) -> str:
    """Returns advice to replace a module's last linear layer by an HPM head, if it has one."""
    linear = [(name, module) for name, module in model.named_modules() if name and type(module) in _LINEAR_TYPES]
    if not linear:
        return ""
    name, layer = linear[-1]
    parent, _, leaf = name.rpartition(".")
    return (f". In any other module put a head into the classifier's place, such as {name}: head = timm_hpm.HPMHead("
            f"{layer.in_features}, {layer.out_features}, bias={layer.bias is not None}); head.load_state_dict("
            f"model.get_submodule({name!r}).state_dict(), strict=False); "
            f"setattr(model.get_submodule({parent!r}), {leaf!r}, head)")


def remove_hpm_head(model: nn.Module) -> nn.Module:
    """Undoes `add_hpm_head`, in place, and returns the model, whose logits are those of the mode "fc".

    Raises:
        ValueError: if `add_hpm_head` did not make the model. The native networks (`PreActNet`) have no other class.
    """
    if not isinstance(model, HPMMixin):
        reason = "it is built around one" if is_equipped(model) else "it has none"
        raise ValueError(f"{type(model).__name__} has no HPM head to remove: {reason}. Expected what add_hpm_head "
                         "returned. For the answers of the FC classifier, set find_head(model).inference = 'fc'")
    if head_name(model) is not None:
        _take_head(model)
    del model.head_config
    model.__class__ = _base_class(type(model))
    return model


def find_classifier(model: nn.Module) -> str:
    """Returns the dotted path of the layer that an HPM head can replace.

    Raises:
        UnsupportedHeadError: if there is no such layer, or more than one; the message names the classifiers.
    """
    kind = type(model).__name__
    classifiers = _classifiers(model)
    if len(classifiers) != 1:
        found = ", ".join(f"{name} ({type(module).__name__})" for name, module in classifiers.items()) or "none"
        raise UnsupportedHeadError(f"{kind} has {len(classifiers)} classifiers: {found}. An HPM head replaces exactly "
                                   "one, whose answer is the model's")
    (name, classifier), = classifiers.items()
    holders = _holders(model, name)
    if any(_is_off(pool) for holder in holders for pool in (getattr(holder, "global_pool", None),
                                                            getattr(holder, "pool_type", None))):
        raise UnsupportedHeadError(f"the classifier {name} of {kind} sees features without pooling (global_pool is "
                                   "''). An HPM head needs pooled ones: pass a global_pool such as 'avg'")
    if isinstance(classifier, nn.Conv2d):
        width, classes = classifier.in_channels, classifier.out_channels
        pointwise = classifier.weight.shape == (classes, width, 1, 1) and classifier.padding == (0, 0)
        if not pointwise or not isinstance(getattr(holders[-1], "global_pool", None), SelectAdaptivePool2d):
            raise UnsupportedHeadError(f"the classifier {name} of {kind} is a convolution; expected a 1x1 one behind "
                                       "timm's SelectAdaptivePool2d, or a linear layer")
    elif type(classifier) in _LINEAR_TYPES:
        width, classes = classifier.in_features, classifier.out_features  # type: ignore[assignment]
    else:
        raise UnsupportedHeadError(f"the classifier {name} of {kind} is a {type(classifier).__name__}; expected a "
                                   "linear layer or a 1x1 convolution")
    # A wrapper around the layer, such as MetaFormer's MLP, has another input width.
    direct = any(module is classifier for module in _answers(model))
    expected = getattr(model, "head_hidden_size", width) if direct else width
    if (width, classes) != (expected, model.num_classes):
        raise UnsupportedHeadError(f"the classifier {name} of {kind} takes {width} features and has {classes} classes; "
                                   f"expected the model's {expected} (head_hidden_size) and {model.num_classes}")
    return name


def _classifiers(model: nn.Module) -> dict[str, nn.Module]:
    """Returns the classifiers of a model by their paths: those of its cfg, else of get_classifier."""
    named = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    modules = dict(model.named_modules())
    paths = [name for name in ((named,) if isinstance(named, str) else named) if name in modules]
    if paths:
        return {name: modules[name] for name in paths}
    answers = _answers(model)
    return {name: module for name, module in modules.items() if any(module is answer for answer in answers)}


def _answers(model: nn.Module) -> list[nn.Module]:
    """Returns the result of a model's get_classifier, as a list; empty if it has none."""
    try:
        answer: Any = model.get_classifier()  # type: ignore[operator]
    except AttributeError:  # also inside some of timm's own
        return []
    return list(answer) if isinstance(answer, (list, tuple, nn.ModuleList)) else [answer]


def _holders(model: nn.Module, path: str) -> list[Any]:
    """Returns the modules around the one at `path`, from the model to its parent."""
    parts = path.split(".")
    return [model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts))]


def _is_off(pool: Any) -> bool:
    """Returns whether a pooling, a module or timm's name of it, is off."""
    return getattr(pool, "pool_type", pool) == ""


def _put_head(model: nn.Module, config: dict[str, Any]) -> None:
    """Replaces the classifier by an HPM head with the arguments `config` and the classifier's parameters."""
    name = find_classifier(model)
    classifier: Any = model.get_submodule(name)
    kind = HPMConvHead if isinstance(classifier, nn.Conv2d) else HPMHead
    weight, bias = classifier.weight, classifier.bias
    head = kind(weight.shape[1], weight.shape[0], bias is not None, device=weight.device, dtype=weight.dtype, **config)
    head.weight, head.bias = weight, bias
    _replace(model, name, head)


def _take_head(model: nn.Module) -> dict[str, Any]:
    """Replaces the head by a plain classifier with its weight and bias, and returns the head's config."""
    name: Any = head_name(model)
    head: Any = model.get_submodule(name)
    has_bias = head.bias is not None
    plain: Any
    if isinstance(head, HPMConvHead):
        plain = nn.Conv2d(head.in_features, head.out_features, 1, bias=has_bias, device="meta")
    else:
        plain = nn.Linear(head.in_features, head.out_features, bias=has_bias, device="meta")
    plain.weight, plain.bias = head.weight, head.bias
    _replace(model, name, plain)
    return head.config()


def _replace(model: nn.Module, name: str, classifier: nn.Module) -> None:
    """Replaces the module at the path `name`, and keeps its training mode."""
    parent = _holders(model, name)[-1]
    leaf = name.rpartition(".")[2]
    before = getattr(parent, leaf)
    setattr(parent, leaf, classifier.train(before.training))
    # Plain classifiers also take maps of one pixel, or all tokens; an HPM head only takes pooled features.
    if isinstance(classifier, HPMConvHead):
        parent.global_pool.flatten = nn.Flatten(1)
    elif isinstance(before, HPMConvHead):
        parent.global_pool.flatten = nn.Identity()
    elif isinstance(classifier, HPMHead):
        parent.__class__ = _ATTENTION_POOLS.get(type(parent), type(parent))
    elif isinstance(parent, _ProjectPooled):
        parent.__class__ = _base_class(type(parent))


@contextmanager
def _all_or_nothing(model: nn.Module) -> Iterator[None]:
    """Restores the classes and attributes of a model's modules if the block raises."""
    before = [
        (module, type(module), dict(vars(module)), [dict(vars(module)[name]) for name in _REGISTRIES])
        for module in model.modules()
    ]
    try:
        yield
    except BaseException:
        for module, kind, attributes, registries in before:
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(attributes)
            for name, content in zip(_REGISTRIES, registries, strict=True):
                attributes[name].clear()
                attributes[name].update(content)
        raise
