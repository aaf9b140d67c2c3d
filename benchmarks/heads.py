#!/usr/bin/env python3
"""FC, ℓ2 and HPM heads fine-tuned alike from one base, attacked alike: training, evaluation and the page of all.

    python benchmarks/heads.py run --output output/heads [--bases digits ...] [--modes fc ...] [--seeds 0 1 2]
    python benchmarks/heads.py table > docs/results.md

`run` trains each base of heads.yaml if it has one to train, fine-tunes it through each inference mode and each seed
with the same images, order, noise and steps, and evaluates each result in the mode it was trained through; the FC
classifier's network also with the other heads, fitted but not trained. A command that was stopped goes on. The reports
go to benchmarks/reports/heads, from which `table` makes docs/results.md. It also reads the sensitivity studies of
benchmarks/reports/sensitivity, made by

    python train.py --device cpu --model-kwargs inference=batch --objective clean --epochs 20 \\
        --output output/digits-normal
    python -m timm_hpm sensitivity --num-images 0 --radii 0:0.15:0.025 --output output/sensitivity-digits \\
        --checkpoint output/digits-normal/model.safetensors timm_hpm/models/weights/hpm_wrn10_2.digits_linf.safetensors
    python train.py --device cpu --config configs/fashion_mnist.yaml --model-kwargs stem_stride=4 inference=batch \\
        --objective clean --epochs 4 --prototype-epoch 3 --lr 0.1 --output output/fashion-normal
    python -m timm_hpm sensitivity --dataset fashion_mnist --model-kwargs stem_stride=4 --num-images 300 \\
        --radii 0:0.15:0.025 --output output/sensitivity-fashion_mnist \\
        --checkpoint output/fashion-normal/model.safetensors \\
        timm_hpm/models/weights/hpm_wrn10_2.fashion_mnist_linf.safetensors
"""

import argparse
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from heads_table import REPORTS, page
from torch.utils.data import DataLoader

from timm_hpm import INFERENCE_MODES, AttackReport, fit_prototypes
from timm_hpm.files import filling, write_text
from timm_hpm.models.constructors import is_constructor
from timm_hpm.models.create import create_model, open_split_for
from timm_hpm.models.saving import write_model

ROOT = Path(__file__).parents[1]
CONFIGS = Path(__file__).with_suffix(".yaml")
# AutoAttack's attacks on the FC classifier alone, at the budgets of fast.
FC_ALONE = {"surrogates": ["fc"], "attacks": ["apgd-ce", "apgd-t", "square"]}


def command(script: str, options: dict[str, Any], folder: Path) -> None:
    """Runs a script with options in a folder, or resumes it there."""
    config = folder.with_suffix(".yaml")
    folder.parent.mkdir(parents=True, exist_ok=True)
    write_text(config, yaml.safe_dump(options))
    begun = any((folder / name).exists() for name in ("args.yaml", "options.json"))
    where = ["--resume", str(folder)] if begun else ["-c", str(config), "--output", str(folder)]
    if begun and is_constructor(options["model"]):
        where += ["--model", options["model"]]
    subprocess.run([sys.executable, str(ROOT / script), *where], check=True)


def train(options: dict[str, Any], folder: Path) -> Path:
    """Trains in a folder if that is not done; returns the weights."""
    finished = folder / "finished"
    if not finished.exists():
        command("train.py", options, folder)
        if not (folder / "model.safetensors").exists():  # stopped by a signal, which is no failure of a job
            raise SystemExit(f"the training in {folder} was stopped; the same command goes on")
        finished.touch()
    return folder / "model.safetensors"


def fitted(base: dict[str, Any], weights: Path) -> Path:
    """Returns the weights with prototypes fitted on clean and adversarial training images, but not trained for."""
    folder = weights.parent.with_name(f"{weights.parent.name}-fitted")
    if not (folder / "model.safetensors").exists():
        options = base["train"]
        model = create_model(options["model"], pretrained=False, checkpoint=str(weights),
                             **options.get("model_kwargs", {})).eval()
        split = open_split_for(model, options["dataset"], "train", data_dir=options.get("data_dir"),
                               img_size=options.get("img_size"))
        fit_prototypes(model, DataLoader(split, batch_size=128), options["threat"])
        with filling(folder, first="model.safetensors") as place:
            write_model(model, place)
    return folder / "model.safetensors"


