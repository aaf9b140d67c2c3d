"""`timm.create_model` and loading for scripts: every mistake of a command line is a ValueError that explains itself."""

from typing import Any

import timm
import torch
from torch import nn

from ..checkpoints import fitting, reading


def create_model(name: str, *, pretrained: bool, **kwargs: Any) -> Any:
    """Returns `timm.create_model(name, pretrained, **kwargs)`.

    Raises:
        ValueError: an unknown model, a tag without weights, or arguments that the model does not take.
    """
    try:
        return timm.create_model(name, pretrained=pretrained, **kwargs)
    except (RuntimeError, TypeError) as error:
        given = "".join(f", {key}={value!r}" for key, value in kwargs.items())
        raise ValueError(f"cannot create the model {name!r} (pretrained={pretrained}{given}): {error}. Names are those "
                         "of timm.list_models(), weights those of timm.list_pretrained()") from error


def load_checkpoint(model: nn.Module, path: str) -> None:
    """Loads weights from a file (safetensors, or a PyTorch file that holds nothing but tensors) into `model`, strictly.

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


def usable_device(name: str) -> torch.device:
    """Returns the device of a name, after a first use of it.

    Raises:
        ValueError: an unknown device, or one that this machine or PyTorch build does not have.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(f"the device {name!r} cannot be used: {error}") from error
    return device
