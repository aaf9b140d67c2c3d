"""`TrainConfig`: everything a training run depends on; its options on the command line and in a YAML file."""

import argparse
import difflib
import math
import reprlib
import types
import typing
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import yaml
from timm.utils import ParseKwargs

from ..guards import shortened
from ..surrogates import SURROGATES
from ..threat import ThreatModel, parse_number
from .objectives import OBJECTIVES
from .schedules import SCHEDULES
from .trunk import BATCH_PROTOTYPES

#: Options that change no weight: a run may be resumed with others.
FREE: typing.Final = ("workers", "data_dir", "dataset_download", "device", "log_with", "recovery_interval",
                      "checkpoint_hist")
AMP_DTYPES: typing.Final = ("bfloat16", "float16")
TRACKERS: typing.Final = ("tensorboard", "wandb")


_MOST_BYTES: typing.Final = 2**20


def _option(default: Any, group: str, about: str, *flags: str, choices: Collection[str] = ()) -> Any:
    """Returns a dataclass field that also says how the command line shows it."""
    return field(default=default, metadata={"group": group, "about": about, "flags": flags, "choices": choices})


@dataclass(frozen=True)
class TrainConfig:
    """The options of a training run, under timm's names where timm has them; see `python train.py --help`.

    Raises:
        ValueError: a value of another type, out of its range, or that does not go with another.
    """

    model: str = _option("hpm_wrn10_2", "model", "timm model with an HPM head")
    model_kwargs: dict[str, Any] | None = _option(None, "model", "arguments of timm.create_model, such as mix=0.5")
    pretrained: bool = _option(False, "model", "start from the pretrained weights")
    initial_checkpoint: str | None = _option(None, "model", "start from the weights in this file, ours or another "
                                                           "project's")
    num_classes: int | None = _option(None, "model", "a new head of so many classes (the model's)")
    in_chans: int | None = _option(None, "model", "channels of the images (the model's)")
    mean: tuple[float, ...] | None = _option(
        None, "model", "taken off each channel (the weights'; the data set's when training from scratch)")
    std: tuple[float, ...] | None = _option(None, "model", "that it is divided by then (see --mean)")
    freeze_backbone: bool = _option(False, "model", "train the head alone")
    grad_checkpointing: bool = _option(False, "model", "less memory, one forward pass more")

    dataset: str = _option("digits", "data", "digits, fashion_mnist, folder, or a name of timm.data.create_dataset")
    data_dir: str | None = _option(None, "data", "where the data set lies")
    dataset_download: bool = _option(False, "data", "let torchvision fetch it")
    class_map: str | None = _option(None, "data", "file of class names in the order of their numbers, as in timm")
    img_size: int | None = _option(None, "data", "pixels a side, for images that are decoded (the model's)")
    shift: int = _option(1, "data", "augmentation: random shifts by up to so many pixels")
    hflip: float = _option(0.0, "data", "augmentation: probability of a horizontal flip")
    random_resized_crop: bool = _option(False, "data", "augmentation: random crops, resized, and flips")
    batch_size: int = _option(128, "data", "images a process and forward pass", "-b")
    workers: int = _option(0, "data", "data loading processes for each process", "-j")

    threat: str | None = _option(None, "attack", "NORM:EPS such as Linf:8/255 (the data set's usual one)")
    objective: str = _option("pgd-at", "attack", "what is minimised", choices=OBJECTIVES)
    trades_beta: float = _option(6.0, "attack", "weight of TRADES' divergence")
    attack_steps: int = _option(10, "attack", "PGD steps; 1 is FGSM with random start")
    attack_step_size: float | None = _option(
        None, "attack", "in units of pixels in [0, 1], such as 2/255 (2.5·eps/steps)")
    attack_through: str = _option("mixed", "attack", "surrogate to craft through", choices=tuple(SURROGATES))
    val_attack_steps: int = _option(20, "attack", "PGD steps for the choice of the best epoch")

    prototype_epoch: float | None = _option(
        None, "prototypes", "epochs before the fit of a head without prototypes, such as 36 or 0.5 (0 if the FC "
                            "classifier is trained; else 0.6 of all, and 20 updates at least)")
    prototype_features: str = _option("adversarial", "prototypes", "what updates them, as TRADES and clean have it",
                                      choices=("adversarial", "both"))
    batch_prototypes: str = _option("local", "prototypes", "the batch of the batch-level ones: each process's, or all",
                                    choices=BATCH_PROTOTYPES)
    fc_loss_weight: float = _option(1.0, "prototypes", "weight of the FC classifier's loss, the head's being 1")

    epochs: int = _option(60, "optimisation", "passes over the training images")
    opt: str = _option("sgd", "optimisation", "optimizer of timm, such as sgd or adamw")
    lr: float = _option(0.1, "optimisation", "peak learning rate")
    momentum: float = _option(0.9, "optimisation", "of sgd")
    weight_decay: float = _option(5e-4, "optimisation", "not for biases, norms and the scale")
    sched: str = _option("onecycle", "optimisation", "learning rate schedule", choices=tuple(SCHEDULES))
    warmup_epochs: float | None = _option(None, "optimisation", "of rising learning rate (onecycle: a quarter; 0)")
    layer_decay: float | None = _option(None, "optimisation", "learning rate of each layer over that of the next")
    clip_grad: float | None = _option(None, "optimisation", "largest norm of the gradient")
    grad_accum_steps: int = _option(1, "optimisation", "batches an update")
    smoothing: float = _option(0.0, "optimisation", "label smoothing; the prototypes keep to the label")
    model_ema: bool = _option(False, "optimisation", "average the weights; the average is what is kept")
    model_ema_decay: float = _option(0.9998, "optimisation", "of that average")
    seed: int = _option(0, "optimisation", "of all randomness, with the epoch, the step and the process")

    device: str | None = _option(None, "machine and output", "cpu leaves accelerators alone (Accelerate's choice)",
                                 choices=("cpu",))
    amp: bool = _option(False, "machine and output", "mixed precision")
    amp_dtype: str = _option("bfloat16", "machine and output", "of mixed precision", choices=AMP_DTYPES)
    channels_last: bool = _option(False, "machine and output", "memory format")
    torchcompile: bool = _option(False, "machine and output", "compile the backbone")
    recovery_interval: int = _option(0, "machine and output", "updates between checkpoints (0: at the ends of epochs)")
    checkpoint_hist: int = _option(2, "machine and output", "checkpoints to keep")
    log_with: str | None = _option(None, "machine and output", "tracker of Accelerate", choices=TRACKERS)

    def __post_init__(self) -> None:
        kinds = typing.get_type_hints(type(self))
        for option in fields(self):
            value = _typed(option.name, getattr(self, option.name), kinds[option.name])
            object.__setattr__(self, option.name, value)
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{option.name} is {value}; expected a finite number")
            choices = option.metadata["choices"]
            if choices and value is not None and value not in choices:
                raise ValueError(f"{option.name} is {value!r}; expected one of {', '.join(choices)}")
        if self.threat is not None:
            ThreatModel.parse(self.threat)
        for name, least in (("epochs", 1), ("batch_size", 1), ("attack_steps", 1), ("val_attack_steps", 1),
                            ("grad_accum_steps", 1), ("checkpoint_hist", 1), ("prototype_epoch", 0), ("shift", 0),
                            ("workers", 0), ("recovery_interval", 0), ("hflip", 0), ("smoothing", 0),
                            ("fc_loss_weight", 0), ("trades_beta", 0), ("warmup_epochs", 0), ("weight_decay", 0),
                            ("momentum", 0), ("model_ema_decay", 0), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise ValueError(f"{name} is {value}; expected at least {least}")
        for name in ("hflip", "momentum", "model_ema_decay", "layer_decay"):
            value = getattr(self, name)
            if value is not None and value > 1:
                raise ValueError(f"{name} is {value}; expected at most 1")
        if self.seed >= 2**32:
            raise ValueError(f"seed is {self.seed}; expected below 2**32, as NumPy takes it")
        for name in ("clip_grad", "attack_step_size", "layer_decay", "lr"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} is {value}; expected above 0")
        if self.smoothing >= 1:
            raise ValueError(f"smoothing is {self.smoothing}; expected below 1, or nothing is left of the label")
        if self.prototype_epoch is not None and self.prototype_epoch > self.epochs:
            raise ValueError(f"prototype_epoch is {self.prototype_epoch:g}, of {self.epochs} epochs; expected "
                             "no more, or the head would never have prototypes")
        if self.warmup_epochs is not None and self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs is {self.warmup_epochs}, of {self.epochs} epochs; expected less")
        if self.pretrained and self.initial_checkpoint:
            raise ValueError("pretrained and initial_checkpoint both say where the weights come from; give one")

    def to_dict(self) -> dict[str, Any]:
        """Returns all options in YAML's and JSON's types."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


class _Loader(yaml.SafeLoader):
    """Reads YAML without aliases, by which few bytes stand for any number of values."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"the alias *{self.peek_event().anchor}; expected values without anchors and aliases")
        return super().compose_node(parent, index)


def read_yaml(path: str) -> dict[str, Any]:
    """Returns the options in a YAML file, checked by `TrainConfig`'s names only.

    Raises:
        ValueError: no such file, no YAML, or a key that is no option; the message names the nearest ones.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise ValueError(f"it has more than {_MOST_BYTES} bytes")
        given = yaml.load(content.decode("utf-8"), _Loader)
    # Some numbers and dates of YAML's are Python's errors.
    except (OSError, ValueError, OverflowError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read the configuration {path}: {shortened(' '.join(str(error).split()))}") from error
    given = {} if given is None else given
    if not isinstance(given, Mapping):
        raise ValueError(f"{path} holds a {type(given).__name__}; expected lines such as `model: hpm_wrn10_2`")
    check_names(given, path)
    return dict(given)


def check_names(given: Mapping[Any, Any], where: str) -> None:
    """Raises a ValueError for keys that are no option of `TrainConfig`."""
    known = [option.name for option in fields(TrainConfig)]
    unknown = [key for key in given if key not in known]
    if unknown:
        near = difflib.get_close_matches(str(unknown[0]).replace("-", "_"), known, n=3, cutoff=0.5)
        advice = f"did you mean {' or '.join(near)}?" if near else f"the options are {', '.join(known)}"
        raise ValueError(f"{where}: unknown option {shortened(', '.join(map(reprlib.repr, unknown)))}; {advice}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds every option to a parser, in groups. What the command line does not say stands nowhere in the result."""
    groups: dict[str, Any] = {}
    kinds = typing.get_type_hints(TrainConfig)
    for option in fields(TrainConfig):
        name, about, default = option.name, option.metadata["about"], option.default
        if not (default is None or isinstance(default, bool)):
            about += f" ({default})"
        kind, *_ = _parts(kinds[name])
        details: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": about.replace("%", "%%")}
        if option.metadata["choices"]:
            details["choices"] = option.metadata["choices"]
        elif kind is bool:
            details["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(kind) is dict:
            details |= {"nargs": "*", "action": ParseKwargs, "metavar": "NAME=VALUE"}
        elif typing.get_origin(kind) is tuple:
            details |= {"nargs": "+", "type": _number, "metavar": "X"}
        else:
            number, metavar = {int: (int, "N"), float: (_number, "X"), str: (str, "TEXT")}[kind]
            details |= {"type": number, "metavar": metavar}
        group = option.metadata["group"]
        groups.setdefault(group, parser.add_argument_group(group) if group not in groups else None)
        groups[group].add_argument(*option.metadata["flags"], f"--{name.replace('_', '-')}", **details)


def _number(text: str) -> float:
    if not _is_number(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number; expected one such as 0.03 or 8/255")
    return parse_number(text)


def _parts(kind: Any) -> tuple[Any, ...]:
    """Returns the types of a union, or the one type."""
    return typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)


def _typed(name: str, value: Any, kind: Any) -> Any:
    """Returns `value` as `kind`, or raises a ValueError; whole numbers are floats, too, but texts are no numbers."""
    for one in _parts(kind):
        if one is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if one is float and isinstance(value, str) and "/" in value and _is_number(value):
            return parse_number(value)
        if typing.get_origin(one) is tuple and isinstance(value, list | tuple) \
                and all(isinstance(part, int | float) and not isinstance(part, bool) for part in value):
            return tuple(float(part) for part in value)
        if typing.get_origin(one) is dict and isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
            return dict(value)
        if isinstance(one, type) and isinstance(value, one) and (one is bool or not isinstance(value, bool)):
            return value
    expected = " or ".join("null" if one is type(None) else getattr(one, "__name__", str(one)) for one in _parts(kind))
    hint = ". YAML reads 1e-3 as a text; write 1.0e-3" if isinstance(value, str) and _is_number(value) else ""
    raise ValueError(f"{name} is {reprlib.repr(value)}, a {type(value).__name__}; expected {expected}{hint}")


def _is_number(text: str) -> bool:
    try:
        parse_number(text)
    except (ValueError, ZeroDivisionError):
        return False
    return True
