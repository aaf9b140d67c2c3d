"""Building the `hpm_*` networks and loading their weights, for the entrypoints of all of them."""

import dataclasses
import json
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from huggingface_hub import try_to_load_from_cache
from timm.models import PretrainedCfg, build_model_with_cfg, load_pretrained
from torch import Tensor, nn

from ..checkpoints import (
    CheckpointError,
    DroppedClassifierWarning,
    check_architecture,
    fitting,
    read_file,
    reading,
    unwrap,
)
from ..formats import native_state_dict, num_classes_of, plain_state_dict, warn_of_normalisation
from ..guards import check_size, weights_only
from ..head import HPMHead, UnfittedHeadWarning, find_head, head_name
from ..surgery import add_hpm_head
from .configs import read_config
from .preact import PreActNet
from .saving import CONFIG, WEIGHTS, config_args, config_fields, own_config, saved_config
from .tags import is_whole, names_weights, own_cfg, tag_args

# Arguments of an HPM head, and its entries in a state dict beside the classifier's weight and bias.
_HEAD_ARGS = ("mix", "ema_decay", "inference")
_HEAD_ENTRIES = ("prototypes", "num_updates", "log_scale")
# With these arguments timm does not load strictly.
_LOOSE_ARGS = ("num_classes", "in_chans", "img_size", "global_pool", "features_only", "feature_cls", "out_indices")


def build_preact_net(
        variant: str,
        pretrained: bool,
        arch_args: Mapping[str, Any],
        kwargs: Mapping[str, Any],
) -> PreActNet:
    """Returns the network of an entrypoint; with `features_only` among `kwargs`, timm's wrapper of it.

    `arch_args` are the architecture's model arguments; those of its tag replace them, and the caller's `kwargs` both.
    """
    asked = kwargs
    cfg, kwargs, state_dict = _resolved(variant, pretrained, kwargs, plain_state_dict)
    create = partial(
        build_model_with_cfg, PreActNet, variant,
        pretrained_cfg=cfg.to_dict(),
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": tuple(range(len(arch_args["depths"]) + 1)), "flatten_sequential": True},
        **{**arch_args, **kwargs},
    )
    check_size(partial(create, pretrained=False), asked)
    # timm prefers the source to the state dict.
    overlay = {"state_dict": state_dict, "source": None} if pretrained else {}
    with fitting(weights_place(cfg), variant, num_classes_of(state_dict, cfg.classifier)), weights_only():
        model = create(pretrained=pretrained, pretrained_cfg_overlay=overlay)
    return loaded(model, cfg) if pretrained else model


def build_variant(
        create: Callable[..., Any],
        variant: str,
        pretrained: bool,
        kwargs: Mapping[str, Any],
        convert: Callable[..., dict[str, Tensor]] = plain_state_dict,
) -> nn.Module:
    """Returns a timm network with an HPM head, under the cfg of the name `variant`.

    The base's own entrypoint builds the network and loads its weights, so all its arguments and checkpoint formats work
    (image size, channels, pooling, `features_only`). The entries of the HPM head are loaded afterwards.

    Arguments:
        create: the base's own entrypoint.
        variant: the registered name.
        pretrained: whether to load weights.
        kwargs: the entrypoint's: the head's (mix, ema_decay, inference), timm's and the network's.
        convert: converts a checkpoint to the base's names; called as `plain_state_dict`.

    Raises:
        UnsupportedHeadError: if an HPM head cannot replace the network's classifier.
        CheckpointError: if the checkpoint cannot be read or does not fit.
        RuntimeError: if the tag has no weights (by timm).
    """
    asked = kwargs
    cfg, kwargs, state_dict = _resolved(variant, pretrained, kwargs, convert)
    head_args = {name: kwargs.pop(name) for name in _HEAD_ARGS if name in kwargs}
    check_size(partial(create, pretrained_cfg=cfg, **kwargs), asked)
    overlay: dict[str, Any] = {}
    converted = pretrained and not cfg.custom_load
    with fitting(weights_place(cfg), variant, num_classes_of(state_dict, cfg.classifier)), weights_only():
        if converted:
            # timm prefers the source to the state dict.
            overlay = {"state_dict": without_head_entries(state_dict, cfg.classifier), "source": None}
            other_classes = cfg.num_classes < 0 or kwargs.get("num_classes", cfg.num_classes) != cfg.num_classes
            if other_classes or kwargs.get("features_only"):
                _check_keys(create, cfg, overlay, kwargs)
        model = create(pretrained=pretrained, pretrained_cfg=cfg, pretrained_cfg_overlay=overlay, **kwargs)
    if kwargs.get("features_only"):
        return loaded(model, cfg) if converted else model
    add_hpm_head(model, **head_args)
    # A saved model may lose its tag, and must keep these.
    model.network_args = {name: kwargs[name] for name in tag_args(variant, asked) if name in kwargs}
    entries = head_entries(state_dict, model)
    if entries:
        head = find_head(model)
        with fitting(weights_place(cfg), variant):
            head.load_state_dict({"weight": head.weight, "bias": head.bias, **entries})
    return loaded(model, cfg) if converted else model


