"""Converts checkpoints, pushes models to the Hugging Face Hub, pulls them and writes model cards.

    python -m timm_hpm convert CHECKPOINT --model hpm_wrn28_10.untrained_deepmind --output FOLDER
    python -m timm_hpm push org/name --model hpm_wrn28_10 --checkpoint FILE --report report.json --private
    python -m timm_hpm pull org/name --output FOLDER
    python -m timm_hpm card hpm_wrn10_2.digits_linf

The token of the Hub is that of `hf auth login` or HF_TOKEN: every user of the machine can read an option.
"""

import argparse
from pathlib import Path
from typing import Any

from timm.utils import ParseKwargs

from .cards import tag_card
from .console import run_command
from .convert import convert
from .files import write_text
from .head import find_head
from .hub import pull, push
from .models.create import create_model
from .models.saving import saved_config


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line; the option `run` is the function of the command."""
    parser = argparse.ArgumentParser(prog="python -m timm_hpm", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    model_kwargs = argparse.ArgumentParser(add_help=False)
    model_kwargs.add_argument("--model-kwargs", nargs="*", default={}, action=ParseKwargs, metavar="NAME=VALUE",
                              help="arguments of timm.create_model, such as inference=sample")

    command = commands.add_parser("convert", parents=[model_kwargs], help="a public checkpoint into timm's format")
    command.set_defaults(run=_convert)
    command.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    command.add_argument("--model", required=True, help="hpm_* model with its tag, of timm.list_pretrained('hpm_*')")
    command.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="a new folder")
    command.add_argument("--num-classes", type=int, metavar="N", help="classes of the checkpoint (the tag's)")
    for name, none in (("mean", "0 0 0"), ("std", "1 1 1")):
        command.add_argument(f"--{name}", type=float, nargs="+", metavar="X",
                             help=f"per-channel {name} of the normalisation (the tag's; {none} if there is none)")

    _add_push(commands, model_kwargs)

    command = commands.add_parser("pull", help="download a model, load it as a check, and describe it")
    command.set_defaults(run=_pull)
    command.add_argument("repo_id", metavar="ORG/NAME")
    command.add_argument("--revision", help="branch, tag or commit (main)")
    command.add_argument("--output", type=Path, metavar="FOLDER", help="a copy of its files, for local-dir:FOLDER")

    command = commands.add_parser("card", help="the card of a tag with weights")
    command.set_defaults(run=_card)
    command.add_argument("name", metavar="NAME", help="a tag of timm.list_pretrained('hpm_*')")
    command.add_argument("--folder", type=Path, default=Path("hub_cards"),
                         help="folder of <tag>.report.json and <tag>.notes.md, if there are any (%(default)s)")
    command.add_argument("--output", type=Path, metavar="FILE", help="(the terminal)")
    return parser


def _add_push(commands: Any, model_kwargs: argparse.ArgumentParser) -> None:
    command = commands.add_parser("push", parents=[model_kwargs], help="a model and its card to the Hub, in one commit")
    command.set_defaults(run=_push)
    command.add_argument("repo_id", metavar="ORG/NAME")
    command.add_argument("--model", required=True, help="timm model with an HPM head, such as hpm_wrn28_10")
    command.add_argument("--checkpoint", metavar="FILE",
                         help="weights, such as train.py's model.safetensors (the model's pretrained ones)")
    command.add_argument("--report", metavar="FILE", help="report.json of evaluate.py, measured of this model")
    command.add_argument("--notes", type=Path, metavar="FILE", help="Markdown for the card, such as the training")
    command.add_argument("--license", help="the Hub's name of a licence, such as mit (the weights' own, or none)")
    command.add_argument("--base-model", metavar="ID", help="Hub id of the model that this one was trained from")
    command.add_argument("--private", action="store_true", help="make a new repository private")
    command.add_argument("--revision", help="branch, made if it is missing (main)")
    command.add_argument("--message", default="Push a model of timm_hpm", help="of the commit (%(default)s)")


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns the exit code."""
    args = make_parser().parse_args(argv)
    args.run(args)
    return 0


def _convert(args: argparse.Namespace) -> None:
    cfg = {name: tuple(value) if isinstance(value, list) else value
           for name in ("num_classes", "mean", "std") if (value := getattr(args, name)) is not None}
    model: Any = convert(args.checkpoint, args.model, args.output, cfg=cfg, **args.model_kwargs)
    used = model.pretrained_cfg
    name = ".".join(filter(None, (used["architecture"], used.get("tag"))))
    print(f"written: {args.output / 'model.safetensors'}, {args.output / 'config.json'}: {name}, {model.num_classes} "
          f"classes, pixels normalised by mean {used['mean']} and std {used['std']}")


def _push(args: argparse.Namespace) -> None:
    model = create_model(
        args.model, pretrained=args.checkpoint is None, checkpoint=args.checkpoint, **args.model_kwargs)
    url = push(
        model, args.repo_id, report=args.report, private=args.private, revision=args.revision,
        commit_message=args.message, license=args.license, base_model=args.base_model,
        notes=args.notes.read_text(encoding="utf-8") if args.notes else "",
        training=saved_config(args.checkpoint).get("training") if args.checkpoint else None)
    print(f"pushed: {url}")


def _pull(args: argparse.Namespace) -> None:
    model = pull(args.repo_id, revision=args.revision, output=args.output)
    head = find_head(model)
    print(f"{args.repo_id}: {model.pretrained_cfg['architecture']}, {model.num_classes} classes, "
          f"{sum(p.numel() for p in model.parameters()):,} parameters")
    print(f"head: {head}, prototypes {'fitted' if head.is_fitted() else 'not fitted'}")
    if args.output is not None:
        print(f"written: {args.output}")


def _card(args: argparse.Namespace) -> None:
    text = tag_card(args.name, args.folder)
    if args.output is None:
        print(text, end="")
    else:
        write_text(args.output, text)
        print(f"written: {args.output}")


if __name__ == "__main__":
    run_command("timm_hpm", main)
