"""The messages of a training run: facts before it begins, a line for each epoch, and signs that it does not learn."""

import math
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from ..console import device_text, duration, facts
from ..data import as_pixel_model, first_images, in_eval_mode, normalisation_of
from ..evaluation.threads import seconds_of_pass
from ..head import head_name
from ..models.constructors import is_constructor
from ..report.tables import pixels_note
from .config import TrainConfig
from .distributed import num_processes
from .objectives import OBJECTIVES
from .setup import Data

# Few enough for a second or so.
_FEW_IMAGES: Final = 8
# Factor by which the scale of a healthy head may change after its fit.
_LARGEST_CHANGE: Final = 1000.0
# Clean accuracy by which a head may be behind its own FC classifier.
_FAR_BEHIND: Final = 0.03


def row_text(row: Mapping[str, Any], epochs: int, images_per_second: float | None = None) -> str:
    """Returns a row of `metrics.csv` as a line: accuracies in %."""
    words = [f"epoch {row['epoch']:>{len(str(epochs - 1))}}", f"lr {row['lr']:.3g}",
             f"loss {row['loss']:.3f}"]
    words += [f"{name.removeprefix('val_').replace('_', ' ')} {100 * value:.1f} %"
              for name, value in row.items() if name.startswith("val_")]
    if images_per_second:
        words.append(f"{images_per_second:,.0f} images/s")
    return "  ".join(words)


def training_header(config: TrainConfig, model: Any, data: Data, device: torch.device) -> str:
    """Returns the facts of a training run, a line each; a few passes of the model are timed."""
    images, _ = first_images(data.plain_train, min(_FEW_IMAGES, len(data.plain_train)))
    channels, height, width = images.shape[1:]
    head = "HPM head" if head_name(model) is not None else "no HPM head"
    own = f"those that {config.model} gives it" if is_constructor(config.model) else "random"
    weights = config.initial_checkpoint or ("pretrained" if config.has_weights else own)
    passes = num_passes(config, len(data.train), len(data.val))
    with in_eval_mode(model):
        seconds = min(seconds_of_pass(as_pixel_model(model), images.to(device)) for _ in range(3))
    steps = "" if config.objective == "clean" else f", {config.attack_steps} PGD steps of {config.attack_step_size:.3g}"
    return facts({
        "model": f"{config.model}, {sum(p.numel() for p in model.parameters()):,} parameters, {head}",
        "weights": weights,
        "data": f"{config.dataset}, {len(data.train):,} images for training and {len(data.val):,} for validation, of "
                f"{width}x{height} pixels and {channels} channel{'s' * (channels > 1)}",
        "normalisation": pixels_note({"normalisation": normalisation_of(as_pixel_model(model))}),
        "threat model": str(config.threat),
        "objective": f"{config.objective}{steps}",
        "optimisation": f"{config.epochs} epochs, batches of {config.batch_size}, {config.opt}, learning rate up to "
                        f"{config.lr:.3g}",
        "device": device_text(device, num_processes()),
        "time": f"about {duration(passes * seconds / len(images) / num_processes())}: {passes:.2g} passes of an image, "
                f"timed on {len(images)} of them",
    })


def num_passes(config: TrainConfig, num_train: int, num_val: int) -> float:
    """Returns the passes of an image, forward and backward, of a run on so many training and validation images."""
    objective = OBJECTIVES[config.objective]
    learned = 2 if objective.uses_clean else 1
    per_image = learned * (2 if config.awp_gamma else 1) + (config.attack_steps if objective.craft is not None else 0)
    # The extra data fill batches up, and an epoch is one pass over the data set's own images.
    images_of_epoch = num_train * config.batch_size / (config.batch_size - config.extra_per_batch)
    return config.epochs * (images_of_epoch * per_image + num_val * config.val_attack_steps)


def epoch_signs(row: Mapping[str, Any], epochs: int, num_classes: int, scale_change: float) -> dict[str, str]:
    """Returns the signs in the metrics `row` of an epoch, of `epochs` in all.

    A loss above ln C counts after the first third of the epochs, and after the first epoch. `scale_change` is the
    head's scale over the scale of its fit.
    """
    signs, bound = {}, math.log(num_classes)
    advice = "lower the learning rate (--lr), or fit the prototypes of an HPM head later (--prototype-epoch)"
    if row["epoch"] >= max(1, epochs // 3) and row["loss"] > bound:
        signs["loss"] = (f"the loss is {row['loss']:.4g} in epoch {row['epoch']}, above ln {num_classes} = "
                         f"{bound:.4g}, the loss of a model that knows nothing; {advice}")
    if not 1 / _LARGEST_CHANGE < scale_change < _LARGEST_CHANGE:
        signs["scale"] = (f"the scale of the head runs away: after epoch {row['epoch']} it is {scale_change:.3g} times "
                          f"the scale of its fit; {advice}")
    return signs


def kept_signs(row: Mapping[str, Any], labels: Tensor) -> dict[str, str]:
    """Returns the sign in the metrics `row` of the kept epoch, for the validation labels (N,), if there is one.

    Either accuracy at chance (the share of the commonest class and two standard errors more), or a head more than 3
    points less accurate than its own FC classifier.
    """
    share = labels.bincount().max().item() / len(labels)
    found = (f"the kept epoch {row['epoch']} has {100 * row['val_clean']:.1f} % clean accuracy on {len(labels)} "
             "validation images")
    if row["val_clean"] <= share + 2 * math.sqrt(share * (1 - share) / len(labels)):
        return {"chance": f"{found}, which is at chance: one class for all has {100 * share:.1f} %; train longer "
                          "(--epochs), or with another learning rate (--lr)"}
    if row["val_fc_clean"] - row["val_clean"] > _FAR_BEHIND:
        return {"behind": f"{found}, and its own FC classifier {100 * row['val_fc_clean']:.1f} %: the features have "
                          "not settled around the prototypes; train longer (--epochs, or a smaller --batch-size), or "
                          "keep the FC classifier (--model-kwargs inference=fc)"}
    return {}