def judge(base: dict[str, Any], weights: Path, label: str, output: Path, reports: Path,
          attack: dict[str, Any] | None = None) -> None:
    """Evaluates weights if that is not done: by `fast`, changed by the base's options, or by those of an `attack`.

    Arguments:
        label: BASE-TRAINED MODE-JUDGED MODE-SEED, the name of the report.
    """
    name, _, mode, _ = label.rsplit("-", 3)
    report = reports / ("fc-alone" if attack else "") / f"{label}.json"
    if report.exists():
        return
    if attack is None:
        attack = base.get("evaluate_batch", {}) if mode == "batch" else {}
    given, folder = base["train"], output / name / (f"{label}-fc-alone" if attack is FC_ALONE else label)
    command("evaluate.py", {
        "model": given["model"], "checkpoint": str(weights), "model_kwargs": given.get("model_kwargs", {}),
        "threat": given["threat"], "inference": [mode], "split": "test", "protocol": "fast", **base["evaluate"],
        **attack}, folder)
    replace(AttackReport.load(folder / "report.json"), examples=[]).save(report)


def run(args: argparse.Namespace) -> None:
    """Trains and evaluates all that is asked for: the trained heads, then those that are not trained."""
    text = CONFIGS.read_text(encoding="utf-8")
    for place in args.place:
        name, _, folder = place.partition("=")
        text = text.replace(f"{{{name}}}", folder)
    configs = yaml.safe_load(text)
    names = args.bases or list(configs)
    runs = [(name, mode, seed) for seed in args.seeds for name in names for mode in args.modes]
    for name, mode, seed in runs:
        weights = tuned(configs[name], mode, seed, args.output / name)
        if not args.train_only:
            judge(configs[name], weights, f"{name}-{mode}-{mode}-{seed}", args.output, args.reports)
    for name, mode, seed in [] if args.train_only else runs:
        base = configs[name]
        weights = tuned(base, mode, seed, args.output / name)
        if mode != "fc":
            judge(base, weights, f"{name}-{mode}-{mode}-{seed}", args.output, args.reports, FC_ALONE)
        elif args.untrained is None or seed in args.untrained:
            weights = fitted(base, weights)
            for other in ("dataset", "sample", "batch"):
                for attack in (None, FC_ALONE):
                    judge(base, weights, f"{name}-{mode}-{other}-{seed}", args.output, args.reports, attack)


def tuned(base: dict[str, Any], mode: str, seed: int, folder: Path) -> Path:
    """Returns the weights of a base that is fine-tuned through a mode; a base to train is the same for all seeds."""
    first = {} if "base" not in base else {
        "initial_checkpoint": str(train({**base["base"], "seed": 0}, folder / "base-0"))}
    kwargs = {**base["train"].get("model_kwargs", {}), "inference": mode}
    return train({**base["train"], **first, "model_kwargs": kwargs, "seed": seed}, folder / f"{mode}-{seed}")


def main() -> None:
    """Runs a command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    running = commands.add_parser("run")
    running.set_defaults(run=run)
    running.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    running.add_argument("--reports", type=Path, default=REPORTS, metavar="FOLDER", help="where the reports go")
    running.add_argument("--bases", nargs="+", metavar="NAME", help="bases of heads.yaml (all)")
    running.add_argument("--modes", nargs="+", choices=INFERENCE_MODES, default=["fc", "dataset", "sample", "batch"])
    running.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N")
    running.add_argument("--untrained", nargs="*", type=int, metavar="N",
                         help="seeds whose FC network is also evaluated with the other heads, not trained (all)")
    running.add_argument("--place", nargs="+", default=[], metavar="NAME=FOLDER", help="folders that heads.yaml names")
    running.add_argument("--train-only", action="store_true", help="no evaluations")
    commands.add_parser("table").set_defaults(run=lambda _: print(page(), end=""))
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
