"""`mixed_surrogate_attack`: the Mixed Surrogate Attack (MSA), and the judge that counts what it finds."""

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from ..data import PixelModel, as_pixel_model, check_answers_alike, check_pixels
from ..files import replacing, writable_folder
from ..head import HPMHead, find_head, head_name, inference_mode
from ..report import TRUE_MODEL, AttackReport, Flag, data_digest, weights_digest
from ..threat import ThreatModel
from .components import COMPONENTS, STANDARD_BUDGETS, AttackBatch, Budget, Notes, check_finite, square_tiles
from .flags import GRADIENT_FREE, check_model, verdict_flag
from .surrogates import SplitModel, check_names


def mixed_surrogate_attack(
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        threat: ThreatModel,
        *,
        batch_size: int = 128,
        surrogates: Sequence[str] | None = None,
        attacks: Sequence[str] | None = None,
        budgets: dict[str, Budget] | None = None,
        surrogates_at_once: int = 1,
        seed: int = 0,
        progress: bool = False,
        save_adversarial: str | os.PathLike | None = None,
        about: Mapping[str, Any] | None = None,
) -> AttackReport:
    """Attacks a classifier through differentiable surrogates, and lets the classifier itself judge what was found.

    Every surrogate is attacked with every component of AutoAttack; each (surrogate, attack, image) yields a candidate.
    The true model, in its own inference mode, judges the candidates in the same whole batches in which they were
    crafted: images 0 to batch_size − 1, and so on. An image counts as robust only if it is classified correctly clean
    and under every candidate. A classifier without an HPM head is its own only surrogate.

    Square needs no gradient, and the straight-through surrogate computes the true model's own logits: Square on it is
    Square on the true model, reported under both.

    Arguments:
        model: a timm model (normalised by its `pretrained_cfg`) or a module of pixels in [0, 1]; in eval mode. It is
            not changed: attacks work on a frozen copy.
        images: (N, channels, H, W), pixels in [0, 1].
        labels: (N,), class indices.
        threat: what the adversary may do.
        batch_size: images in a judged batch, at least 1. In the `"batch"` mode the answer depends on it.
        surrogates: names of `SURROGATES`; None means all that differ in the head's inference mode.
        attacks: names of `COMPONENTS`; None means all.
        budgets: budgets for some of the attacks; None means AutoAttack's standard ones. Targets are capped at C − 1.
        surrogates_at_once: surrogates attacked side by side in one pass: more memory, less overhead for small nets.
        seed: of the attacks' random starts and searches; the caller's random state is left as it was.
        progress: shows a progress bar on standard error.
        save_adversarial: path of a safetensors file for images, labels, every candidate and the protocol; `rejudge`
            reads it.
        about: what else the report's protocol is to say, such as the data set, the split and the weights' origin.

    Returns:
        The report, with a verdict for each image and candidate.

    Raises:
        ValueError: bad images, labels, batch size, names of surrogates or attacks, or a model in train mode.
        NonFiniteLogitsError: the classifier or a surrogate answered NaN or infinity; the message names the image.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected at least 1")
    if surrogates_at_once < 1:
        raise ValueError(f"surrogates_at_once is {surrogates_at_once}; expected at least 1")
    check_answers_alike(model)
    check_pixels(images, labels)
    if save_adversarial is not None:
        writable_folder(Path(save_adversarial).parent)
    images, labels = images.detach().float().contiguous(), labels.detach().long()
    pixel_model = as_pixel_model(model)
    device = _device(pixel_model, images)
    example = images[:batch_size].to(device)
    num_classes = _num_classes(pixel_model, example)
    check_pixels(images, labels, num_classes)
    split = SplitModel(pixel_model, example)
    names = split.default_surrogates() if surrogates is None else split.check_surrogates(surrogates)
    chosen = tuple(COMPONENTS) if attacks is None else check_names("attack", attacks, tuple(COMPONENTS))
    checks = _no_cost()
    with _seeded(device, seed, "checks"):
        flags = _check_model(pixel_model, example, labels[:batch_size].to(device), checks)
    if any(flag.name == "no-gradient" for flag in flags):
        chosen = _without_gradients(chosen)
    plan = _plan(split, names, chosen, surrogates_at_once)

    if threat.norm == "L2" and any(attack == "square" for _, attack in plan) and not square_tiles(*images.shape[-2:]):
        raise ValueError(f"Square under L2 cannot tile images of {images.shape[-2]}×{images.shape[-1]} pixels (nor can "
                         f"AutoAttack's); leave it out: attacks={[name for name in COMPONENTS if name != 'square']}")
    budget_of = {attack: budget.for_classes(num_classes) for attack, budget in _check_budgets(budgets).items()
                 if any(attack == planned for _, planned in plan)}

    start = time.perf_counter()
    crafting = _Crafting(split, threat, plan, budget_of, batch_size, seed, device)
    court = _Court(model, pixel_model, batch_size, with_baseline=split.head is not None and "fc" in names)
    court.decide("clean", images, labels)
    candidates: dict[str, list[Tensor]] = {}
    for name, first, points in crafting.candidates(images, labels, progress):
        court.decide(name, points, labels[first:first + batch_size], first)
        if save_adversarial is not None:
            candidates.setdefault(name, []).append(points.cpu())

    correct = _in_order(court.verdicts, names)
    twin = f"{split.twin()}/square"
    if twin in correct and split.head is not None:
        correct[f"{TRUE_MODEL}/square"] = correct[twin]
    total = {key: checks[key] + sum(row[key] for row in crafting.cost.values()) for key in _no_cost()}
    total["forward_passes"] += court.judged
    total["seconds"] = time.perf_counter() - start

    report = AttackReport(
        protocol=dict(about or {}) | _protocol(model, split, images, labels, threat, batch_size, names, budget_of,
                                               surrogates_at_once, seed, num_classes, device),
        correct=correct,
        baseline_correct=court.baseline,
        cost=crafting.cost | {"all": total},
        flags=flags + crafting.notes.flags + [flag for flag in [verdict_flag(correct)] if flag],
    )
    if save_adversarial is not None:
        with replacing(save_adversarial) as temporary:
            saved = {name: torch.cat(parts) for name, parts in candidates.items()}
            save_file({"clean": images.cpu(), "labels": labels.cpu()} | saved, temporary,
                      {"protocol": json.dumps(report.protocol)})
    return report


@torch.no_grad()
def judge(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int, *, first_image: int = 0) -> Tensor:
    """Returns which images (N,) the model classifies correctly, asked in whole batches in the order given.

    Arguments:
        model: a timm model, or a module of pixels in [0, 1]; in eval mode.
        images: (N, channels, H, W), pixels in [0, 1].
        labels: (N,), class indices.
        batch_size: images a batch; the last batch has what is left.
        first_image: index of the first image, for error messages.

    Raises:
        ValueError: bad images, labels or batch size, or a model in train mode.
        NonFiniteLogitsError: an answer that is NaN or infinite; the message names the first such image.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected at least 1")
    check_answers_alike(model)
    check_pixels(images, labels)
    model = as_pixel_model(model)
    device = _device(model, images)
    verdicts = []
    for first in range(0, len(images), batch_size):
        logits = model(images[first:first + batch_size].to(device))
        check_finite(logits, partial(_image_name, first_image + first))
        verdicts.append(logits.argmax(dim=1).cpu() == labels[first:first + batch_size].cpu())
    return torch.cat(verdicts)


