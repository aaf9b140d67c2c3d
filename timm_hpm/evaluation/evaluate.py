"""`evaluate`: the Mixed Surrogate Attack on a model object and a data set, in one call."""

import operator
import os
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..data import PixelModel, as_pixel_model, first_images, open_split, unwrapped
from ..head import head_mode
from ..models.create import open_split_for
from ..report import AttackReport
from ..threat import ThreatModel
from .msa import mixed_surrogate_attack


def evaluate(
        model: nn.Module,
        data: str | Dataset | tuple[Tensor, Tensor] = "digits",
        threat: ThreatModel | str | None = None,
        *,
        split: str = "test",
        num_images: int = 0,
        data_dir: str | os.PathLike | None = None,
        inference: str | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        **options: Any,
) -> AttackReport:
    """Measures the robust accuracy of any classifier; the same as `evaluate.py` for one mode and one radius.

    Arguments:
        model: a timm model (normalised by its `pretrained_cfg`, or by `mean` and `std`) or a module of pixels in
            [0, 1], in eval mode. It is not changed.
        data: a name of `timm_hpm.data.DATASETS`, a data set of (image (channels, H, W) in [0, 1], class index), or
            images (N, channels, H, W) in [0, 1] with labels (N,).
        threat: the threat model, or a text such as `"Linf:8/255"`; None means the usual one of a data set by name.
        split: `"train"`, `"val"` or `"test"` of a data set by name.
        num_images: number of images, the first ones; 0 means all.
        data_dir: folder of a data set by name.
        inference: mode of the HPM head; None means the model's own.
        mean, std: per-channel normalisation of the pixels; None means the model's own.
        **options: further arguments of `mixed_surrogate_attack`, such as `protocol` and `folder`.

    Raises:
        ValueError: if the data are malformed or do not fit the model, if a threat is missing, and as
            `mixed_surrogate_attack`.
    """
    about = dict(options.pop("about", None) or {})
    if isinstance(data, str):
        network: Any = unwrapped(model)
        network = unwrapped(network.model) if isinstance(network, PixelModel) else network
        opened = (open_split_for(network, data, split, data_dir=data_dir) if hasattr(network, "pretrained_cfg")
                  else open_split(data, split, data_dir=data_dir, class_map=getattr(network, "class_map", None)))
        images, labels = first_images(opened, num_images)
        threat = opened.threat if threat is None else threat
        about = {"dataset": data, "split": split} | about
    else:
        images, labels = _first_of(data, num_images)
    if threat is None:
        raise ValueError("threat is None, and only a data set by name has a usual one; give one such as 'Linf:8/255'")
    if mean is not None or std is not None:
        model = as_pixel_model(model, mean, std)
    with nullcontext() if inference is None else head_mode(model, inference):
        return mixed_surrogate_attack(model, images, labels, threat, about=about, **options)


def _first_of(data: Any, num_images: int) -> tuple[Tensor, Tensor]:
    if not (isinstance(data, tuple | list) and len(data) == 2 and all(isinstance(part, Tensor) for part in data)):
        if not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
            raise ValueError(f"data is a {type(data).__name__}; expected the name of a data set, a data set of (image, "
                             "label), or a pair of tensors (images, labels)")
        pairs = [data[i] for i in range(min(max(num_images, 0), len(data)) or len(data))]
        try:
            data = (torch.stack([torch.as_tensor(image) for image, _ in pairs]),
                    torch.tensor([operator.index(label) for _, label in pairs]))
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"data does not hold (image, label) of one size ({error}); expected images as tensors "
                             "(channels, H, W) with pixels in [0, 1], such as by torchvision's ToTensor, and "
                             "labels as integers") from error
    images, labels = data
    if not 0 <= num_images <= len(images):
        raise ValueError(f"num_images is {num_images}; expected 0 to {len(images)}, and 0 means all")
    return images[:num_images or None], labels[:num_images or None]
