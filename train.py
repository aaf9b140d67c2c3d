#!/usr/bin/env python3
"""Trains a robust model with an HPM head, adversarially, from scratch or from pretrained weights.

Run it as it is, under `accelerate launch`, or under `torchrun` (several CPU processes: Accelerate's launcher starts
only one). Options come from --config, a YAML file, and from the command line, which goes first. Writes into --output:
model.safetensors and config.json (the epoch of the best robust validation accuracy), args.yaml, metrics.csv, curve.svg,
checkpoints/, and warnings.txt if something is wrong. A run that was stopped goes on by `train.py --resume FOLDER`.
"""

import argparse
import signal
import sys
from pathlib import Path
from typing import Any

from accelerate import PartialState

import timm_hpm  # noqa: F401  (registers the models)
from timm_hpm.console import run_command
from timm_hpm.files import default_folder
from timm_hpm.options import given_options
from timm_hpm.training import Stopped, TrainConfig, train
from timm_hpm.training.run_folder import measuring_command, saved_options


def parse_args(argv: list[str] | None = None) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Returns the arguments of this script, and the given options of `TrainConfig`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
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
        options = saved_options(resume).to_dict() | options
        output = resume
    config = TrainConfig(**options)
    if output is None:
        output = default_folder(config.model, "train-")
    try:
        kept = train(config, output, resume=resume is not None, progress=True)
    except Stopped as stopped:
        if PartialState().is_main_process:
            print(f"{stopped}; go on by: train.py --resume {output}", file=sys.stderr)
        return 130 if stopped.signal == signal.SIGINT else 0
    if PartialState().is_main_process:
        print("kept: " + "  ".join(f"{name} {value:.4g}" for name, value in kept.items()))
        print(f"written: {output}/model.safetensors; measure it with: {measuring_command(output)}")
    return 0


if __name__ == "__main__":
    run_command("train.py", main)