def _image_name(first: int, row: int) -> str:
    return f"image {first + row}"


def rejudge(model: nn.Module, path: str | os.PathLike) -> dict[str, str]:
    """Returns the verdicts (`AttackReport.correct`) on the images that `save_adversarial` saved, judged again.

    In the same batches and, for a model with an HPM head, in the inference mode of the saved protocol.

    Raises:
        ValueError: a file that `mixed_surrogate_attack` did not write or that is damaged, or a model that mixes its
            prototypes otherwise than the saved protocol says.
        OSError: no such file.
    """
    protocol = saved_protocol(path)
    with safe_open(path, "pt") as file, _mode_of(model, protocol["inference"]) as head:
        if head is not None and head.mix != protocol["mix"]:
            raise ValueError(f"the model's mix is {head.mix}, that of {path} is {protocol['mix']}; give the same")
        labels = file.get_tensor("labels")
        return {name: _verdicts(judge(model, file.get_tensor(name), labels, protocol["batch_size"]))
                for name in file.keys() if name != "labels"}  # noqa: SIM118  (it is no dict)


def saved_protocol(path: str | os.PathLike) -> dict[str, Any]:
    """Returns the protocol (`AttackReport.protocol`) by which the images of a `save_adversarial` file were found.

    Raises:
        ValueError: a file that `mixed_surrogate_attack` did not write, or that is damaged.
        OSError: no such file.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata, names = file.metadata() or {}, set(file.keys())
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged, or no safetensors file ({error}); run the attack again") from error
    if "protocol" not in metadata or not {"clean", "labels"} <= names:
        raise ValueError(f"{path} holds no adversarial images of timm_hpm; expected the file that "
                         "evaluate.py --save-adversarial wrote")
    return json.loads(metadata["protocol"])


def _check_budgets(budgets: Mapping[str, Budget] | None) -> dict[str, Budget]:
    """Returns the budget of every component."""
    if budgets:
        check_names("attack", list(budgets), tuple(COMPONENTS))
    chosen = STANDARD_BUDGETS | dict(budgets or {})
    for attack, standard in STANDARD_BUDGETS.items():
        if standard.targets and not chosen[attack].targets:
            raise ValueError(f"the budget of {attack} has no targets, and would leave the clean images as they are; "
                             f"expected such as Budget({chosen[attack].iterations}, targets={standard.targets})")
    return chosen


# Enough to see what `check_model` looks for.
_NUM_CHECKED: Final = 32


def _check_model(pixel_model: nn.Module, images: Tensor, labels: Tensor, cost: dict[str, float]) -> list[Flag]:
    """Returns the flags of `check_model` on some of a batch's images, and adds its passes to `cost`."""
    images, labels = images[:_NUM_CHECKED], labels[:_NUM_CHECKED]

    def count(module: nn.Module, inputs: tuple[Tensor]) -> None:
        cost["forward_passes"] += len(inputs[0])

    with pixel_model.register_forward_pre_hook(count):
        flags = check_model(pixel_model, images, labels)
    cost["backward_passes"] += len(images)
    return flags


