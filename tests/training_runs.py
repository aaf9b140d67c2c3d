"""Training runs of seconds in this process, from the embedded weights."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from timm_hpm.training import TrainConfig, train

TINY = TrainConfig(device="cpu", pretrained=True, epochs=1, lr=0.01, attack_steps=1, val_attack_steps=1, batch_size=350)


def forget_accelerator() -> None:
    """Accelerate keeps its precision and device for a whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)


def run(folder: Path, resume: bool = False, log: Any = lambda line: None, **changes: Any) -> dict[str, Any]:
    """Trains in `folder` by `TINY` with `changes`; returns the row of the kept epoch."""
    forget_accelerator()
    try:
        return train(None, dataclasses.replace(TINY, **changes), folder, resume=resume, log=log)
    finally:
        forget_accelerator()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")
