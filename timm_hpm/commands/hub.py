"""`convert`, `push`, `pull` and `card`: models to and from other formats and the Hugging Face Hub."""

from pathlib import Path
from typing import Any

from timm.utils import ParseKwargs

from .. import hub
from ..cards import tag_card
from ..files import write_text
from ..head import find_head, head_name
from ..models.create import convert as convert_checkpoint
from ..models.create import create_model
from ..models.saving import saved_config
from .parser import Parser

_TOKEN = """
The token of the Hub is that of `hf auth login` or HF_TOKEN: every user of the machine can read an option."""


def _add_model_kwargs(parser: Parser) -> None:
    parser.add_argument("--model-kwargs", nargs="*", default={}, action=ParseKwargs, metavar="NAME=VALUE",
                        help="arguments of timm.create_model, such as inference=batch")


def convert(argv: list[str] | None = None) -> int:
    """Converts a public checkpoint into a folder in timm's format; returns the exit code."""
    parser = Parser("convert", (
        "wrn.pt --model hpm_wrn28_10.untrained_deepmind --output wrn",
        "resnet18.ckpt --model hpm_resnet18.salman2020_imagenet_linf_eps4 --output resnet18",
        "mine.pt --model hpm_wrn10_2.untrained --output mine --mean 0 0 0 --std 1 1 1"), """\
Converts a checkpoint of another project into a folder that timm.create_model("local-dir:FOLDER", pretrained=True)
loads.""")
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="the checkpoint's file")
    parser.add_argument("--model", required=True, metavar="NAME",
                        help="hpm_* model with its tag, of timm.list_pretrained('hpm_*')")
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="a new folder")
    parser.add_argument("--num-classes", type=int, metavar="N", help="classes of the checkpoint (the tag's)")
    for name, none in (("mean", "0 0 0"), ("std", "1 1 1")):
        parser.add_argument(f"--{name}", type=float, nargs="+", metavar="X",
                            help=f"per-channel {name} of the normalisation (the tag's; {none} if there is none)")
    _add_model_kwargs(parser)
    args = parser.parse_args(argv)
    cfg = {name: tuple(value) if isinstance(value, list) else value
           for name in ("num_classes", "mean", "std") if (value := getattr(args, name)) is not None}
    model: Any = convert_checkpoint(args.checkpoint, args.model, args.output, cfg=cfg, **args.model_kwargs)
    used = model.pretrained_cfg
    name = ".".join(filter(None, (used["architecture"], used.get("tag"))))
    print(f"written: {args.output / 'model.safetensors'}, {args.output / 'config.json'}: {name}, {model.num_classes} "
          f"classes, pixels normalised by mean {used['mean']} and std {used['std']}")
    return 0


def push(argv: list[str] | None = None) -> int:
    """Pushes a model and its card to the Hub, in one commit; returns the exit code."""
    parser = Parser("push", (
        "org/name --model local-dir:output/run",
        "org/name --model hpm_wrn28_10 --checkpoint model.safetensors --private",
        "org/name --model local-dir:output/run --report output/run-report/report.json --license mit"),
        f"Pushes a model and its card to the Hugging Face Hub, in one commit.{_TOKEN}")
    parser.add_argument("repo_id", metavar="ORG/NAME", help="the repository, made if it is missing")
    parser.add_argument("--model", required=True, metavar="NAME",
                        help="timm model such as hpm_wrn28_10, or a constructor such as net.py:small")
    parser.add_argument("--checkpoint", metavar="FILE",
                        help="weights, such as the model.safetensors of a run (the model's pretrained ones)")
    parser.add_argument("--report", metavar="FILE", help="report.json of an evaluation, measured of this model")
    parser.add_argument("--notes", type=Path, metavar="FILE", help="Markdown for the card, such as the training")
    parser.add_argument("--license", help="the Hub's name of a licence, such as mit (the weights' own, or none)")
    parser.add_argument("--base-model", metavar="ID", help="Hub id of the model that this one was trained from")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--revision", help="branch, made if it is missing (main)")
    parser.add_argument("--message", default="Push a model of timm_hpm", help="of the commit (%(default)s)")
    _add_model_kwargs(parser)
    args = parser.parse_args(argv)
    model = create_model(
        args.model, pretrained=args.checkpoint is None, checkpoint=args.checkpoint, **args.model_kwargs)
    url = hub.push(
        model, args.repo_id, report=args.report, private=args.private, revision=args.revision,
        commit_message=args.message, license=args.license, base_model=args.base_model,
        notes=args.notes.read_text(encoding="utf-8") if args.notes else "",
        training=saved_config(args.checkpoint).get("training") if args.checkpoint else None)
    print(f"pushed: {url}")
    return 0


def pull(argv: list[str] | None = None) -> int:
    """Downloads a model of the Hub and describes it; returns the exit code."""
    parser = Parser("pull", ("org/name", "org/name --output models/name", "org/name --revision v1"),
                    f"Downloads a model from the Hugging Face Hub, loads it as a check, and describes it.{_TOKEN}")
    parser.add_argument("repo_id", metavar="ORG/NAME", help="the repository")
    parser.add_argument("--revision", help="branch, tag or commit (main)")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="a copy of its files, for local-dir:FOLDER")
    args = parser.parse_args(argv)
    model = hub.pull(args.repo_id, revision=args.revision, output=args.output)
    print(f"{args.repo_id}: {model.pretrained_cfg['architecture']}, {model.num_classes} classes, "
          f"{sum(p.numel() for p in model.parameters()):,} parameters")
    if head_name(model) is not None:
        head = find_head(model)
        print(f"head: {head}, prototypes {'fitted' if head.is_fitted() else 'not fitted'}")
    if args.output is not None:
        print(f"written: {args.output}")
    return 0


def card(argv: list[str] | None = None) -> int:
    """Writes the model card of a tag; returns the exit code."""
    parser = Parser("card", (
        "hpm_wrn10_2.digits_linf", "hpm_wrn28_10.wang2023_cifar10_linf --output card.md",
        "hpm_wrn10_2.digits_linf --folder hub_cards"), "Writes the model card of a tag with weights.")
    parser.add_argument("name", metavar="NAME", help="a tag of timm.list_pretrained('hpm_*')")
    parser.add_argument("--folder", type=Path, default=Path("hub_cards"),
                        help="folder of <tag>.report.json and <tag>.notes.md, if there are any (%(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="(the terminal)")
    args = parser.parse_args(argv)
    text = tag_card(args.name, args.folder)
    if args.output is None:
        print(text, end="")
    else:
        write_text(args.output, text)
        print(f"written: {args.output}")
    return 0
