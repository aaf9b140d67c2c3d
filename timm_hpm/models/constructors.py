"""Networks from a caller's own constructor: `path/to/file.py:function` or `package.module:function`."""

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from torch import nn

from ..head import HPMHead, find_head, head_name
from ..surgery import HPMMixin, UnsupportedHeadError, add_hpm_head, find_classifier, is_equipped

# Prefixes of timm's own names with a colon.
_PLACES: Final = ("hf-hub", "hf_hub", "local-dir")
#: Arguments of an HPM head.
HEAD_ARGS: Final = ("mix", "ema_decay", "inference")
#: The beginning of the `normalisation_source` of a network for which nobody has stated one.
UNNORMALISED: Final = "none"
# Arguments that a constructor need not take.
_OPTIONAL: Final = ("num_classes", "in_chans", "img_size")


def is_constructor(name: str) -> bool:
    """Returns whether a model's name is that of a constructor, not of a timm model."""
    return ":" in name and name.partition(":")[0] not in _PLACES


def named_again(name: str, given: Mapping[str, Any], folder: Any) -> list[str]:
    """Returns the options that a command needs besides `--resume` to go on with a run of the model `name`."""
    if not is_constructor(name):
        return []
    if given.get("model") != name:
        raise ValueError(f"the run in {folder} is of the constructor {name}, and code is not run because a file names "
                         f"it. If it is your own, name it: --model {name}")
    return ["--model", name]


def find_constructor(name: str) -> Callable[..., Any]:
    """Imports and returns the function `path/to/file.py:function` or `package.module:function`."""
    place, _, function = name.rpartition(":")
    module = _import_file(Path(place)) if place.endswith(".py") else _import_module(place)
    found = getattr(module, function, None)
    if not callable(found):
        own = [key for key, value in vars(module).items()
               if callable(value) and getattr(value, "__module__", None) == module.__name__ and not key.startswith("_")]
        raise ValueError(f"{place} has no function {function!r}; it has {', '.join(own) or 'none'}")
    return found


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ValueError(f"there is no file {path}; expected path/to/file.py:function or package.module:function")
    path = path.resolve()
    name = f"timm_hpm_constructor_{abs(hash(path))}"
    if name not in sys.modules:
        # Modules beside it can be imported, as if it were run, but hide no installed ones.
        sys.path.append(str(path.parent))
        spec: Any = spec_from_file_location(name, path)
        sys.modules[name] = module_from_spec(spec)
        try:
            spec.loader.exec_module(sys.modules[name])
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def _import_module(name: str) -> ModuleType:
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if not f"{name}.".startswith(f"{error.name}."):  # one that the module itself imports
            raise
        raise ValueError(f"there is no module {error.name!r} here or installed; expected package.module:function or "
                         "path/to/file.py:function") from error


def construct(name: str, given: Mapping[str, Any], saved: Mapping[str, Any]) -> Any:
    """Returns the network that the constructor `name` makes, with the attributes of a timm model.

    It gets an HPM head if its arguments `given`, or in the config `saved` with its weights, have some of one and the
    constructor has not added one. Those of `_OPTIONAL` are passed only if it takes them.
    """
    make = find_constructor(name)
    args = {**(saved.get("model_args") or {}), **given}
    overlay = args.pop("pretrained_cfg_overlay", None) or {}
    head_args = {key: args.pop(key) for key in HEAD_ARGS if key in args}
    parameters = inspect.signature(make).parameters.values()
    takes = {parameter.name for parameter in parameters}
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        args = {key: value for key, value in args.items() if key in takes or key not in _OPTIONAL}
    made = make(**args)
    if not isinstance(made, nn.Module):
        raise ValueError(f"{name} returned {type(made).__name__}; expected an nn.Module")
    model: Any = made
    if head_args and not is_equipped(model):
        add_hpm_head(model, (saved.get("pretrained_cfg") or {}).get("classifier"), **head_args)
    elif head_args:
        head = find_head(model)
        for key, value in HPMHead(1, 1, **{**head.config(), **head_args}).config().items():
            setattr(head, key, value)
    if "mean" not in {**(getattr(model, "pretrained_cfg", None) or {}), **overlay}:
        model.normalisation_source = f"{UNNORMALISED}, {name} takes pixels in [0, 1]"
    describe(model, name, {key: value for key, value in overlay.items() if key != "file"}, given.get("in_chans") or 3)
    if given.get("img_size"):
        model.pretrained_cfg["input_size"] = (model.pretrained_cfg["input_size"][0], *[given["img_size"]] * 2)
    model.network_args = args
    if given.get("num_classes") not in (None, model.num_classes):
        raise ValueError(f"{name} made a network of {model.num_classes} classes, and num_classes is "
                         f"{given['num_classes']}; let the constructor take num_classes")
    return model


def describe(model: Any, name: str | None = None, fields: Mapping[str, Any] | None = None, in_chans: int = 3) -> None:
    """Gives a network the attributes `num_classes` and `pretrained_cfg` of timm's models, by `described_cfg`."""
    model.pretrained_cfg = cfg = described_cfg(model, name, fields, in_chans)
    model.num_classes = cfg["num_classes"]


def described_cfg(model: Any, name: str | None = None, fields: Mapping[str, Any] | None = None,
                  in_chans: int = 3) -> dict[str, Any]:
    """Returns the pretrained cfg of a network that timm did not make; without a mean it takes pixels in [0, 1].

    `name` is its constructor's, else its class's. `fields` win over those of its own `pretrained_cfg`, which are kept.
    `in_chans` is of a network that has neither a convolution nor a mean or `input_size`.
    """
    kind = type(model).__bases__[1] if isinstance(model, HPMMixin) else type(model)
    name, fields = name or f"{kind.__module__}:{kind.__qualname__}", fields or {}
    own = {**(getattr(model, "pretrained_cfg", None) or {}), **fields}
    try:
        classifier = head_name(model) or find_classifier(model)
    except UnsupportedHeadError:
        classifier = None
    classes = len(model.get_submodule(classifier).weight) if classifier else getattr(model, "num_classes", None)
    if not isinstance(classes, int):
        raise ValueError(f"{name} does not say its number of classes: set the attribute num_classes of the module")
    convs = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    first, channels = (convs[0][0], convs[0][1].in_channels) if convs else (None, in_chans)
    if "mean" in own or "input_size" in own:
        channels = len(own["mean"]) if "mean" in own else own["input_size"][0]
    return {
        "input_size": (channels, 224, 224), "mean": (0.0,) * channels, "std": (1.0,) * channels, "crop_pct": 1.0,
        "interpolation": "bicubic", **own, "first_conv": first, "classifier": classifier, "num_classes": classes,
        "architecture": name, "constructor": name, "tag": None}
