"""What a training run starts from: its model and its data, checked against each other before anything is written."""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..data import ImageSplit, PixelModel, check_every_class
from ..head import UnfittedHeadWarning, find_head, inference_mode
from ..models.create import class_names, create_model, open_split_for
from ..models.saving import OF_TRAINING
from .config import TrainConfig


@dataclass(frozen=True)
class Data:
    """The images to train on, the same without random crops, and those to choose the best epoch by."""

    train: ImageSplit
    plain_train: ImageSplit
    val: ImageSplit


def create_trainable(config: TrainConfig) -> Any:
    """Returns the model of a run, with its weights, on the CPU.

    Raises:
        ValueError: an unknown model, one without an HPM head, or weights that do not fit it.
    """
    given = {name: getattr(config, name) for name in ("num_classes", "in_chans") if getattr(config, name) is not None}
    twice = sorted(given.keys() & (config.model_kwargs or {}).keys())
    if twice:
        raise ValueError(f"{', '.join(twice)} stands in the options and in model_kwargs; give it once")
    pretrained = config.pretrained
    if config.initial_checkpoint is not None:
        # The way of a public checkpoint: its format is converted, and a head of another size starts anew.
        pretrained = True
        own = {name: getattr(config, name) for name in ("mean", "std") if getattr(config, name) is not None}
        given["pretrained_cfg_overlay"] = {"file": config.initial_checkpoint, **own}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnfittedHeadWarning)  # the run fits its prototypes
        if config.img_size is not None and create_model(
                config.model, pretrained=False, num_classes=0).pretrained_cfg.get("fixed_input_size"):
            given["img_size"] = config.img_size
        model = create_model(config.model, pretrained=pretrained, new_head=True, **given, **(config.model_kwargs or {}))
    if find_head(model).inference == "fc":
        find_head(model).reset_prototypes()  # they would be those of other features
    model.pretrained_cfg["tag"] = None  # what comes of the training are nobody's published weights
    for name in ("mean", "std"):
        if getattr(config, name) is not None:
            model.pretrained_cfg[name] = getattr(config, name)
    if config.grad_checkpointing:
        try:
            model.set_grad_checkpointing(True)
        except (AttributeError, AssertionError) as error:
            raise ValueError(f"{config.model} has no gradient checkpointing ({error}); leave it out") from error
    if config.batch_size == 1 and not config.freeze_backbone and any(
            isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        raise ValueError(f"batch_size is 1, and {config.model} has BatchNorm, which learns nothing from the statistics "
                         "of one image; expected at least 2, or --freeze-backbone")
    return model


def open_data(config: TrainConfig, model: Any) -> Data:
    """Returns the data of a run, whose class names the model takes over, and if it starts at random their mean and std.

    Raises:
        ValueError: data that do not fit the model, or a training split without an image of some class.
        OSError: data that are not there.
    """
    cfg = model.pretrained_cfg
    options: dict[str, Any] = {"img_size": config.img_size, "data_dir": config.data_dir,
                               "download": config.dataset_download, "class_map": config.class_map}
    crop_seed = config.seed if config.random_resized_crop else None
    plain = open_split_for(model, config.dataset, "train", **options)
    train = plain if crop_seed is None else open_split_for(
        model, config.dataset, "train", random_resized_crop_seed=crop_seed, **options)
    data = Data(train, plain, open_split_for(model, config.dataset, "val", **options))
    check_every_class(data.train, model.num_classes)
    for name in OF_TRAINING:  # of the weights that it begins with
        cfg.pop(name, None)
    # timm saves the names only if the number is right.
    cfg.update(label_names=data.train.class_names or class_names(model), num_classes=model.num_classes)
    if data.train.mean is not None and not config.pretrained and config.initial_checkpoint is None:
        for name in ("mean", "std"):
            if getattr(config, name) is None:
                cfg[name] = getattr(data.train, name)
    pixels = data.train[0][0].unsqueeze(0)
    for name in ("mean", "std"):
        if len(cfg[name]) != len(pixels[0]):
            raise ValueError(f"{name} is {tuple(cfg[name])}, and {config.dataset} has images of {len(pixels[0])} "
                             f"channels; give one value a channel by --{name}")
    cfg["input_size"] = tuple(pixels.shape[1:])
    _check_forward(config, model, pixels)
    return data


def _check_forward(config: TrainConfig, model: Any, pixels: torch.Tensor) -> None:
    mode = model.training
    try:
        with torch.no_grad(), inference_mode(model, "fc"):
            PixelModel(model.eval())(pixels)
    except (RuntimeError, AssertionError, ValueError) as error:
        size = "×".join(map(str, pixels.shape[1:]))
        raise ValueError(f"{config.model} does not take {config.dataset}'s images of {size} (channels, height, width): "
                         f"{error}. Give --in-chans, --img-size, --mean and --std, or another model") from error
    finally:
        model.train(mode)
