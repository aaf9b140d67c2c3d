"""A model in a folder, in timm's own format: what the Hub gets, and what a converted checkpoint becomes.

The weights file holds its config as well, in its metadata: renamed, or beside the config of another save, it still says
what it is.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from timm.models import get_pretrained_cfg
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from ..head import find_head
from .configs import checked_config
from .preact import PreActNet

WEIGHTS: Final = "model.safetensors"
CONFIG: Final = "config.json"
#: What a pretrained cfg says of how its weights came about.
OF_TRAINING: Final = ("license", "origin_url", "paper_ids", "paper_name", "notes")
# The key of the config among a weights file's metadata.
_METADATA: Final = "timm_hpm"
# Model arguments that say how a model was made or is used, not which function its weights are of.
_NOT_OF_WEIGHTS: Final = ("num_classes", "features_only", "feature_cls", "out_indices", "cache_dir", "device", "dtype")


def write_model(
        model: Any,
        folder: Path,
        *,
        training: dict[str, Any] | None = None,
        license: str | None = None,
        **model_args: Any,
) -> dict[str, Any]:
    """Writes a model into an existing folder as timm's `local-dir:` reads it, and returns its config.

    Arguments:
        model, model_args: see `model_config`.
        folder: receives `WEIGHTS` and `CONFIG`.
        training: the options and results of the model's training, for the config.
        license: of the weights, for the config; None leaves that of the model's pretrained cfg.

    Raises:
        ValueError: see `model_config` and `tensors_of`.
    """
    config = model_config(model, **model_args)
    if training is not None:
        config["training"] = training
    if license is not None:
        config["pretrained_cfg"]["license"] = license
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(tensors_of(model), folder / WEIGHTS, weights_metadata(config))
    return config


def model_config(model: Any, **model_args: Any) -> dict[str, Any]:
    """Returns the config that timm makes a model from: its architecture, its pretrained cfg and its model arguments.

    The weights do not show all of it: mix, EMA decay, inference mode, layout, channels, and the normalisation.

    Arguments:
        model: a model with an HPM head, made by `timm.create_model`.
        model_args: further arguments of `timm.create_model`, which older versions of timm do not record.

    Raises:
        ValueError: a model that timm.create_model did not make, or arguments that JSON cannot hold.
    """
    head = find_head(model)
    cfg = getattr(model, "pretrained_cfg", None) or {}
    architecture = cfg.get("architecture")
    if not architecture:
        raise ValueError(f"{type(model).__name__} has no architecture in its pretrained_cfg, so timm could not build "
                         "it again. Expected a model that timm.create_model made")
    with TemporaryDirectory(prefix="timm_hpm-") as temporary:
        path = Path(temporary) / CONFIG
        try:
            # Newer versions of timm add what create_model was given; older ones write these alone.
            args = {**model_args, **_network_args(model), **head.config()}
            if in_chans(model) != cfg["input_size"][0]:
                args["in_chans"] = in_chans(model)
            save_config_for_hf(model, path, model_args=args)  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            raise ValueError(f"timm cannot write the config of {architecture}: {error}. Create the model with "
                             "arguments that JSON can hold") from error
        config = json.loads(path.read_text(encoding="utf-8"))
    # A resumed run gives arguments that its first part found out: equal models, equal files.
    config["model_args"] = dict(sorted(config["model_args"].items()))
    # The published accuracies of the tag's own weights need not hold for these. A licence and an origin that are the
    # network's, or that timm gave to weights of which nobody knows whether they are here, are not those of the weights.
    others = not architecture.startswith("hpm_") or cfg.get("origin_url") == _network_origin(architecture)
    for name in OF_TRAINING if others else ("notes",):
        config["pretrained_cfg"].pop(name, None)
    if cfg.get("num_classes") != model.num_classes:
        config["pretrained_cfg"].pop("tag", None)  # the tag's weights have another classifier
        names = cfg.get("label_names") or ()
        if len(names) == model.num_classes:  # timm takes them for the tag's
            config["pretrained_cfg"]["label_names"] = names
    if not architecture.startswith("hpm_"):
        config["architecture"] = f"hpm_{architecture}"
    return config


def _network_origin(architecture: str) -> str | None:
    """Returns the origin that a network has before any weights are loaded; None if it says none."""
    try:
        cfg = get_pretrained_cfg(f"{architecture}.untrained")
    except RuntimeError:  # no such tag
        return None
    return None if cfg is None else cfg.origin_url


def weights_metadata(config: dict[str, Any]) -> dict[str, str]:
    """Returns the metadata of a safetensors file whose weights are of a model with this config."""
    # One entry: safetensors writes several in any order, and equal models would make different files.
    return {_METADATA: json.dumps(config)}


def saved_config(path: str | Path) -> dict[str, Any]:
    """Returns the config of the model that a weights file was saved of; empty if nothing says it.

    It stands in the file's metadata; for files without, in the `CONFIG` beside a file that is named `WEIGHTS`.

    Raises:
        ValueError: a damaged config.
    """
    path = Path(path)
    beside = path.with_name(CONFIG)
    if not (config := own_config(path)) and path.name == WEIGHTS and beside.is_file():
        config = _checked(beside.read_bytes(), beside)
    return config


def own_config(path: str | Path) -> dict[str, Any]:
    """Returns the config in a weights file's metadata; empty if it has none.

    Raises:
        ValueError: a damaged config.
    """
    path = Path(path)
    if path.suffix != ".safetensors" or not path.is_file():
        return {}
    with safe_open(path, "pt") as file:
        text = (file.metadata() or {}).get(_METADATA)
    return {} if text is None else _checked(text, path)


def config_fields(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of a pretrained cfg that a saved config knows of its weights' inputs and classes."""
    names = ("mean", "std", "input_size", "crop_pct", "interpolation", "label_names")
    cfg = config["pretrained_cfg"]
    return {name: tuple(cfg[name]) if isinstance(cfg[name], list) else cfg[name] for name in names if name in cfg}


def config_args(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of `timm.create_model` that a saved config's weights need, but for the number of classes.

    Those that name another source of weights are left out.
    """
    return {name: value for name, value in config["model_args"].items()
            if name not in _NOT_OF_WEIGHTS and not name.startswith(("pretrained", "checkpoint"))}


def _checked(text: str | bytes, place: Path) -> dict[str, Any]:
    """Returns the config in a text, or raises a ValueError that names its place and what is wrong with it."""
    config = checked_config(text, place)
    cfg = config["pretrained_cfg"]
    if not (cfg.get("mean") and cfg.get("std") and len(cfg["mean"]) == len(cfg["std"])):
        raise ValueError(f"{place} does not say how its weights expect pixels normalised; take it away, mend it, or "
                         "save the model again")
    return config


def in_chans(model: nn.Module) -> int:
    """Returns how many channels a network takes, whatever its pretrained cfg says."""
    cfg: Any = model.pretrained_cfg
    conv = dict(model.named_modules()).get(cfg["first_conv"]) if isinstance(cfg.get("first_conv"), str) else None
    return conv.in_channels if isinstance(conv, nn.Conv2d) else cfg["input_size"][0]


def _network_args(model: nn.Module) -> dict[str, Any]:
    """Returns the arguments of a network that its tag or its caller gave: a `PreActNet`'s as it is now."""
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
    """Returns a model's state dict as safetensors takes it: on the CPU, contiguous, and no two in one storage.

    Raises:
        ValueError: entries that safetensors cannot hold; the message names them.
    """
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
