"""`TrainConfig`: every option of a training run."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

from ..options import RunOptions, as_dict, free_names, option
from ..surrogates import SURROGATES
from ..threat import ThreatModel
from .objectives import OBJECTIVES

TRACKERS: Final = ("tensorboard", "wandb")
SCHEDULES: Final = ("onecycle", "cosine", "tanh", "step", "multistep", "poly", "constant")

_MODEL: Final = "model"
_DATA: Final = "data"
_ATTACK: Final = "attack"
_PROTOTYPES: Final = "prototypes"
_OPTIMISATION: Final = "optimisation"
_MACHINE: Final = "machine and output"

# Options without an effect unless another one is on, or has one of these values.
_NEEDS: Final[dict[str, tuple[str, tuple[str, ...]]]] = {
    "extra_fraction": ("extra_data", ()), "model_ema_decay": ("model_ema", ()), "awp_warmup": ("awp_gamma", ()),
    "decay_epochs": ("sched", ("step",)), "decay_milestones": ("sched", ("multistep",)),
    "decay_rate": ("sched", ("step", "multistep", "poly")), "min_lr": ("sched", ("onecycle", "cosine", "tanh", "poly")),
}


@dataclass(frozen=True)
class TrainConfig(RunOptions):
    """The options of a training run, under timm's names if timm has them; see `python train.py --help`."""

    pretrained: bool = option(False, _MODEL, "initial weights: the model's pretrained ones, else random ones")
    initial_checkpoint: str | None = option(None, _MODEL, "file of the initial weights, ours or another project's")
    drop: float | None = option(None, _MODEL, "dropout of the classifier's input (the model's)", least=0, below=1)
    drop_path: float | None = option(None, _MODEL, "stochastic depth (the model's)", least=0, below=1)
    freeze_backbone: bool = option(
        False, _MODEL, "training of the head alone; the rest stays in eval mode, without dropout")
    grad_checkpointing: bool = option(False, _MODEL, "gradient checkpointing: less memory, one more forward pass")

    data_dir: str | None = option(None, _DATA, "folder of the data set", free=True)
    shift: int = option(1, _DATA, "augmentation: largest random shift in pixels", least=0)
    hflip: float = option(0.0, _DATA, "augmentation: probability of a horizontal flip", least=0, most=1)
    random_resized_crop: bool = option(False, _DATA, "augmentation: random resized crops, and flips")
    aa: str | None = option(
        None, _DATA, "augmentation: timm's name of a policy, such as rand-m9-mstd0.5, original or augmix-m3")
    batch_size: int = option(128, _DATA, "images per process and forward pass", "-b", least=1)
    extra_data: str | None = option(
        None, _DATA, "npz file of further training images, such as generated ones: image, uint8 N×H×W×channels, and "
                     "label, the model's class numbers")
    extra_fraction: float = option(0.7, _DATA, "fraction of each batch that --extra-data gives", least=0, below=1)

    objective: str = option("pgd-at", _ATTACK, "training objective: its attack and its loss", choices=OBJECTIVES)
    trades_beta: float = option(6.0, _ATTACK, "weight of TRADES' divergence", least=0)
    mart_lambda: float = option(5.0, _ATTACK, "weight of MART's divergence", least=0)
    awp_gamma: float = option(
        0.0, _ATTACK, "adversarial weight perturbation, relative to each weight's norm, such as 0.005; 0 for none",
        least=0, below=1)
    awp_warmup: float = option(0.0, _ATTACK, "epochs before the weight perturbation", least=0)
    attack_steps: int = option(10, _ATTACK, "PGD steps; 1 is FGSM with random start", least=1)
    attack_step_size: float | None = option(
        None, _ATTACK, "PGD step size in units of pixels in [0, 1], such as 2/255 (2.5·eps/steps)", above=0)
    attack_through: str = option("mixed", _ATTACK, "surrogate that the attack differentiates", choices=SURROGATES)
    val_attack_steps: int = option(20, _ATTACK, "PGD steps of the validation that chooses the best epoch", least=1)

    prototype_epoch: float | None = option(
        None, _PROTOTYPES, "epochs before the fit of a head without prototypes, such as 36 or 0.5 (0 if the FC "
                           "classifier is trained; else 0.6 of all, and 40 updates at least)", least=0)
    prototype_features: str = option("adversarial", _PROTOTYPES, "images whose features update the prototypes",
                                     choices=("adversarial", "both"))
    fc_loss_weight: float = option(1.0, _PROTOTYPES, "weight of the FC classifier's loss; the head's is 1", least=0)

    epochs: int = option(60, _OPTIMISATION, "passes over the training images", least=1)
    opt: str = option("sgd", _OPTIMISATION, "timm optimizer, such as sgd or adamw")
    lr: float = option(0.1, _OPTIMISATION, "peak learning rate", above=0)
    opt_eps: float | None = option(None, _OPTIMISATION, "epsilon of the optimizer (its own)", above=0)
    opt_betas: tuple[float, ...] | None = option(
        None, _OPTIMISATION, "betas of the optimizer (its own)", least=0, below=1)
    opt_kwargs: dict[str, Any] | None = option(None, _OPTIMISATION, "further arguments of the optimizer")
    momentum: float = option(0.9, _OPTIMISATION, "momentum of sgd", least=0, most=1)
    weight_decay: float = option(5e-4, _OPTIMISATION, "weight decay; none for biases, norms and the scale", least=0)
    sched: str = option("onecycle", _OPTIMISATION, "learning rate schedule: timm's, or onecycle", choices=SCHEDULES)
    warmup_epochs: float | None = option(
        None, _OPTIMISATION, "epochs of rising learning rate (a quarter of all with onecycle, else 0)", least=0)
    warmup_lr: float | None = option(
        None, _OPTIMISATION, "initial learning rate of the warm-up (a 25th of --lr with onecycle, else 1e-5)", above=0)
    warmup_prefix: bool = option(False, _OPTIMISATION, "start of the schedule after the warm-up, not under it")
    min_lr: float = option(0.0, _OPTIMISATION, "final learning rate of onecycle, cosine, tanh and poly", least=0)
    decay_epochs: float = option(90.0, _OPTIMISATION, "epochs between the decays of step", above=0)
    decay_milestones: tuple[float, ...] = option(
        (90.0, 180.0, 270.0), _OPTIMISATION, "epochs of the decays of multistep", above=0)
    decay_rate: float = option(0.1, _OPTIMISATION, "decay of step and multistep; power of poly", above=0)
    layer_decay: float | None = option(
        None, _OPTIMISATION, "ratio of each layer's learning rate to the next layer's", above=0, most=1)
    clip_grad: float | None = option(None, _OPTIMISATION, "largest norm of the gradient", above=0)
    grad_accum_steps: int = option(1, _OPTIMISATION, "batches per update", least=1)
    smoothing: float = option(0.0, _OPTIMISATION, "label smoothing of the loss", least=0, below=1)
    model_ema: bool = option(False, _OPTIMISATION, "moving average of the weights, which is then the kept model")
    model_ema_decay: float = option(0.9998, _OPTIMISATION, "EMA decay of the weights per update", least=0, most=1)

    device: str | None = option(None, _MACHINE, "cpu ignores accelerators (Accelerate's choice)", choices=("cpu",),
                                free=True)
    torchcompile: bool = option(False, _MACHINE, "compilation of the backbone")
    recovery_interval: int = option(0, _MACHINE, "updates between checkpoints; 0 means only at the ends of epochs",
                                    least=0, free=True)
    checkpoint_hist: int = option(2, _MACHINE, "number of checkpoints to keep", least=1, free=True)
    log_with: str | None = option(None, _MACHINE, "tracker of Accelerate", choices=TRACKERS, free=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threat is not None:
            ThreatModel.of(self.threat)
        if self.prototype_epoch is not None and self.prototype_epoch > self.epochs:
            raise ValueError(f"prototype_epoch is {self.prototype_epoch:g}, of {self.epochs} epochs; expected "
                             "no more, or the head would never have prototypes")
        if self.warmup_epochs is not None and self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs is {self.warmup_epochs}, of {self.epochs} epochs; expected less")
        for name in ("min_lr", "warmup_lr"):
            if (getattr(self, name) or 0.0) > self.lr:
                raise ValueError(f"{name} is {getattr(self, name)}, above the peak {self.lr} (lr); expected no more")
        if self.extra_per_batch == self.batch_size:
            raise ValueError(f"extra_fraction is {self.extra_fraction} of batch_size {self.batch_size}, which leaves "
                             "no image of the data set; expected a smaller fraction or a larger batch")
        self._check_effects()
        rates = {name: getattr(self, name) for name in ("drop", "drop_path")} | (self.model_kwargs or {})
        lost = [name for name in ("drop", "drop_path", "drop_rate", "drop_path_rate") if rates.get(name)]
        if self.freeze_backbone and lost:
            raise ValueError(f"{' and '.join(lost)} would have no effect in the backbone, which is in eval mode if it "
                             "is frozen (freeze_backbone); leave out one or the other")
        if self.pretrained and self.initial_checkpoint:
            raise ValueError("pretrained and initial_checkpoint both say where the weights come from; give one")

    def _check_effects(self) -> None:
        """Raises a ValueError for an option that has no effect without another one."""
        defaults = {one.name: one.default for one in fields(self)}
        of_objectives = {name: ("objective", tuple(one.name for one in OBJECTIVES.values() if name in one.options))
                         for objective in OBJECTIVES.values() for name in objective.options}
        for name, (other, values) in (_NEEDS | of_objectives).items():
            value, there = getattr(self, name), getattr(self, other)
            has_effect = there in values if values else bool(there)
            if value != defaults[name] and not has_effect:
                raise ValueError(f"{name} is {value}, and has no effect without --{other.replace('_', '-')}"
                                 f"{' ' * bool(values)}{' or '.join(values)}; give that, too, or leave {name} out")
        one_cycle = self.sched == "onecycle"
        if self.warmup_prefix and one_cycle:
            raise ValueError("warmup_prefix has no effect on onecycle, which begins with its warm-up; leave it out")
        warms_up = one_cycle if self.warmup_epochs is None else self.warmup_epochs > 0
        for name in ("warmup_lr", "warmup_prefix"):
            if getattr(self, name) and not warms_up:
                raise ValueError(f"{name} is {getattr(self, name)}, and has no effect without --warmup-epochs; give "
                                 f"that, too, or leave {name} out")

    @property
    def extra_per_batch(self) -> int:
        """Returns the number of images of the extra data in a batch."""
        return round(self.extra_fraction * self.batch_size) if self.extra_data else 0

    @property
    def has_weights(self) -> bool:
        """Returns whether the run starts from weights, not at random."""
        return self.pretrained or self.initial_checkpoint is not None

    def to_dict(self) -> dict[str, Any]:
        """Returns all options in YAML's and JSON's types."""
        return as_dict(self)


_FREE: Final = free_names(TrainConfig)


def differing(saved: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """Returns the names of the options by which a run must not be resumed; more epochs extend it."""
    return [name for name in given if saved.get(name) != given[name] and name not in _FREE
            and not (name == "epochs" and saved.get(name, 0) < given[name])]
