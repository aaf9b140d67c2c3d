"""`measure_neighbours`: what an adversary does to an image by its neighbours in the batch, without touching the image.

Only an HPM head in batch mode answers so. It is the hole of that mode: a service that batches strangers' images
together lets one of them choose the neighbours of another's image.
"""

import math
from collections.abc import Iterator, Sequence
from numbers import Real
from typing import Any, Final

import torch
from torch import Tensor, nn

from ..attacks import margin_loss
from ..data import check_answers_alike, check_pixels, checked_integer, normal_tensor
from ..head import HPMHead
from ..surrogates import soft_logits
from ..threat import ThreatModel
from .attacked import AttackedModel
from .checks import restored
from .judge import device_of, pixel_model_for, predictions
from .seeding import seeded

#: From a few strangers' images in a batch to many.
BATCH_SIZES: Final = (10, 50, 250)

# Of the wrong classes, the likeliest; of the batch, how much is of that class.
_CLASSES: Final = 4
_SHARES: Final = (0.0, 0.02, 0.1, 0.3, 0.6)
_SHUFFLES: Final = 5
# Of each kind of neighbours, the most distant or the nearest: the mean counts, and the last ones spoil it.
_STEPS: Final = 10


@torch.inference_mode(False)
def measure_neighbours(
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        threat: ThreatModel | str,
        *,
        batch_sizes: Sequence[int] = BATCH_SIZES,
        mixes: Sequence[float] | None = None,
        num_targets: int = 50,
        perturbed: bool = True,
        seed: int = 0,
) -> list[dict[str, Any]]:
    """Returns how many clean, correctly classified targets flip, for each batch size, mix and kind of neighbours.

    The kinds: `"chosen"`, clean images of the same set picked for each target by their features; `"adversarial"`, those
    moved within `threat` as well; and `"reshuffled"`, of which nobody makes a choice: there all images are targets, and
    `flipped` is how many answers change on average over 5 random orders of the set. The model itself judges, on whole
    batches of pixels; an answer that is NaN or infinite has flipped.

    Arguments:
        model: with an HPM head in batch mode, in eval mode; afterwards as before.
        images: (N, channels, H, W), pixels in [0, 1]; the adversary chooses from these too.
        labels: (N,), class indices.
        threat: what the adversary may do to neighbours, or a text such as `"Linf:8/255"`.
        batch_sizes: images in a batch, from 2 to N.
        mixes: values of the head's `mix` to try, in [0, 1]; None means its own.
        num_targets: the first so many images that are right; 0 for all of them.
        perturbed: whether to run `"adversarial"` too, which costs 10 passes forward and backward of a batch a target.
        seed: of the random orders, and of what the model draws; the caller's random states are left alone.

    Returns:
        Rows with batch_size, mix, kind, targets and flipped.

    Raises:
        ValueError: bad images or labels, a batch size, a mix or a number of targets that does not fit, or a head that
            is not in batch mode.
        NonFiniteLogitsError: an answer to the images in the order given that is NaN or infinite.
    """
    check_answers_alike(model)
    images = check_pixels(images, labels)
    check_neighbours(batch_sizes, mixes, len(images), num_targets)
    threat, seed = ThreatModel.of(threat), checked_integer("seed", seed, 0)
    pixel_model = pixel_model_for(model, images)
    images, labels = normal_tensor(images).detach().float().contiguous(), normal_tensor(labels).detach().long()
    device = device_of(pixel_model, images)
    with seeded(device, seed, "split"):
        split = AttackedModel(pixel_model, images[:max(batch_sizes)].to(device))
    if split.head is None or split.head.inference != "batch" or not split.head.is_fitted():
        raise ValueError("this model's predictions depend on no neighbours in a batch; expected a fitted HPM head in "
                         "batch mode")
    head = next(module for module in pixel_model.modules() if isinstance(module, HPMHead))
    with torch.no_grad(), seeded(device, seed, "features"):
        features = torch.cat([split.features(part.to(device)) for part in images.split(max(batch_sizes))])
    rows = []
    before = head.mix
    with restored(model):
        try:
            for mix in (before,) if mixes is None else mixes:
                head.mix = split.head.mix = mix
                for size in batch_sizes:
                    with seeded(device, seed, "neighbours", size, mix):
                        search = _Search(pixel_model, split, images, labels, features, size)
                        rows += [{"batch_size": size, "mix": mix} | row
                                 for row in search.rows(threat, num_targets, perturbed, seed)]
        finally:
            head.mix = before
    return rows


def check_neighbours(batch_sizes: Sequence[int], mixes: Sequence[float] | None, num_images: int,
                   num_targets: int = 0) -> None:
    """Raises a ValueError unless `measure_neighbours` takes these arguments for so many images."""
    for name, values in (("batch sizes", batch_sizes), ("mixes", mixes)):
        if values is not None and not isinstance(values, Sequence):
            raise ValueError(f"neighbours: the {name} are {values!r}; expected a list")
        if values is not None and not values:
            raise ValueError(f"neighbours: no {name} are given; expected at least one")
    for size in batch_sizes:
        checked_integer("a batch size", size, 0)
        if not 2 <= size <= num_images:
            raise ValueError(f"a batch size is {size}; expected 2 to the number of images, {num_images}")
    for mix in mixes or ():
        if not isinstance(mix, Real) or not 0 <= mix <= 1:
            raise ValueError(f"a mix is {mix!r}; expected a number in [0, 1]")
    checked_integer("num_targets", num_targets, 0)


