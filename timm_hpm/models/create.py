"""`timm.create_model` and loading for scripts: every mistake of a command line is a ValueError that explains itself."""

import pickle
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from torch import nn

from ..checkpoints import weights_only


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
    if not Path(path).is_file():
        raise ValueError(f"the checkpoint {path} is not a file")
    try:
        with weights_only():
            timm.models.load_checkpoint(model, path, weights_only=True)
    except (RuntimeError, TypeError, SafetensorError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"cannot load the checkpoint {path} into "
                         f"{type(model).__name__}: {str(error)[:600]}") from error


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
