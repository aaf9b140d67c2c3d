#!/usr/bin/env python3
"""Cost of the Mixed Surrogate Attack on a model in batch mode, as ratios of two things in one run.

    OMP_NUM_THREADS=1 python benchmarks/msa.py [--images 100] [--batch-size 50] [--runs 3] [--only NAME ...]
        [--model hpm_wrn10_2] [--checkpoint FILE] [--dataset digits] [--split val] [--data-dir FOLDER] [--scale 1.0]
        [--output FOLDER]

- standard over naive: time of the protocol `standard`, over that of pyautoattack's standard version once per surrogate
  and the judge on its results.
- fast over naive: the same of the protocol `fast`.
- two processes over one: time of `evaluate.py` by `standard` in one process, over that in two, of one thread each; the
  median of several runs.

Beside them stand the robust accuracies that were found, and the ratio of the processor's time, which other work on the
machine changes less. `--scale` multiplies every budget of all but the last, for a first look; a figure is one at
scale 1. `--output` keeps the raw reports.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from _timing import seconds
from pyautoattack import AutoAttack
from torch import Tensor, nn

import timm_hpm
from timm_hpm.data import first_images
from timm_hpm.evaluation import PROTOCOLS, Protocol
from timm_hpm.evaluation.attacked import AttackedModel
from timm_hpm.evaluation.judge import as_row
from timm_hpm.files import writable_folder, write_text
from timm_hpm.models.create import create_model, open_split_for
from timm_hpm.report import weights_digest
from timm_hpm.report.metrics import right_in_all

NAMES = ("standard over naive", "fast over naive", "two processes over one")


def scaled(protocol: Protocol, scale: float) -> Protocol:
    """Returns the protocol with `scale` times its iterations."""
    return replace(protocol, attacks={name: replace(budget, iterations=max(round(budget.iterations * scale), 1))
                                      for name, budget in protocol.attacks.items()})


def naive(model: nn.Module, images: Tensor, labels: Tensor, threat: timm_hpm.ThreatModel, batch_size: int,
          scale: float) -> dict[str, str]:
    """Runs AutoAttack once per surrogate, as its users would, and returns the verdicts on the results."""
    pixel_model = timm_hpm.PixelModel(model)
    split = AttackedModel(pixel_model, images[:batch_size])
    # The plain network: the attacked copy is faster, and ours.
    backbone = pixel_model
    head = timm_hpm.find_head(model)
    correct = {"clean": as_row(timm_hpm.judge(model, images, labels, batch_size))}
    for surrogate in split.surrogates():
        seen: list[Tensor] = []
        with timm_hpm.head_mode(model, "fc"), head.register_forward_pre_hook(
                lambda _, inputs, seen=seen: seen.append(inputs[0])):
            def logits(x: Tensor, surrogate: str = surrogate, seen: list[Tensor] = seen) -> Tensor:
                seen.clear()
                backbone(x)
                return split.logits(surrogate, seen[0])

            adversary = AutoAttack(logits, norm=threat.norm, eps=threat.eps, seed=0, device="cpu", version="standard")
            adversary.apgd.n_iter = adversary.apgd_targeted.n_iter = adversary.fab.n_iter = max(round(100 * scale), 1)
            adversary.square.n_queries = max(round(5_000 * scale), 1)
            found, _ = adversary.run_standard_evaluation(images, labels, batch_size=batch_size)
        correct[f"{surrogate}/autoattack"] = as_row(
            timm_hpm.judge(model, found.detach().clamp(0, 1), labels, batch_size))
    return correct


def main() -> None:
    """Prints the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100, help="(%(default)s)")
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--runs", type=int, default=3, help="of two processes (%(default)s)")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--model", default="hpm_wrn10_2")
    parser.add_argument("--checkpoint")
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--split", default="val", help="(%(default)s: what the protocols are made by)")
    parser.add_argument("--data-dir")
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="keep the reports of the protocols and of naive")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = create_model(args.model, pretrained=args.checkpoint is None, checkpoint=args.checkpoint, inference="batch")
    model.eval().requires_grad_(False)
    if args.output:
        writable_folder(args.output)
    data = open_split_for(model, args.dataset, args.split, data_dir=args.data_dir)
    images, labels = first_images(data, args.images)
    threat = timm_hpm.ThreatModel.of(data.threat)

    protocols = [name for name in ("standard", "fast") if f"{name} over naive" in args.only]
    if protocols:
        compare_protocols(model, images, labels, threat, protocols, args)
    if NAMES[2] in args.only:
        each = processes(args)
        print(f"{NAMES[2]}: {statistics.median(each):.2f} ({', '.join(f'{ratio:.2f}' for ratio in each)})")


