"""`convert`: a checkpoint of another project as a folder of timm's format, model.safetensors and config.json."""

from pathlib import Path
from typing import Any

from torch import nn

from ..files import filling, remove_unfinished
from .create import create_model
from .saving import CONFIG, WEIGHTS, write_model


def convert(
        checkpoint: str | Path,
        model_name: str,
        output: str | Path,
        *,
        cfg: dict[str, Any] | None = None,
        **model_args: Any,
) -> nn.Module:
    """Converts a checkpoint of any format that `timm_hpm.models.formats` knows, and returns its model.

    Arguments:
        checkpoint: the file: safetensors, or a PyTorch file that holds only tensors and plain values.
        model_name: the `hpm_*` model, with its tag unless the default one is meant.
        output: the folder for `model.safetensors` and `config.json`, each of which appears whole or not at all.
        cfg: fields of the pretrained cfg that are not the tag's, such as mean, std and num_classes.
        model_args: arguments of `timm.create_model`; `num_classes` is that of the checkpoint.

    Raises:
        ValueError: if the checkpoint cannot be read or is of another network, or the model is unknown.
        OSError: if the folder holds a model, or cannot be written.
    """
    overlay = {**(cfg or {}), "file": str(checkpoint)}
    if "num_classes" in model_args:
        # As an argument it would make timm replace the checkpoint's classifier.
        overlay["num_classes"] = model_args.pop("num_classes")
    if overlay.get("num_classes", 1) < 1:
        raise ValueError(f"num_classes is {overlay['num_classes']}; expected that of the checkpoint, whose classifier "
                         "is converted with the rest")
    remove_unfinished(output)
    if any((Path(output) / name).exists() for name in (CONFIG, WEIGHTS)):
        raise OSError(f"{output} holds a model; choose another --output, or remove it")
    with filling(output, first=WEIGHTS) as folder:
        model = create_model(model_name, pretrained=True, pretrained_cfg_overlay=overlay, **model_args)
        write_model(model, folder)
    return model
