"""`train`: a whole training run, of a model object or of the model that the options name."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file
from torch import nn

from ..data import PixelModel, unwrapped
from ..evaluation.processes import leave
from ..files import default_folder, locked, remove, remove_unfinished
from ..models.saving import WEIGHTS, check_no_draws, in_float32
from .config import TrainConfig
from .distributed import process_index
from .loop import UNPACKED, Run
from .setup import described
from .signals import noted_signals


def train(model: nn.Module | None, config: TrainConfig | None = None, output: str | os.PathLike | None = None, *,
          resume: bool = False, log: Callable[[str], None] = print, progress: bool = False,
          **options: Any) -> dict[str, Any]:
    """Trains a model and writes it into the folder `output`; under `accelerate launch` or `torchrun`, on all processes.

    The attack runs in eval mode: BatchNorm uses its running statistics and does not change them. The model then learns
    in train mode. The prototypes follow the detached features of all processes' images of an update. Before the epoch
    `prototype_epoch` a head without prototypes predicts by its FC classifier; then they are fitted once. The run keeps
    the epoch of the best robust validation accuracy. docs/training.md has the details, and the cost of a batch.

    All randomness is a function of the seed, the epoch, the batch and the process. A resumed run on the same machine
    with the same number of processes therefore ends with the same weights as an uninterrupted one.

    Arguments:
        model: the network, trained in place; it ends in eval mode with the weights of the kept epoch. A timm model,
            with or without an HPM head, or any module that returns logits (B, C) of pixels in [0, 1], or of what
            `config.mean` and `config.std` make of them. None makes the model that `config` names.
        config: the options; None means the defaults.
        output: the run's folder: `model.safetensors` and `config.json` (timm's `local-dir:`), `args.yaml`,
            `metrics.csv`, `curve.svg`, `checkpoints/`. None means a new one in `output/`.
        resume: whether to resume from the newest undamaged checkpoint in `output`.
        log: is called with a line for each epoch.
        progress: whether to show a progress bar on standard error.
        options: fields of `config` to replace, such as `dataset="torch/cifar10"`.

    Returns:
        The row of `metrics.csv` of the kept epoch.

    Raises:
        ValueError: if options do not fit each other, the model, the data or the earlier run; nothing is written then.
        OSError: if a file is missing or cannot be written.
        FloatingPointError: if the loss or a weight is not finite; the last checkpoint is on disk.
        Stopped: on SIGTERM or SIGINT; a checkpoint is on disk.
    """
    config = replace(config or TrainConfig(), **options)
    whole = model
    if model is not None:
        model = unwrapped(model)
    if isinstance(model, PixelModel):
        check_no_draws(model)
        own: dict[str, Any] = {name: tuple(getattr(model, name).flatten().tolist()) for name in ("mean", "std")}
        for name, value in config.given(*own).items():
            if in_float32({**own, name: value}) != in_float32(own):
                raise ValueError(f"{name} is {value}, and the PixelModel normalises by {own[name]}; leave it out")
        config = replace(config, **own)
        model = unwrapped(model.model)
    if model is not None:
        config = replace(config, model=described(model, config).pretrained_cfg["architecture"])
    PartialState(cpu=config.device == "cpu")
    # The name may hold the time, and another one on each process.
    folder = Path(broadcast_object_list([str(output or default_folder(config.model, "train-"))])[0])
    with noted_signals(config.seconds()) as asked, locked(folder, shared=True):
        try:
            run = Run(config, folder, model=model, resume=resume, log=log, progress=progress, asked_to_stop=asked)
            accelerator = run.accelerator
            try:
                kept = run.train()
            finally:
                if accelerator.is_main_process:
                    remove_unfinished(folder)
                # A live reference to the process group keeps its threads alive. A thread that calls Python while the
                # interpreter exits is aborted, and the process with it.
                del run
                accelerator.free_memory()
                leave(accelerator)
            if model is not None and whole is not None:
                model.load_state_dict(load_file(folder / WEIGHTS))
                whole.eval()
            return kept
        finally:
            AcceleratorState._reset_state()  # Accelerate would keep the precision for the next run
            if process_index() == 0:
                remove(folder / UNPACKED)
