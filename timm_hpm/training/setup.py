"""The model, the data, the optimizer and the schedule of a training run, checked before anything is written."""

import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from accelerate import Accelerator, PartialState
from accelerate.tracking import get_available_trackers
from accelerate.utils import DataLoaderConfiguration, DistributedDataParallelKwargs
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn

from ..attacks.pgd import default_step_size
from ..data import ImageSplit, PixelModel, check_every_class, check_logits, first_images, head_logits, in_eval_mode
from ..data.sources import data_source
from ..evaluation.judge import judge
from ..evaluation.threads import use_threads
from ..head import UnfittedHeadWarning, find_head, mode_if_any, own_mode
from ..models.constructors import describe, is_constructor
from ..models.create import class_names, create_model, open_split_for
from ..models.saving import OF_TRAINING, in_chans
from ..threat import ThreatModel
from .config import TrainConfig
from .distributed import num_processes

# Prototypes of an untrained network carry no information: its features soon move away from them, and BatchNorm's
# running statistics, which the fit uses, are still the initial ones. Measured in docs/training.md.
_LATE_PART: Final = 0.6
_LATE_UPDATES: Final = 40
_MOST_IMAGES: Final = 1000
# Start of the one-cycle schedule, in parts of its peak.
_LOW: Final = 0.04


@dataclass(frozen=True)
class Data:
    """The training images, the same without random crops, and the validation images."""

    train: ImageSplit
    plain_train: ImageSplit
    val: ImageSplit


def create_trainable(config: TrainConfig) -> Any:
    """Returns the model of a run, with its weights, on the CPU."""
    given = config.given("num_classes", "in_chans")
    given |= {f"{name}_rate": value for name, value in config.given("drop", "drop_path").items()}
    if config.initial_checkpoint is not None:
        # Loaded as a public checkpoint is: its format is converted, and a head of another size starts anew.
        given["pretrained_cfg_overlay"] = {"file": config.initial_checkpoint, **config.given("mean", "std")}
    given |= _size_argument(config)
    kwargs = config.model_kwargs or {}
    twice = sorted(name for name in given.keys() & kwargs.keys() if given[name] != kwargs[name])
    if twice:
        raise ValueError(f"{', '.join(twice)} is in the options and in model_kwargs, with other values; give it once")
    model = _quietly_created(config, pretrained=config.has_weights, new_head=True, **kwargs | given)
    return _ready(model, config)


def made_trainable(model: nn.Module, config: TrainConfig) -> Any:
    """Returns a caller's model, `described`, on the CPU."""
    making = config.given("initial_checkpoint", "model_kwargs", "drop", "drop_path") | (
        {"pretrained": True} if config.pretrained else {})
    if making:
        raise ValueError(f"{', '.join(making)} makes a model, and the run is given one; leave it out")
    has: Any = {"num_classes": model.num_classes, "in_chans": in_chans(model)}
    for name, value in config.given(*has).items():
        if value != has[name]:
            raise ValueError(f"{name} is {value}, and the model has {has[name]}; leave it out")
    return _ready(model.cpu(), config)


def described(model: Any, config: TrainConfig) -> Any:
    """Returns a caller's model with the attributes of a timm model, and with a name in its `pretrained_cfg`."""
    if not (getattr(model, "pretrained_cfg", None) or {}).get("architecture"):
        size = data_source(config.dataset).image_size
        if config.num_classes is not None and not hasattr(model, "num_classes"):
            model.num_classes = config.num_classes
        describe(model, None, ({"input_size": size} if size else {}) | config.given("mean", "std"))
    return model


def _ready(model: Any, config: TrainConfig) -> Any:
    if own_mode(model) == "fc":
        find_head(model).reset_prototypes()  # they would be those of other features
    # The trained weights are not those of the tag.
    model.pretrained_cfg.update(tag=None, **config.given("mean", "std"))
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