def _resolved(
        variant: str,
        pretrained: bool,
        kwargs: Mapping[str, Any],
        convert: Callable[..., dict[str, Tensor]],
) -> tuple[PretrainedCfg, dict[str, Any], dict[str, Tensor]]:
    """Returns the pretrained cfg of an entrypoint's weights, its other arguments, and the weights, converted.

    Precedence: the caller's arguments, the config in the weights' metadata, that of their folder, the tag's.

    Arguments:
        variant, pretrained, kwargs, convert: see `build_variant`. Without `pretrained`, and for a foreign format that
            the network reads by itself (`custom_load`), there are no weights.

    Raises:
        CheckpointError: if the weights cannot be read, or their config is of others.
    """
    cfg = own_cfg(variant, pretrained, kwargs)
    overlay = kwargs.get("pretrained_cfg_overlay") or {}
    args = {name: value for name, value in kwargs.items() if name not in ("pretrained_cfg", "pretrained_cfg_overlay")}
    tag = tag_args(variant, kwargs)
    if not pretrained or cfg.custom_load:
        return cfg, {**tag, **args}, {}
    state_dict = read_checkpoint(cfg, kwargs.get("cache_dir"))
    foreign, place = names_weights(kwargs), weights_place(cfg)
    with fitting(place, variant):
        stated = _stated_args(cfg, args)
        config = _weights_config(cfg, kwargs.get("cache_dir"))
        if config:
            check_architecture(config, variant)
            fields = {name: value for name, value in config_fields(config).items()
                      if name not in overlay and json.dumps(value) != json.dumps(getattr(cfg, name, None))}
            of_folder = {name: value for name, value in stated.items() if args.get(name) == value}
            own = config_args(config)
            _warn_of_folder(place, cfg, fields, of_folder, own)
            cfg = dataclasses.replace(cfg, **fields)
            tag |= own
            args = {name: value for name, value in args.items() if name not in own or name not in of_folder}
        if foreign and not config:
            warn_of_normalisation(place, cfg.mean, cfg.std, overlay, state_dict)
        state_dict = convert(state_dict, cfg.mean, cfg.std)
        whole = is_whole(kwargs.get("pretrained_cfg")) and not foreign
        cfg = _with_classes(cfg, args, num_classes_of(state_dict, cfg.classifier), stated if whole else None)
    return cfg, {**tag, **args}, state_dict


