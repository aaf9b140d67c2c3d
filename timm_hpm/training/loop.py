"""`Run`: the loop over the epochs and batches of adversarial training, on Accelerate."""

import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from accelerate.utils import broadcast, broadcast_object_list, set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from ..data import as_pixel_model, random_flip, random_shift
from ..files import writable_folder
from ..head import find_head
from ..models.constructors import is_constructor
from ..models.saving import model_config, tensors_of, weights_metadata
from ..prototypes import fit_prototypes
from ..threat import ThreatModel
from . import setup
from .config import TrainConfig, differing
from .distributed import average_, num_processes, process_index, reduced, seed_at
from .extra import ExtraImages
from .header import epoch_signs, kept_signs, row_text, training_header
from .objectives import OBJECTIVES, Outputs, TrainingAttack, perturbed_weights
from .recovery import Checkpoint, Progress, check_identity, identity, newest_checkpoint
from .run_folder import CHECKPOINTS, RunFolder, saved_options
from .signals import Stopped, StopRequest, obey_parent, shielded_batches
from .trunk import AveragedModel, PixelTrunk, inputs_only
from .validation import Validation

#: The file in a run's folder that compressed extra data are unpacked into.
UNPACKED: Final = "extra-data.npy"

_DIVERGED: Final = ("lower the learning rate (--lr), or clip the gradient (--clip-grad). The last checkpoint and the "
                    "best epoch so far are in the output folder")
# Defaults that a resumed run keeps.
_KEPT: Final = ("threads", "prototype_epoch", "warmup_epochs")