def _size_argument(config: TrainConfig) -> dict[str, Any]:
    """Returns the `img_size` of timm.create_model that a network of a fixed size needs for images of another."""
    if config.img_size is None:
        return {}
    if is_constructor(config.model):  # which need not take it
        return {"img_size": config.img_size}
    cfg = _quietly_created(config, pretrained=False, num_classes=0).pretrained_cfg
    same = all(side == config.img_size for side in cfg["input_size"][1:])
    return {"img_size": config.img_size} if cfg.get("fixed_input_size") and not same else {}


def _quietly_created(config: TrainConfig, **arguments: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnfittedHeadWarning)  # the run fits its prototypes
        return create_model(config.model, **arguments)


def create_accelerator(config: TrainConfig, folder: Path) -> Accelerator:
    """Returns Accelerate's view of the processes and devices of a run in `folder`."""
    if config.log_with is not None and config.log_with not in {
            str(tracker.value) for tracker in get_available_trackers()}:
        raise ModuleNotFoundError(f"the tracker {config.log_with} is not installed; run: pip install {config.log_with}")
    accelerator = Accelerator(
        cpu=config.device == "cpu",
        mixed_precision={"bfloat16": "bf16", "float16": "fp16"}[config.amp_dtype] if config.amp else "no",
        gradient_accumulation_steps=config.grad_accum_steps,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, non_blocking=True),
        # The loop averages the buffers.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        log_with=config.log_with,
        project_dir=folder,
        step_scheduler_with_optimizer=False,
    )
    _check_launcher(config, accelerator)
    return accelerator


def _check_launcher(config: TrainConfig, accelerator: Accelerator) -> None:
    """Raises a ValueError if the launcher asks for other settings than the options, or the CPU lacks the precision."""
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched not in ("no", accelerator.mixed_precision):
        raise ValueError(f"the launcher asks for mixed precision {launched}, the options for "
                         f"{accelerator.mixed_precision}; give --amp --amp-dtype, or --mixed_precision no to "
                         "accelerate launch")
    if accelerator.gradient_accumulation_steps != config.grad_accum_steps:
        raise ValueError(f"the launcher asks for {accelerator.gradient_accumulation_steps} batches an update, the "
                         f"options for {config.grad_accum_steps}; give --grad-accum-steps")
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("amp_dtype is float16, which CPUs have no mixed precision in; give --amp-dtype bfloat16")


def create_optimizer(config: TrainConfig, model: Any) -> Any:
    """Returns timm's optimizer for a model, or raises a ValueError if timm does not make it."""
    own = {name.removeprefix("opt_"): value for name, value in config.given("opt_eps", "opt_betas").items()}
    make = partial(create_optimizer_v2, model, config.opt, lr=config.lr, weight_decay=config.weight_decay,
                   momentum=config.momentum, layer_decay=config.layer_decay, **(config.opt_kwargs or {}))
    try:
        optimizer = make()
        given = [*(f"opt_{name}" for name in own), *["momentum"] * (config.momentum != TrainConfig.momentum)]
        unused = [name for name in given if name.removeprefix("opt_") not in optimizer.defaults]
        if unused:  # timm leaves them out
            raise ValueError(f"it has no {' and no '.join(name.removeprefix('opt_') for name in unused)}; leave "
                             f"{' and '.join('--' + name.replace('_', '-') for name in unused)} out")
        betas = own.get("betas", ())
        if betas and len(betas) != len(optimizer.defaults["betas"]):
            raise ValueError(f"--opt-betas gives {len(betas)}; expected {len(optimizer.defaults['betas'])}, such as "
                             f"{' '.join(map(str, optimizer.defaults['betas']))}")
        return make(**own) if own else optimizer
    except (ValueError, TypeError, AssertionError) as error:
        raise ValueError(f"cannot make the optimizer {config.opt!r} (layer_decay={config.layer_decay}): {error}. "
                         "Names are those of timm.optim.list_optimizers()") from error


