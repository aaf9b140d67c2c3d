"""`timm.create_model` and loading for scripts: every mistake of a command line is a ValueError that explains itself."""

import re
import reprlib
import traceback
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from timm.models import get_pretrained_cfg, split_model_name_tag
from timm.models._hub import download_from_hf

from ..checkpoints import check_architecture, fitting, read_file, reading, unwrap
from ..data import ImageSplit, data_source, open_split
from ..files import filling, remove_unfinished
from ..guards import check_size, shortened, weights_only, without_tokens
from ..head import head_name
from ..names import did_you_mean
from ..threat import ThreatModel
from ._builder import build_plain
from .constructors import construct, is_constructor
from .formats import num_classes_of, plain_state_dict, warn_of_normalisation
from .hpm_timm import register_saved
from .saving import CONFIG, WEIGHTS, config_args, config_fields, in_chans, read_config, saved_config, write_model

# Parts of the names of tags for data sets with other names elsewhere.
_DATA_SETS = {"tiny-imagenet": "tiny", "tiny_imagenet": "tiny", "tinyimagenet": "tiny", "image_folder": "imagenet"}


def create_model(name: str, *, pretrained: bool = False, checkpoint: str | None = None, new_head: bool = False,
                 **kwargs: Any) -> Any:
    """Returns `timm.create_model(name, pretrained, **kwargs)`, with the weights of the file `checkpoint` if given.

    A name such as `path/to/file.py:function` or `package.module:function` calls the caller's own constructor, see
    `construct`; a constructor that only a file names is not run. A saved model's architecture may be any `hpm_*`, also
    one that is not registered. The config in a weights file (the layout, the head's mix and inference mode, ...) gives
    the arguments that are not among `kwargs`. No code of a file runs, and no message contains the token of the Hub's
    client.

    Arguments:
        new_head: whether weights of other classes than `num_classes` may get a new, random classifier.

    Raises:
        ValueError: if the model is unknown, its tag has no weights, a saved model is damaged, the weights do not fit,
            or the model does not take the arguments.
        OSError: if a saved model is missing or cannot be reached.
    """
    if kwargs.get("checkpoint_path"):  # timm would load it unread, under the tag's name and normalisation
        raise ValueError(f"checkpoint_path is {str(kwargs['checkpoint_path'])!r}; give such weights by --checkpoint "
                         "(evaluate.py), --initial-checkpoint (train.py) or pretrained_cfg_overlay=dict(file=...)")
    if is_constructor(name):
        return _constructed(name, checkpoint, kwargs)
    # Without the cause: it may quote a server's response, with the token.
    try:
        model: Any = _created(name, pretrained, _args_of(checkpoint, name) | kwargs)
    except OSError as error:
        raise OSError(without_tokens(str(error))) from None
    except Exception as error:  # damaged files and arguments of other types cause errors of any type
        given = "".join(f", {key}={reprlib.repr(value)}" for key, value in kwargs.items())
        text = shortened(without_tokens(str(error) or type(error).__name__))
        raise ValueError(f"cannot create the model {name!r} (pretrained={pretrained}{given}): {text}. "
                         f"{_nearest(name)}") from None
    if checkpoint is not None:
        load_checkpoint(model, checkpoint, kwargs.get("pretrained_cfg_overlay") or ())
        return model
    classes = model.pretrained_cfg.get("num_classes")
    if pretrained and not new_head and model.num_classes != classes:
        raise ValueError(f"the pretrained weights of {name} have {classes} classes, and num_classes is "
                         f"{model.num_classes}: the classifier would be random. Leave num_classes out, or give weights "
                         f"of {model.num_classes} classes (--checkpoint FILE)")
    return model


