"""Training runs of seconds in this process, from the embedded weights."""

import csv
import dataclasses
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import nn

from timm_hpm.training import TrainConfig, train

TINY = TrainConfig(device="cpu", pretrained=True, epochs=1, lr=0.01, attack_steps=1, val_attack_steps=1, batch_size=350)


def forget_accelerator() -> None:
    """Accelerate keeps its precision and device for a whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)


def run(folder: Path, resume: bool = False, log: Any = lambda line: None, network: nn.Module | None = None,
        **changes: Any) -> dict[str, Any]:
    """Trains in `folder` by `TINY` with `changes`, or a network that is given; returns the row of the kept epoch."""
    forget_accelerator()
    try:
        return train(network, dataclasses.replace(TINY, **changes), folder, resume=resume, log=log)
    finally:
        forget_accelerator()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def rows(folder: Path) -> list[dict[str, str]]:
    """Returns the metrics of the epochs."""
    return list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))


def stopped(whole: Path, part: Path, index: int = 0) -> Path:
    """Makes `part` the folder of the run in `whole` as of one of its checkpoints, and returns `part`."""
    checkpoint = sorted((whole / "checkpoints").iterdir())[index]
    shutil.copytree(checkpoint, part / "checkpoints" / checkpoint.name)
    shutil.copy(whole / "args.yaml", part)
    return part
