"""Adversarial training of a timm model with an HPM head, on Accelerate."""

import csv
import io
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import broadcast, set_seed
from safetensors.torch import save_file
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ..attacks.msa import judge
from ..attacks.pgd import pgd
from ..attacks.surrogates import SURROGATES
from ..data import PixelModel, data_source, load_split, random_shift
from ..files import replacing, writable_folder, write_text
from ..head import HPMHead, find_head, inference_mode
from ..models.create import create_model
from ..prototypes import fit_prototypes
from ..threat import ThreatModel


@dataclass(frozen=True)
class TrainConfig:
    """Everything a training run depends on; see `python train.py --help`."""

    model: str = "hpm_wrn10_2"
    model_args: dict[str, Any] = field(default_factory=dict)
    pretrained: bool = False
    dataset: str = "digits"
    threat: str | None = None
    epochs: int = 60
    prototype_epoch: int = 0
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    attack_steps: int = 10
    attack_step_size: float | None = None
    attack_through: str = "mixed"
    shift: int = 1
    val_attack_steps: int = 20
    seed: int = 0
    device: str | None = None
    mixed_precision: str = "no"


class PixelTrunk(nn.Module):
    """A timm model as training needs it: pixels in [0, 1] to (features, HPM logits, FC logits)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.pixel_model = PixelModel(model)

    def features(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the head's input (B, d) and its FC classifier's logits (B, C) for `pixels` (B, channels, H, W)."""
        seen: list[Tensor] = []
        # Not timm's pre_logits: a norm or an MLP may stand between those and the head.
        with inference_mode(self.pixel_model, "fc") as head, \
                head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])):
            fc_logits = self.pixel_model(pixels)
        return seen[0], fc_logits

    def surrogate_logits(self, surrogate: str, pixels: Tensor) -> Tensor:
        """Returns the logits (B, C) of one of `SURROGATES` for `pixels` (B, channels, H, W)."""
        return SURROGATES[surrogate].logits(find_head(self.pixel_model), self.features(pixels)[0])

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the features (B, d), and the logits (B, C) of the HPM head and of its FC classifier."""
        features, fc_logits = self.features(pixels)
        return features, find_head(self.pixel_model)(features).float(), fc_logits


def train(config: TrainConfig, output: str | os.PathLike, log: Callable[[str], None] = print) -> dict[str, float]:
    """Trains a model and writes `model.safetensors`, `config.json` and `metrics.csv` into the folder `output`.

    A step costs `attack_steps` + 1 forward and backward passes. Attacks are crafted in eval mode (BatchNorm by its
    running statistics) and learned from in train mode; the loss is the cross-entropy of the HPM head plus that of the
    FC classifier, on adversarial images; the prototypes follow the features of the same step, detached. Before the
    epoch `prototype_epoch` the head has none and answers as its FC classifier; then they are fitted once. The epoch of
    the best robust accuracy on the validation split is kept: robust overfitting is the rule.

    Returns:
        The row of `metrics.csv` of the epoch that was kept.

    Raises:
        ValueError: options that do not fit together; nothing is written then.
        FloatingPointError: a loss that is not finite, with the step's number. What was best so far is on disk.
    """
    folder = writable_folder(output)
    source = data_source(config.dataset)
    threat = ThreatModel.parse(config.threat or source.threat)
    if config.attack_through not in SURROGATES:
        raise ValueError(f"attack_through is {config.attack_through!r}; expected one of {', '.join(SURROGATES)}")
    if config.prototype_epoch >= config.epochs:
        raise ValueError(f"prototype_epoch is {config.prototype_epoch}, of {config.epochs} epochs; expected less, or "
                         "the head would never have prototypes")
    for name, least in (("epochs", 1), ("prototype_epoch", 0), ("batch_size", 1), ("attack_steps", 1), ("shift", 0),
                        ("val_attack_steps", 1)):
        if getattr(config, name) < least:
            raise ValueError(f"{name} is {getattr(config, name)}; expected at least {least}")
    images = load_split(config.dataset, "train")
    if config.batch_size > len(images):
        raise ValueError(f"batch_size is {config.batch_size}; expected at most the {len(images)} training images")
    accelerator = Accelerator(cpu=config.device == "cpu", mixed_precision=config.mixed_precision)
    set_seed(config.seed)
    model = create_model(config.model, pretrained=config.pretrained, **config.model_args)
    trunk = PixelTrunk(model)
    head = find_head(model)
    if head.out_features != source.num_classes:
        raise ValueError(f"{config.model} has {head.out_features} classes and {config.dataset} {source.num_classes}; "
                         f"give --model-kwargs num_classes={source.num_classes}")
    loader = DataLoader(images, config.batch_size, shuffle=True, drop_last=True)
    val = load_split(config.dataset, "val")
    optimizer = create_optimizer_v2(trunk, "sgd", lr=config.lr, momentum=config.momentum,
                                    weight_decay=config.weight_decay)
    trained, optimizer, loader = accelerator.prepare(trunk, optimizer, loader)
    total_steps = config.epochs * len(loader)
    # Stepped by hand, once an optimizer step: Accelerate's wrapper would step once for every process.
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, total_steps=total_steps, pct_start=0.25)

    rows: list[dict[str, float]] = []
    best: dict[str, float] = {}
    for epoch in range(config.epochs):
        if epoch == config.prototype_epoch and not head.is_fitted():
            fit_prototypes(trunk.pixel_model, DataLoader(images, 256), threat,
                           held_out=DataLoader(val, 256))
            # Each process fitted on its own random starts.
            for tensor in head.state_dict().values():
                tensor.copy_(broadcast(tensor))
        losses = [
            _step(accelerator, trained, trunk, head, optimizer, scheduler, images, labels, threat, config, epoch, step)
            for step, (images, labels) in enumerate(loader)
        ]
        row: dict[str, float] = {"epoch": epoch, "lr": optimizer.param_groups[0]["lr"],
                                 "loss": sum(losses) / len(losses)}
        if accelerator.is_main_process:
            row["val_clean"], row["val_robust"] = validate(trunk, val, threat, config)
            rows.append(row)
            log("  ".join(f"{name} {value:.4g}" for name, value in row.items()))
            if epoch >= config.prototype_epoch and row["val_robust"] > best.get("val_robust", -1.0):
                best = row
                _save(folder, model, config, best)
            write_text(folder / "metrics.csv", _csv(rows))
        accelerator.wait_for_everyone()
    accelerator.end_training()
    return best


def _step(accelerator, trained, trunk, head: HPMHead, optimizer, scheduler, images: Tensor, labels: Tensor,
          threat: ThreatModel, config: TrainConfig, epoch: int, step: int) -> float:
    """Makes one training step and returns its loss."""
    images = random_shift(images, config.shift)
    trained.eval()
    through = config.attack_through if head.is_fitted() else "fc"
    with accelerator.autocast():
        adversarial = pgd(partial(trunk.surrogate_logits, through), images, labels, threat,
                          steps=config.attack_steps, step_size=config.attack_step_size)
    trained.train()
    features, hpm_logits, fc_logits = trained(adversarial)
    loss = F.cross_entropy(hpm_logits, labels) + F.cross_entropy(fc_logits, labels)
    if not loss.isfinite():
        raise FloatingPointError(f"the loss is {loss.item()} at step {step} of epoch {epoch}; lower the learning rate "
                                 "(--lr). The best epoch so far is kept in the output folder")
    accelerator.backward(loss)
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    if head.is_fitted():
        sums, counts = head.class_sums(features.detach(), labels)
        head.apply_class_sums(accelerator.reduce(sums, "sum"), accelerator.reduce(counts, "sum"))
    return loss.item()


def validate(trunk: PixelTrunk, split: TensorDataset, threat: ThreatModel, config: TrainConfig) -> tuple[float, float]:
    """Returns the clean accuracy and the robust accuracy under PGD through the FC classifier and `attack_through`.

    The head judges in its own inference mode and in batches of `config.batch_size`. An attack to choose epochs by,
    not to report.
    """
    trunk.eval()
    head = find_head(trunk)
    device = head.weight.device
    images, labels = split.tensors
    correct = clean = judge(trunk.pixel_model, images, labels, config.batch_size)
    for name in dict.fromkeys(["fc", config.attack_through if head.is_fitted() else "fc"]):
        adversarial = torch.cat([
            pgd(partial(trunk.surrogate_logits, name), x.to(device), y.to(device), threat,
                steps=config.val_attack_steps).cpu()
            for x, y in zip(images.split(config.batch_size), labels.split(config.batch_size), strict=True)
        ])
        correct = correct & judge(trunk.pixel_model, adversarial, labels, config.batch_size)
    return clean.float().mean().item(), correct.float().mean().item()


def _save(folder: Path, model: nn.Module, config: TrainConfig, row: dict[str, float]) -> None:
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with replacing(folder / "model.safetensors") as temporary:
        save_file(state, temporary, {"format": "pt"})
    write_text(folder / "config.json", json.dumps(asdict(config) | {"kept": row}, indent=1) + "\n")


def _csv(rows: list[dict[str, float]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