def load_model(
        name: str | None = None,
        *,
        dataset: str | None = None,
        threat: ThreatModel | str | None = None,
        **model_args: Any,
) -> Any:
    """Returns a public robust network with its weights, in eval mode: the only one that fits.

    Arguments:
        name: a tag such as `"wang2023_cifar10_linf"`, a name such as `"hpm_wrn28_10.wang2023_cifar10_linf"`, an
            architecture such as `"hpm_wrn28_10"` or a part of any of them; None takes all.
        dataset: the training set, such as `"cifar10"`, `"imagenet"` or `"torch/cifar100"`.
        threat: the threat model of the training, such as `"Linf:8/255"`.
        model_args: arguments of `timm.create_model`, such as `inference`.

    Raises:
        ValueError: if no network or more than one fits; the message lists the candidates, or the nearest names.
    """
    threat = ThreatModel.of(threat) if threat else None
    cfgs = {full: get_pretrained_cfg(full) for full in timm.list_pretrained("hpm_*")}
    known = {full: cfg.notes for full, cfg in cfgs.items() if cfg and cfg.notes}
    found = [full for full, notes in known.items() if _fits(full, notes, dataset, threat)]
    if name is not None:
        exact = [full for full in found if name in (full, full.partition(".")[2])]
        found = exact or [full for full in found if name in full]
    if len(found) != 1:
        wanted = (("name", name), ("dataset", dataset), ("threat", threat))
        asked = ", ".join(f"{key}={str(value)!r}" for key, value in wanted if value) or "nothing"
        if not found:
            near = did_you_mean(name, [*known, *(full.partition(".")[2] for full in known)])
            raise ValueError(f"no network fits {asked}{near}; see timm.list_pretrained('hpm_*') and docs/models.md")
        lines = "".join(f"\n    {full}: {'; '.join(known[full])}" for full in found)
        raise ValueError(f"{len(found)} networks fit {asked}; expected one. They are:{lines}")
    return create_model(found[0], pretrained=True, **model_args).eval()


def _fits(full: str, notes: tuple[str, ...], dataset: str | None, threat: ThreatModel | None) -> bool:
    part = (dataset or "").lower().rpartition("/")[2].replace("cifar-", "cifar")
    # A tag is the authors and the year, if any, the data set and the norm.
    tag = re.sub(r"^[a-z]+\d{4}_|_(linf|l2)(_.*)?$", "", full.partition(".")[2])
    return (not part or _DATA_SETS.get(part, part) == tag) and (
        threat is None or ThreatModel.of(notes[0].partition(": ")[2]) == threat)


def convert(checkpoint: str | Path, model_name: str, output: str | Path, *, cfg: dict[str, Any] | None = None,
            **model_args: Any) -> Any:
    """Converts a checkpoint of any format that `timm_hpm.models.formats` knows, and returns its model.

    The file is safetensors, or a PyTorch file of only tensors and plain values. The folder `output` gets
    `model.safetensors` and `config.json`, whole or not at all; if it holds a model, that is an OSError. `cfg` are
    fields of the pretrained cfg that are not the tag's in `model_name`, such as mean; `model_args` are arguments
    of `timm.create_model`, of which `num_classes` is that of the checkpoint. Raises as `create_model` does.
    """
    overlay = {**(cfg or {}), "file": str(checkpoint)}
    if "num_classes" in model_args:
        # As an argument it would make timm replace the checkpoint's classifier.
        overlay["num_classes"] = model_args.pop("num_classes")
    if overlay.get("num_classes", 1) < 1:
        raise ValueError(f"num_classes is {overlay['num_classes']}; expected that of the checkpoint, above 0")
    remove_unfinished(output)
    if any((Path(output) / name).exists() for name in (CONFIG, WEIGHTS)):
        raise OSError(f"{output} holds a model; choose another --output, or remove it")
    with filling(output, first=WEIGHTS) as folder:
        model = create_model(model_name, pretrained=True, pretrained_cfg_overlay=overlay, **model_args)
        write_model(model, folder)
    return model


def _constructed(name: str, checkpoint: str | None, kwargs: dict[str, Any]) -> Any:
    overlay = kwargs.get("pretrained_cfg_overlay") or {}
    file = checkpoint or overlay.get("file")
    try:
        saved = saved_config(file) if file else {}
        model = construct(name, kwargs, saved if "constructor" in saved else {})
    except Exception as error:  # the caller's own code raises errors of any type
        frames = traceback.extract_tb(error.__traceback__)
        # The call itself fails in a file of this package.
        own = isinstance(error, ValueError) or Path(frames[-1].filename).parent == Path(__file__).parent
        place = "" if own else f" ({frames[-1].filename}, line {frames[-1].lineno})"
        if isinstance(error, TypeError) and own:
            place = "; --model-kwargs NAME=VALUE gives the constructor's arguments"
        raise ValueError(f"cannot create the model {name!r}: {type(error).__name__}: {error}{place}") from error
    if file:
        load_checkpoint(model, file, overlay, unfitted=checkpoint is None)
    return model


