"""A model in a folder, in timm's own format: what the Hub gets, and what a converted checkpoint becomes."""

import json
from pathlib import Path
from typing import Any, Final

from safetensors.torch import save_file
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from ..head import find_head
from .preact import PreActNet

WEIGHTS: Final = "model.safetensors"
CONFIG: Final = "config.json"


def write_model(model: Any, folder: Path, **model_args: Any) -> dict[str, Any]:
    """Writes a model into an existing folder as timm's `local-dir:` reads it, and returns its config.

    What the weights do not show (mix, decay, mode, layout, channels) stands among the config's model arguments.

    Arguments:
        model: a model with an HPM head, made by `timm.create_model`.
        folder: receives `WEIGHTS` and `CONFIG`.
        model_args: further arguments of `timm.create_model`, which older versions of timm do not record.

    Raises:
        ValueError: a model that timm.create_model did not make, or arguments that JSON cannot hold.
    """
    path, head = folder / CONFIG, find_head(model)
    cfg = getattr(model, "pretrained_cfg", None) or {}
    architecture = cfg.get("architecture")
    if not architecture:
        raise ValueError(f"{type(model).__name__} has no architecture in its pretrained_cfg, so timm could not build "
                         "it again. Expected a model that timm.create_model made")
    try:
        # Newer versions of timm add what create_model was given; older ones write these alone.
        args = {**model_args, **_network_args(model), **head.config()}
        if in_chans(model) != cfg["input_size"][0]:
            args["in_chans"] = in_chans(model)
        save_config_for_hf(model, path, model_args=args)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise ValueError(f"timm cannot write the config of {architecture}: {error}. Create the model with arguments "
                         "that JSON can hold") from error
    config = json.loads(path.read_text(encoding="utf-8"))
    # What others published of the tag's own weights need not hold for these.
    config["pretrained_cfg"].pop("notes", None)
    if not architecture.startswith("hpm_"):
        config["architecture"] = f"hpm_{architecture}"
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(tensors_of(model), folder / WEIGHTS, {"format": "pt"})
    return config


def in_chans(model: nn.Module) -> int:
    """Returns how many channels a network takes, whatever its pretrained cfg says."""
    cfg: Any = model.pretrained_cfg
    conv = dict(model.named_modules()).get(cfg["first_conv"]) if isinstance(cfg.get("first_conv"), str) else None
    return conv.in_channels if isinstance(conv, nn.Conv2d) else cfg["input_size"][0]


def _network_args(model: nn.Module) -> dict[str, Any]:
    """Returns the arguments of a `PreActNet` as it is now, whichever tag or caller gave them."""
    if not isinstance(model, PreActNet):
        return {}
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
    """Returns a model's state dict as safetensors takes it: on the CPU, contiguous, and no two in one storage."""
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in model.state_dict().items():
        tensor = tensor.detach().cpu().contiguous()
        if tensor.untyped_storage().data_ptr() in storages:
            tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
        tensors[name] = tensor
    return tensors
