"""`Subject`: the model that is evaluated, and the description and the checks of it in a report."""

import platform
import warnings
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from typing import Any, Final

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from .. import __version__
from ..attacks import margin_loss
from ..checkpoints import NormalisationWarning
from ..data import PixelModel, ask, check_logits, check_pixels, head_logits, normalisation_of, unwrapped
from ..functional import in_autocast
from ..head import own_mode
from ..models.constructors import UNNORMALISED
from ..report import Flag, data_digest, weights_digest
from ..report.metrics import right_in_all
from ..seeding import seeded
from ..threat import ThreatModel
from .attacked import AttackedModel
from .checks import change_flag, check_model, copy_flag, head_flag, probability_flag, rough_flag, verdict_flag
from .judge import check_finite, device_of, own_logits, pixel_model_for, precision_of
from .resume import no_cost

# Images of the checks.
_NUM_CHECKED: Final = 32


class Subject:
    """The model that is evaluated, its attacked copy, and its logits for the first batch before any attack.

    Raises an error unless these logits are a classifier's.
    """

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor, batch_size: int, seed: int):
        self.model, self.batch_size, self.seed = model, batch_size, seed
        self.pixel_model = pixel_model_for(model, images)
        _warn_of_torchvision(self.pixel_model)
        self.draws = getattr(self.pixel_model, "draws", 1)
        self.device = device_of(self.pixel_model, images)
        self.example = images[:batch_size].to(self.device)
        # A model may draw random numbers at each call.
        with seeded(self.device, seed, "model"):
            self.logits = _first_logits(self.pixel_model, self.example)
        self.num_classes = self.logits.shape[1]
        check_pixels(images, labels, self.num_classes)
        with seeded(self.device, seed, "split"), without_autocast(self.example):
            self.attacked = AttackedModel(self.pixel_model, self.example)
        self.cost = no_cost()  # of the checks
        self.copied: Tensor | None = None  # the outputs of the attacked copy for the first images before any attack

    def judges_whole_batches(self) -> bool:
        """Returns whether a prediction of the true model depends on the other images of its batch."""
        return self.attacked.batch_dependent(self.attacked.exact_surrogate())

    def flags_before(self, images: Tensor, labels: Tensor) -> list[Flag]:
        """Returns the flags of the checks before any attack, on the first images."""
        images, labels = images[:_NUM_CHECKED].to(self.device), labels[:_NUM_CHECKED].to(self.device)

        def count(module: nn.Module, inputs: tuple[Tensor]) -> None:
            self.cost["forward_passes"] += self.draws * len(inputs[0])

        with seeded(self.device, self.seed, "checks"), self.pixel_model.register_forward_pre_hook(count):
            flags = check_model(self.pixel_model, images, labels, self.batch_size)
        flags += [flag for flag in (probability_flag(self.logits), head_flag(self.model)) if flag is not None]
        self.cost["backward_passes"] += self.draws * len(images)
        self.copied = self._copied()
        return flags

    def _copied(self) -> Tensor:
        images = self.example[:_NUM_CHECKED]
        self.cost["forward_passes"] += self.draws * len(images)
        with torch.no_grad(), seeded(self.device, self.seed, "copy"), without_autocast(images):
            return ask(self.attacked.backbone, images)

    def flags_after(self, images: Tensor, labels: Tensor, threat: ThreatModel, correct: dict[str, str],
                    raised: set[str]) -> list[Flag]:
        """Returns the flags after the attacks, of verdicts, gradient and state; `raised` are the flags so far.

        The gradient of a model with an HPM head is that of its FC classifier.
        """
        flags = [verdict_flag(correct)]
        if not raised & {"no-gradient", "zero-gradient"}:
            survive = [i for i, right in enumerate(right_in_all(correct.values())) if right][:_NUM_CHECKED]
            before = self.attacked.forward_passes, self.attacked.backward_passes
            with seeded(self.device, self.seed, "survivors"), without_autocast(self.example):
                flags.append(rough_flag(lambda x: self.attacked.logits("fc", self.attacked.features(x)),
                                        images[survive].to(self.device), labels[survive].to(self.device), threat,
                                        self.batch_size))
            self.cost["forward_passes"] += self.attacked.forward_passes - before[0]
            self.cost["backward_passes"] += self.attacked.backward_passes - before[1]
        if "changes-state" not in raised:
            with seeded(self.device, self.seed, "model"):
                flags.append(change_flag(self.pixel_model, self.example, self.logits))
            self.cost["forward_passes"] += self.draws * len(self.example)
            if self.copied is not None and flags[-1] is None:
                flags.append(copy_flag(self.attacked.backbone, self.copied, self._copied()))
        return [flag for flag in flags if flag is not None]

    def described(self, images: Tensor, labels: Tensor, raised: set[str]) -> dict[str, Any]:
        """Returns the model, the images and the environment for a report's protocol; `raised` are the flags so far."""
        margin = None
        if not raised & {"random-forward", "averaged-draws", "changes-state"}:
            # Two networks may compute different functions with the same weights.
            margin = float(margin_loss(self.logits.float(), labels[:len(self.logits)].to(self.device)).mean())
        inner = unwrapped(self.model)
        inner = unwrapped(inner.model) if isinstance(inner, PixelModel) else inner
        cfg = getattr(inner, "pretrained_cfg", None) or {}
        head = self.attacked.head
        return {
            "architecture": cfg.get("architecture") or type(inner).__name__,
            "weights_digest": weights_digest(inner),
            "normalisation": normalisation_of(self.pixel_model),
            "eot": self.draws,
            "num_images": len(images),
            "data_digest": data_digest(images, labels),
            "num_classes": self.num_classes,
            "inference": own_mode(self.model),
            "mix": None if head is None else head.mix,
            "prototypes_fitted": None if head is None else head.is_fitted(),
            "clean_margin": margin,
            "precision": precision_of(self.model, self.device),
            "attacked_scale": None if head is None else float(head.scale()),
            "device": self.device.type,
            "versions": {"python": platform.python_version(), "timm-hpm": __version__} | {
                package: version(package) for package in ("torch", "timm")},
        }


