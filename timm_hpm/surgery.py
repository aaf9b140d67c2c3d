"""`add_hpm_head` replaces the classifier of any network by an HPM head, `remove_hpm_head` restores it.

The model's class becomes a subclass of the old one (`HPMResNet` of `ResNet`) whose `reset_classifier` makes HPM heads.
No key of its state dict changes.
"""

from functools import cache
from typing import Any

import torch
from timm.layers import AttentionPool2d, RotAttentionPool2d
from timm.layers import Linear as ScriptableLinear
from timm.models import register_notrace_module
from torch import Tensor, nn

from .head import HPMConvHead, HPMHead, WholeLoading, check_module, head_name

# Linear layers that only compute F.linear; any other subclass may compute more.
_LINEAR_TYPES = (nn.Linear, ScriptableLinear)
_WRAPPERS = (torch.jit.ScriptModule, nn.DataParallel, nn.parallel.DistributedDataParallel)
_BY_HAND = (". By hand: put timm_hpm.HPMHead(num_features, num_classes) in the classifier's place, behind features (B, "
            "num_features)")


class UnsupportedHeadError(ValueError):
    """An HPM head cannot replace the model's classifier; the message names the classifier and the reason."""


class HPMMixin(WholeLoading):
    """Mixin that `add_hpm_head` adds to a model's class: the `reset_classifier` of timm's models makes HPM heads.

    Instances keep the arguments of their head in the attribute `head_config`, also while they have no head, and in
    `head_path` the path of a classifier that timm does not know, else None.
    """

    # No annotations in the class: TorchScript would read them instead of the model's.

    def reset_classifier(self, num_classes: int, *args: Any, **kwargs: Any) -> None:
        """Replaces the head by a fresh one of the same kind (mix, ema_decay, inference), or by none for 0 classes.

        Device, dtype and training mode stay. `args` and `kwargs` are those of the model's own `reset_classifier`; a
        model without one raises an AttributeError. If an HPM head cannot replace the new classifier, such as without
        pooling, the model has that classifier, and an UnsupportedHeadError says so.
        """
        base: Any = super()
        path: Any = self.head_path
        reset = getattr(base, "reset_classifier", None)
        if reset is None:
            raise AttributeError(f"{_base_class(type(self)).__name__} has no reset_classifier of its own, which makes "
                                 "the new classifier; for other classes call remove_hpm_head(model), replace its "
                                 "classifier, and call add_hpm_head again")
        if head_name(self) is not None:
            self.head_config = _take_head(self)
        reset(num_classes, *args, **kwargs)
        if num_classes > 0:
            self.get_submodule(find_classifier(self, path)).train(self.training)
            _put_head(self, path, self.head_config)

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
        classifier: str | None = None,
        *,
        mix: float = 0.5,
        ema_decay: float = 0.99,
        inference: str = "dataset",
) -> nn.Module:
    """Replaces the classifier of a model by an HPM head, in place, and returns the model.

    The head keeps the classifier's weight and bias: until it is fitted, the model returns the same logits as before.
    A timm model's `reset_classifier` makes HPM heads of the same kind from now on; one without classes
    (`num_classes=0`) gets its head from it.

    Arguments:
        model: a network with one linear classifier (or a 1x1 convolution) on pooled features, whose output is the
            model's.
        classifier: the classifier's dotted path, such as `"fc"`. None takes the classifier that timm knows; of another
            module its last linear layer, unless others are as near to the top or have as many outputs.
        mix: see `HPMHead`.
        ema_decay: see `HPMHead`.
        inference: see `HPMHead`.

    Raises:
        UnsupportedHeadError: if there is no such classifier, or none is obvious. The model does not change then.
        ValueError: if `HPMHead` refuses an argument, or the model has an HPM head already, as the `hpm_*` models.
    """
    check_module(model)
    kind = type(model).__name__
    if is_equipped(model):
        raise ValueError(f"{kind} has an HPM head already, or will have one after reset_classifier(num_classes); to "
                         "change it, set find_head(model).mix, .ema_decay or .inference, or call remove_hpm_head first")
    if isinstance(model, _WRAPPERS) or hasattr(model, "_orig_mod"):  # the latter by torch.compile
        raise UnsupportedHeadError(f"{kind} is compiled, or wrapped for several devices; give the module inside")
    config = HPMHead(1, 1, mix=mix, ema_decay=ema_decay, inference=inference).config()
    num_classes: Any = getattr(model, "num_classes", None)
    own_reset = classifier is None and hasattr(model, "reset_classifier") and isinstance(num_classes, int)
    path = None if own_reset else find_classifier(model, classifier)
    if path is not None or num_classes > 0:
        _put_head(model, path, config)
    base: Any = type(model)
    model.__class__ = _hpm_class(base)
    model.head_config, model.head_path = config, path  # type: ignore[assignment]
    return model


