"""Converts a public checkpoint into timm's format: model.safetensors and config.json in a new folder.

    python -m timm_hpm.convert CHECKPOINT --model hpm_wrn28_10.untrained_deepmind --output FOLDER

The model's tag says how images are normalised and which layout the network has; `timm.list_pretrained("hpm_*")` lists
those of public checkpoints. timm.create_model("local-dir:FOLDER", pretrained=True) loads the result.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from timm.utils import ParseKwargs
from torch import nn

from .files import new_folder
from .guards import last_words
from .models.create import create_model
from .models.saving import write_model


def convert(
        checkpoint: str | Path,
        model_name: str,
        output: str | Path,
        *,
        cfg: dict[str, Any] | None = None,
        **model_args: Any,
) -> nn.Module:
    """Converts a checkpoint of any format that `timm_hpm.checkpoints` knows, and returns the model that it makes.

    Arguments:
        checkpoint: the file: safetensors, or a PyTorch file that holds nothing but tensors and plain values.
        model_name: the `hpm_*` model, with a tag where the default one is not meant.
        output: the folder to make; it appears whole or not at all.
        cfg: fields of the pretrained cfg that are not the tag's, such as mean, std and num_classes.
        model_args: arguments of `timm.create_model`; `num_classes` is that of the checkpoint.

    Raises:
        ValueError: a checkpoint that cannot be read or is of another network, or an unknown model.
        OSError: a folder that holds something already, or cannot be written.
    """
    overlay = {**(cfg or {}), "file": str(checkpoint)}
    if "num_classes" in model_args:
        # As an argument it would ask timm for a new classifier in the place of the checkpoint's.
        overlay["num_classes"] = model_args.pop("num_classes")
    if overlay.get("num_classes", 1) < 1:
        raise ValueError(f"num_classes is {overlay['num_classes']}; expected that of the checkpoint, whose classifier "
                         "is converted with the rest")
    with new_folder(output) as folder:
        model = create_model(model_name, pretrained=True, pretrained_cfg_overlay=overlay, **model_args)
        write_model(model, folder, **model_args)
    return model


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Returns the command line's options."""
    parser = argparse.ArgumentParser(
        prog="python -m timm_hpm.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    parser.add_argument("--model", required=True, help="hpm_* model, with its tag")
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="a new folder")
    parser.add_argument("--num-classes", type=int, metavar="N", help="classes of the checkpoint (the tag's)")
    parser.add_argument("--mean", type=float, nargs="+", metavar="X",
                        help="mean of the pixels that the network expects taken off (the tag's; 0 0 0 for none)")
    parser.add_argument("--std", type=float, nargs="+", metavar="X",
                        help="what it expects the pixels divided by then (the tag's; 1 1 1 for nothing)")
    parser.add_argument("--model-kwargs", nargs="*", default={}, action=ParseKwargs, metavar="NAME=VALUE",
                        help="arguments of timm.create_model, such as layout=deepmind")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    args = parse_args(argv)
    cfg = {"num_classes": args.num_classes, "mean": args.mean and tuple(args.mean), "std": args.std and tuple(args.std)}
    cfg = {name: value for name, value in cfg.items() if value is not None}
    model: Any = convert(args.checkpoint, args.model, args.output, cfg=cfg, **args.model_kwargs)
    used = model.pretrained_cfg
    name = ".".join(filter(None, (used["architecture"], used.get("tag"))))
    print(f"written: {args.output / 'model.safetensors'}, {args.output / 'config.json'}: "
          f"{name}, {model.num_classes} classes, pixels normalised by "
          f"mean {used['mean']} and std {used['std']}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        sys.exit(last_words("timm_hpm.convert", error))
