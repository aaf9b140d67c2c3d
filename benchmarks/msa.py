#!/usr/bin/env python3
"""What the Mixed Surrogate Attack costs, as ratios of two things in one run, on the embedded model or another.

    OMP_NUM_THREADS=1 python benchmarks/msa.py [--images 100] [--batch-size 50] [--runs 3] [--only NAME ...]
        [--model hpm_wrn10_2] [--checkpoint FILE] [--dataset digits] [--split val] [--data-dir FOLDER] [--scale 1.0]
        [--output FOLDER]

- attack over passes: time of an evaluation by `standard` at a fifth of its budgets on one batch, checks and verdicts
  included, over the time that its counted passes take by themselves: the attacks' from the pixels to the surrogates'
  logits, in batches of as many rows as the attack has at first, and the judge's. The median of several runs; also for
  each attack.
- standard over naive: time of the protocol `standard`, over that of pyautoattack's standard version once per surrogate
  and the judge on what it hands back.
- fast over naive: the same of the protocol `fast`.
- two processes over one: time of `evaluate.py --protocol fast` in one process, over that in two, of one thread each.

Beside them stand the robust accuracies that were found, and the ratio of the processor's time, which other work on the
machine changes less. `--scale` multiplies every budget of all that is compared, for a first look; a figure is one at
scale 1. `--output` keeps the raw reports.
"""

import argparse
import json
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
from timm_hpm.attacks import PROTOCOLS, Protocol
from timm_hpm.attacks.joint import JOINT_ATTACKS
from timm_hpm.attacks.judge import as_row
from timm_hpm.attacks.msa import surrogates_of
from timm_hpm.attacks.surrogates import SplitModel
from timm_hpm.data import first_images
from timm_hpm.files import writable_folder, write_text
from timm_hpm.models.create import create_model, load_checkpoint, open_split_for
from timm_hpm.report.verdicts import right_in_all

NAMES = ("attack over passes", "standard over naive", "fast over naive", "two processes over one")


def passes(split: SplitModel, images: Tensor, surrogates: Sequence[str], forward: float,
           backward: float) -> None:
    """Makes as many passes, in batches of `images` for each of the surrogates side by side, as were counted."""
    rows = images.repeat(len(surrogates), 1, 1, 1)

    def logits(x: Tensor) -> Tensor:
        parts = split.features(x).split(len(images))
        return torch.cat([split.logits(name, part) for name, part in zip(surrogates, parts, strict=True)])

    for _ in range(round(backward / len(rows))):
        x = rows.clone().requires_grad_()
        torch.autograd.grad(logits(x).sum(), x)
    with torch.no_grad():
        for _ in range(round((forward - backward) / len(rows))):
            logits(rows)


def overhead(model: nn.Module, images: Tensor, labels: Tensor, threat: timm_hpm.ThreatModel, scale: float,
             runs: int) -> dict[str, float]:
    """Returns the time of a whole evaluation on one batch, and of each of its attacks, over that of its passes."""
    pixel_model = timm_hpm.PixelModel(model)
    split = SplitModel(pixel_model, images)
    protocol = scaled(PROTOCOLS["standard"], scale / 5)
    ratios: dict[str, list[float]] = {}
    for _ in range(runs):
        report = timm_hpm.mixed_surrogate_attack(model, images, labels, threat, batch_size=len(images),
                                                 surrogates_at_once=5, protocol=protocol)
        total = report.cost.pop("all")
        # The judge's, and those of the checks.
        rest = total["forward_passes"] - sum(cost["forward_passes"] for cost in report.cost.values())
        alone = seconds(lambda rest=rest: judge_passes(pixel_model, images, rest))
        for name, cost in report.cost.items():
            surrogates = surrogates_of(name, split, split.default_surrogates())
            # These take one surrogate after the other.
            at_once = [[one] for one in surrogates] if name in (*JOINT_ATTACKS, "apgd-chain") else [surrogates]
            forward, backward = cost["forward_passes"] / len(at_once), cost["backward_passes"] / len(at_once)
            others = sum(seconds(lambda names=names, f=forward, b=backward: passes(split, images, names, f, b))
                         for names in at_once)
            ratios.setdefault(name, []).append(cost["seconds"] / others)
            alone += others
        ratios.setdefault("all", []).append(total["seconds"] / alone)
    return {name: statistics.median(values) for name, values in ratios.items()}


