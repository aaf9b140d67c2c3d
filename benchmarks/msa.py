#!/usr/bin/env python3
"""What the Mixed Surrogate Attack costs, as ratios of two things in one run, on the embedded model or another.

    OMP_NUM_THREADS=1 python benchmarks/msa.py [--images 100] [--batch-size 50] [--runs 3] [--only NAME ...]
        [--model hpm_wrn10_2] [--checkpoint FILE] [--dataset digits] [--data-dir FOLDER] [--scale 1.0]

- attack over passes: time of APGD-CE and Square side by side through the surrogates, over the time that their counted
  passes take by themselves at that number of rows; the median of paired runs.
- standard over naive: time of the protocol `standard`, over that of pyautoattack's standard version once per surrogate
  and the judge on what it hands back.
- fast over naive: the same of the protocol `fast`.
- two processes over one: time of `evaluate.py --protocol fast` in one process, over that in two, of one thread each.

Beside them stand the robust accuracies that were found. `--scale` multiplies every budget of all that is compared, for
a first look; a figure is one at scale 1.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from _timing import seconds
from pyautoattack import AutoAttack
from torch import Tensor, nn

import timm_hpm
from timm_hpm.attacks import PROTOCOLS, Budget
from timm_hpm.attacks.components import COMPONENTS, AttackBatch, Notes
from timm_hpm.attacks.surrogates import SplitModel
from timm_hpm.data import first_images
from timm_hpm.models.create import create_model, load_checkpoint, open_split_for

NAMES = ("attack over passes", "standard over naive", "fast over naive", "two processes over one")


def attack(split: SplitModel, images: Tensor, labels: Tensor, threat: timm_hpm.ThreatModel) -> None:
    """Runs a gradient attack and a search through all surrogates side by side."""
    for name, budget in {"apgd-ce": Budget(20), "square": Budget(60)}.items():
        batch = AttackBatch(split, split.default_surrogates(), images, labels)
        COMPONENTS[name](batch, threat, budget, Notes())


def passes(split: SplitModel, images: Tensor, forward: int, backward: int) -> None:
    """Makes as many passes, in batches of `images`, as were counted."""
    for _ in range(round(backward / len(images))):
        x = images.clone().requires_grad_()
        torch.autograd.grad(split.features(x).sum(), x)
    with torch.no_grad():
        for _ in range(round((forward - backward) / len(images))):
            split.features(images)


def overhead(model: nn.Module, images: Tensor, labels: Tensor, threat: timm_hpm.ThreatModel, runs: int) -> float:
    """Returns the time of an attack over that of its passes."""
    split = SplitModel(timm_hpm.PixelModel(model), images)
    rows = images.repeat(len(split.default_surrogates()), 1, 1, 1)
    attack(split, images, labels, threat)
    ratios = []
    for _ in range(runs):
        before = split.forward_passes, split.backward_passes
        whole = seconds(lambda: attack(split, images, labels, threat))
        forward, backward = split.forward_passes - before[0], split.backward_passes - before[1]
        ratios.append(whole / seconds(lambda f=forward, b=backward: passes(split, rows, f, b)))
    return statistics.median(ratios)


def naive(model: nn.Module, images: Tensor, labels: Tensor, threat: timm_hpm.ThreatModel, batch_size: int,
          scale: float) -> float:
    """Runs AutoAttack once per surrogate, as its users would, and returns the judged worst case."""
    pixel_model = timm_hpm.PixelModel(model)
    split = SplitModel(pixel_model, images[:batch_size])
    # The plain network: what makes the attacked copy fast is ours.
    backbone = pixel_model
    head = timm_hpm.find_head(model)
    right = timm_hpm.judge(model, images, labels, batch_size)
    for surrogate in split.default_surrogates():
        seen: list[Tensor] = []
        with timm_hpm.inference_mode(model, "fc"), head.register_forward_pre_hook(
                lambda _, inputs, seen=seen: seen.append(inputs[0])):
            def logits(x: Tensor, surrogate: str = surrogate, seen: list[Tensor] = seen) -> Tensor:
                seen.clear()
                backbone(x)
                return split.logits(surrogate, seen[0])

            adversary = AutoAttack(logits, norm=threat.norm, eps=threat.eps, seed=0, device="cpu", version="standard")
            adversary.apgd.n_iter = adversary.apgd_targeted.n_iter = adversary.fab.n_iter = max(round(100 * scale), 1)
            adversary.square.n_queries = max(round(5_000 * scale), 1)
            found, _ = adversary.run_standard_evaluation(images, labels, batch_size=batch_size)
        right &= timm_hpm.judge(model, found.detach().clamp(0, 1), labels, batch_size)
    return float(right.float().mean())


def main() -> None:
    """Prints the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--model", default="hpm_wrn10_2")
    parser.add_argument("--checkpoint")
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--data-dir")
    parser.add_argument("--scale", type=float, default=1.0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = create_model(args.model, pretrained=args.checkpoint is None)
    if args.checkpoint:
        load_checkpoint(model, args.checkpoint)
    model.eval().requires_grad_(False)
    # Not the test split: this is what the protocols are made by.
    data = open_split_for(model, args.dataset, "val", data_dir=args.data_dir)
    images, labels = first_images(data, args.images)
    threat = timm_hpm.ThreatModel.parse(data.threat)

    if NAMES[0] in args.only:
        size = args.batch_size
        print(f"{NAMES[0]}: {overhead(model, images[:size], labels[:size], threat, args.runs):.2f}", flush=True)
    protocols = [name for name in ("standard", "fast") if f"{name} over naive" in args.only]
    if protocols:
        accuracies: dict[str, float] = {}

        def run(name: str) -> None:
            protocol = PROTOCOLS[name]
            budgets = {attack: replace(budget, iterations=max(round(budget.iterations * args.scale), 1))
                       for attack, budget in protocol.attacks.items()}
            report = timm_hpm.mixed_surrogate_attack(
                model, images, labels, threat, batch_size=args.batch_size, surrogates_at_once=5,
                protocol=replace(protocol, attacks=budgets))
            accuracies[name] = report.robust_accuracy

        def run_naive() -> None:
            accuracies["naive"] = naive(model, images, labels, threat, args.batch_size, args.scale)

        whole = seconds(run_naive)
        for name in protocols:
            ratio = seconds(lambda name=name: run(name)) / whole
            print(f"{name} over naive: {ratio:.2f} (robust {100 * accuracies[name]:.1f} %, "
                  f"naive {100 * accuracies['naive']:.1f} %)", flush=True)
    if NAMES[3] in args.only:
        print(f"{NAMES[3]}: {processes(args):.2f}")


def processes(args: argparse.Namespace) -> float:
    """Returns how much faster two processes are than one."""
    root = Path(__file__).parent.parent
    options = [str(root / "evaluate.py"), "--device", "cpu", "--protocol", "fast", "--dataset", args.dataset, "--split",
               "val", "--num-images", str(args.images), "--batch-size", str(args.batch_size), "--model", args.model]
    options += ["--checkpoint", args.checkpoint] if args.checkpoint else []
    options += ["--data-dir", args.data_dir] if args.data_dir else []
    times = []
    with tempfile.TemporaryDirectory() as folder:
        for number in (1, 2):
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(number)]
            command = [sys.executable, *launcher, *options, "--output", f"{folder}/{number}"]
            times.append(seconds(lambda command=command: subprocess.run(command, check=True, capture_output=True)))
        reports = [timm_hpm.AttackReport.load(f"{folder}/{number}/report.json") for number in (1, 2)]
    assert reports[0].same_results(reports[1]), "the report depends on the number of processes"
    return times[0] / times[1]


if __name__ == "__main__":
    main()
