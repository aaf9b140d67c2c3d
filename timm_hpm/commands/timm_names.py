"""The options of timm's train.py and validate.py that ours do not take, and the reason or the option instead."""

from dataclasses import fields
from typing import Final

#: Names without their dashes, apart by spaces; a star stands for any end.
_REASONS: Final = (
    ("a mixture of images belongs to no class, and prototypes are means of classes",
     "mixup* cutmix*"),
    ("the loss is that of --objective",
     "jsd-loss bce-* aug-repeats aug-splits resplit kd-* distill-loss-weight task-loss-weight"),
    ("the augmentations are --shift, --hflip, --random-resized-crop and --aa",
     "color-jitter* grayscale-prob gaussian-blur-prob reprob remode recount vflip scale ratio train-crop-mode tta"),
    ("give --shift 0, and no other augmentation", "no-aug"),
    ("give --interpolation", "train-interpolation"),
    ("the schedule steps at each update", "sched-on-updates"),
    ("--lr is the peak learning rate, whatever the batch", "lr-base*"),
    ("--sched has one cycle, without noise, cool-down or patience",
     "lr-noise* lr-cycle-* lr-k-decay cooldown-epochs patience-epochs"),
    ("give --decay-rate", "dr"),
    ("give more --epochs", "epoch-repeats"),
    ("--clip-grad is the largest norm", "clip-mode"),
    ("--layer-decay has no lower bound", "layer-decay-*"),
    ("give it in --model-kwargs, such as global_pool=avg, if the model takes it",
     "gp bn-momentum bn-eps drop-block drop-connect test-pool"),
    ("give --initial-checkpoint FILE, and --num-classes for a new classifier",
     "checkpoint pretrained-path head-init-scale head-init-bias"),
    ("give --checkpoint FILE", "initial-checkpoint"),
    ("BatchNorm's running statistics are averaged over the processes at each update", "sync-bn dist-bn split-bn"),
    ("--model-ema has a warm-up and is on the model's device", "model-ema-force-cpu model-ema-warmup"),
    ("give --in-chans and --img-size", "input-size use-train-size"),
    ("images keep one size; give --img-size and --batch-size",
     "train-img-sizes train-batch-sizes train-size-* variable-batch-loss-scale naflex-*"),
    ("give --crop-pct; the crop is at the centre", "crop-mode crop-border-pixels tf-preprocessing"),
    ("the splits are fixed, see docs/data.md; --val-fraction sets the validation images of most",
     "train-split val-split train-num-samples val-num-samples train-batches-per-epoch train-steps-per-epoch"),
    ("give --num-images", "num-samples"),
    ("give --class-map or --class-subset", "real-labels valid-labels"),
    ("a data set has the columns image and label", "input-key input-img-mode target-key"),
    ("no code of a data set runs", "dataset-trust-remote-code"),
    ("give --output FOLDER", "experiment results-file results-format save-images"),
    ("give --resume FOLDER, which continues with all state", "start-epoch no-resume-opt"),
    ("give --log-with wandb; wandb reads its own environment, such as WANDB_PROJECT", "log-wandb wandb-*"),
    ("the kept epoch is that of the best robust validation accuracy", "eval-metric metrics-avg"),
    ("a run validates after each epoch, in batches of --batch-size", "val-interval validation-batch-size"),
    ("a bar and a line for each epoch are printed", "log-interval log-freq"),
    ("give --amp --amp-dtype", "model-dtype"),
    ("an attack searches an eager copy; train.py --torchcompile compiles the backbone with torch's defaults",
     "torchscript torchcompile* aot-autograd fuser fast-norm reparam"),
    ("give the file of the average, by --checkpoint", "use-ema"),
    ("start torchrun --nproc_per_node N, or accelerate launch", "num-gpu local_rank no-ddp-bb synchronize-step"),
    ("it is set by itself", "pin-mem no-prefetcher device-modules use-multi-epochs-loader worker-seeding"),
    ("give a smaller --batch-size", "retry"),
)


def reason_against(option: str) -> str | None:
    """Returns why a command does not take an option of another command or of timm's scripts; None if none has it."""
    # Their slow imports are for this message only.
    from ..evaluation.config import EvaluateConfig
    from ..training.config import TrainConfig

    name = option.removeprefix("--")
    for reason, names in _REASONS if option.startswith("--") else ():
        if any(name == known or (known.endswith("*") and name.startswith(known[:-1])) for known in names.split()):
            return f"{option} is an option of timm's scripts and not of this one: {reason}"
    for command, config in (("train", TrainConfig), ("evaluate", EvaluateConfig)):
        if option.startswith("--") and name.replace("-", "_") in {one.name for one in fields(config)}:
            return f"{option} is an option of {command}, and not of this command"
    return None
