"""A classifier of some of its classes: a 1,000-class model on ImageNet-100, -A or -R."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from timm.data import ImageNetInfo
from torch import nn

from .data import unwrapped
from .names import some
from .surgery import find_classifier

_IMAGENET_CLASSES: Final = 1000


def keep_classes(model: Any, classes: Sequence[str | int]) -> Any:
    """Leaves out all other classes of a classifier, in place: their logits take part in no prediction and no attack.

    The rows of the other classes leave the classifier's weight and bias and the prototypes of an HPM head. The kept
    classes are numbered in the order of `classes`. The model's attribute `class_map` gets the new number of each class
    name, −1 if it is left out, by which `evaluate`, `train` and `open_split` number the labels.

    Arguments:
        model: its classifier is a Linear layer, a 1×1 convolution or an HPM head.
        classes: names (see `model_classes`) or numbers.

    Returns:
        `model`.

    Raises:
        ValueError: if a class is unknown or given twice, there are fewer than two, or the classifier is another layer.
    """
    names = model_classes(model)
    numbers = [_number(one, names) for one in classes]
    if len(numbers) < 2 or len(set(numbers)) < len(numbers):
        twice = [repr(names[number]) for number in dict.fromkeys(numbers) if numbers.count(number) > 1]
        raise ValueError(f"the subset has {len(numbers)} classes, {some(twice) or 'none'} twice; expected two or "
                         "more, each once")
    network: Any = unwrapped(model)
    layers = network.get_classifier() if hasattr(network, "get_classifier") else network.get_submodule(
        find_classifier(network))
    for layer in layers if isinstance(layers, tuple | list) else (layers,):
        if not isinstance(layer, nn.Linear | nn.Conv2d) or layer._parameters.get("weight") is None:
            raise ValueError(f"the classifier is a {type(layer).__name__}; expected a Linear layer, a 1×1 convolution "
                             "or an HPM head, whose rows are classes")
        for name, value in layer._parameters.items():
            if value is not None and value.ndim and len(value) == len(names):
                layer._parameters[name] = nn.Parameter(value.detach()[numbers].clone(), value.requires_grad)
        for name, buffer in layer._buffers.items():
            if buffer is not None and buffer.ndim and len(buffer) == len(names):
                layer._buffers[name] = buffer[numbers].clone()
        setattr(layer, "out_features" if isinstance(layer, nn.Linear) else "out_channels", len(numbers))
    kept = [names[number] for number in numbers]
    network.num_classes = len(kept)
    network.class_map = dict.fromkeys(names, -1) | {name: number for number, name in enumerate(kept)}
    if cfg := getattr(network, "pretrained_cfg", None):  # with one, a module of pixels would be normalised
        network.pretrained_cfg = {**cfg, "num_classes": len(kept), "label_names": kept}
    return model


def model_classes(model: Any) -> tuple[str, ...]:
    """Returns the names of a model's classes: its own, the synsets of ImageNet's 1,000, or else their numbers."""
    network: Any = unwrapped(model)
    number = getattr(network, "num_classes", None)
    if not isinstance(number, int):
        raise ValueError(f"{type(network).__name__} has no num_classes; set that attribute, the number of classes")
    names = (getattr(network, "pretrained_cfg", None) or {}).get("label_names") or ()
    if len(names) != number or isinstance(names, Mapping):
        names = ImageNetInfo().label_names() if number == _IMAGENET_CLASSES else range(number)
    return tuple(map(str, names))


def read_subset(file: str | os.PathLike) -> list[str]:
    """Returns the classes in a file, one a line, names or numbers; empty lines and text after `#` are left out."""
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read the class subset {file}: {error}. Expected a text file") from error
    return [name for line in lines if (name := line.partition("#")[0].strip())]


def _number(one: str | int, names: Sequence[str]) -> int:
    if isinstance(one, str) and one in names:
        if names.count(one) > 1:
            raise ValueError(f"the subset has the class {one!r}, and {names.count(one)} classes of the model have that "
                             "name; give its number")
        return names.index(one)
    number = int(one) if isinstance(one, int) or one.isdecimal() else -1
    if not 0 <= number < len(names):
        raise ValueError(f"the subset has the class {one!r}, which the model has not; expected numbers from 0 to "
                         f"{len(names) - 1}, or names such as {some(map(repr, names))}")
    return number
