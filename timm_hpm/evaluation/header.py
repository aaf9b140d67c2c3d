"""What an evaluation says before it begins: the model, the data, the attack, and how long it may take."""

import time
from collections import Counter
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..console import device_text, duration, facts
from ..data import as_pixel_model, normalisation_of
from ..head import find_head, head_name
from ..report.metrics import attack_of
from ..report.tables import pixels_note
from ..threat import ThreatModel
from .attacked import AttackedModel
from .plan import Plan, make_plan
from .protocols import Protocol
from .seeding import seeded
from .subject import precision_of
from .table import ATTACKS

# Few enough for a second or so; of faster networks the whole batch is timed.
_FEW_IMAGES = 4
_FAST_SECONDS = 0.1


def evaluation_header(about: dict[str, Any], model: nn.Module, images: Tensor, threat: ThreatModel, protocol: Protocol,
                      *, radii: list[float] | None = None, modes: tuple[str, ...] | None = None, batch_size: int,
                      accelerator: Accelerator | None = None) -> str:
    """Returns the facts of an evaluation, a line each.

    Arguments:
        about: `model`, `weights`, `dataset` and `split`, as in the report's protocol.
        model: in eval mode; asked for a few images, to time it.
        images: (N, channels, H, W), all that are attacked.
        threat: the threat model.
        protocol: the protocol.
        radii: of a sweep, in place of the threat model's.
        modes: inference modes, each evaluated; None means the model's own.
        batch_size: images in a judged batch.
        accelerator: of several processes.
    """
    head = "no HPM head" if head_name(model) is None else (
        f"HPM head, inference mode {', '.join(modes or [find_head(model).inference])}")
    pixel_model = as_pixel_model(model)
    attacked, device = attacked_copy(pixel_model, images[:batch_size])
    plan = make_plan(protocol, attacked, 10**6, ())
    budgets = "; ".join(f"{name} {budget}" for name, budget in
                        (protocol if attacked.head is not None else protocol.for_plain()).attacks.items())
    times = len([eps for eps in radii or [threat.eps] if eps]) * len(modes or [""])
    precision = precision_of(pixel_model, device)
    processes = 1 if accelerator is None else accelerator.num_processes
    channels, height, width = images.shape[1:]
    return facts({
        "model": f"{about['model']}, {sum(p.numel() for p in model.parameters()):,} parameters, {head}",
        "weights": about["weights"],
        "data": f"{about['dataset']}, split {about['split']}, {len(images):,} images of {width}x{height} pixels and "
                f"{channels} channel{'s' * (channels > 1)}",
        "normalisation": pixels_note({"normalisation": normalisation_of(pixel_model)}),
        "threat model": str(threat) if radii is None else f"{threat.norm}, {len(radii)} radii up to {max(radii):g}",
        "protocol": f"{protocol.name}, on {', '.join(plan.surrogates)}: {budgets}",
        "batches": f"of {batch_size} images",
        "device": device_text(device, processes) + ("" if precision == "float32" else f", judged in {precision}"),
        "time": estimate(plan, attacked, images[:batch_size].to(device), len(images) * times / processes),
    })


def attacked_copy(pixel_model: nn.Module, images: Tensor) -> tuple[AttackedModel, torch.device]:
    """Returns the copy of a model that attacks search, and its device."""
    device = next((p.device for p in pixel_model.parameters()), images.device)
    with seeded(device, 0, "header"):
        return AttackedModel(pixel_model, images.to(device)), device


def estimate(plan: Plan, attacked: AttackedModel, batch: Tensor, num_images: float) -> str:
    """Returns how long a plan's attacks and verdicts on so many images may take, from the time of one pass."""
    queries: Counter[tuple[int, bool]] = Counter()
    for group, row in plan.steps:
        queries[len(group), ATTACKS[attack_of(row)].needs_gradient] += plan.budget(row).queries()
        queries[len(group), False] += 1  # the verdicts
    # Surrogates side by side share a pass, which costs less than one for each.
    seconds = sum(
        number * size * _seconds_per_image(attacked, plan.surrogates[0], batch.repeat(size, 1, 1, 1), gradient)
        for (size, gradient), number in queries.items())
    passes = sum(size * number for (size, _), number in queries.items())
    most = "at most about" if plan.cascade else "about"
    return (f"{most} {duration(num_images * seconds)} for the attacks and verdicts: {passes:,} passes an image, timed "
            "on the first images")


def _seconds_per_image(attacked: AttackedModel, surrogate: str, batch: Tensor, gradient: bool) -> float:
    """Returns the seconds of a pass of one image, forward or also backward."""
    few = batch[:_FEW_IMAGES]
    # The first pass allocates memory.
    seconds = min(_pass(attacked, surrogate, few, gradient) for _ in range(2))
    if seconds > _FAST_SECONDS:
        return seconds / len(few)
    return min(_pass(attacked, surrogate, batch, gradient) for _ in range(3)) / len(batch)


def _pass(attacked: AttackedModel, surrogate: str, images: Tensor, gradient: bool) -> float:
    start = time.perf_counter()
    x = images.clone().requires_grad_(gradient)
    with torch.set_grad_enabled(gradient):
        total = attacked.logits(surrogate, attacked.features(x)).sum()
        if gradient and total.requires_grad:
            torch.autograd.grad(total, x, allow_unused=True)
    total.item()  # waits for the device
    return time.perf_counter() - start
