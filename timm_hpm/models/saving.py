"""Saving a model into a folder in timm's format, for the Hub and for converted checkpoints.

The metadata of the weights file repeats the config, and identifies the file if it is renamed or moved.
"""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from timm.models import get_pretrained_cfg
from timm.models._hub import save_config_for_hf
from timm.utils import ModelEma, ModelEmaV2, ModelEmaV3
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from .. import rules
from ..data import PixelModel, normalisation_of, unwrapped
from ..head import find_head, head_name
from ..rules import COUNT, NUMBER, POSITIVE, STRING, Rule
from .constructors import described_cfg
from .preact import PreActNet

WEIGHTS: Final = "model.safetensors"
CONFIG: Final = "config.json"
#: Fields of a pretrained cfg about the training of its weights.
OF_TRAINING: Final = ("license", "origin_url", "paper_ids", "paper_name", "notes")
# The key of the config among a weights file's metadata.
_METADATA: Final = "timm_hpm"
# Model arguments that do not change the function of the weights.
_NOT_OF_WEIGHTS: Final = ("num_classes", "features_only", "feature_cls", "out_indices", "cache_dir", "device", "dtype")

_AVERAGES: Final = (ModelEmaV2, ModelEmaV3, AveragedModel)
# Largest size and depth of a config; timm's own are below 3 MB and four levels.
_MOST_BYTES: Final = 64 * 2**20
_SHALLOW: Final = rules.shallow(20)

_TEXTS: Final = Rule(lambda value: isinstance(value, str) or (isinstance(value, list | tuple) and all(
    isinstance(part, str) for part in value)), "a text or an array of texts")
_SIZE: Final = Rule(lambda value: isinstance(value, list | tuple) and len(value) == 3 and all(map(COUNT.holds, value)),
                    "channels, height and width, whole numbers above 0")
# Fields of a pretrained cfg, of which each may be null.
_FIELDS: Final = {f"{name}?": (pattern,) for name, pattern in {
    "num_classes": Rule(lambda value: COUNT.holds(value) or (value in (0, -1) and NUMBER.holds(value)),
                        "a whole number from 0"),
    "mean": [NUMBER],
    "std": [POSITIVE],
    **dict.fromkeys(("input_size", "test_input_size", "min_input_size"), _SIZE),
    **dict.fromkeys(("crop_pct", "test_crop_pct"), POSITIVE),
    **dict.fromkeys(("interpolation", "crop_mode", "tag", "license", "origin_url", "paper_name"), STRING),
    **dict.fromkeys(("first_conv", "classifier", "notes", "paper_ids"), _TEXTS),
    "fixed_input_size": rules.TRUTH,
    "label_names": [STRING],
}.items()} | {"*": rules.ANYTHING}
_CONFIG: Final = {
    "architecture": STRING, "pretrained_cfg": {"*": _SHALLOW}, "model_args": {"*": _SHALLOW}, "*": _SHALLOW,
    **{f"{name}?": _FIELDS[f"{name}?"] for name in ("num_classes", "label_names")}}


def write_model(model: Any, folder: Path, *, training: dict[str, Any] | None = None,
                license: str | None = None) -> dict[str, Any]:
    """Writes a model into a folder in the format of timm's `local-dir:`; returns its config, with its `training`."""
    config = model_config(model)
    if training is not None:
        config["training"] = training
    if license is not None:
        config["pretrained_cfg"]["license"] = license
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(tensors_of(model), folder / WEIGHTS, weights_metadata(config))
    return config


def saved_network(model: nn.Module) -> Any:
    """Returns the network in a wrapper; that in a `PixelModel` states its mean and std in its pretrained cfg."""
    model = _without_wrappers(model)
    if not isinstance(model, PixelModel):
        return model
    check_no_draws(model)
    network: Any = copy.copy(_without_wrappers(model.model))  # the caller's keeps its cfg
    cfg, own = getattr(network, "pretrained_cfg", None) or {}, in_float32(normalisation_of(model))
    if in_float32(cfg if cfg.get("mean") and cfg.get("std") else None) != own:
        network.pretrained_cfg = {**cfg, **own}
    return network


def _without_wrappers(model: Any) -> nn.Module:
    # Not by timm's unwrap_model, which takes any attribute named `module` for the model.
    if isinstance(model, ModelEma):  # timm's oldest average, no nn.Module
        return _without_wrappers(model.ema)
    model = unwrapped(model)
    return _without_wrappers(model.module) if isinstance(model, _AVERAGES) else model


