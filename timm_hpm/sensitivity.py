"""`measure_sensitivity`: how far an attack moves a backbone's features, and how far each head's margin follows.

The paper (arXiv 2606.01746) calls an FC classifier sensitive and an ℓ2 classifier insensitive. A margin is in units of
its head's logits, so two heads are comparable by the part of the margin that is lost, not by the logits that are lost.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .attacks.apgd import apgd
from .attacks.losses import cross_entropy, margin_loss
from .data import as_pixel_model, check_eval_mode, check_range, checked_integer, for_gradients
from .evaluation.attacked import AttackedModel
from .files import write_text
from .head import INFERENCE_MODES, check_inference, find_head, head_mode
from .seeding import seeded
from .threat import ThreatModel


@dataclass(frozen=True)
class Movement:
    """The movement of some images' features and margins under the margin attack; means over the images.

    A margin is z_y − max_{c≠y} z_c of the logits z: negative if the image is misclassified.
    """

    images: int  # their number
    accuracy: float  # fraction classified correctly under both attacks
    naive_accuracy: float  # fraction that an attack on the cross-entropy alone leaves correct
    # ‖f(x + δ) − f(x)‖₂ of the features f, over the root mean square of ‖f(x) − f(x')‖₂ of two images of the split.
    feature_shift: float
    margin: float  # of the clean image, in logits
    margin_lost: float  # margin of the clean image less that of the attacked one

    @property
    def fraction_lost(self) -> float:
        """Returns the part of the clean margin that the attack takes; above 1 the average image is misclassified."""
        return self.margin_lost / self.margin if self.margin > 0 else float("nan")

    @property
    def sensitivity(self) -> float:
        """Returns the part of the margin lost for each unit of feature shift; it does not depend on a head's scale."""
        return self.fraction_lost / self.feature_shift if self.feature_shift else float("nan")


@dataclass(frozen=True)
class HeadSensitivity:
    """The sensitivity of one head at one radius: over all images, and over those of each class."""

    head: str
    eps: float
    overall: Movement
    by_class: Mapping[int, Movement]


@dataclass(frozen=True)
class Sensitivity:
    """The sensitivity of a backbone's heads at several radii."""

    name: str  # the network's
    protocol: Mapping[str, Any]  # norm, images, iterations, batch size and seed, in JSON's types
    clean: Mapping[str, float]  # accuracy of each head on the clean images
    rows: tuple[HeadSensitivity, ...]  # one for each head and radius above 0

    def save(self, path: str | os.PathLike) -> None:
        write_text(path, json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Sensitivity":
        """Returns the study that `save` wrote; raises a ValueError if the file holds something else."""
        try:
            saved = json.loads(Path(path).read_text(encoding="utf-8"))
            rows = tuple(HeadSensitivity(row["head"], float(row["eps"]), Movement(**row["overall"]),
                                         {int(label): Movement(**of) for label, of in row["by_class"].items()})
                         for row in saved["rows"])
            return cls(saved["name"], saved["protocol"], saved["clean"], rows)
        except (TypeError, KeyError, AttributeError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} holds no sensitivity ({type(error).__name__}: {error}); expected the JSON file "
                             "that Sensitivity.save wrote") from error