def _weights_config(cfg: PretrainedCfg, cache_dir: str | Path | None) -> dict[str, Any]:
    """Returns the config in the metadata of a pretrained cfg's weights; empty if there is none."""
    repository, _, revision = (cfg.hf_hub_id or "").partition("@")
    try:
        if cfg.source == "local-dir":
            return own_config(Path(str(cfg.file)) / WEIGHTS)
        if cfg.source != "hf-hub" and (cfg.state_dict or cfg.file):
            return saved_config(str(cfg.file)) if not cfg.state_dict else {}
        # It has just been read, into a cache.
        downloads = Path(cache_dir or Path(torch.hub.get_dir()) / "checkpoints")
        cached: Any = downloads / Path(urlsplit(str(cfg.url)).path).name
        if repository:
            cached = try_to_load_from_cache(repository, cfg.hf_hub_filename or WEIGHTS, cache_dir, revision or None)
        return own_config(cached) if isinstance(cached, str | Path) else {}
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def _stated_args(cfg: PretrainedCfg, args: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the model arguments in the config of a saved model, which timm passes on like the caller's."""
    stated = args.get("pretrained_model_args")  # of newer versions of timm
    path = Path(str(cfg.file)) / CONFIG
    if stated is None and cfg.source == "local-dir" and path.is_file():
        stated = read_config(path)["model_args"]
    return stated or {}


def _warn_of_folder(place: str, cfg: PretrainedCfg, fields: Mapping[str, Any], of_folder: Mapping[str, Any],
                    own: Mapping[str, Any]) -> None:
    """Warns if the `config.json` of a folder belongs to other weights."""
    if cfg.source not in ("local-dir", "hf-hub"):
        return
    others = [*fields, *(name for name, value in of_folder.items()
                         if json.dumps(own.get(name, value)) != json.dumps(value))]
    if others:
        warnings.warn(f"{place}: the config.json beside them is of other weights (it differs in {', '.join(others)}). "
                      "Their own config, in their metadata, is taken; save the model again to mend it, or pass the "
                      "arguments that you want to timm.create_model", stacklevel=2)


def _with_classes(cfg: PretrainedCfg, args: Mapping[str, Any], found: int | None,
                  stated: Mapping[str, Any] | None) -> PretrainedCfg:
    """Returns a pretrained cfg with its weights' number of classes, by which timm keeps or drops their classifier.

    Arguments:
        cfg: the weights'; a negative number of classes means a new classifier, and stays.
        args: the network's arguments; without `num_classes` the weights must have the classes of `cfg`.
        found: the weights' number of classes; None if they have no classifier.
        stated: the model arguments of their config, if `cfg` was saved with these weights; else None.

    Raises:
        CheckpointError: if the config of the weights has another number of classes.
    """
    if found is None or cfg.num_classes < 0:
        return cfg
    if stated is not None:
        numbers = (cfg.num_classes, stated.get("num_classes", found))
        wrong = next((number for number in numbers if number != found), None)
        if wrong is not None:
            raise CheckpointError(f"size mismatch for {cfg.classifier}.weight: the weights have {found} classes, and "
                                  f"their config {wrong}; it is of other weights, or damaged")
    return cfg if args.get("num_classes") is None else dataclasses.replace(cfg, num_classes=found)


def _check_keys(create: Any, cfg: PretrainedCfg, overlay: Mapping[str, Any], kwargs: Mapping[str, Any]) -> None:
    """Loads a checkpoint into a network of its own classes, strictly.

    With other classes and for features timm loads loosely: it ignores unknown entries, and leaves missing ones random.

    Raises:
        RuntimeError: if the network or the checkpoint lacks an entry of the other (by torch).
    """
    classifier = overlay["state_dict"].get(f"{cfg.classifier}.weight")
    num_classes = cfg.num_classes if classifier is None else len(classifier)
    if num_classes < 0:
        return
    same = {name: value for name, value in kwargs.items() if name not in _LOOSE_ARGS}
    try:
        create(pretrained=True, pretrained_cfg=cfg, pretrained_cfg_overlay={**overlay, "num_classes": num_classes},
               num_classes=num_classes, **same)
    except RuntimeError as error:
        # The real load raises for other shapes, too, except for the classifier's.
        if "Unexpected key(s)" in str(error) or "Missing key(s)" in str(error):
            raise


def loaded(model: Any, cfg: PretrainedCfg) -> Any:
    """Returns a model that was loaded from a state dict, with the source of the weights in its pretrained cfg.

    Warns if its classifier is not that of the weights, or if it is and has no prototypes.
    """
    model.pretrained_cfg.pop("state_dict", None)
    if cfg.source is not None:
        model.pretrained_cfg["source"] = cfg.source
    if head_name(model) is None or cfg.num_classes < 0:
        return model
    name = ".".join(filter(None, (cfg.architecture, cfg.tag)))
    if model.num_classes != cfg.num_classes:
        warnings.warn(
            f"the weights of {name} have {cfg.num_classes} classes, and num_classes is {model.num_classes}: their "
            "classifier and prototypes are dropped, and the model has a random one", DroppedClassifierWarning,
            stacklevel=2)
    elif not find_head(model).is_fitted():
        warnings.warn(
            f"the weights of {name} hold no prototypes: its HPM head answers as its FC classifier until "
            "timm_hpm.fit_prototypes(model, loader, threat), or fine-tuning, gives it some",
            UnfittedHeadWarning, stacklevel=2)
    return model


def weights_place(cfg: PretrainedCfg) -> str:
    """Returns the place of a pretrained cfg's weights, for messages."""
    name = cfg.hf_hub_filename or "the weights"
    if cfg.source == "hf-hub":
        return f"{name} of the Hugging Face repository {cfg.hf_hub_id}"
    if cfg.state_dict:
        return "the given state dict"
    if cfg.file:
        return f"the weights in {cfg.file}"
    if cfg.hf_hub_id:
        return f"{name} of the Hugging Face repository {cfg.hf_hub_id}"
    return f"the weights at {cfg.url}"


def read_checkpoint(cfg: PretrainedCfg, cache_dir: str | Path | None = None) -> dict[str, Tensor]:
    """Returns the state dict of a pretrained cfg's file, with the file's own names; code in the file does not run.

    Raises:
        CheckpointError: if the file is missing or damaged or holds more than tensors, or a server fails.
        RuntimeError: if the cfg has no weights (by timm).
    """
    found: dict[str, Tensor] = {}

    def keep(checkpoint: Any, model: nn.Module) -> dict[str, Tensor]:
        found.update(unwrap(checkpoint))
        return {}

    if cfg.file and not cfg.source and not cfg.state_dict:
        with reading(weights_place(cfg)):
            return unwrap(read_file(cfg.file))  # timm would choose among several state dicts by itself
    source = {**cfg.to_dict(), "first_conv": None, "classifier": None}
    anything = cfg.has_weights or cfg.state_dict or cfg.source
    with reading(weights_place(cfg)) if anything else nullcontext():
        load_pretrained(nn.Module(), source, filter_fn=keep, cache_dir=cache_dir)
    return found


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: PreActNet) -> dict[str, Tensor]:
    """Returns the entries of a checkpoint for `model`; does not change `state_dict`.

    Takes any checkpoint that `native_state_dict` knows. If the model has another number of classes than the pretrained
    cfg, or that is -1 for a new head, timm only drops the classifier's `weight` and `bias`. Prototypes belong to the
    classes as well:

    - a model without a head gets no entry of the checkpoint's head;
    - a model with other classes, or a new head, keeps its own prototypes, update counts and scale;
    - plain FC weights are completed with the model's own entries: they load strictly, and the head of a new model
      predicts as its FC classifier.

    Raises:
        CheckpointError: if `native_state_dict` refuses the checkpoint.
    """
    cfg = _cfg(model)
    state_dict = native_state_dict(
        state_dict, model.state_dict().keys(), layout=model.layout, shortcut=model.shortcut,
        mean=cfg["mean"], std=cfg["std"])
    name = head_name(model)
    if name is None:
        classifier = cfg.get("classifier") or "fc"
        return {key: value for key, value in state_dict.items() if not key.startswith(f"{classifier}.")}
    entries = head_entries(state_dict, model) or own_entries(find_head(model))
    return {**without_head_entries(state_dict, name), **{f"{name}.{key}": value for key, value in entries.items()}}