def remove_hpm_head(model: nn.Module) -> nn.Module:
    """Undoes `add_hpm_head`, in place, and returns the model, whose logits are those of the mode "fc".

    Raises a ValueError if `add_hpm_head` did not make the model.
    """
    if not isinstance(model, HPMMixin):
        reason = "it is built around one" if is_equipped(model) else "it has none"
        raise ValueError(f"{type(model).__name__} has no HPM head to remove: {reason}. Expected what add_hpm_head "
                         "returned. For the answers of the FC classifier, set find_head(model).inference = 'fc'")
    if head_name(model) is not None:
        _take_head(model)
    del model.head_config, model.head_path
    model.__class__ = _base_class(type(model))
    return model


def find_classifier(model: nn.Module, path: str | None = None) -> str:
    """Returns the dotted path of the layer that an HPM head can replace: `path` if given, else the obvious one."""
    kind = type(model).__name__
    modules = dict(model.named_modules())
    if path is not None and (not path or path not in modules):
        layers = [name for name, module in modules.items() if _is_replaceable(module)]
        raise UnsupportedHeadError(f"{kind} has no layer {path!r}; expected the path of its classifier, one of "
                                   f"{', '.join(layers[-8:]) or 'its layers, of which none is linear'}")
    found = {path: modules[path]} if path else _classifiers(model)
    if len(found) != 1:
        listed = [f"{name} ({type(module).__name__})" for name, module in found.items()]
        if len(listed) > 8:
            listed[4:-4] = ["..."]
        raise UnsupportedHeadError(f"{kind} has {len(found)} classifiers: {', '.join(listed) or 'none'}. An HPM head "
                                   "replaces exactly one, whose answer is the model's" + (
                                       ": name it, as in add_hpm_head(model, classifier='fc')" if listed else _BY_HAND))
    classifier: Any
    (name, classifier), = found.items()
    place = f"the classifier {name or 'itself'} of {kind}"
    if not name or not _is_replaceable(classifier):
        raise UnsupportedHeadError(
            f"{place} is a {type(classifier).__name__}; expected a linear layer or a 1x1 convolution inside the model"
            + _BY_HAND)
    if unpooled := _missing_pooling(model, name):
        raise UnsupportedHeadError(f"{place} sees features without pooling ({unpooled}). An HPM head needs pooled "
                                   "ones: pass a global_pool such as 'avg', or pool in front of the classifier")
    classes, width = classifier.weight.shape[:2]
    # A wrapper around the layer, such as MetaFormer's MLP, has another input width.
    direct = any(module is classifier for module in _answers(model))
    expected = (getattr(model, "head_hidden_size", width) if direct else width, getattr(model, "num_classes", classes))
    if path is None and (width, classes) != expected:
        raise UnsupportedHeadError(f"{place} takes {width} features and has {classes} classes; expected the model's "
                                   f"{expected[0]} (head_hidden_size) and {expected[1]}")
    return name


def _is_replaceable(module: nn.Module) -> bool:
    """Returns whether a module is a plain linear layer or 1x1 convolution."""
    return type(module) in _LINEAR_TYPES or _is_pointwise(module)


def _is_pointwise(module: nn.Module) -> bool:
    return type(module) is nn.Conv2d and (module.kernel_size, module.padding, module.groups) == ((1, 1), (0, 0), 1)


def _missing_pooling(model: nn.Module, name: str) -> str:
    """Returns the sign that the classifier at the path `name` sees features that are not pooled, or ""."""
    pools = [getattr(holder, pool, None) for holder in _holders(model, name) for pool in ("global_pool", "pool_type")]
    if any(getattr(pool, "pool_type", pool) == "" for pool in pools):
        return "global_pool is ''"
    paths = list(dict(model.named_modules()))
    later = [path for path in paths[paths.index(name):] if "Pool" in type(model.get_submodule(path)).__name__]
    return f"{later[0]} comes after it" if later and isinstance(model.get_submodule(name), nn.Conv2d) else ""