def check_no_draws(model: PixelModel) -> None:
    """Raises a ValueError if a model averages several draws, which no saved file says."""
    if model.draws > 1:
        raise ValueError(f"the PixelModel averages {model.draws} draws, and a saved model is a network of one; give "
                         f"PixelModel(model, mean, std) without draws, and evaluate with --eot {model.draws}")


def in_float32(normalisation: Mapping[str, Any] | None) -> dict[str, list[float]]:
    """Returns the mean and std of a normalisation as a model keeps them; {} if there is none."""
    return {name: np.asarray(normalisation[name], np.float32).tolist()
            for name in ("mean", "std")} if normalisation else {}


def model_config(model: Any) -> dict[str, Any]:
    """Returns the config that timm makes a model from: its architecture, its pretrained cfg and its model arguments.

    The weights do not show mix, EMA decay, inference mode, layout, channels and normalisation.
    """
    head_args = {} if head_name(model) is None else find_head(model).config()
    cfg = getattr(model, "pretrained_cfg", None) or {}
    architecture: Any = cfg.get("architecture")
    if not architecture or cfg.get("constructor"):
        return _constructor_config(described_cfg(model, cfg.get("constructor")),
                                   {**getattr(model, "network_args", {}), **head_args})
    with TemporaryDirectory(prefix="timm_hpm-") as temporary:
        path = Path(temporary) / CONFIG
        try:
            # timm adds the arguments of create_model.
            save_config_for_hf(model, path, model_args={**_network_args(model), **head_args})  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            raise ValueError(f"timm cannot write the config of {architecture}: {error}. Create the model with "
                             "arguments that JSON can hold") from error
        config = json.loads(path.read_text(encoding="utf-8"))
    # The arguments of a resumed run have another order, and equal models must make equal files.
    config["model_args"] = dict(sorted(config["model_args"].items()))
    # The published accuracies of the tag's weights need not hold for these, nor the licence and origin of the network,
    # or of timm's weights, which may not be the loaded ones.
    others = not architecture.startswith("hpm_") or cfg.get("origin_url") == _network_origin(architecture)
    for name in OF_TRAINING if others else ("notes",):
        config["pretrained_cfg"].pop(name, None)
    if cfg.get("num_classes") != model.num_classes:
        config["pretrained_cfg"].pop("tag", None)  # the tag's weights have another classifier
        names = cfg.get("label_names") or ()
        if len(names) == model.num_classes:  # timm takes them for the tag's
            config["pretrained_cfg"]["label_names"] = names
    if head_args and not architecture.startswith("hpm_"):
        config["architecture"] = f"hpm_{architecture}"
    return config


def _constructor_config(cfg: dict[str, Any], args: dict[str, Any]) -> dict[str, Any]:
    fields = {name: value for name, value in cfg.items() if value is not None}
    config = {"architecture": fields.pop("architecture"), "constructor": fields.pop("constructor"),
              "num_classes": cfg["num_classes"], "model_args": dict(sorted(args.items())), "pretrained_cfg": fields}
    try:
        return json.loads(json.dumps(config))
    except (TypeError, ValueError) as error:
        raise ValueError(f"the arguments of {config['constructor']} do not fit into JSON: {error}") from error


def _network_origin(architecture: str) -> str | None:
    """Returns the origin in the cfg of a network without weights; None if it has none."""
    try:
        cfg = get_pretrained_cfg(f"{architecture}.untrained")
    except RuntimeError:  # no such tag
        return None
    return None if cfg is None else cfg.origin_url


def weights_metadata(config: dict[str, Any]) -> dict[str, str]:
    """Returns the metadata of the safetensors file of a model with this config."""
    # One entry: safetensors writes several in random order, and equal models must make equal files.
    return {_METADATA: json.dumps(config)}


def read_config(path: str | Path) -> dict[str, Any]:
    """Returns the config of a saved model in the file `path`; raises as `checked_config` and `open` do."""
    try:
        with open(path, "rb") as file:
            return checked_config(file.read(_MOST_BYTES + 1), path)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist; expected the folder of a saved model. A training run writes "
                                "it after its first epoch") from None


def checked_config(text: str | bytes, place: str | Path) -> dict[str, Any]:
    """Returns the config in a JSON text, in timm's newer form, with the objects `pretrained_cfg` and `model_args`."""
    try:
        if len(text) > _MOST_BYTES:
            raise ValueError(f"it has more than {_MOST_BYTES} bytes")
        config = json.loads(text)
        if isinstance(config, dict):
            # In the older form the fields of the pretrained cfg are beside the architecture.
            config = {"pretrained_cfg": config, "model_args": {}, **config}
        rules.check("", config, _CONFIG)
        check_cfg(config["pretrained_cfg"])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is damaged or not timm's ({str(error)[:300]}); fetch or save it again") from None
    return config