class _Search:
    """Neighbours for targets, in batches of one size."""

    def __init__(self, pixel_model: nn.Module, split: AttackedModel, images: Tensor, labels: Tensor, features: Tensor,
                 size: int):
        assert split.head is not None
        self.pixel_model, self.split, self.head, self.size = pixel_model, split, split.head, size
        self.images, self.labels, self.features = images, labels, features
        self.answers = predictions(pixel_model, images, size)
        with torch.no_grad():
            self.assigned = self.head.float_fc_logits(features.float()).argmax(dim=1)

    def rows(self, threat: ThreatModel, num_targets: int, perturbed: bool, seed: int) -> Iterator[dict[str, Any]]:
        generator = torch.Generator().manual_seed(seed % 2**63)
        changed = 0
        for _ in range(_SHUFFLES):
            order = torch.randperm(len(self.images), generator=generator)
            changed += int((self.answers_to(self.images[order]) != self.answers[order]).sum())
        yield {"kind": "reshuffled", "targets": len(self.images), "flipped": changed / _SHUFFLES}
        right = (self.answers == self.labels.cpu()).nonzero().squeeze(1).tolist()
        if not right:
            return
        targets = right[:num_targets or len(right)]
        chosen = {target: self.choose(target) for target in targets}
        flipped = {target: self.flips(target, self.images[neighbours]) for target, neighbours in chosen.items()}
        yield {"kind": "chosen", "targets": len(targets), "flipped": sum(flipped.values())}
        if perturbed:
            yield {"kind": "adversarial", "targets": len(targets), "flipped": sum(
                flipped[target] or self.flips(target, self.move(target, self.images[neighbours], threat))
                for target, neighbours in chosen.items())}

    def answers_to(self, images: Tensor) -> Tensor:
        return predictions(self.pixel_model, images, self.size, allow_non_finite=True)

    def flips(self, target: int, neighbours: Tensor) -> bool:
        """Returns whether the model errs on the target at the head of a batch with these neighbours (B − 1, ...)."""
        batch = torch.cat([self.images[target:target + 1], neighbours.cpu()])
        return int(self.answers_to(batch)[0]) != int(self.labels[target])

    @torch.no_grad()
    def choose(self, target: int) -> Tensor:
        """Returns the numbers (B − 1,) of the clean neighbours that bring the target nearest to an error, or past it.

        Its own class's mean is drawn away from it, by the images that are assigned to that class and lie farthest, and
        a wrong class's towards it, by the nearest ones.
        """
        label, z = int(self.labels[target]), self.features[target].float()
        distances = (self.features.float() - z).square().sum(dim=1)
        near = distances.argsort()
        near = near[near != target]
        own = near[self.assigned[near] == label].flip(0)
        likeliest = -(self.head.prototypes.float() - z).square().sum(dim=1)
        likeliest[label] = -torch.inf
        best, most = near[:self.size - 1], -torch.inf
        for wrong in likeliest.topk(min(_CLASSES, len(likeliest) - 1)).indices.tolist():
            theirs = near[self.assigned[near] == wrong]
            for share in _SHARES:
                some = theirs[:max(1, round(share * self.size))]
                # What fills the batch up must not undo it: images of other classes do nothing.
                rest = near[(self.assigned[near] != label) & (self.assigned[near] != wrong)]
                for keep in (1, self.size // 8, self.size):
                    picked = torch.cat([some, own[:keep], rest, own[keep:], theirs[len(some):]])[:self.size - 1]
                    batch = self.features[torch.cat([torch.tensor([target], device=picked.device), picked])]
                    margin = float(margin_loss(self.split.logits("ste", batch)[:1], self.labels[target:target + 1].to(
                        batch.device)).nan_to_num(math.inf))
                    if margin > most:
                        best, most = picked, margin
        return best.cpu()

    def move(self, target: int, neighbours: Tensor, threat: ThreatModel) -> Tensor:
        """Returns the neighbours (B − 1, ...) moved within `threat` against the target, which stays as it is."""
        device = self.features.device
        clean, z = neighbours.to(device), self.features[target:target + 1]
        label = self.labels[target:target + 1].to(device)
        x = clean
        for i in range(_STEPS):
            x = x.detach().requires_grad_()
            with torch.enable_grad():
                batch = torch.cat([z, self.split.features(x)])
                # The one is what the head computes, the other has a gradient with respect to who is assigned where.
                logits = torch.stack([self.split.logits("ste", batch)[0], soft_logits(self.head, batch, 0.3)[0]])
                # A gradient there is, even if the model answers NaN by itself.
                loss = margin_loss(logits, label.repeat(2)).sum() + 0 * x.sum()
                gradient, = torch.autograd.grad(loss, x)
            x = threat.project(x.detach() + threat.scaled(gradient, threat.eps * (1 - i / _STEPS)), clean)
        return x