def head_entries(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Returns a checkpoint's entries of the HPM head of `model`, beside weight and bias, by the head's own keys.

    Empty if there are none, or if they or the pretrained cfg have other classes than the model: stale prototypes are
    worse than none.
    """
    name = head_name(model)
    if name is None:
        return {}
    entries = {key: state_dict[f"{name}.{key}"] for key in _HEAD_ENTRIES if f"{name}.{key}" in state_dict}
    num_classes = find_head(model).out_features
    prototypes = entries.get("prototypes")
    if prototypes is not None and len(prototypes) != num_classes:
        return {}
    return entries if _cfg(model).get("num_classes", num_classes) == num_classes else {}


def own_entries(head: HPMHead) -> dict[str, Tensor]:
    """Returns the entries of a head's state dict beside its weight and bias."""
    return {key: value for key, value in head.state_dict().items() if key in _HEAD_ENTRIES}


def without_head_entries(state_dict: Mapping[str, Tensor], classifier: str | None) -> dict[str, Tensor]:
    """Returns a checkpoint without the entries of the HPM head at `classifier` beside its weight and bias."""
    own = {f"{classifier}.{key}" for key in _HEAD_ENTRIES}
    return {key: value for key, value in state_dict.items() if key not in own}


def _cfg(model: Any) -> dict[str, Any]:
    """Returns the pretrained cfg of a model, empty if it has none."""
    cfg: Any = getattr(model, "pretrained_cfg", None)
    return cfg or {}