@torch.no_grad()
def judge_passes(model: nn.Module, images: Tensor, number: float) -> None:
    """Makes so many passes of the true model in batches of `images`."""
    for _ in range(round(number / len(images))):
        model(images)


def scaled(protocol: Protocol, scale: float) -> Protocol:
    """Returns the protocol with `scale` times its iterations."""
    return replace(protocol, attacks={name: replace(budget, iterations=max(round(budget.iterations * scale), 1))
                                      for name, budget in protocol.attacks.items()})


def naive(model: nn.Module, images: Tensor, labels: Tensor, threat: timm_hpm.ThreatModel, batch_size: int,
          scale: float) -> dict[str, str]:
    """Runs AutoAttack once per surrogate, as its users would, and returns the verdicts on what each handed back."""
    pixel_model = timm_hpm.PixelModel(model)
    split = SplitModel(pixel_model, images[:batch_size])
    # The plain network: what makes the attacked copy fast is ours.
    backbone = pixel_model
    head = timm_hpm.find_head(model)
    correct = {"clean": as_row(timm_hpm.judge(model, images, labels, batch_size))}
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
        correct[f"{surrogate}/autoattack"] = as_row(
            timm_hpm.judge(model, found.detach().clamp(0, 1), labels, batch_size))
    return correct


def main() -> None:
    """Prints the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--runs", type=int, default=3, help="of attack over passes (%(default)s)")
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
    model = create_model(args.model, pretrained=args.checkpoint is None)
    if args.checkpoint:
        load_checkpoint(model, args.checkpoint)
    model.eval().requires_grad_(False)
    if args.output:
        writable_folder(args.output)
    data = open_split_for(model, args.dataset, args.split, data_dir=args.data_dir)
    images, labels = first_images(data, args.images)
    threat = timm_hpm.ThreatModel.parse(data.threat)

    if NAMES[0] in args.only:
        size = args.batch_size
        ratios = overhead(model, images[:size], labels[:size], threat, args.scale, args.runs)
        each = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items() if name != "all")
        print(f"{NAMES[0]}: {ratios['all']:.2f} ({each})", flush=True)
    protocols = [name for name in ("standard", "fast") if f"{name} over naive" in args.only]
    if protocols:
        compare_protocols(model, images, labels, threat, protocols, args)
    if NAMES[3] in args.only:
        print(f"{NAMES[3]}: {processes(args):.2f}")


def compare_protocols(model: nn.Module, images: Tensor, labels: Tensor, threat: timm_hpm.ThreatModel,
                      protocols: Sequence[str], args: argparse.Namespace) -> None:
    """Prints what the protocols take and find beside the naive one, and keeps the reports."""
    correct: dict[str, str] = {}

    def run_naive() -> None:
        correct.update(naive(model, images, labels, threat, args.batch_size, args.scale))

    def run(name: str) -> None:
        nonlocal report
        about = {"model": args.model, "weights": args.checkpoint or "pretrained", "dataset": args.dataset,
                 "split": args.split}
        report = timm_hpm.mixed_surrogate_attack(
            model, images, labels, threat, batch_size=args.batch_size, surrogates_at_once=5, about=about,
            protocol=scaled(PROTOCOLS[name], args.scale))

    report: timm_hpm.AttackReport
    wall, processor = both_times(run_naive)
    robust = sum(right_in_all(correct.values())) / len(images)
    print(f"naive: robust {100 * robust:.1f} %", flush=True)
    if args.output:
        write_text(args.output / "naive.json", json.dumps({
            "model": args.model, "checkpoint": args.checkpoint, "dataset": args.dataset, "split": args.split,
            "threat": str(threat), "batch_size": args.batch_size, "scale": args.scale, "seconds": wall,
            "robust_accuracy": robust, "correct": correct}, indent=1) + "\n")
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


def processes(args: argparse.Namespace) -> float:
    """Returns how much faster two processes are than one."""
    root = Path(__file__).parent.parent
    options = [str(root / "evaluate.py"), "--device", "cpu", "--protocol", "fast", "--dataset", args.dataset, "--split",
               args.split, "--num-images", str(args.images), "--batch-size", str(args.batch_size)]
    options += ["--model", args.model]
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