def _nearest(name: str) -> str:
    base = split_model_name_tag(name)[0]
    known = timm.list_models()
    if ":" in name or base in known:
        return "Names are those of timm.list_models(), weights those of timm.list_pretrained()"
    near = did_you_mean(base, [*known, *(f"hpm_{other}" for other in known if not other.startswith("hpm_"))])
    return ("Names are those of timm.list_models(), hpm_ before any of them (in Python after timm_hpm.register_hpm), "
            f"or a constructor of your own, path/to/file.py:function{near}")


def _created(name: str, pretrained: bool, kwargs: dict[str, Any]) -> Any:
    """Returns `timm.create_model(name, pretrained, **kwargs)`, if that fits this machine; no file's code runs."""
    place, _, path = name.partition(":")
    asked = kwargs
    with weights_only():
        if place in ("hf-hub", "hf_hub", "local-dir"):
            config = read_config(Path(path) / CONFIG if place == "local-dir" else download_from_hf(path, CONFIG))
            if "constructor" in config:
                raise ValueError(f"its constructor is {str(config['constructor'])!r:.200}, and code is not run because "
                                 "a file names it. If it is your own, name it, with these weights: --model "
                                 f"CONSTRUCTOR --checkpoint {path}/{WEIGHTS}")
            register_saved(config["architecture"])
            asked = {**kwargs, "config": config}
        elif timm.is_model(split_model_name_tag(name)[0].removeprefix("hpm_")):
            register_saved(split_model_name_tag(name)[0])
        if not name.startswith("hpm_"):  # these check themselves
            check_size(lambda: timm.create_model(name, pretrained=False, **kwargs), asked)
            file = str((kwargs.get("pretrained_cfg_overlay") or {}).get("file") or "")
            # timm alone knows the arrays of an .npz file.
            if pretrained and file and not file.endswith(".npz") and timm.is_model(split_model_name_tag(name)[0]):
                return build_plain(name, kwargs)
        return timm.create_model(name, pretrained=pretrained, **kwargs)


def _args_of(checkpoint: str | None, name: str) -> dict[str, Any]:
    """Returns the model arguments in a weights file's config, if it is of the architecture `name`."""
    if checkpoint is None:
        return {}
    with _explained(checkpoint):
        config = saved_config(checkpoint)
    of_name = config and (":" in name or split_model_name_tag(name)[0] == config["architecture"])
    return config_args(config) if of_name else {}


def load_checkpoint(model: Any, path: str, given: Collection[str] = (), *, unfitted: bool = False) -> None:
    """Loads weights from a file (safetensors, or a PyTorch file that holds nothing but tensors) into `model`, strictly.

    The model adopts the normalisation and the class names in the config of our own files, but for the fields `given`
    by the caller. Another file causes a `NormalisationWarning`, unless it contains a module that normalises. If
    `unfitted`, weights without prototypes load, and leave the HPM head without any.
    """
    cfg, source = model.pretrained_cfg, getattr(model, "normalisation_source", None)
    with _explained(path):
        config = saved_config(path)
        if config:
            cfg.update({name: value for name, value in config_fields(config).items() if name not in given})
        with reading(f"the checkpoint {path}"):
            state_dict = unwrap(read_file(path))
        with fitting(f"the checkpoint {path}", type(model).__name__, num_classes_of(state_dict, cfg.get("classifier"))):
            # Networks of other names may have the same entries, and other padding, activations or patches.
            known = cfg.get("architecture")
            if config and "constructor" not in cfg and config["architecture"] not in (known, f"hpm_{known}"):
                check_architecture(config, known)
            network = f"the pretrained_cfg of {cfg.get('architecture') or type(model).__name__}"
            # Not in the pretrained_cfg, which has timm's fields only; `PixelModel` reads it.
            model.normalisation_source = f"the config in {path}" if config else network
            if not config and "constructor" in cfg:
                model.normalisation_source = source
            elif not config and warn_of_normalisation(
                    f"the weights in {path}", cfg["mean"], cfg["std"], given, state_dict):
                model.normalisation_source = f"assumed, {network}: {path} does not say it"
            own = model.state_dict()
            if not state_dict.keys() <= own.keys():
                state_dict = plain_state_dict(state_dict, cfg["mean"], cfg["std"])
            head = head_name(model) if unfitted else None
            entries = {key: value for key, value in own.items() if head and key.startswith(f"{head}.")}
            model.load_state_dict({**entries, **state_dict})
    cfg["num_classes"] = model.num_classes


