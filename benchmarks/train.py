#!/usr/bin/env python3
"""Cost of training, as ratios of two things in one run.

    python benchmarks/train.py

- HPM step over FC step: time of a training step of `hpm_wrn10_2` on Fashion-MNIST-sized images in batch mode, over the
  same net, attack (PGD-2) and batch with the head in its fc mode; the median of paired runs.
- step over its passes: time of that HPM step over its forward and backward passes alone.
- two processes over one: images a second of those HPM steps in two processes of batch 128 and one thread each (by
  torchrun, as train.py runs), over those of one process of batch 128 and one thread.
- bytes kept by an attack over those kept with parameters that want gradients: for the backward pass of one attack step
  of `hpm_vit_small_patch16_224`, batch 2.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile

import timm
import torch
from _timing import seconds
from torch import Tensor

import timm_hpm
from timm_hpm.attacks import pgd
from timm_hpm.training.config import TrainConfig
from timm_hpm.training.loop import Run
from timm_hpm.training.trunk import PixelTrunk, inputs_only

RUNS = 15
THREAT = timm_hpm.ThreatModel("Linf", 0.1)


def run_of(inference: str, folder: str) -> Run:
    """Returns a training run of which single steps can be made."""
    config = TrainConfig(device="cpu", pretrained=True, model_kwargs={"inference": inference}, attack_steps=2, lr=1e-6)
    return Run(config, f"{folder}/{inference}")


def step(run: Run, images: Tensor, labels: Tensor) -> None:
    """Makes one training step: attack, update of the parameters, update of the prototypes."""
    sums: list = []
    run.learn(images, labels, sums)
    run.after_update(sums)


def passes(run: Run, images: Tensor) -> None:
    """Makes the passes of a step and nothing else."""
    run.trained.eval()
    with inputs_only(run.trunk):
        for _ in range(run.config.attack_steps):
            x = images.clone().requires_grad_()
            torch.autograd.grad(run.trunk.backbone(x).sum(), x)
    run.trained.train()
    run.trunk.backbone(images).sum().backward()
    run.optimizer.zero_grad()


def steps() -> None:
    """Prints the cost of a step."""
    images, labels = torch.rand(128, 1, 28, 28), torch.arange(128) % 10
    with tempfile.TemporaryDirectory() as folder:
        hpm, fc = run_of("batch", folder), run_of("fc", folder)
        over_fc, over_passes = [], []
        for turn in range(RUNS + 1):
            tasks = {"hpm": lambda: step(hpm, images, labels), "fc": lambda: step(fc, images, labels),
                     "passes": lambda: passes(hpm, images)}
            # By turns: the first task has other caches than the second.
            order = list(tasks) if turn % 2 else list(tasks)[::-1]
            took = {name: seconds(tasks[name]) for name in order}
            if turn:
                over_fc.append(took["hpm"] / took["fc"])
                over_passes.append(took["hpm"] / took["passes"])
    print(f"HPM step over FC step: {statistics.median(over_fc):.3f}")
    print(f"step over its passes: {statistics.median(over_passes):.3f}", flush=True)


def worker() -> None:
    """Prints the images a second of all processes together, as one of them."""
    images, labels = torch.rand(128, 1, 28, 28), torch.arange(128) % 10
    with tempfile.TemporaryDirectory() as folder:
        run = run_of("batch", folder)
        step(run, images, labels)
        run.accelerator.wait_for_everyone()
        took = seconds(lambda: [step(run, images, labels) for _ in range(40)])
        if run.accelerator.is_main_process:
            print(run.accelerator.num_processes * 40 * len(images) / took)
        run.accelerator.end_training()


def images_per_second(processes: int) -> float:
    """Returns the images a second of so many processes together, of one thread each."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    done = subprocess.run([sys.executable, *launcher, __file__, "--worker"], check=True, text=True, capture_output=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    return float(done.stdout)


def processes() -> None:
    """Prints how much faster two processes are."""
    ratios = []
    for _ in range(3):
        ratios.append(images_per_second(2) / images_per_second(1))
    print(f"two processes over one: {statistics.median(ratios):.2f}", flush=True)


def memory() -> None:
    """Prints the memory kept for the backward pass of an attack step."""
    trunk = PixelTrunk(timm.create_model("hpm_vit_small_patch16_224.untrained").eval())
    images, labels = torch.rand(2, 3, 224, 224), torch.zeros(2, dtype=torch.long)

    def kept() -> int:
        storages: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            pgd(lambda x: trunk.surrogate_logits("fc", x), images, labels, THREAT, steps=1)
        return sum(storages.values())

    whole = kept()
    with inputs_only(trunk):
        print(f"bytes kept by an attack over those with parameter gradients: {kept() / whole:.2f}")


def main() -> None:
    """Prints the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", action="store_true", help="be one of the processes")
    is_worker = parser.parse_args().worker
    torch.manual_seed(0)
    torch.set_num_threads(1)
    if is_worker:
        return worker()
    steps()
    memory()
    processes()


if __name__ == "__main__":
    main()
