"""`timm.create_model` and loading for scripts: every mistake of a command line is a ValueError that explains itself."""

import json
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import load_model_config_from_hf
from torch import nn

from ..checkpoints import fitting, reading
from ..data import ImageSplit, data_source, open_split
from .hpm_timm import register_saved
from .saving import CONFIG, WEIGHTS, in_chans


def create_model(name: str, *, pretrained: bool, **kwargs: Any) -> Any:
    """Returns `timm.create_model(name, pretrained, **kwargs)`.

    Where `name` is that of a saved model, its architecture may be any `hpm_*`, also one that nobody has registered.

    Raises:
        ValueError: an unknown model, a tag without weights, or arguments that the model does not take.
        OSError: a saved model that is not there, or cannot be reached.
    """
    try:
        place, _, path = name.partition(":")
        if place in ("hf-hub", "hf_hub"):
            register_saved(load_model_config_from_hf(path)[1])
        elif place == "local-dir" and (Path(path) / CONFIG).is_file():
            register_saved(str(json.loads((Path(path) / CONFIG).read_text(encoding="utf-8")).get("architecture")))
        return timm.create_model(name, pretrained=pretrained, **kwargs)
    except (RuntimeError, TypeError) as error:
        given = "".join(f", {key}={value!r}" for key, value in kwargs.items())
        raise ValueError(f"cannot create the model {name!r} (pretrained={pretrained}{given}): {error}. Names are those "
                         "of timm.list_models(), weights those of timm.list_pretrained()") from error


def load_checkpoint(model: nn.Module, path: str) -> None:
    """Loads weights from a file (safetensors, or a PyTorch file that holds nothing but tensors) into `model`, strictly.

    Where the file lies in a folder of timm's `local-dir:`, such as one of train.py, its `config.json` says by which
    mean and std the weights expect pixels normalised; the model takes those over.

    Raises:
        ValueError: no such file, a damaged one, or weights of another model.
    """
    place = f"the checkpoint {path}"
    try:
        with reading(place):
            state_dict = timm.models.load_state_dict(path, weights_only=True)
        with fitting(place, type(model).__name__):
            model.load_state_dict(state_dict)
    except RuntimeError as error:
        raise ValueError(str(error)[:1000]) from error
    model.pretrained_cfg.update(saved_normalisation(path))  # type: ignore[operator, union-attr]


def saved_normalisation(path: str) -> dict[str, tuple[float, ...]]:
    """Returns the mean and std by which weights in a folder of timm's `local-dir:` expect pixels normalised.

    Nothing of weights in another place, which do not say it.

    Raises:
        ValueError: a `config.json` beside the weights that cannot be read.
    """
    config = Path(path).with_name(CONFIG)
    if Path(path).name != WEIGHTS or not config.is_file():
        return {}
    try:
        saved = json.loads(config.read_text(encoding="utf-8"))["pretrained_cfg"]
        return {name: tuple(saved[name]) for name in ("mean", "std")}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{config} does not say how {path} expects pixels normalised ({error!r}); take it away, or "
                         "mend it") from error


def open_split_for(model: Any, dataset: str, split: str, *, img_size: int | None = None, **options: Any) -> ImageSplit:
    """Returns `open_split(dataset, split, **options)` in the size, the channels and the classes that `model` takes.

    Arguments:
        model: a timm model.
        img_size: pixels a side that images are resized to where they are decoded; None takes the model's own.

    Raises:
        ValueError: images or classes that do not fit the model, and all else that `open_split` raises.
    """
    cfg = model.pretrained_cfg
    source = data_source(dataset)
    height, width = (img_size, img_size) if img_size is not None else cfg["input_size"][1:]
    if img_size is None and source.image_size is not None and not cfg.get("fixed_input_size"):
        height, width = source.image_size[1:]
    if source.num_classes not in (None, model.num_classes):
        raise ValueError(f"{type(model).__name__} has {model.num_classes} classes and {dataset} {source.num_classes}; "
                         f"give --num-classes {source.num_classes}")
    opened = open_split(dataset, split, num_classes=model.num_classes, input_size=(in_chans(model), height, width),
                        crop_pct=cfg.get("crop_pct") or 1.0, interpolation=cfg.get("interpolation") or "bicubic",
                        **options)
    if opened.num_classes != model.num_classes:
        raise ValueError(f"{type(model).__name__} has {model.num_classes} classes and {dataset} {opened.num_classes}; "
                         f"give --num-classes {opened.num_classes}")
    return opened


def usable_device(name: str) -> torch.device:
    """Returns the device of a name, after a first use of it.

    Raises:
        ValueError: an unknown device, or one that this machine or PyTorch build does not have.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # which meta, that holds no values, does not answer
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(f"the device {name!r} cannot be used: {error}") from error
    return device
