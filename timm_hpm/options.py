"""Options of a script: a dataclass whose fields make the command line, read YAML and JSON files, and check the values.

A field, made by `option`, is a bool, int, float, str, `tuple[T, ...]` of the last three, `dict[str, Any]`, or None. The
dataclass calls `check` in its `__post_init__`.
"""

import argparse
import json
import math
import operator
import os
import reprlib
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from typing import Any, Final

import yaml
from timm.utils import ParseKwargs

from .deadline import parse_time
from .guards import shortened
from .names import did_you_mean
from .threat import parse_number

AMP_DTYPES: Final = ("bfloat16", "float16")
INTERPOLATIONS: Final = ("bilinear", "bicubic", "lanczos", "nearest")

_MOST_BYTES: Final = 2**20
_RANGES: Final = {"least": (operator.ge, "at least"), "most": (operator.le, "at most"),
                  "above": (operator.gt, "above"), "below": (operator.lt, "below")}


def option(default: Any, group: str, about: str, *flags: str, choices: Collection[str] = (), free: bool = False,
           **bounds: float) -> Any:
    """Returns a dataclass field for an option of a script.

    Arguments:
        default: the value if the option is not given.
        group: heading in the script's help.
        about: help text, a noun phrase with the unit; the default is added in parentheses if it is no bool and no None.
        flags: short forms, such as `"-b"`.
        choices: accepted texts; a live table of names may grow later.
        free: whether a run may be resumed with another value.
        bounds: of a number, or of each number of a tuple: `least`, `most`, `above`, `below`.
    """
    return field(default=default, metadata={
        "group": group, "about": about, "flags": flags, "choices": choices, "free": free, "bounds": bounds})


@dataclass(frozen=True)
class CommonOptions:
    """The options about the model and the data that several commands share."""

    model: str = option("hpm_wrn10_2", "model", "timm model, with or without an HPM head, or a constructor: "
                                                   "file.py:function")
    model_kwargs: dict[str, Any] | None = option(
        None, "model", "arguments of timm.create_model, such as inference=batch")
    num_classes: int | None = option(None, "model", "number of classes (the model's)")
    in_chans: int | None = option(None, "model", "channels of the images (the model's)")
    mean: tuple[float, ...] | None = option(
        None, "model", "per-channel mean of the normalisation of pixels in [0, 1] (the model's; of timm's from scratch "
                       "the data set's)")
    std: tuple[float, ...] | None = option(
        None, "model", "per-channel standard deviation of the normalisation (see --mean)", above=0)
    dataset: str = option("digits", "data", "digits, fashion_mnist, svhn, stl10, tiny_imagenet, folder, torch/NAME or "
                                            "hfds/NAME; see docs/data.md")
    data_dir: str | None = option(None, "data", "folder of the data set")
    dataset_download: bool = option(False, "data", "download of the data set by torchvision", free=True)
    class_map: str | None = option(
        None, "data", "file of class names in the order of the model's classes, as in timm")
    img_size: int | None = option(None, "data", "side of decoded images in pixels (the model's)")
    crop_pct: float | None = option(
        None, "data", "part of a decoded image's side that the centre crop keeps (the model's)", above=0, most=1)
    interpolation: str | None = option(
        None, "data", "interpolation of decoded images (the model's)", choices=INTERPOLATIONS)
    workers: int = option(0, "data", "data loading workers per process", "-j", least=0, free=True)
    val_fraction: float | None = option(
        None, "data", "fraction of the training images held out for validation, of a data set without a validation "
                      "split (0.1, at most 5,000 images)", above=0, below=1)
    threat: str | None = option(None, "attack", "threat model NORM:EPS, such as Linf:8/255 (the data set's usual one)")
    # NumPy's random state takes no larger one.
    seed: int = option(0, "attack", "seed of all randomness", least=0, below=2**32)

    def __post_init__(self) -> None:
        check(self)
        for name, value in self.given("num_classes", "in_chans").items():
            if (other := (self.model_kwargs or {}).get(name, value)) != value:
                raise ValueError(f"--{name.replace('_', '-')} is {value} and --model-kwargs {name}={other}; give one "
                                 "of them")

    def given(self, *names: str) -> dict[str, Any]:
        """Returns those of the options that are not None."""
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@dataclass(frozen=True)
class RunOptions(CommonOptions):
    """The options that a training run and an evaluation share."""

    amp: bool = option(False, "machine and output", "mixed precision; in an evaluation of the judged model")
    amp_dtype: str = option("bfloat16", "machine and output", "data type of mixed precision", choices=AMP_DTYPES)
    channels_last: bool = option(False, "machine and output", "channels-last memory format")
    threads: int | None = option(
        None, "machine and output", "CPU threads of a process (OMP_NUM_THREADS, or the fastest number in a short "
                                    "measurement)", least=1)
    time_limit: str | None = option(
        None, "machine and output", "time such as 30m or 2h30m after which the run stops and can be resumed, with "
                                    "another limit or none. Training finishes the update that it is in; an evaluation "
                                    "the attack on a batch, or the study of neighbours at one batch size", free=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.seconds()
        if self.amp_dtype != AMP_DTYPES[0] and not self.amp:
            raise ValueError(f"amp_dtype is {self.amp_dtype}, and has no effect without amp; give --amp, too, or leave "
                             "it out")

    def seconds(self) -> float | None:
        return None if self.time_limit is None else parse_time(self.time_limit)


def check(options: Any) -> None:
    """Converts the fields to their types, numbers also from texts such as "2/255", or raises a ValueError."""
    kinds = typing.get_type_hints(type(options))
    for one in fields(options):
        value = _typed(one.name, getattr(options, one.name), kinds[one.name])
        object.__setattr__(options, one.name, value)  # of a frozen dataclass
        for part in value if isinstance(value, tuple) else (value,):
            _check_value(one.name, part, one.metadata)


def as_dict(options: Any) -> dict[str, Any]:
    """Returns all options in YAML's and JSON's types."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(options).items()}


def free_names(kind: type) -> tuple[str, ...]:
    """Returns the names of the options that a resumed run may change."""
    return tuple(one.name for one in fields(kind) if one.metadata["free"])


class _Loader(yaml.SafeLoader):
    """Reads YAML without names given twice, and without aliases, by which few bytes stand for any number of values."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        found = super().construct_mapping(node, deep)
        if len(found) < len(node.value):
            _each_once([(self.construct_object(key), None) for key, _ in node.value])
        return found

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"the alias *{self.peek_event().anchor}; expected values without anchors and aliases")
        return super().compose_node(parent, index)


