"""`train`: adversarial training of a model."""

import signal
import sys
from pathlib import Path
from typing import Any

from accelerate import PartialState

from ..files import default_folder
from ..models.constructors import named_again
from ..options import given_options
from ..training import Stopped, TrainConfig, train
from ..training.header import row_text
from ..training.run_folder import measuring_command, saved_options
from .parser import Parser, resuming

_ABOUT = """\
Trains a robust model adversarially, with or without an HPM head, from scratch or from pretrained weights. Options come
from --config, a YAML file, and from the command line, which overrides it. Writes into --output: model.safetensors and
config.json (the epoch of the best robust validation accuracy), args.yaml, metrics.csv, curve.svg, checkpoints/, and
warnings.txt if something is wrong.

On several GPUs: accelerate launch -m timm_hpm train; on several CPU processes: torchrun --nproc_per_node 2 -m timm_hpm
train --device cpu (Accelerate's launcher starts only one)."""
_EXAMPLES = ("--pretrained --epochs 5 --lr 0.01",
             "--model hpm_resnet18 --dataset folder --data-dir data --threat Linf:4/255",
             "--resume output/run")


def parse_args(argv: list[str] | None = None) -> tuple[Any, dict[str, Any]]:
    """Returns the arguments of the command itself, and the given options of `TrainConfig`."""
    parser = Parser("train", _EXAMPLES, _ABOUT)
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="(output/train-<model>-<date>)")
    parser.add_argument("--resume", type=Path, metavar="FOLDER", help="folder of a run to resume")
    return given_options(parser, TrainConfig, argv)


def main(argv: list[str] | None = None) -> int:
    """Runs the training; returns the exit code."""
    args, options = parse_args(argv)
    output, resume = args.output, args.resume
    if resume:
        if output:
            raise ValueError("--resume FOLDER names the output folder, too; leave out --output")
        saved = saved_options(resume).to_dict()
        named_again(saved["model"], options, resume)
        options = saved | {"time_limit": None} | options
        output = resume
    config = TrainConfig(**options)
    if output is None:
        output = default_folder(config.model, "train-")
    try:
        kept = train(None, config, output, resume=resume is not None, progress=True)
    except Stopped as stopped:
        if PartialState().is_main_process:
            print(f"{stopped}; to go on: {resuming('train', config, output)}", file=sys.stderr)
        return 130 if stopped.signal == signal.SIGINT else 0
    if PartialState().is_main_process:
        print(f"kept: {row_text(kept, config.epochs)}")
        print(f"written: {output}/model.safetensors; measure it with: {measuring_command(output)}")
    return 0