def _without_gradients(attacks: tuple[str, ...]) -> tuple[str, ...]:
    """Returns those of the attacks that need no gradient."""
    usable = tuple(attack for attack in attacks if attack in GRADIENT_FREE)
    if not usable:
        raise ValueError(f"the model's logits have no gradient with respect to the pixels, which {', '.join(attacks)} "
                         f"need; look for a detach() or torch.no_grad() in it, or attack by {', '.join(GRADIENT_FREE)}")
    return usable


def _plan(
        split: SplitModel,
        surrogates: tuple[str, ...],
        attacks: tuple[str, ...],
        at_once: int,
) -> list[tuple[tuple[str, ...], str]]:
    """Returns the (surrogates side by side, attack) of one batch, in order."""
    groups = [surrogates[i:i + at_once] for i in range(0, len(surrogates), at_once)]
    plan = [(group, attack) for group in groups for attack in attacks]
    if "square" in attacks and split.twin() not in surrogates:
        plan.append(((TRUE_MODEL,), "square"))
    return plan


@dataclass
class _Crafting:
    """Makes the candidates of each batch, surrogate and attack, and keeps count of what that costs."""

    split: SplitModel
    threat: ThreatModel
    plan: list[tuple[tuple[str, ...], str]]
    budgets: dict[str, Budget]
    batch_size: int
    seed: int
    device: torch.device
    notes: Notes = field(default_factory=Notes)

    def __post_init__(self) -> None:
        self.cost = {attack: _no_cost() for attack in self.budgets}

    def candidates(self, images: Tensor, labels: Tensor, progress: bool) -> Iterator[tuple[str, int, Tensor]]:
        """Yields `"<surrogate>/<attack>"`, the index of a batch's first image, and its candidates (B, ...)."""
        starts = range(0, len(images), self.batch_size)
        queries = len(starts) * sum(self.budgets[attack].queries() for _, attack in self.plan)
        with tqdm(total=queries, disable=not progress, unit="query", smoothing=0) as bar:
            for first in starts:
                x = images[first:first + self.batch_size].to(self.device)
                y = labels[first:first + self.batch_size].to(self.device)
                for group, attack in self.plan:
                    bar.set_postfix_str(f"images {first}–{first + len(x) - 1}, {'+'.join(group)}: {attack}")
                    done = bar.n + self.budgets[attack].queries()
                    found = self._attack(group, attack, x, y, first, partial(_advance, bar, done))
                    bar.update(done - bar.n)
                    for surrogate, points in zip(group, found.split(len(x)), strict=True):
                        yield f"{surrogate}/{attack}", first, points

    def _attack(self, group: tuple[str, ...], attack: str, images: Tensor, labels: Tensor, first: int,
                on_query: Callable[[], None]) -> Tensor:
        """Returns the candidates (S·B, ...) of one attack on one batch through a group of S surrogates."""
        self.notes.prefix = f"{attack} on {', '.join(group)}: "
        surrogates = [self.split.twin() if name == TRUE_MODEL else name for name in group]
        with _counted(self.cost[attack], self.split), _seeded(self.device, self.seed, attack, group, first):
            batch = AttackBatch(self.split, surrogates, images, labels, first_image=first, on_query=on_query)
            found = COMPONENTS[attack](batch, self.threat, self.budgets[attack], self.notes)
            # The components end in the ball already, up to rounding.
            return self.threat.project(found, batch.clean)


