"""What an evaluation says before it begins: the model, the data, the attack, and how long it may take."""

import math
from functools import cache
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn

from ..console import device_text, duration, facts
from ..data import as_pixel_model, normalisation_of
from ..head import find_head, head_name, mode_if_any
from ..report.metrics import attack_of
from ..report.tables import pixels_note
from ..seeding import seeded
from ..threat import ThreatModel
from .attacked import AttackedModel
from .judge import device_of, precision_of
from .plan import Plan, make_plan
from .protocols import Protocol
from .subject import without_autocast
from .table import ATTACKS
from .threads import seconds_of_pass

# Few enough for a second or so; of faster networks the whole batch is timed.
_FEW_IMAGES = 4
_FAST_SECONDS = 0.1


def evaluation_header(about: dict[str, Any], model: nn.Module, images: Tensor, threat: ThreatModel, protocol: Protocol,
                      *, radii: list[float] | None = None, modes: tuple[str, ...] | None = None, batch_size: int,
                      accelerator: Accelerator | None = None, time_limit: str | None = None) -> str:
    """Returns the facts of an evaluation, a line each; times the model on a few of the images (N, channels, H, W).

    `radii` are a sweep's, in place of the threat model's. Of several modes the attacks and the time are those of the
    batch mode, which has the most, or else of the first.
    """
    modes = () if head_name(model) is None else modes or (find_head(model).inference,)
    head = f"HPM head, inference mode {', '.join(modes)}" if modes else "no HPM head"
    pixel_model = as_pixel_model(model)
    device = device_of(pixel_model, images)
    batch = images[:batch_size].to(device)
    mode = "batch" if "batch" in modes else next(iter(modes), None)
    with seeded(device, 0, "header"), without_autocast(batch), mode_if_any(pixel_model, mode):
        attacked = AttackedModel(pixel_model, batch)
    plan = make_plan(protocol, attacked, 10**6, ())
    budgets = "; ".join(f"{name} {budget}" for name, budget in plan.protocol.attacks.items())
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
        **estimate(plan, attacked, batch, len(images) * times / processes, time_limit),
    })


def estimate(plan: Plan, attacked: AttackedModel, batch: Tensor, num_images: float,
             time_limit: str | None = None) -> dict[str, str]:
    """Returns how long attacks and verdicts on so many images may take, and how long one may overrun the limit."""
    steps = [(len(group), ATTACKS[attack_of(row)], plan.queries(row)) for group, row in plan.steps]

    @cache
    def seconds(size: int, gradient: bool, part: float) -> float:
        # Surrogates side by side share a pass, which costs less than one for each; a part of a batch costs more.
        images = batch[:math.ceil(part * len(batch))].repeat(size, 1, 1, 1)
        return size * _seconds_per_image(attacked, plan.surrogates[0], images, gradient)

    costs = [number * seconds(size, attack.needs_gradient, attack.nearest) + seconds(size, False, 1.0)
             for size, attack, number in steps]
    passes = sum(size * (number + 1) for size, _, number in steps)  # with the verdicts
    most = "at most about" if plan.cascade else "about"
    text = (f"{most} {duration(num_images * sum(costs))} for the attacks and verdicts: {passes:,} passes an image, "
            "timed on the first images")
    return {"time": text} | ({} if time_limit is None else {
        "time limit": f"{time_limit}, after which the attack on a batch that is under way is finished: at most about "
                      f"{duration(len(batch) * max(costs))}"})


def _seconds_per_image(attacked: AttackedModel, surrogate: str, batch: Tensor, gradient: bool) -> float:
    """Returns the seconds of a pass of one image, forward or also backward."""
    def seconds(images: Tensor) -> float:
        # The first pass allocates memory.
        with without_autocast(images):
            return min(seconds_of_pass(lambda x: attacked.logits(surrogate, attacked.features(x)), images, gradient)
                       for _ in range(3)) / len(images)

    few = batch[:_FEW_IMAGES]
    slow = seconds(few)
    return slow if slow * len(few) > _FAST_SECONDS else seconds(batch)