@torch.inference_mode(False)
def measure_sensitivity(
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        norm: str,
        radii: Sequence[float],
        modes: Sequence[str] = INFERENCE_MODES[::-1],
        *,
        iterations: int = 50,
        batch_size: int = 100,
        seed: int = 0,
        name: str = "",
        progress: bool = False,
) -> Sensitivity:
    """Attacks each head of one backbone at several radii and measures how its features and margins move.

    Each head is attacked by APGD on its own logits, with two losses: the margin, which no scale of the logits
    saturates, and the cross-entropy at the head's own scale, whose gradient vanishes if the scale is large. The
    difference of the two accuracies is the robustness that the naive attack would claim without cause. Costs
    2·(iterations + 1) forward and backward passes for each image, head and radius. `mixed_surrogate_attack`, which
    measures robust accuracy, is stronger.

    Arguments:
        model: as in `mixed_surrogate_attack`, in eval mode, with a fitted HPM head.
        images: (N, channels, H, W), pixels in [0, 1].
        labels: (N,), class indices.
        norm: `"Linf"` or `"L2"`.
        radii: in units of the pixel range; those of 0 are left out.
        modes: inference modes of the HPM head, each a head of its own.
        iterations: APGD steps of each attack, at least 1.
        batch_size: images in a batch, at least 1; the logits of `"batch"` depend on it.
        seed: of the random starts.
        name: of the model in the result; "" means its class.
        progress: shows a progress bar on standard error.

    Raises:
        ValueError: if the head is not fitted, the model is in train mode, or an argument is malformed.
    """
    threats = [ThreatModel(norm, eps) for eps in radii if eps != 0]
    modes = tuple(dict.fromkeys(check_inference(mode) for mode in modes))
    if not threats or not modes:
        raise ValueError(f"radii are {list(radii)} and modes {list(modes)}; expected a radius above 0 and a mode")
    if not find_head(model).is_fitted():
        raise ValueError("the HPM head has no prototypes, so all heads are the FC classifier; call "
                         "timm_hpm.fit_prototypes(model, loader) first")
    iterations, seed = checked_integer("iterations", iterations, 1), checked_integer("seed", seed, 0)
    batch_size = checked_integer("batch_size", batch_size, 1)
    check_eval_mode(model)
    device = next(model.parameters()).device
    images, labels = (part.to(device) for part in for_gradients(images, labels))
    check_range(labels, find_head(model).out_features)
    study = _Study(model, images, labels, batch_size)
    clean = {mode: study.at(mode, images) for mode in modes}
    rows = []
    with tqdm(total=len(threats) * len(modes), disable=not progress, unit="attack") as bar:
        for mode in modes:
            for threat in threats:
                with seeded(device, seed, mode, str(threat)):
                    rows.append(study.row(mode, threat, clean[mode], iterations))
                bar.update()
    protocol = {"norm": norm, "images": len(images), "iterations": iterations, "batch_size": batch_size, "seed": seed}
    return Sensitivity(name or type(model).__name__, protocol,
                       {mode: float((margins > 0).float().mean()) for mode, (_, margins) in clean.items()}, tuple(rows))


class _Study:
    """One backbone, its head in any mode, and the images."""

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor, batch_size: int):
        own_scale = find_head(model).log_scale.detach().clone()
        self.images, self.labels, self.batch_size = images, labels, batch_size
        self.attacked = AttackedModel(as_pixel_model(model), images[:batch_size])
        assert self.attacked.head is not None  # the model has one
        self.head = self.attacked.head
        # The naive attack must meet the head's own scale, not the moderated one of the copy.
        self.head.log_scale.copy_(own_scale)
        with torch.no_grad():
            features = self._features(images)
            centred = features - features.mean(dim=0)
        # Two independent images differ by √2 times the standard deviation.
        self.spread = float(centred.square().sum(dim=1).mean().sqrt()) * 2 ** 0.5

    def _logits(self, pixels: Tensor) -> Tensor:
        return self.head(self.attacked.features(pixels).to(self.head.weight.dtype)).float()

    def _features(self, images: Tensor) -> Tensor:
        return torch.cat([self.attacked.features(batch).float() for batch in images.split(self.batch_size)])

    @torch.no_grad()
    def at(self, mode: str, images: Tensor) -> tuple[Tensor, Tensor]:
        """Returns features (N, d) and margins (N,) of a head at `images` (N, ...), in whole batches."""
        with head_mode(self.head, mode):
            features = self._features(images)
            logits = torch.cat([self.head(batch.to(self.head.weight.dtype)).float()
                                for batch in features.split(self.batch_size)])
        return features, -margin_loss(logits, self.labels)

    def attack(self, mode: str, threat: ThreatModel, iterations: int) -> tuple[Tensor, Tensor]:
        """Returns the points of largest margin loss and of largest cross-entropy, each (N, ...)."""
        found: tuple[list[Tensor], list[Tensor]] = ([], [])
        with head_mode(self.head, mode):
            for x, y in zip(self.images.split(self.batch_size), self.labels.split(self.batch_size), strict=True):
                for points, loss in ((found[0], partial(margin_loss, labels=y)), (found[1], cross_entropy(y))):
                    points.append(apgd(self._logits, x, y, threat, iterations, loss).largest)
        return torch.cat(found[0]), torch.cat(found[1])

    def row(self, mode: str, threat: ThreatModel, clean: tuple[Tensor, Tensor], iterations: int) -> HeadSensitivity:
        """Attacks a head, and returns its movement over all images and over those of each class."""
        strong, naive = (self.at(mode, points) for points in self.attack(mode, threat, iterations))
        shift = (strong[0] - clean[0]).norm(dim=1) / self.spread
        held_naive = (clean[1] > 0) & (naive[1] > 0)
        held = held_naive & (strong[1] > 0)
        columns = torch.stack([held.float(), held_naive.float(), shift, clean[1], clean[1] - strong[1]])

        def movement(chosen: Tensor) -> Movement:
            return Movement(int(chosen.sum()), *columns[:, chosen].mean(dim=1).tolist())

        by_class = {int(label): movement(self.labels == label) for label in self.labels.unique()}
        return HeadSensitivity(mode, threat.eps, movement(torch.ones_like(self.labels, dtype=torch.bool)), by_class)