class OneCycleScheduler(Scheduler):
    """A cosine from `low` times the peak up, then one down to `min_lr`. Source: Smith and Topin, arXiv 1708.07120.

    The learning rate rises in the fraction `rising` of the `total` updates.
    """

    def __init__(self, optimizer: Any, total: int, rising: float, low: float = _LOW, min_lr: float = 0.0):
        super().__init__(optimizer, "lr")
        self.total, self.rising, self.low, self.min_lr = total, rising, low, min_lr
        self.step(0)

    def _get_lr(self, t: int) -> list[float]:
        done = min(t / self.total, 1.0)
        if done < self.rising:
            part = self.low + (1 - self.low) * 0.5 * (1 - math.cos(math.pi * done / self.rising))
            return [peak * part for peak in self.base_values]
        part = 0.5 * (1 + math.cos(math.pi * (done - self.rising) / max(1 - self.rising, 1e-9)))
        return [self.min_lr + (peak - self.min_lr) * part for peak in self.base_values]


def create_schedule(config: TrainConfig, optimizer: Any, updates_per_epoch: int) -> Scheduler:
    """Returns the schedule of a run, which steps by the number of updates made."""
    total, warmup = config.epochs * updates_per_epoch, (config.warmup_epochs or 0.0) * updates_per_epoch
    if config.sched == "onecycle":
        low = _LOW if config.warmup_lr is None else config.warmup_lr / config.lr
        return OneCycleScheduler(optimizer, total, warmup / total, low, config.min_lr)
    return create_scheduler_v2(
        optimizer, config.sched,
        num_epochs=math.ceil(total - warmup) if config.warmup_prefix else total,
        decay_epochs=config.decay_epochs * updates_per_epoch,
        decay_milestones=[round(epoch * updates_per_epoch) for epoch in config.decay_milestones],
        decay_rate=config.decay_rate, min_lr=config.min_lr,
        warmup_lr=1e-5 if config.warmup_lr is None else config.warmup_lr, warmup_epochs=warmup,  # type: ignore[arg-type]
        warmup_prefix=config.warmup_prefix)[0]


def in_effect(config: TrainConfig, model: Any, data: Data, fresh: bool) -> TrainConfig:
    """Returns the options with the defaults that depend on the model and the data."""
    threat = ThreatModel.of(config.threat or data.train.threat)
    step = config.attack_step_size
    if step is not None and step > 2 * threat.eps:
        raise ValueError(f"attack_step_size is {step:g}, in units of pixels in [0, 1], and the ball of {threat} is "
                         f"{2 * threat.eps:g} wide; expected no more than that. Did you mean {step:g}/255?")
    channels, height, width = model.pretrained_cfg["input_size"]
    with in_eval_mode(model):
        few = first_images(data.val, min(len(data.val), config.batch_size))[0]
        threads = use_threads(config.threads, PixelModel(model), few)
    defaults = {
        "threat": str(threat), "attack_step_size": default_step_size(threat, config.attack_steps),
        "prototype_epoch": 0.0 if _is_trained(config, model, data, fresh) else _late(config, len(data.train)),
        "warmup_epochs": config.epochs / 4 if config.sched == "onecycle" else 0.0,
        "num_classes": model.num_classes, "in_chans": channels, "img_size": height if height == width else None,
        "mean": tuple(model.pretrained_cfg["mean"]), "std": tuple(model.pretrained_cfg["std"]),
        "threads": threads}
    return replace(config, **{name: value for name, value in defaults.items()
                              if getattr(config, name) is None and name not in (config.model_kwargs or {})})