def _each_once(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    """Returns pairs as a dictionary; raises a ValueError for a name that several have, of which one would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice; give it once")
    return found


def read_options(path: str | os.PathLike, kind: type) -> dict[str, Any]:
    """Returns the options of a dataclass in a YAML file, or in JSON if it is named `.json`; only names are checked."""
    try:
        with open(path, "rb") as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise ValueError(f"it has more than {_MOST_BYTES} bytes")
        text = content.decode("utf-8")
        is_json = os.fspath(path).endswith(".json")
        given = json.loads(text, object_pairs_hook=_each_once) if is_json else yaml.load(text, _Loader)
    # PyYAML raises Python's own errors for some numbers and dates.
    except (OSError, ValueError, OverflowError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read the configuration {path}: {shortened(' '.join(str(error).split()))}") from error
    given = {} if given is None else given
    if not isinstance(given, Mapping):
        raise ValueError(f"{path} holds a {type(given).__name__}; expected lines such as `model: hpm_wrn10_2`")
    known = [one.name for one in fields(kind)]
    unknown = [key for key in given if key not in known]
    if unknown:
        advice = did_you_mean(str(unknown[0]).replace("-", "_"), known) or f"; the options are {', '.join(known)}"
        raise ValueError(f"{path}: unknown option {shortened(', '.join(map(reprlib.repr, unknown)))}{advice}")
    return dict(given)


def add_arguments(parser: argparse.ArgumentParser, kind: type) -> None:
    """Adds every option of a dataclass to a parser, in groups. The result holds only the options that are given."""
    groups: dict[str, Any] = {}
    kinds = typing.get_type_hints(kind)
    for one in fields(kind):
        group = one.metadata["group"]
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        about, default = one.metadata["about"], one.default
        if not (default is None or default == () or isinstance(default, bool)):
            about += f" ({default})"
        details = _argument(_parts(kinds[one.name])[0], one.metadata["choices"])
        groups[group].add_argument(*one.metadata["flags"], f"--{one.name.replace('_', '-')}", dest=one.name,
                                   default=argparse.SUPPRESS, help=about.replace("%", "%%"), **details)


def given_options(parser: argparse.ArgumentParser, kind: type,
                  argv: Sequence[str] | None) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Returns the values of a parser's own arguments, and the options of a dataclass that are given.

    Adds the options to the parser, and `--config`, a YAML file of options, which the command line overrides.
    """
    parser.add_argument("-c", "--config", metavar="FILE", help="YAML file of options")
    add_arguments(parser, kind)
    args = parser.parse_args(argv)
    options = read_options(args.config, kind) if args.config else {}
    options |= {one.name: vars(args).pop(one.name) for one in fields(kind) if hasattr(args, one.name)}
    return args, options


def _argument(kind: Any, choices: Collection[str]) -> dict[str, Any]:
    """Returns the details of an argument of a parser for values of a type; `check` sees the choices in a tuple."""
    if choices and typing.get_origin(kind) is not tuple:
        return {"type": partial(_one_of, choices), "metavar": "{" + ",".join(choices) + "}"}
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if typing.get_origin(kind) is dict:
        return {"nargs": "*", "action": _Pairs, "metavar": "NAME=VALUE"}
    of_one = {int: (int, "N"), float: (_number, "X"), str: (str, "TEXT")}
    if typing.get_origin(kind) is tuple:
        of, metavar = of_one[typing.get_args(kind)[0]]
        return {"nargs": "+", "action": _Several, "type": lambda text: _several(text, of), "metavar": metavar}
    of, metavar = of_one[kind]
    return {"type": of, "metavar": metavar}


class _Pairs(ParseKwargs):
    """timm's action for NAME=VALUE, whose pairs of an option given again join the first ones."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        before = getattr(namespace, self.dest, None) or {}
        if odd := next((value for value in values if value and "=" not in value), None):
            parser.error(f"argument {option_string}: {odd!r}; expected NAME=VALUE")
        super().__call__(parser, namespace, values, option_string)
        setattr(namespace, self.dest, before | getattr(namespace, self.dest))


class _Several(argparse.Action):
    """Stores the values of an option's words, each of which may hold several, as one tuple."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, tuple(value for word in values for value in word))


def _several(text: str, of: Any) -> list[Any]:
    """Returns the values in a word such as "fc,ste"; none for "none"."""
    try:
        return [] if text == "none" else [of(part.strip()) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from error


def _one_of(choices: Collection[str], text: str) -> str:
    if text not in choices:
        raise argparse.ArgumentTypeError(
            f"{text!r}; expected one of {', '.join(choices)}{did_you_mean(text, choices)}")
    return text


def _number(text: str) -> float:
    if not _is_number(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number; expected one such as 0.03 or 8/255")
    return parse_number(text)


def _parts(kind: Any) -> tuple[Any, ...]:
    return typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)


def _check_value(name: str, value: Any, metadata: Mapping[str, Any]) -> None:
    if value is None:
        return
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} is {value}; expected a finite number")
    if (choices := metadata["choices"]) and value not in choices:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(choices)}{did_you_mean(value, choices)}")
    for bound, limit in metadata["bounds"].items():
        holds, text = _RANGES[bound]
        if not holds(value, limit):
            raise ValueError(f"{name} is {value}; expected {text} {limit}")


def _typed(name: str, value: Any, kind: Any) -> Any:
    for one in _parts(kind):
        if typing.get_origin(one) is tuple and isinstance(value, list | tuple):
            return tuple(_typed(name, part, typing.get_args(one)[0]) for part in value)
        if typing.get_origin(one) is dict and isinstance(value, Mapping) and all(
                isinstance(key, str) and key.isidentifier() for key in value):
            return dict(value)
        if one is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if one is float and isinstance(value, str) and "/" in value and _is_number(value):
            return parse_number(value)
        # Python 3.10 takes tuple[str, ...] for a type.
        if typing.get_origin(one) is None and isinstance(value, one) and (one is bool or not isinstance(value, bool)):
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