def check_cfg(cfg: Mapping[str, Any]) -> None:
    """Raises a ValueError for the first field of a pretrained cfg that has another type than timm's."""
    rules.check("", dict(cfg), _FIELDS)


def saved_config(path: str | Path) -> dict[str, Any]:
    """Returns the config in a weights file's metadata, or in the `CONFIG` beside a file named `WEIGHTS`, or {}."""
    path = Path(path)
    beside = path.with_name(CONFIG)
    if not (config := own_config(path)) and path.name == WEIGHTS and beside.is_file():
        config = _checked(beside.read_bytes(), beside)
    return config


def own_config(path: str | Path) -> dict[str, Any]:
    """Returns the config in a weights file's metadata, or {}; raises a ValueError if it is damaged."""
    path = Path(path)
    if path.suffix != ".safetensors" or not path.is_file():
        return {}
    with safe_open(path, "pt") as file:
        text = (file.metadata() or {}).get(_METADATA)
    return {} if text is None else _checked(text, path)


def saved_training(file: Path) -> dict[str, Any] | None:
    """Returns the training in the config of a weights file; None without one."""
    training = saved_config(file).get("training") if file.suffix == ".safetensors" and file.is_file() else None
    return training if isinstance(training, dict) else None


def weights_path(model: Any) -> Path:
    """Returns the path of a model's weights by its pretrained cfg."""
    file = Path((model.pretrained_cfg or {}).get("file") or "")
    return file / WEIGHTS if file.is_dir() else file  # timm names a folder


def config_fields(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of a saved config's pretrained cfg about the inputs and the classes of its weights."""
    names = ("mean", "std", "input_size", "crop_pct", "crop_mode", "interpolation", "label_names")
    cfg = config["pretrained_cfg"]
    return {name: tuple(cfg[name]) if isinstance(cfg[name], list) else cfg[name] for name in names if name in cfg}


def config_args(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of `timm.create_model` that a saved config's weights need, but for their classes."""
    return {name: value for name, value in config["model_args"].items()
            if name not in _NOT_OF_WEIGHTS and not name.startswith(("pretrained", "checkpoint"))}


def _checked(text: str | bytes, place: Path) -> dict[str, Any]:
    config = checked_config(text, place)
    cfg = config["pretrained_cfg"]
    if not (cfg.get("mean") and cfg.get("std") and len(cfg["mean"]) == len(cfg["std"])):
        raise ValueError(f"{place} does not say how its weights expect pixels normalised; save the model again")
    return config


def in_chans(model: nn.Module) -> int:
    """Returns the number of input channels of a network, by its first convolution if it has one."""
    cfg: Any = model.pretrained_cfg
    conv = dict(model.named_modules()).get(cfg["first_conv"]) if isinstance(cfg.get("first_conv"), str) else None
    return conv.in_channels if isinstance(conv, nn.Conv2d) else cfg["input_size"][0]


def _network_args(model: nn.Module) -> dict[str, Any]:
    """Returns the arguments of a network from its tag or its caller; for a `PreActNet`, its present ones."""
    if not isinstance(model, PreActNet):
        return getattr(model, "network_args", {})
    info: list[dict[str, Any]] = model.feature_info
    return {
        "depths": [len(stage) for stage in model.stages],  # type: ignore[arg-type]
        "channels": [level["num_chs"] for level in info[1:]],
        "stem_chs": model.conv1.out_channels,
        "stem_stride": model.stem_stride,
        "layout": model.layout,
        "shortcut": model.shortcut,
        "final_norm": not isinstance(model.norm, nn.Identity),
    }


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Returns a model's state dict for safetensors: on the CPU, contiguous, and without shared storage."""
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    state = model.state_dict()
    others = [f"{name} ({_kind(value)})" for name, value in state.items() if _kind(value)]
    if others:
        raise ValueError(f"{type(model).__name__} cannot be saved: safetensors holds plain tensors only, and its state "
                         f"dict has {', '.join(others)}. Save a model without extra state and quantisation")
    for name, tensor in state.items():
        tensor = tensor.detach().cpu().contiguous()
        if tensor.untyped_storage().data_ptr() in storages:
            tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
        tensors[name] = tensor
    return tensors


def _kind(value: Any) -> str:
    """Returns the kind of a state dict's entry that safetensors cannot hold; empty if it can."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    return "quantised" if value.is_quantized else "sparse" if value.layout != torch.strided else ""