def _warn_of_torchvision(pixel_model: nn.Module) -> None:
    """Warns that a network of torchvision gets pixels in [0, 1]: its public weights expect them normalised."""
    network = unwrapped(pixel_model)
    if isinstance(network, PixelModel) and network.source.startswith(UNNORMALISED):
        network = unwrapped(network.model)
    if any(kind.__module__.startswith("torchvision.models") for kind in type(network).__mro__):
        warnings.warn(
            f"{type(network).__name__} is torchvision's, whose weights expect pixels normalised by mean "
            f"{IMAGENET_DEFAULT_MEAN} and std {IMAGENET_DEFAULT_STD}, and here it gets pixels in [0, 1]. Give mean and "
            "std: --mean and --std, or timm_hpm.PixelModel(model, mean, std); (0, 0, 0) and (1, 1, 1) if it takes "
            "pixels as they are",
            NormalisationWarning, stacklevel=2)


@torch.no_grad()
def _first_logits(pixel_model: nn.Module, images: Tensor) -> Tensor:
    """Returns the logits (B, C); raises unless they are finite, the HPM head's if there is one, and one image's too."""
    logits = head_logits(pixel_model, images)
    check_finite(own_logits(pixel_model, images, logits))
    try:
        check_logits(ask(pixel_model, images[:1]), 1)
    except (RuntimeError, IndexError, ValueError) as error:
        raise ValueError(f"the model fails on a batch of one image, which attacks end with ({error}); look for a "
                         "squeeze() without a dimension in it: flatten(1) keeps the batch") from error
    return logits


def without_autocast(x: Tensor) -> AbstractContextManager[None]:
    return torch.autocast(x.device.type, enabled=False) if in_autocast(x) else nullcontext()
