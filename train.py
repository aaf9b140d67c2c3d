#!/usr/bin/env python3
"""Trains a robust model with an HPM head, adversarially, from scratch or from pretrained weights.

Run it as it is, under `accelerate launch`, or under `torchrun` (several CPU processes: Accelerate's launcher starts
only one). Writes model.safetensors (the epoch of the best robust validation accuracy), config.json and metrics.csv.
"""

import argparse
import sys
from datetime import datetime
from pathlib import Path

from timm.utils import ParseKwargs

import timm_hpm  # noqa: F401  (registers the models)
from timm_hpm.attacks import SURROGATES
from timm_hpm.data import DATASETS
from timm_hpm.training.loop import TrainConfig, train


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Returns the command line's options; the defaults are `TrainConfig`'s."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("model")
    group.add_argument("--model", help="timm model with an HPM head (hpm_wrn10_2)")
    group.add_argument("--model-kwargs", dest="model_args", nargs="*", action=ParseKwargs, metavar="NAME=VALUE",
                       help="arguments of timm.create_model, such as mix=0.5")
    group.add_argument("--pretrained", action="store_true", default=None, help="start from the pretrained weights")
    group = parser.add_argument_group("data")
    group.add_argument("--dataset", help=f"one of {', '.join(DATASETS)} (digits)")
    group.add_argument("--shift", type=int, help="augmentation: random shifts by up to so many pixels (1)")
    group = parser.add_argument_group("attack")
    group.add_argument("--threat", metavar="NORM:EPS", help="such as Linf:8/255 (the data set's usual one)")
    group.add_argument("--attack-steps", type=int, help="PGD steps; 1 is FGSM with random start (10)")
    group.add_argument("--attack-step-size", type=float, help="in pixels of [0, 1] (2.5·eps/steps)")
    group.add_argument("--attack-through", help=f"surrogate to craft through: {', '.join(SURROGATES)} (mixed)")
    group.add_argument("--val-attack-steps", type=int, help="PGD steps for the choice of the best epoch (20)")
    group = parser.add_argument_group("optimisation")
    group.add_argument("--epochs", type=int, help="(60)")
    group.add_argument("--prototype-epoch", type=int, help="epoch before which the prototypes are first fitted (0)")
    group.add_argument("-b", "--batch-size", type=int, help="images a process and step (128)")
    group.add_argument("--lr", type=float, help="peak of the one-cycle schedule (0.1)")
    group.add_argument("--momentum", type=float, help="(0.9)")
    group.add_argument("--weight-decay", type=float, help="(5e-4)")
    group.add_argument("--seed", type=int, help="(0)")
    group = parser.add_argument_group("machine and output")
    group.add_argument("--device", choices=["cpu"], help="cpu to leave accelerators alone (Accelerate's choice)")
    group.add_argument("--mixed-precision", choices=["no", "bf16", "fp16"], help="(no)")
    group.add_argument("--output", type=Path, metavar="FOLDER", help="(output/train-<model>-<date>)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Runs the training; returns the exit code."""
    args = vars(parse_args(argv))
    given = {name: value for name, value in args.items() if value is not None}
    output = given.pop("output", None)
    config = TrainConfig(**given)
    if output is None:
        output = Path("output") / f"train-{config.model}-{datetime.now():%Y-%m-%d-%H%M%S}"
    kept = train(config, output)
    print("kept: " + "  ".join(f"{name} {value:.4g}" for name, value in kept.items()))
    print(f"written: {output}/model.safetensors; measure it with: python evaluate.py --model {config.model} "
          f"--checkpoint {output}/model.safetensors")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError, ModuleNotFoundError, FloatingPointError) as error:
        sys.exit(f"train.py: {error}")
