#!/usr/bin/env python3
"""What an attack costs beside its backbone passes, as ratios of two things in one run, each the median of paired runs.

    python benchmarks/msa.py

- side by side over one by one: time of APGD-CE and Square through the five surrogates of the embedded model in one
  pass, over the same surrogates one after another.
- attack over passes: time of those attacks side by side, over the time that their counted passes take by themselves at
  that number of rows.
"""

import statistics

import timm
import torch
from _timing import seconds

import timm_hpm
from timm_hpm.attacks.components import COMPONENTS, AttackBatch, Budget, Notes
from timm_hpm.attacks.surrogates import SURROGATES, SplitModel

BUDGETS = {"apgd-ce": Budget(20), "square": Budget(60)}
RUNS = 5


def attack(split: SplitModel, groups: list[list[str]], images: torch.Tensor, labels: torch.Tensor) -> None:
    """Runs the attacks through each group of surrogates."""
    threat = timm_hpm.ThreatModel("Linf", 0.1)
    for group in groups:
        for name, budget in BUDGETS.items():
            COMPONENTS[name](AttackBatch(split, group, images, labels), threat, budget, Notes())


def passes(split: SplitModel, images: torch.Tensor, forward: int, backward: int) -> None:
    """Makes as many passes, in batches of `images`, as were counted."""
    for _ in range(round(backward / len(images))):
        x = images.clone().requires_grad_()
        torch.autograd.grad(split.features(x).sum(), x)
    with torch.no_grad():
        for _ in range(round((forward - backward) / len(images))):
            split.features(images)


def main() -> None:
    """Prints the ratios."""
    images, labels = (part[:100] for part in timm_hpm.load_split("digits", "val").tensors)
    split = SplitModel(timm_hpm.PixelModel(timm.create_model("hpm_wrn10_2", pretrained=True).eval()), images)
    together, apart = [list(SURROGATES)], [[name] for name in SURROGATES]
    attack(split, together, images, labels)
    side_by_side, over_passes = [], []
    for _ in range(RUNS):
        counts = split.forward_passes, split.backward_passes
        whole = seconds(lambda: attack(split, together, images, labels))
        forward, backward = split.forward_passes - counts[0], split.backward_passes - counts[1]
        rows = images.repeat(len(SURROGATES), 1, 1, 1)
        over_passes.append(whole / seconds(lambda rows=rows, f=forward, b=backward: passes(split, rows, f, b)))
        side_by_side.append(whole / seconds(lambda: attack(split, apart, images, labels)))
    print(f"side by side over one by one: {statistics.median(side_by_side):.2f}")
    print(f"attack over passes: {statistics.median(over_passes):.2f}")


if __name__ == "__main__":
    main()
