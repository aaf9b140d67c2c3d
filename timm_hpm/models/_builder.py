"""Building the `hpm_*` networks and loading their weights, for the entrypoints of all of them."""

import dataclasses
import json
import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import timm
import torch
from huggingface_hub import try_to_load_from_cache
from timm.models import PretrainedCfg, build_model_with_cfg, load_pretrained, register_model, split_model_name_tag
from timm.models._hub import download_cached_file
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
from ..guards import check_size, weights_only
from ..head import UNFITTED, UnfittedHeadWarning, find_head, head_name
from ..surgery import add_hpm_head
from .constructors import HEAD_ARGS
from .formats import native_state_dict, num_classes_of, plain_state_dict, warn_of_normalisation, xcit_state_dict
from .preact import PreActNet
from .saving import WEIGHTS, config_args, config_fields, own_config, saved_config
from .tags import is_whole, names_weights, own_cfg, tag_args

# Entries of an HPM head in a state dict beside the classifier's weight and bias.
_HEAD_ENTRIES = ("prototypes", "num_updates", "log_scale")
# With these arguments timm does not load strictly.
_LOOSE_ARGS = ("num_classes", "in_chans", "img_size", "global_pool", "features_only", "feature_cls", "out_indices")


def register_entrypoint(module: str, name: str, doc: str, build: Callable[[str, bool, dict[str, Any]], Any]) -> None:
    """Registers the architecture `name` with timm, made by `build(name, pretrained, kwargs)`, in a module."""

    def entrypoint(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return build(name, pretrained, kwargs)

    entrypoint.__module__, entrypoint.__doc__ = module, doc
    entrypoint.__name__ = entrypoint.__qualname__ = name
    setattr(sys.modules[module], name, register_model(entrypoint))


def build_preact_net(variant: str, pretrained: bool, kwargs: Mapping[str, Any], **arch_args: Any) -> Any:
    """Returns `build_variant` of the `PreActNet` with the architecture's `arch_args`."""
    levels = tuple(range(len(arch_args["depths"]) + 1))
    create = creator(PreActNet, variant, {"out_indices": levels, "flatten_sequential": True},
                     pretrained_filter_fn=native_state_dict, **arch_args)
    return build_variant(create, variant, pretrained, kwargs)


def creator(model_cls: type[nn.Module], variant: str, feature_cfg: Mapping[str, Any], **fixed: Any) -> Any:
    """Returns timm's `build_model_with_cfg` with these arguments, of which others may replace the `fixed` ones."""
    # timm changes the dictionary that it gets.
    return lambda **kwargs: build_model_with_cfg(model_cls, variant, feature_cfg={**feature_cfg}, **{**fixed, **kwargs})


def build_variant(create: Callable[..., Any], variant: str, pretrained: bool, kwargs: Mapping[str, Any],
                  convert: Callable[..., dict[str, Tensor]] = plain_state_dict, *, head: bool = True) -> Any:
    """Returns a network with an HPM head under the cfg of the name `variant`; with `features_only`, timm's wrapper.

    `create`, the base's own entrypoint, builds the network and loads its weights, so all its arguments and checkpoint
    formats work (image size, channels, pooling). The entries of the HPM head are loaded afterwards.

    `kwargs` are the head's (mix, ema_decay, inference), timm's and the network's. `convert` converts a checkpoint to
    the base's names, and is called as `plain_state_dict`. Without `head` the network gets no HPM head.
    """
    asked = kwargs
    cfg, kwargs, state_dict = _resolved(variant, pretrained, kwargs, convert)
    head_args = {name: kwargs.pop(name) for name in HEAD_ARGS if head and name in kwargs}
    check_size(partial(create, pretrained=False, pretrained_cfg=cfg, **kwargs), asked)
    overlay: dict[str, Any] = {}
    converted = pretrained and not cfg.custom_load
    with fitting(weights_place(cfg), variant, num_classes_of(state_dict, cfg.classifier)), weights_only():
        if converted:
            own = {f"{cfg.classifier}.{entry}" for entry in _HEAD_ENTRIES}
            # timm prefers the source to the state dict.
            overlay = {"state_dict": {key: value for key, value in state_dict.items() if key not in own},
                       "source": None}
            if kwargs.get("num_classes", cfg.num_classes) != cfg.num_classes or kwargs.get("features_only"):
                # The new classifier of timm's own network is then the one that timm makes.
                with torch.random.fork_rng(devices=[], enabled=not head):
                    _check_keys(create, cfg, overlay, kwargs)
        model = create(pretrained=pretrained, pretrained_cfg=cfg, pretrained_cfg_overlay=overlay, **kwargs)
        if converted and not kwargs.get("features_only") and model.num_classes == cfg.num_classes:
            _check_missing(model, create, cfg, overlay, kwargs)
    if head and not kwargs.get("features_only"):
        add_hpm_head(model, **head_args)
        # A saved model may lose its tag, and must keep these.
        model.network_args = {name: kwargs[name] for name in tag_args(variant, asked) if name in kwargs}
        _load_head(model, state_dict, cfg, variant)
    return loaded(model, cfg) if converted else model


def build_plain(name: str, kwargs: Mapping[str, Any]) -> Any:
    """Returns timm's own network `name` with the weights of a file, which `pretrained_cfg_overlay` names.

    timm alone would neither read the file's config nor keep its classifier if the tag's has another size, and would
    then load any file, also of another network.
    """
    base, tag = split_model_name_tag(name)
    given = {key: value for key, value in kwargs.items() if value is not None}
    if tag:
        given["pretrained_cfg"] = tag
    # Of the tag's weights.
    given["pretrained_cfg_overlay"] = {"custom_load": False, **kwargs["pretrained_cfg_overlay"]}
    return build_variant(partial(timm.create_model, base), base, True, given, converter(base), head=False)


def converter(base: str) -> Callable[..., dict[str, Tensor]]:
    """Returns the function that converts checkpoints to the names of timm's network `base`."""
    return xcit_state_dict if base.startswith("xcit_") else plain_state_dict


def _load_head(model: Any, state_dict: Mapping[str, Tensor], cfg: PretrainedCfg, variant: str) -> None:
    """Loads the entries of the HPM head beside weight and bias, if there are any, of the model's number of classes."""
    name = head_name(model)
    entries = {key: state_dict[f"{name}.{key}"] for key in _HEAD_ENTRIES if f"{name}.{key}" in state_dict}
    if name is None or not entries:
        return
    head = find_head(model)
    # Stale prototypes are worse than none.
    if model.pretrained_cfg.get("num_classes") == len(entries.get("prototypes", head.weight)) == head.out_features:
        with fitting(weights_place(cfg), variant):
            head.load_state_dict({**entries, **{key: value for key, value in head.state_dict().items()
                                                if key not in _HEAD_ENTRIES}})


def _resolved(variant: str, pretrained: bool, kwargs: Mapping[str, Any], convert: Callable[..., dict[str, Tensor]],
              ) -> tuple[PretrainedCfg, dict[str, Any], dict[str, Tensor]]:
    """Returns the cfg of an entrypoint's weights, its other arguments, and the weights, converted; see `build_variant`.

    Precedence: the caller's arguments, the config in the weights' metadata, that of their folder, the tag's. Weights
    that the network reads by itself (`custom_load`) are not among them.
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
        # Those in the config of a saved model, which timm passes on like the caller's.
        stated = args.get("pretrained_model_args") or {}
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
    """Returns a cfg with its weights' number of classes `found`, by which timm keeps or drops their classifier.

    A negative number of classes in `cfg` means a new classifier. Without `num_classes` among the network's `args` the
    weights must have the classes of `cfg`. `stated` are the model arguments that were saved with the weights, if any.
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
    """Loads a checkpoint into a network of its own classes, strictly, and raises torch's error for other keys.

    With other classes and for features timm loads loosely: it ignores unknown entries, and leaves missing ones random.
    """
    num_classes = num_classes_of(overlay["state_dict"], cfg.classifier) or cfg.num_classes
    if num_classes < 0:
        return
    same = {name: value for name, value in kwargs.items() if name not in _LOOSE_ARGS}
    try:
        model = create(pretrained=True, pretrained_cfg=cfg, num_classes=num_classes, **same,
                       pretrained_cfg_overlay={**overlay, "num_classes": num_classes})
    except RuntimeError as error:
        # The real load raises for other shapes, too, except for the classifier's.
        if "Unexpected key(s)" in str(error) or "Missing key(s)" in str(error):
            raise
    else:
        _check_missing(model, create, cfg, overlay, same)


def _check_missing(model: nn.Module, create: Any, cfg: PretrainedCfg, overlay: Mapping[str, Any],
                   kwargs: Mapping[str, Any]) -> None:
    """Raises torch's error if weights lack entries of a loaded network that timm always loads loosely, such as DLA."""
    missing = [key for key in model.state_dict()
               if key not in overlay["state_dict"] and not key.endswith("num_batches_tracked")]
    if not missing:
        return
    # A strict load has passed: the network's own filter renamed entries. It refuses one unknown entry.
    unknown = {**overlay, "state_dict": {"unknown": torch.zeros(1)}}
    try:
        with torch.device("meta"):
            create(pretrained=True, pretrained_cfg=cfg, pretrained_cfg_overlay=unknown, **kwargs)
    except Exception:
        return
    raise RuntimeError(f"Error in loading state_dict: Missing key(s) in state_dict: {', '.join(missing)}")


def loaded(model: Any, cfg: PretrainedCfg) -> Any:
    """Returns a loaded model with the source of its weights in its cfg; warns of a new classifier or no prototypes."""
    model.pretrained_cfg.pop("state_dict", None)
    if cfg.source is not None:
        model.pretrained_cfg["source"] = cfg.source
    if not getattr(model, "num_classes", 0) or cfg.num_classes < 0:
        return model
    name = ".".join(filter(None, (cfg.architecture, cfg.tag)))
    if model.num_classes != cfg.num_classes:
        warnings.warn(
            f"the weights of {name} have {cfg.num_classes} classes, and num_classes is {model.num_classes}: their "
            "classifier is left out, and the model has a random one"
            + ("" if head_name(model) is None else " without prototypes"), DroppedClassifierWarning, stacklevel=2)
    elif head_name(model) is not None and not find_head(model).is_fitted():
        warnings.warn(f"the weights of {name} hold no prototypes: its HPM head {UNFITTED}", UnfittedHeadWarning,
                      stacklevel=2)
    return model


def weights_place(cfg: PretrainedCfg) -> str:
    """Returns the place of a pretrained cfg's weights, for messages."""
    if cfg.state_dict and cfg.source != "hf-hub":
        return "the given state dict"
    if cfg.file and cfg.source != "hf-hub":
        return f"the weights in {cfg.file}"
    if cfg.hf_hub_id:
        return f"{cfg.hf_hub_filename or 'the weights'} of the Hugging Face repository {cfg.hf_hub_id}"
    return f"the weights at {cfg.url}"


def read_checkpoint(cfg: PretrainedCfg, cache_dir: str | Path | None = None) -> dict[str, Tensor]:
    """Returns the state dict of a pretrained cfg's file, with the file's own names; code in the file does not run."""
    found: dict[str, Tensor] = {}

    def keep(checkpoint: Any, model: nn.Module) -> dict[str, Tensor]:
        found.update(unwrap(checkpoint))
        return {}

    if not (cfg.source or cfg.state_dict) and (cfg.file or (cfg.url and not cfg.hf_hub_id)):
        # timm would choose among several state dicts by itself, and torch 2.6 reads no safetensors of a URL.
        with reading(weights_place(cfg)):
            return unwrap(read_file(cfg.file or download_cached_file(cfg.url or "", check_hash=False, progress=True,
                                                                     cache_dir=cache_dir)))
    source = {**cfg.to_dict(), "first_conv": None, "classifier": None}
    anything = cfg.has_weights or cfg.state_dict or cfg.source
    with reading(weights_place(cfg)) if anything else nullcontext():
        load_pretrained(nn.Module(), source, filter_fn=keep, cache_dir=cache_dir)
    return found
