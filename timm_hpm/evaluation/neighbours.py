"""`measure_neighbours`: flips of an untouched image by an adversary who chooses its neighbours in the batch."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from ..attacks import margin_loss
from ..data import check_eval_mode, checked_integer, for_gradients
from ..head import find_head, own_mode
from ..seeding import seeded
from ..surrogates import soft_logits
from ..threat import ThreatModel
from .checks import restored
from .judge import predictions
from .subject import Subject, without_autocast

#: From a few strangers' images in a batch to many.
BATCH_SIZES: Final = (10, 50, 250)

# The likeliest wrong classes, and the share of the batch that one of them gets.
_CLASSES: Final = 4
_SHARES: Final = (0.0, 0.02, 0.1, 0.3, 0.6)
_SHUFFLES: Final = 5
_STEPS: Final = 10


@torch.inference_mode(False)
def measure_neighbours(
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        threat: ThreatModel | str,
        *,
        batch_sizes: Sequence[int] = BATCH_SIZES,
        num_targets: int = 50,
        seed: int = 0,
) -> list[dict[str, Any]]:
    """Returns the number of clean, correctly classified targets that flip, by batch size and kind of neighbours.

    The kinds: `"chosen"`, clean images of the same set picked for each target by their features; `"adversarial"`, those
    also perturbed within `threat`, by 10 passes forward and backward of a batch a target; and `"reshuffled"`, without
    an adversary: all images are targets, and `flipped` is the mean number of changed predictions over 5 random orders.
    The model itself judges whole batches; logits that are NaN or infinite count as a flip.

    Arguments:
        model: with an HPM head in batch mode, in eval mode; it does not change.
        images: (N, channels, H, W), pixels in [0, 1]; the adversary chooses from these too.
        labels: (N,), class indices.
        threat: the threat model of the neighbours, or a text such as `"Linf:8/255"`.
        batch_sizes: images in a batch, from 2 to N.
        num_targets: number of targets, the first correct images; 0 for all of them.
        seed: of the random orders and the model's random numbers; the caller's random state is restored.

    Returns:
        Rows with batch_size, mix, kind, targets and flipped.

    Raises:
        ValueError: if an argument is malformed, or the head is not in batch mode.
        NonFiniteLogitsError: if the logits of the images in the order given are NaN or infinite.
    """
    check_eval_mode(model)
    images, labels = for_gradients(images, labels)
    check_neighbours(model, batch_sizes, len(images), num_targets)
    threat, seed = ThreatModel.of(threat), checked_integer("seed", seed, 0)
    if own_mode(model) != "batch" or not find_head(model).is_fitted():
        raise ValueError("this model's predictions depend on no neighbours in a batch; expected a fitted HPM head in "
                         "batch mode")
    with restored(model):
        subject = Subject(model, images, labels, max(batch_sizes), seed)
    device, mix = subject.device, find_head(model).mix
    with torch.no_grad(), seeded(device, seed, "features"), without_autocast(subject.example):
        features = torch.cat([subject.attacked.features(part.to(device)) for part in images.split(max(batch_sizes))])
    rows = []
    for size in batch_sizes:
        with restored(model), seeded(device, seed, "neighbours", size, mix):
            search = _Search(subject, images, labels, features, size)
            rows += [{"batch_size": size, "mix": mix} | row for row in search.rows(threat, num_targets)]
    return rows


def check_neighbours(model: nn.Module, batch_sizes: Sequence[int], num_images: int, num_targets: int = 0) -> None:
    """Raises a ValueError unless `measure_neighbours` takes these arguments for so many images."""
    if not isinstance(batch_sizes, Sequence) or not batch_sizes:
        raise ValueError(f"neighbours: the batch sizes are {batch_sizes!r}; expected a list of at least one")
    for size in batch_sizes:
        if not 2 <= checked_integer("a batch size", size, 0) <= num_images:
            raise ValueError(f"a batch size is {size}; expected 2 to the number of images, {num_images}")
    checked_integer("num_targets", num_targets, 0)
    if (draws := getattr(model, "draws", 1)) > 1:
        raise ValueError(f"neighbours are chosen by the features of one draw, and the model averages {draws}; leave "
                         "out the neighbours (--neighbours), or the draws (--eot)")


class _Search:
    """Neighbours for targets, in batches of one size."""

    def __init__(self, subject: Subject, images: Tensor, labels: Tensor, features: Tensor, size: int):
        assert subject.attacked.head is not None
        self.subject, self.split, self.head, self.size = subject, subject.attacked, subject.attacked.head, size
        self.images, self.labels, self.features = images, labels, features
        self.classes, _ = predictions(subject.pixel_model, images, size, labels.cpu())
        with torch.no_grad():
            self.assigned = self.head.float_fc_logits(features.float()).argmax(dim=1)

    def rows(self, threat: ThreatModel, num_targets: int) -> Iterator[dict[str, Any]]:
        generator = torch.Generator().manual_seed(self.subject.seed % 2**63)
        changed = 0
        for _ in range(_SHUFFLES):
            order = torch.randperm(len(self.images), generator=generator)
            changed += int((self.predict(self.images[order]) != self.classes[order]).sum())
        yield {"kind": "reshuffled", "targets": len(self.images), "flipped": changed / _SHUFFLES}
        right = (self.classes == self.labels.cpu()).nonzero().squeeze(1).tolist()
        if not right:
            return
        targets = right[:num_targets or len(right)]
        with without_autocast(self.features):
            chosen = {target: self.choose(target) for target in targets}
        flipped = {target: self.flips(target, self.images[neighbours]) for target, neighbours in chosen.items()}
        yield {"kind": "chosen", "targets": len(targets), "flipped": sum(flipped.values())}
        yield {"kind": "adversarial", "targets": len(targets), "flipped": sum(
            flipped[target] or self.flips(target, self.move(target, self.images[neighbours], threat))
            for target, neighbours in chosen.items())}

    def predict(self, images: Tensor) -> Tensor:
        """Returns the classes (N,) that the true model predicts in batches of this size."""
        return predictions(self.subject.pixel_model, images, self.size, allow_non_finite=True)[0]

    def flips(self, target: int, neighbours: Tensor) -> bool:
        """Returns whether the target is misclassified at the head of a batch with these neighbours (B − 1, ...)."""
        batch = torch.cat([self.images[target:target + 1], neighbours.cpu()])
        return int(self.predict(batch)[0]) != int(self.labels[target])

    @torch.no_grad()
    def choose(self, target: int) -> Tensor:
        """Returns the numbers (B − 1,) of the clean neighbours that give the target the largest margin of an error.

        The images assigned to its class that are farthest from it move that class's mean away, and the nearest ones of
        a wrong class bring that class's mean near.
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
                # Images of other classes fill the batch up and change neither mean.
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
        """Returns the neighbours (B − 1, ...) perturbed within `threat` against the target, which stays as it is."""
        device = self.features.device
        clean, z = neighbours.to(device), self.features[target:target + 1]
        label = self.labels[target:target + 1].to(device)
        x = clean
        for i in range(_STEPS):
            x = x.detach().requires_grad_()
            with torch.enable_grad(), without_autocast(x):
                batch = torch.cat([z, self.split.features(x)])
                # The head's own logits, and soft ones with a gradient through the assignment.
                logits = torch.stack([self.split.logits("ste", batch)[0], soft_logits(self.head, batch, 0.3)[0]])
                # The last term keeps a gradient even if the model outputs a constant.
                loss = margin_loss(logits, label.repeat(2)).sum() + 0 * x.sum()
                gradient, = torch.autograd.grad(loss, x)
            x = threat.project(x.detach() + threat.scaled(gradient, threat.eps * (1 - i / _STEPS)), clean)
        return x
