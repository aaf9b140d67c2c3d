"""The validation that chooses the best epoch of a training run: a quick attack, not one to report."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from ..attacks import pgd
from ..data import ImageSplit, as_pixel_model
from ..evaluation.judge import judge
from ..head import head_mode
from ..threat import ThreatModel
from .config import TrainConfig
from .distributed import num_processes, process_index, reduced, seed_at
from .signals import StopRequest, obey_parent, shielded_batches
from .trunk import PixelTrunk, inputs_only


@dataclass(frozen=True)
class Validation:
    """Validates a model on a split, in batches of `config.batch_size` images that the processes share out.

    A single process that is asked to stop does so between two batches, several do after the last one.
    """

    split: ImageSplit
    config: TrainConfig
    threat: ThreatModel
    accelerator: Accelerator
    stop: StopRequest

    def __call__(self, model: Any, trunk: PixelTrunk, surrogates: Sequence[str]) -> dict[str, float]:
        """Returns accuracies: clean, robust by PGD through each of the `surrogates`, and the FC classifier's clean one.

        The head predicts in its own inference mode. `model` is in eval mode afterwards, and `trunk` is one of its own.
        """
        config, size, device = self.config, self.config.batch_size, self.accelerator.device
        model.eval()
        judged = as_pixel_model(model)
        counts = torch.zeros(3, device=device)
        batches = torch.arange(len(self.split)).split(size)
        own = range(process_index(), len(batches), num_processes())
        loader = DataLoader(self.split, batch_sampler=[batches[number].tolist() for number in own],
                            num_workers=config.workers, worker_init_fn=obey_parent)
        pairs = self.stop.batches(loader) if num_processes() == 1 else shielded_batches(loader)
        for number, (images, labels) in zip(own, pairs, strict=True):
            images, labels = images.to(device), labels.to(device)
            robust = clean = judge(judged, images, labels, size)
            fc = clean
            if trunk.uses_prototypes:
                with head_mode(model, "fc"):
                    fc = judge(judged, images, labels, size)
            for name in surrogates:
                seed_at(config.seed, "validation", number, name)
                with self.accelerator.autocast(), inputs_only(trunk):
                    adversarial = pgd(partial(trunk.surrogate_logits, name), images, labels, self.threat,
                                      steps=config.val_attack_steps)
                robust = robust & judge(judged, adversarial, labels, size, allow_non_finite=True)
            counts += torch.stack([clean.sum(), robust.sum(), fc.sum()]).to(counts)
        summed = reduced(torch.cat([counts, self.stop.votes().to(counts)])).tolist()
        counted, votes = summed[:len(counts)], summed[len(counts):]
        self.stop.agree(votes)
        return {name: count / len(self.split)
                for name, count in zip(("val_clean", "val_robust", "val_fc_clean"), counted, strict=True)}