@contextmanager
def _explained(path: str) -> Iterator[None]:
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"cannot read the checkpoint {path}: {error}; it is damaged, or no checkpoint") from error
    except RuntimeError as error:
        raise ValueError(shortened(str(error))) from error


def open_split_for(model: Any, dataset: str, split: str, *, img_size: int | None = None, crop_pct: float | None = None,
                   interpolation: str | None = None, **options: Any) -> ImageSplit:
    """Returns `open_split(dataset, split, **options)` in the size, the channels and the classes that `model` takes.

    `img_size` is the side to which images are resized as they are decoded; `crop_pct` and `interpolation`, of
    decoded images, `model` takes over. None means the model's own. The class map of `keep_classes` is the default.
    """
    cfg = model.pretrained_cfg
    source = data_source(dataset)
    given = {name: value for name, value in (("crop_pct", crop_pct), ("interpolation", interpolation)) if value}
    if given and source.image_size is not None:
        raise ValueError(f"{' and '.join(given)} is of decoded images, and those of {dataset} are all of one size; "
                         "leave it out")
    cfg.update(given)
    height, width = (img_size, img_size) if img_size is not None else cfg["input_size"][1:]
    if img_size is None and source.image_size is not None and not cfg.get("fixed_input_size"):
        height, width = source.image_size[1:]
    if options.get("class_map") is None:
        options["class_map"] = getattr(model, "class_map", None)
    if options["class_map"] is None:
        _check_num_classes(model, dataset, source.num_classes)
    opened = open_split(dataset, split, num_classes=model.num_classes, input_size=(in_chans(model), height, width),
                        crop_pct=cfg.get("crop_pct") or 1.0, interpolation=cfg.get("interpolation") or "bicubic",
                        crop_mode=cfg.get("crop_mode") or "center", **{"mean": cfg.get("mean")} | options)
    _check_num_classes(model, dataset, opened.num_classes)
    known = class_names(model)
    different = [(own, name) for own, name in zip(opened.class_names or (), known or (), strict=False)
                 if own and name and own != name]
    if different:
        warnings.warn(f"{opened} names {len(different)} of the {model.num_classes} classes otherwise than the model "
                      f"does: {different[0][0]!r} is {different[0][1]!r} there. If they are in another order, the "
                      "labels are wrong: give --class-map a file with the model's names in its order", stacklevel=2)
    return opened


def class_names(model: Any) -> tuple[str, ...] | None:
    """Returns the names of a timm model's classes, or None if its `pretrained_cfg` does not have one for each."""
    names = model.pretrained_cfg.get("label_names")
    if isinstance(names, Mapping):  # timm's form if there are gaps, with keys that JSON made texts
        names = [names.get(number, names.get(str(number), "")) for number in range(model.num_classes)]
    return tuple(map(str, names)) if names and len(names) == model.num_classes else None


def _check_num_classes(model: Any, dataset: str, classes: int | None) -> None:
    if classes not in (None, model.num_classes):
        raise ValueError(f"{type(model).__name__} has {model.num_classes} classes and {dataset} {classes}. To train, "
                         f"give --num-classes {classes}; to evaluate, weights of {classes} classes: --checkpoint FILE "
                         f"--num-classes {classes}, or --class-map FILE if they are some of the model's")


def usable_device(name: str) -> torch.device:
    """Returns the device of a name, after a first use of it."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # raises for meta, which holds no values
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(f"the device {name!r} cannot be used: {error}") from error
    return device