def _classifiers(model: nn.Module) -> dict[str, nn.Module]:
    """Returns the classifiers of a model by their paths: those of its cfg, else of get_classifier, else the likely."""
    named = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    modules = dict(model.named_modules())
    paths = [name for name in ((named,) if isinstance(named, str) else named) if name in modules]
    if paths:
        return {name: modules[name] for name in paths}
    answers = _answers(model)
    found = {name: module for name, module in modules.items() if any(module is answer for answer in answers)}
    return found or _likely_classifiers(model)


def _answers(model: nn.Module) -> list[nn.Module]:
    """Returns the result of a model's get_classifier, as a list; empty if it has none."""
    try:
        answer: Any = model.get_classifier()  # type: ignore[operator]
    except AttributeError:  # also inside some of timm's own
        return []
    return list(answer) if isinstance(answer, (list, tuple, nn.ModuleList)) else [answer]


def _likely_classifiers(model: nn.Module) -> dict[str, nn.Module]:
    """Returns the last linear layer of a module, and those as near to the top or with as many outputs.

    Of a Sequential only its last part counts. Auxiliary classifiers do not count, and 1x1 convolutions only if the last
    layer is one.
    """
    weighted = {name: module for name, module in model.named_modules()
                if isinstance(module, (nn.Linear, nn.Conv2d)) and "aux" not in name.lower()}
    for prefix, module in model.named_modules():
        if isinstance(module, nn.Sequential):
            inside = [name for name in weighted if name.startswith(f"{prefix}." if prefix else "")]
            depth = prefix.count(".") + 1 if prefix else 0
            last = {name.split(".")[depth] for name in inside[-1:]}
            for name in inside:
                if name.split(".")[depth] not in last:
                    del weighted[name]
    if not weighted:
        return {}
    *_, (path, last_layer) = weighted.items()
    alike = {name: module for name, module in weighted.items() if name == path or (
        _is_pointwise(module) if isinstance(last_layer, nn.Conv2d) else isinstance(module, nn.Linear))}
    top = min(name.count(".") for name in alike)
    return {name: module for name, module in alike.items()
            if name == path or name.count(".") == top or len(module.weight) == len(last_layer.weight)}


def _holders(model: nn.Module, path: str) -> list[Any]:
    """Returns the modules around the one at `path`, from the model to its parent."""
    parts = path.split(".")
    return [model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts))]


def _put_head(model: nn.Module, path: str | None, config: dict[str, Any]) -> None:
    """Replaces the classifier by an HPM head with the arguments `config` and the classifier's parameters."""
    name = find_classifier(model, path)
    classifier: Any = model.get_submodule(name)
    if classifier._forward_hooks or classifier._forward_pre_hooks:
        raise UnsupportedHeadError(f"the classifier {name} of {type(model).__name__} has hooks, which a head would not "
                                   "have; remove them first, such as by nn.utils.remove_weight_norm")
    kind = HPMConvHead if isinstance(classifier, nn.Conv2d) else HPMHead
    weight, bias = classifier.weight, classifier.bias
    head = kind(weight.shape[1], weight.shape[0], bias is not None, device=weight.device, dtype=weight.dtype, **config)
    head.weight, head.bias = weight, bias
    _replace(model, name, head)


def _take_head(model: nn.Module) -> dict[str, Any]:
    """Replaces the head by a plain classifier with its weight and bias, and returns the head's config."""
    name: Any = head_name(model)
    head: Any = model.get_submodule(name)
    is_conv, bias = isinstance(head, HPMConvHead), head.bias is not None
    plain: Any = (nn.Conv2d(head.in_features, head.out_features, 1, bias=bias, device="meta") if is_conv
                  else nn.Linear(head.in_features, head.out_features, bias=bias, device="meta"))
    plain.weight, plain.bias = head.weight, head.bias
    _replace(model, name, plain)
    return head.config()


def _replace(model: nn.Module, name: str, classifier: nn.Module) -> None:
    """Replaces the module at the path `name`, and keeps its training mode."""
    parent = _holders(model, name)[-1]
    leaf = name.rpartition(".")[2]
    setattr(parent, leaf, classifier.train(getattr(parent, leaf).training))
    # timm's attention poolings project all tokens; an HPM head only takes pooled features.
    if isinstance(classifier, HPMHead):
        parent.__class__ = _ATTENTION_POOLS.get(type(parent), type(parent))
    elif isinstance(parent, _ProjectPooled):
        parent.__class__ = _base_class(type(parent))