class _Court:
    """The judges: the true model, and as a baseline the FC classifier on what was found on that classifier."""

    def __init__(self, model: nn.Module, pixel_model: nn.Module, batch_size: int, *, with_baseline: bool):
        self.model = model
        self.pixel_model = pixel_model
        self.batch_size = batch_size
        self.with_baseline = with_baseline
        self.verdicts: dict[str, str] = {}
        self.baseline: dict[str, str] = {}
        self.judged = 0

    def decide(self, name: str, points: Tensor, labels: Tensor, first: int = 0) -> None:
        """Judges whole batches of candidates and adds the verdicts to those that stand under `name`."""
        self._judge(self.verdicts, name, points, labels, first)
        if self.with_baseline and (name == "clean" or name.startswith("fc/")):
            with inference_mode(self.model, "fc"):
                self._judge(self.baseline, name, points, labels, first)

    def _judge(self, verdicts: dict[str, str], name: str, points: Tensor, labels: Tensor, first: int) -> None:
        correct = judge(self.pixel_model, points, labels, self.batch_size, first_image=first)
        verdicts[name] = verdicts.get(name, "") + _verdicts(correct)
        self.judged += len(points)


def _in_order(verdicts: dict[str, str], surrogates: tuple[str, ...]) -> dict[str, str]:
    """Returns the verdicts by surrogate and attack in the order of the tables, the clean ones first."""
    names = [f"{surrogate}/{attack}" for surrogate in (*surrogates, TRUE_MODEL) for attack in COMPONENTS]
    return {name: verdicts[name] for name in ["clean", *names] if name in verdicts}


