#!/usr/bin/env python3
"""What the protocols find on a network with 100 classes, and at which part of AutoAttack's time.

    OMP_NUM_THREADS=1 python benchmarks/many_classes.py [--split val] [--num-images 200] [--protocols fast standard]

An image is two digits side by side, its class both together: 00 to 99. The network is a small one that the script
trains adversarially on pairs of the training split, which takes less than a minute; the attacked pairs are of the
given split.
"""

import argparse
import sys

import torch
import torch.nn.functional as F
from public_nets import autoattack, by_protocol, measured
from torch import Tensor, nn

import timm_hpm
from timm_hpm import ThreatModel
from timm_hpm.attacks import pgd

THREAT = ThreatModel("Linf", 0.1)
EPOCHS, PAIRS, BATCH, RATE = 10, 5_000, 100, 2e-3


def pairs(split: str, count: int) -> tuple[Tensor, Tensor]:
    """Returns random pairs of digits (N, 1, 8, 16) of a split, and their classes (N,), 0 to 99."""
    images, labels = timm_hpm.load_split("digits", split).tensors
    left, right = torch.randint(len(images), (2, count))
    return torch.cat([images[left], images[right]], dim=3), 10 * labels[left] + labels[right]


def trained(seed: int) -> nn.Module:
    """Returns the network, trained on PGD-2 images of fresh pairs in each epoch."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(1_024, 128), nn.ReLU(), nn.Linear(128, 100))
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    for epoch in range(EPOCHS):
        threat = ThreatModel(THREAT.norm, THREAT.eps * min(1, (epoch + 1) / (EPOCHS / 2)))
        for images, labels in zip(*(part.split(BATCH) for part in pairs("train", PAIRS)), strict=True):
            found = pgd(model, images, labels, threat, steps=2)
            optimizer.zero_grad()
            F.cross_entropy(model(found), labels).backward()
            optimizer.step()
        schedule.step()
    return model.eval().requires_grad_(False)


def main() -> int:
    """Prints the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", default="test", help="split of the attacked digits (test)")
    parser.add_argument("--protocols", nargs="+", default=["fast", "standard"], help="protocols (fast standard)")
    parser.add_argument("--num-images", type=int, default=200, metavar="N", help="pairs to attack (200)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the network, the pairs and the attacks (0)")
    args = parser.parse_args()
    model = trained(args.seed)
    torch.manual_seed(args.seed)
    run = (model, *pairs(args.split, args.num_images), THREAT)
    right = int((model(run[1]).argmax(dim=1) == run[2]).sum())
    print(f"100 classes, {THREAT}, {args.num_images} pairs of the {args.split} split: {right} correct", flush=True)
    reference = measured(lambda: autoattack(*run, args.seed, args.num_images), *run)
    print(f"AutoAttack: {reference['robust'].count('1')} robust", flush=True)
    for name in args.protocols:
        result = measured(lambda name=name: by_protocol(name, *run, args.seed, args.num_images), *run)
        verdicts = list(zip(reference["robust"], result["robust"], strict=True))
        print(f"{name}: {result['robust'].count('1')} robust, breaks {verdicts.count(('1', '0'))} more and misses "
              f"{verdicts.count(('0', '1'))}, in {result['cpu_seconds'] / reference['cpu_seconds']:.3f} of its time; "
              f"{reference['lost'] + result['lost']} lost in float64", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