class Run:
    """A training run: its parts, and the loop over epochs and batches; the arguments are those of `train`.

    `asked_to_stop` are signals that ask the run to stop, which the caller appends.
    """

    def __init__(self, config: TrainConfig, output: str | os.PathLike, *, model: Any = None, resume: bool = False,
                 log: Callable[[str], None] = print, progress: bool = False, asked_to_stop: Sequence[int] = ()):
        if resume:  # these defaults depend on a measurement, on the weights or on the number of epochs
            saved = saved_options(Path(output))
            config = replace(config, **{name: getattr(saved, name) for name in _KEPT if getattr(config, name) is None})
        self.config = config
        folder, self.log, self.show_progress = writable_folder(output), log, progress
        self.accelerator = accelerator = setup.create_accelerator(config, folder)
        set_seed(config.seed)
        self.model = setup.create_trainable(config) if model is None else setup.made_trainable(model, config)
        # A constructor may give its network weights, and the normalisation is its own, too.
        fresh = model is None and not config.has_weights and not is_constructor(config.model)
        with accelerator.local_main_process_first():  # it may download
            self.data = setup.open_data(config, self.model, fresh)
        self.model.to(accelerator.device)
        self.config = broadcast_object_list([setup.in_effect(config, self.model, self.data, fresh)])[0]
        self.threat = ThreatModel.of(str(self.config.threat))
        self.objective = OBJECTIVES[config.objective]
        self.folder = RunFolder(folder, self.config, resume)
        self.extra: ExtraImages | None = None
        if config.extra_data:
            with accelerator.main_process_first():
                self.extra = ExtraImages(config.extra_data, self.model.pretrained_cfg["input_size"],
                                         self.model.num_classes, folder / UNPACKED,
                                         unpack=accelerator.is_main_process)
        if config.channels_last:
            self.model.to(memory_format=torch.channels_last)
        self.trunk = PixelTrunk(self.model)
        self.head = self.trunk.head
        self.frozen = self._freeze()
        self.ema = AveragedModel(self.model, config.model_ema_decay) if config.model_ema else None
        self.progress = Progress(num_processes(), log_scale=self._log_scale())
        self.stop = StopRequest(asked_to_stop)
        self._prepare()
        accelerator.wait_for_everyone()
        if resume:
            self._restore()
        if accelerator.is_main_process:
            self.folder.begin()
        if config.log_with:
            accelerator.init_trackers("timm_hpm", {name: str(value) for name, value in self.config.to_dict().items()})

    def _freeze(self) -> nn.Module | None:
        """Freezes the unused scale of an FC head, and the backbone if the options say so; returns a frozen backbone."""
        if self.head is not None and not self.trunk.uses_prototypes:
            self.head.log_scale.requires_grad_(False)
        if not self.config.freeze_backbone:
            return None
        classifier = self.head or getattr(self.model, "get_classifier", lambda: None)()
        if not isinstance(classifier, nn.Module):
            raise ValueError(f"freeze_backbone needs a classifier that can be told apart, and {self.config.model} has "
                             "neither an HPM head nor timm's get_classifier(); leave it out")
        own = {id(parameter) for parameter in classifier.parameters()}
        for parameter in self.model.parameters():
            if id(parameter) not in own:
                parameter.requires_grad_(False)
        return self.trunk.backbone

    def _prepare(self) -> None:
        """Makes the optimizer, the loader and the schedule, and hands the first two to Accelerate."""
        config, accelerator = self.config, self.accelerator
        optimizer = setup.create_optimizer(config, self.model)
        own = config.batch_size - config.extra_per_batch
        loader = DataLoader(self.data.train, own, shuffle=True, drop_last=True,
                            num_workers=config.workers, worker_init_fn=obey_parent,
                            pin_memory=accelerator.device.type == "cuda")
        if config.torchcompile:
            self.trunk.backbone.compile()
        with warnings.catch_warnings():
            # Torch 2.14's, of an option that older ones need.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            self.trained, self.optimizer, self.loader = accelerator.prepare(self.trunk, optimizer, loader)
        if not len(self.loader):
            raise ValueError(f"batch_size is {own} on {num_processes()} processes; expected no more than the "
                             f"{len(self.data.train)} training images in all")
        # Not prepared: Accelerate would step it once per process.
        self.schedule = setup.create_schedule(config, optimizer, -(-len(self.loader) // config.grad_accum_steps))

    def _restore(self) -> None:
        """Takes up the newest undamaged checkpoint, if there is one."""
        checkpoint = newest_checkpoint(self.folder.path / CHECKPOINTS)
        if checkpoint is None:
            return
        self._load(checkpoint)
        check_identity(self.progress.identity, self._identity())
        if checkpoint.config["epochs"] < self.config.epochs:
            for sign in ("chance", "behind"):  # of an epoch that need not be the kept one now
                self.progress.warnings.pop(sign, None)
        if self.accelerator.is_main_process:
            if checkpoint.best is not None:
                self.folder.publish_best(checkpoint.best)
            self.folder.write_warnings(self.progress.warnings.values())

    def _load(self, checkpoint: Checkpoint) -> None:
        """Takes up a checkpoint; raises a ValueError if its options, number of processes or version are others."""
        progress, scaler = checkpoint.progress, self.accelerator.scaler
        processes, place = progress["processes"], f"the checkpoint after update {progress['updates']}"
        if differing(checkpoint.config, self.config.to_dict()):
            raise ValueError(f"{place} is of another run than args.yaml beside it; take one of them away")
        if processes != num_processes():
            raise ValueError(f"the run was trained by {processes} processes and is to be resumed by {num_processes()}; "
                             f"launch {processes}, or the batch and the schedule would be others")
        try:
            self.model.load_state_dict(checkpoint.model)
            if self.ema is not None and checkpoint.average is not None:
                self.ema.load(checkpoint.average, checkpoint.optimizer["average"])
            self.optimizer.load_state_dict(checkpoint.optimizer["optimizer"])
            if scaler is not None:
                scaler.load_state_dict(checkpoint.optimizer["scaler"])
            self.progress = Progress(**progress)
            self.schedule.step(self.progress.updates)  # perhaps of more epochs than the checkpoint's
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"{place} does not fit this run: {error}; remove it if of another version") from error

    def train(self) -> dict[str, Any]:
        """Trains to the end; returns the row of the kept epoch."""
        if self.show_progress and self.accelerator.is_main_process:
            print(training_header(self.config, self.model, self.data, self.accelerator.device), file=sys.stderr)
        while self.progress.epoch < self.config.epochs:
            self._finish_epoch(self._train_epoch())
        return self.progress.best

    def _train_epoch(self) -> float | None:
        """Trains on the batches that are left of the epoch; returns the images per second, None if none was left."""
        state = self.progress
        start, images = time.perf_counter(), 0
        if state.batches == len(self.loader):  # stopped between the last update and the validation
            return None
        loader = self.accelerator.skip_first_batches(self.loader, state.batches) if state.batches else self.loader
        for part in (self.loader, loader, self.data.train):
            part.set_epoch(state.epoch)
        if self.ema is not None and not state.batches:
            self.ema.begin_epoch()
        sums: list[tuple[Tensor, Tensor]] = []
        with tqdm(total=len(self.loader), initial=state.batches, desc=f"epoch {state.epoch}", unit="batch", leave=False,
                  disable=not (self.show_progress and self.accelerator.is_main_process)) as bar:
            for images_, labels in shielded_batches(loader):
                self._fit_if_due(state.epoch + state.batches / len(self.loader))
                seed_at(self.config.seed, "batch", state.epoch, state.batches)
                loss = self.learn(images_, labels, sums)
                state.batches += 1
                state.loss += loss
                images += self.config.batch_size * num_processes()
                bar.set_postfix_str(f"loss {loss:.3f}")
                bar.update()
                if self.accelerator.sync_gradients:
                    self.after_update(sums)
        return images / (time.perf_counter() - start)

    def learn(self, images: Tensor, labels: Tensor, sums: list[tuple[Tensor, Tensor]]) -> float:
        """Learns from a batch; returns the mean loss over the processes, and appends the class sums to `sums`."""
        config, accelerator = self.config, self.accelerator
        if self.extra is not None and config.extra_per_batch:
            further = self.extra.draw(config.extra_per_batch)
            images, labels = (torch.cat([part, more.to(part.device)])
                              for part, more in zip((images, labels), further, strict=True))
        images = random_flip(random_shift(images, config.shift), config.hflip)
        if config.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        batches = self._attacked(images, labels)
        self._set_mode(training=True)
        with accelerator.accumulate(self.trained):
            with perturbed_weights(self.trunk, partial(self._loss, batches, labels), self._gamma()):
                outputs: list[Outputs] = self.trained(*batches)
                loss = self.objective.loss(outputs, labels, config)
                mean = self._checked(loss)
                accelerator.backward(loss * self._share())
            if accelerator.sync_gradients and config.clip_grad is not None:
                accelerator.clip_grad_norm_(self.trained.parameters(), config.clip_grad)
            self.optimizer.step()
            self.optimizer.zero_grad()
        if self.trunk.has_prototypes:
            first = 0 if config.prototype_features == "both" else -1
            sums += [self.head.class_sums(features.detach(), labels) for features, _, _ in outputs[first:]]
            if self.ema is not None:
                with accelerator.autocast():
                    for batch in batches[first:]:
                        self.ema.see(batch, labels)
        return mean

    def _share(self) -> float:
        """Returns the factor of a batch's loss that makes the last update of an epoch the mean of its batches, too."""
        # Accelerate divides by the batches of a whole update.
        whole, rest = self.config.grad_accum_steps, len(self.loader) % self.config.grad_accum_steps
        return whole / rest if self.progress.batches >= len(self.loader) - rest else 1.0

    def _loss(self, batches: Sequence[Tensor], labels: Tensor) -> Tensor:
        """Returns the loss of this process's batches, scaled for float16, to perturb the weights by."""
        scaler = self.accelerator.scaler
        with self.accelerator.autocast():
            loss = self.objective.loss(self.trunk(*batches), labels, self.config)
        return loss if scaler is None else scaler.scale(loss)

    def _gamma(self) -> float:
        state = self.progress
        begun = state.epoch + state.batches / len(self.loader) >= self.config.awp_warmup
        return self.config.awp_gamma if begun else 0.0

    def _attacked(self, images: Tensor, labels: Tensor) -> list[Tensor]:
        """Returns the batches to learn from: clean images (B, ...), adversarial ones, or clean and adversarial ones."""
        config, craft = self.config, self.objective.craft
        if craft is None:
            return [images]
        self._set_mode(training=False)
        attack = TrainingAttack(partial(self.trunk.surrogate_logits, self._surrogate()), self.threat,
                                config.attack_steps, config.attack_step_size)
        with self.accelerator.autocast(), inputs_only(self.trunk):
            adversarial = craft(attack, images, labels)
        return [images, adversarial] if self.objective.uses_clean or config.prototype_features == "both" \
            else [adversarial]

    def after_update(self, sums: list[tuple[Tensor, Tensor]]) -> None:
        """Moves the prototypes by the class sums of the update's batches, steps the schedule, and saves if due."""
        if sums:
            self.head.apply_class_sums(*(reduced(sum(parts)) for parts in zip(*sums, strict=True)))  # type: ignore
            sums.clear()
        # BatchNorm's running statistics: each process has seen other images, and attacks use them.
        average_([buffer for buffer in self.trunk.backbone.buffers() if buffer.is_floating_point()])
        self.progress.updates += 1
        self.schedule.step(self.progress.updates)
        if self.ema is not None:
            self.ema.update(self.model, self.progress.updates)
        interval = self.config.recovery_interval
        if self.stop.number or (interval and self.progress.updates % interval == 0):
            self._save()
        if self.stop.number:
            raise Stopped(self.stop.number)

    def _checked(self, loss: Tensor) -> float:
        """Returns the mean loss over the processes, and agrees with them on stopping; raises if it is not finite."""
        # One message and one wait for the device serve both.
        total, *stops = reduced(torch.cat([loss.detach().float().view(1), self.stop.votes().to(loss.device)])).tolist()
        mean = total / num_processes()
        self.stop.agree(stops)
        if not math.isfinite(mean):
            raise FloatingPointError(
                f"the loss is {mean} at batch {self.progress.batches} of epoch {self.progress.epoch}; {_DIVERGED}")
        return mean

    def _fit_if_due(self, epochs: float) -> None:
        """Fits the prototypes of a head that has none, if `epochs` of training reach `prototype_epoch`."""
        if epochs < (self.config.prototype_epoch or 0.0) or not self._lacks_prototypes():
            return
        for model in (self.model,) if self.ema is None else (self.model, self.ema.module):
            self._fit_prototypes(model)
        self.progress.log_scale = self._log_scale()

    def _fit_prototypes(self, model: Any) -> None:
        config = self.config
        seed_at(self.config.seed, "fit", process_index())
        rows = range(process_index(), len(self.data.plain_train), num_processes())
        options: dict[str, Any] = {"batch_size": 256, "num_workers": config.workers, "worker_init_fn": obey_parent}
        loader = DataLoader(Subset(self.data.plain_train, rows), **options)
        held_out = DataLoader(self.data.val, **options)
        fit_prototypes(as_pixel_model(model), self.stop.batches(loader),
                       self.threat if self.objective.craft is not None else None, held_out=self.stop.batches(held_out),
                       attack_steps=config.attack_steps, attack_step_size=config.attack_step_size, reduce=reduced)
        for tensor in find_head(model).state_dict().values():
            tensor.copy_(broadcast(tensor))  # each process fitted the scale on its own random starts

    def _finish_epoch(self, images_per_second: float | None) -> None:
        state, config = self.progress, self.config
        self._check_finite()
        self._fit_if_due(state.epoch + 1)
        row: dict[str, Any] = {"epoch": state.epoch, "lr": self.optimizer.param_groups[-1]["lr"],
                               "loss": state.loss / max(state.batches, 1)}
        kept, trunk = (self.model, self.trunk) if self.ema is None else (self.ema.module, self.ema.trunk)
        self._set_mode(training=False)
        try:
            validation = Validation(self.data.val, config, self.threat, self.accelerator, self.stop)
            row |= validation(kept, trunk, tuple(dict.fromkeys(["fc", self._surrogate()])))
        except Stopped:
            self._save()
            raise
        state.rows.append(row)
        # A head without prototypes is unfinished. Of equally good epochs the last one is kept.
        is_best = not self._lacks_prototypes() and row["val_robust"] >= state.best.get("val_robust", -1.0)
        if is_best:
            state.best = row
        if self.accelerator.is_main_process:
            self.log(row_text(row, config.epochs, images_per_second))
            if is_best:
                self.folder.write_best(kept, row)
            self.folder.write_metrics(state.rows)
        self._warn(row)
        if config.log_with:
            self.accelerator.log({name: value for name, value in row.items() if name != "epoch"}, step=state.epoch)
        state.epoch, state.batches, state.loss = state.epoch + 1, 0, 0.0
        self._save()
        if self.stop.number and state.epoch < config.epochs:
            raise Stopped(self.stop.number)

    def _warn(self, row: dict[str, Any]) -> None:
        """Writes each new sign that the run does not learn into the log and into the run's folder."""
        state, config = self.progress, self.config
        change = math.exp(self._log_scale() - state.log_scale)
        signs = epoch_signs(row, config.epochs, self.model.num_classes, change)
        if row["epoch"] == config.epochs - 1:
            signs |= kept_signs(state.best, self.data.val.labels)
        for sign, text in signs.items():
            if sign not in state.warnings:
                state.warnings[sign] = text
                if self.accelerator.is_main_process:
                    self.log(f"warning: {text}")
                    self.folder.write_warnings(state.warnings.values())

    def _save(self) -> None:
        self._check_finite()
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self.progress.identity = self._identity()
            scaler, average = self.accelerator.scaler, None
            optimizer = {"optimizer": self.optimizer.state_dict(),
                         "scaler": {} if scaler is None else scaler.state_dict()}
            if self.ema is not None:
                average, optimizer["average"] = tensors_of(self.ema.module), self.ema.class_sums()
            self.folder.write_checkpoint(Checkpoint(
                tensors_of(self.model), average, optimizer, dict(vars(self.progress)), self.config.to_dict(),
                weights_metadata(model_config(self.model))))
        self.accelerator.wait_for_everyone()

    def _check_finite(self) -> None:
        """Raises a FloatingPointError if an update has left a weight that is not finite."""
        if not torch.stack([parameter.isfinite().all() for parameter in self.model.parameters()]).all():
            state = self.progress
            raise FloatingPointError(f"update {state.updates} (batch {state.batches - 1} of epoch {state.epoch}) left "
                                     f"weights that are not finite; {_DIVERGED}")

    def _identity(self) -> dict[str, Any]:
        return identity(self.model, self.data, None if self.extra is None else self.extra.digest)

    def _surrogate(self) -> str:
        """Returns the surrogate to attack through: the FC classifier if the model predicts by it."""
        return self.config.attack_through if self.trunk.has_prototypes else "fc"

    def _lacks_prototypes(self) -> bool:
        return self.trunk.uses_prototypes and not self.trunk.has_prototypes

    def _log_scale(self) -> float:
        return 0.0 if self.head is None else self.head.log_scale.item()

    def _set_mode(self, *, training: bool) -> None:
        self.trained.train(training)
        if self.frozen is not None:
            self.frozen.eval()  # so that its BatchNorm keeps its statistics