@torch.no_grad()
def _num_classes(pixel_model: nn.Module, images: Tensor) -> int:
    """Returns the number of classes; raises unless the model answers with logits, and its HPM head answers last."""
    answers: list[Tensor] = []
    name = head_name(pixel_model)
    head = nn.Identity() if name is None else pixel_model.get_submodule(name)
    with head.register_forward_hook(lambda module, inputs, output: answers.append(output)):
        logits = pixel_model(images)
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(f"the model answers with the shape {tuple(logits.shape)}; expected logits (B, C), C above 1")
    check_finite(logits, partial(_image_name, 0))
    if name is not None and not (answers and torch.equal(answers[-1].float(), logits.float())):
        raise ValueError(f"the model's answer is not what its HPM head ({name}) answers: something follows the head, "
                         "which the surrogates would not see. Attack it without its HPM head")
    return logits.shape[1]


def _device(model: nn.Module, images: Tensor) -> torch.device:
    parameter = next(model.parameters(), None)
    return images.device if parameter is None else parameter.device


@contextmanager
def _mode_of(model: nn.Module, mode: str) -> Iterator[HPMHead | None]:
    """Puts an HPM model into the inference mode `mode`; a model without an HPM head has the mode `"none"`."""
    if mode == "none":
        yield None
    else:
        with inference_mode(model, mode) as head:
            yield head


@contextmanager
def _seeded(device: torch.device, seed: int, *what: Any) -> Iterator[None]:
    """Seeds the global random state by `seed` and what is run, and puts the caller's back afterwards."""
    digest = hashlib.sha256(repr((seed, *what)).encode()).digest()
    on_cpu = device.type == "cpu"
    with torch.random.fork_rng([] if on_cpu else [device.index or 0], device_type="cuda" if on_cpu else device.type):
        torch.manual_seed(int.from_bytes(digest[:6], "big"))
        yield


def _no_cost() -> dict[str, float]:
    return {"seconds": 0.0, "forward_passes": 0, "backward_passes": 0}


def _advance(bar: tqdm, most: int) -> None:
    bar.update(bar.n < most)


@contextmanager
def _counted(cost: dict[str, float], split: SplitModel) -> Iterator[None]:
    before = time.perf_counter(), split.forward_passes, split.backward_passes
    yield
    cost["seconds"] += time.perf_counter() - before[0]
    cost["forward_passes"] += split.forward_passes - before[1]
    cost["backward_passes"] += split.backward_passes - before[2]


def _verdicts(correct: Tensor) -> str:
    return "".join("1" if right else "0" for right in correct.tolist())


def _protocol(
        model: nn.Module,
        split: SplitModel,
        images: Tensor,
        labels: Tensor,
        threat: ThreatModel,
        batch_size: int,
        surrogates: tuple[str, ...],
        budgets: dict[str, Budget],
        at_once: int,
        seed: int,
        num_classes: int,
        device: torch.device,
) -> dict[str, Any]:
    cfg = getattr(getattr(model, "model", model), "pretrained_cfg", None) or {}
    head = None if split.head is None else find_head(model)
    return {
        "architecture": cfg.get("architecture") or type(model).__name__,
        "weights_digest": weights_digest(model.model if isinstance(model, PixelModel) else model),
        "threat": str(threat),
        "num_images": len(images),
        "data_digest": data_digest(images, labels),
        "num_classes": num_classes,
        "batch_size": batch_size,
        "inference": "none" if head is None else head.inference,
        "mix": None if head is None else head.mix,
        "prototypes_fitted": None if head is None else head.is_fitted(),
        "surrogates": list(surrogates),
        "attacked_scale": None if split.head is None else float(split.head.scale()),
        "attacks": {attack: {k: v for k, v in asdict(budget).items() if v} for attack, budget in budgets.items()},
        "surrogates_at_once": at_once,
        "seed": seed,
        "device": device.type,
        "versions": {"python": platform.python_version()} | {
            package: version(package) for package in ("timm-hpm", "torch", "timm", "pyautoattack")},
    }