def compare_protocols(model: nn.Module, images: Tensor, labels: Tensor, threat: timm_hpm.ThreatModel,
                      protocols: Sequence[str], args: argparse.Namespace) -> None:
    """Prints time and robust accuracy of the protocols and of the naive one, and keeps the reports."""
    correct: dict[str, str] = {}

    def run_naive() -> None:
        correct.update(naive(model, images, labels, threat, args.batch_size, args.scale))

    def run(name: str) -> None:
        nonlocal report
        about = {"model": args.model, "weights": args.checkpoint or "pretrained", "dataset": args.dataset,
                 "split": args.split}
        report = timm_hpm.mixed_surrogate_attack(
            model, images, labels, threat, batch_size=args.batch_size, about=about,
            protocol=scaled(PROTOCOLS[name], args.scale).changed(surrogates_at_once=5))

    report: timm_hpm.AttackReport
    wall, processor = both_times(run_naive)
    robust = sum(right_in_all(correct.values())) / len(images)
    print(f"naive: robust {100 * robust:.1f} %", flush=True)
    if args.output:
        write_text(args.output / "naive.json", json.dumps({
            "model": args.model, "checkpoint": args.checkpoint, "dataset": args.dataset, "split": args.split,
            "weights_digest": weights_digest(model), "threat": str(threat), "batch_size": args.batch_size,
            "scale": args.scale, "robust_accuracy": robust, "correct": correct}, indent=1) + "\n")
    for name in protocols:
        mine, my_processor = both_times(lambda name=name: run(name))
        print(f"{name} over naive: {mine / wall:.2f} (processor's time {my_processor / processor:.2f}; robust "
              f"{100 * report.robust_accuracy:.1f} %, naive {100 * robust:.1f} %)", flush=True)
        if args.output:
            report.save(args.output / f"{name}.json")


def both_times(task: Callable[[], object]) -> tuple[float, float]:
    """Returns how long a task takes, on the clock and of this process's processor."""
    before = time.process_time()
    wall = seconds(task)
    return wall, time.process_time() - before


def processes(args: argparse.Namespace) -> list[float]:
    """Returns how much faster two processes are than one, which is timed before and after them, in several runs."""
    root = Path(__file__).parent.parent
    options = [str(root / "evaluate.py"), "--device", "cpu", "--dataset", args.dataset, "--split",
               args.split, "--num-images", str(args.images), "--batch-size", str(args.batch_size)]
    options += ["--model", args.model, "--inference", "batch"]
    options += ["--checkpoint", args.checkpoint] if args.checkpoint else []
    options += ["--data-dir", args.data_dir] if args.data_dir else []

    def timed(number: int, output: Path) -> float:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(number)]
        command = [sys.executable, *launcher, *options, "--output", str(output)]
        return seconds(lambda: subprocess.run(command, check=True, capture_output=True,
                                              env=os.environ | {"OMP_NUM_THREADS": "1"}))

    ratios = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        before = timed(1, folder / "one")
        report = timm_hpm.AttackReport.load(folder / "one" / "report.json")
        for run in range(args.runs):
            two = timed(2, folder / f"two-{run}")
            assert report.same_results(timm_hpm.AttackReport.load(folder / f"two-{run}" / "report.json")), (
                "the report depends on the number of processes")
            after = timed(1, folder / f"one-{run}")
            ratios.append(statistics.mean((before, after)) / two)
            before = after
    return ratios


if __name__ == "__main__":
    main()
