"""`attack`: the adversarial images of a single attack, by its name."""

import torch
from torch import Tensor, nn

from ..attacks import margin_loss
from ..data import check_eval_mode, checked_integer, for_gradients
from ..seeding import seeded
from ..surrogates import check_names
from ..threat import ThreatModel
from .batch import AttackBatch, Budget
from .checks import gradient_flag, restored
from .plan import make_plan
from .protocols import Protocol, as_budget
from .subject import Subject, without_autocast
from .table import ATTACKS


@torch.inference_mode(False)
def attack(
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        threat: ThreatModel | str,
        name: str = "apgd-t",
        *,
        budget: Budget | int | str | None = None,
        batch_size: int = 128,
        seed: int = 0,
) -> Tensor:
    """Returns adversarial images (N, channels, H, W) of one attack: in the threat model's ball and in [0, 1].

    For an image that the attack does not break it is the point of largest loss. A measurement wants
    `mixed_surrogate_attack`, which runs all attacks through all surrogates.

    Arguments:
        model, seed: as in `mixed_surrogate_attack`; the model is in eval mode.
        images: (N, channels, H, W), pixels in [0, 1].
        labels: (N,), class indices.
        threat: the threat model, or a text such as `"Linf:8/255"`.
        name: of `timm_hpm.evaluation.ATTACKS`, such as `"apgd-ce"`, `"apgd-t"`, `"fab-t"` or `"square"`. It attacks the
            logits of the model itself; `"apgd-chain"` goes through all surrogates of an HPM head.
        budget: a `Budget`, iterations, or a text such as `"100x9r2"`; None means the standard one.
        batch_size: images in a batch; in the mode `"batch"` of an HPM head the predictions depend on it.

    Raises:
        ValueError: if an argument is malformed, the attack does not apply to the model, or needs gradients that the
            model lacks.
        NonFiniteLogitsError: if the logits of a clean image of the first batch are NaN or infinite.
    """
    record = ATTACKS[check_names("attack", [name], tuple(ATTACKS))[0]]
    protocol = Protocol("single", {name: record.budget if budget is None else as_budget(name, budget)}).changed()
    batch_size, seed = checked_integer("batch_size", batch_size, 1), checked_integer("seed", seed, 0)
    threat = ThreatModel.of(threat)
    check_eval_mode(model)
    images, labels = for_gradients(images, labels)
    with restored(model):
        subject = Subject(model, images, labels, batch_size, seed)
        copy, exact = subject.attacked, subject.attacked.exact_surrogate()
        flag = gradient_flag(subject.pixel_model, subject.example[:2], labels[:2].to(subject.device), 2)
        surrogates = (exact,) if record.surrogates(copy, (exact,)) else record.surrogates(copy, copy.surrogates())
        plan = make_plan(protocol.changed(surrogates or None), copy, subject.num_classes, {flag.name} if flag else ())
        found = []
        for first in range(0, len(images), batch_size):
            clean, truth = (part[first:first + batch_size].to(subject.device) for part in (images, labels))
            candidates: list[Tensor] = []
            for row in record.rows(plan.budget(name).restarts):
                with seeded(subject.device, seed, record.seed_name(row), surrogates, first), without_autocast(clean):
                    batch = AttackBatch(copy, surrogates, clean, truth)
                    candidates += record.candidates(batch, threat, plan.budget(name)).split(len(clean))
            found.append(_best(subject, candidates, truth).to(images.device))
    return torch.cat(found)


@torch.no_grad()
def _best(subject: Subject, candidates: list[Tensor], labels: Tensor) -> Tensor:
    """Returns each image's candidate (B, ...) of largest margin, or the batch with most errors if they depend on it."""
    if len(candidates) == 1:
        return candidates[0]
    copy, exact = subject.attacked, subject.attacked.exact_surrogate()
    with without_autocast(labels):
        margins = torch.stack([margin_loss(copy.logits(exact, copy.features(found)), labels).nan_to_num(torch.inf)
                               for found in candidates])
    if subject.judges_whole_batches():
        return candidates[int((margins >= 0).sum(dim=1).argmax())]
    return torch.stack(candidates)[margins.argmax(dim=0), torch.arange(len(labels), device=labels.device)]