def _late(config: TrainConfig, num_images: int) -> float:
    """Returns the epochs before the prototypes of a network that starts without a trained classifier."""
    batches = max(1, num_images // ((config.batch_size - config.extra_per_batch) * num_processes()))
    updates_per_epoch = -(-batches // config.grad_accum_steps)
    return min(max(_LATE_PART * config.epochs, _LATE_UPDATES / updates_per_epoch), config.epochs)


def _is_trained(config: TrainConfig, model: Any, data: Data, fresh: bool) -> bool:
    """Returns whether the model needs no prototypes, has them, or has a trained FC classifier.

    A trained one is right on a quarter of the first validation images that the commonest class gets wrong.
    """
    if own_mode(model) in ("none", "fc") or find_head(model).is_fitted():
        return True
    if fresh:
        return False
    images, labels = first_images(data.val, min(len(data.val), _MOST_IMAGES))
    with mode_if_any(model, "fc"), in_eval_mode(model):
        right = judge(PixelModel(model), images, labels, config.batch_size, allow_non_finite=True)
    share = labels.bincount().max().item() / len(labels)
    return right.float().mean().item() > share + (1 - share) / 4


def open_data(config: TrainConfig, model: Any, fresh: bool) -> Data:
    """Returns the data of a run; the model takes over their class names, and if it is `fresh` their mean and std."""
    cfg = model.pretrained_cfg
    options: dict[str, Any] = {"img_size": config.img_size, "data_dir": config.data_dir,
                               "download": config.dataset_download, "class_map": config.class_map,
                               "val_fraction": config.val_fraction, "crop_pct": config.crop_pct,
                               "interpolation": config.interpolation}
    plain = train = open_split_for(model, config.dataset, "train", **options)
    if config.random_resized_crop or config.aa:
        train = open_split_for(model, config.dataset, "train", augmentation_seed=config.seed, auto_augment=config.aa,
                               random_resized_crop=config.random_resized_crop, **options)
    data = Data(train, plain, open_split_for(model, config.dataset, "val", **options))
    check_every_class(data.train, model.num_classes)
    for name in OF_TRAINING:  # they describe the initial weights
        cfg.pop(name, None)
    # timm saves the names only if the number is right.
    cfg.update(label_names=data.train.class_names or class_names(model), num_classes=model.num_classes)
    if data.train.mean is not None and fresh:
        cfg.update({"mean": data.train.mean, "std": data.train.std} | config.given("mean", "std"))
    pixels = data.train[0][0].unsqueeze(0)
    for name in ("mean", "std"):
        if len(cfg[name]) != len(pixels[0]):
            raise ValueError(f"{name} is {tuple(cfg[name])}, and {config.dataset} has images of {len(pixels[0])} "
                             f"channels; give one value a channel by --{name}")
    cfg["input_size"] = tuple(pixels.shape[1:])
    _check_forward(config, model, pixels)
    return data


def _check_forward(config: TrainConfig, model: Any, pixels: torch.Tensor) -> None:
    try:
        with torch.no_grad(), mode_if_any(model, "fc"), in_eval_mode(model), _narrow_convolutions(model) as narrow:
            logits = check_logits(PixelModel(model)(pixels), 1)
        if logits.shape[1] != model.num_classes:
            raise ValueError(f"it returns {logits.shape[1]} logits for {model.num_classes} classes")
    except (RuntimeError, AssertionError, ValueError) as error:
        size = "×".join(map(str, pixels.shape[1:]))
        raise ValueError(f"{config.model} does not take {config.dataset}'s images of {size} (channels, height, width): "
                         f"{error}. Give --in-chans, --img-size, --mean and --std, or another model") from error
    with torch.no_grad(), mode_if_any(model, "fc"), in_eval_mode(model):
        head_logits(PixelModel(model), pixels)
    if narrow and config.amp and PartialState().device.type == "cpu":
        raise ValueError(f"the strided convolution {narrow[0]} of {config.model} meets maps narrower than its stride. "
                         "Of its weight's gradient in bfloat16, torch leaves a part uninitialised on CPUs, and the "
                         "weights would become garbage; leave out --amp, or give larger images")


@contextmanager
def _narrow_convolutions(model: nn.Module) -> Iterator[list[str]]:
    """Yields a list, which gets the convolutions that meet maps narrower than their stride in the block."""
    found: list[str] = []

    def note(name: str, module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        if inputs[0].shape[-1] < module.stride[-1] and module.kernel_size[-1] > 1:
            found.append(name)

    hooks = [module.register_forward_pre_hook(partial(note, name)) for name, module in model.named_modules()
             if isinstance(module, nn.Conv2d)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
