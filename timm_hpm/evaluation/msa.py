"""`mixed_surrogate_attack`: the Mixed Surrogate Attack (MSA)."""

import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from tqdm import tqdm

from ..attacks import margin_loss
from ..data import (
    PixelModel,
    as_pixel_model,
    ask,
    check_answers_alike,
    check_logits,
    check_pixels,
    checked_integer,
    normal_tensor,
    normalisation_of,
    unwrapped,
)
from ..files import Parts, locked, save_parts, writable_folder
from ..functional import in_autocast
from ..head import find_head, head_mode, head_name
from ..report import (
    ASSEMBLED,
    NUM_EXAMPLES,
    TRUE_MODEL,
    AttackReport,
    Example,
    Flag,
    data_digest,
    make_example,
    weights_digest,
)
from ..report.metrics import attack_of, right_in_all
from ..threat import ThreatModel
from .attacked import AttackedModel
from .batch import AttackBatch, Notes
from .budget import Budget
from .checks import (
    change_flag,
    check_model,
    clean_flags,
    head_flag,
    probability_flag,
    restored,
    rough_flag,
    verdict_flag,
)
from .judge import as_row, check_finite, device_of, image_name, judge, own_logits, pixel_model_for, predictions
from .neighbours import check_neighbours, measure_neighbours
from .protocols import PROTOCOLS, Protocol, find_protocol
from .resume import ProgressFolder, Step, check_same_run
from .seeding import seeded
from .table import ATTACKS


# A caller's inference mode would leave no gradients to attack by.
@torch.inference_mode(False)
def mixed_surrogate_attack(
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        threat: ThreatModel | str,
        *,
        protocol: str | Protocol = "standard",
        batch_size: int = 128,
        surrogates: Sequence[str] | None = None,
        attacks: Sequence[str] | None = None,
        budgets: Mapping[str, Budget | int | str] | None = None,
        survivors_only: bool = False,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        surrogates_at_once: int = 1,
        seed: int = 0,
        neighbours: Sequence[int] = (),
        neighbours_mixes: Sequence[float] | None = None,
        progress: bool = False,
        save_adversarial: str | os.PathLike | None = None,
        resume: str | os.PathLike | None = None,
        finished: str | os.PathLike | None = None,
        accelerator: Accelerator | None = None,
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
            not changed: attacks search a frozen copy (`AttackedModel`), and its parameters and buffers are restored if
            a forward pass changes them. It is judged in its own precision and in the caller's autocast.
        images: (N, channels, H, W), pixels in [0, 1].
        labels: (N,), class indices.
        threat: what the adversary may do, or a text such as `"Linf:8/255"`.
        protocol: `"standard"`, `"fast"` or a `Protocol`; the next four make it a custom one.
        batch_size: images in a judged batch, at least 1. In the `"batch"` mode the answer depends on it.
        surrogates: names of `SURROGATES`; None means the protocol's.
        attacks: names of `ATTACKS`; None means the protocol's.
        budgets: budgets for some of the attacks (`as_budget`); None means the protocol's. Targets are capped at C − 1.
        survivors_only: an image that was broken is attacked no more; see `Protocol`.
        mean, std: by which pixels are normalised, one value a channel; None means the model's `pretrained_cfg`. The
            report says which, and where they come from.
        surrogates_at_once: surrogates attacked side by side in one pass: more memory, less overhead for small nets.
        seed: of the attacks' random starts and searches; the caller's random state is left as it was.
        neighbours: batch sizes for which a head in batch mode is asked what neighbours do to an untouched image, and
            neighbours_mixes: values of its `mix` to ask for; see `measure_neighbours`. None of it enters an accuracy.
        progress: shows a progress bar on standard error.
        save_adversarial: path of a safetensors file for images, labels, every candidate, the assembled batches and the
            protocol; `rejudge` reads it. Until it is written, the candidates lie in `resume`, or without that in a
            folder beside the file.
        resume: a folder that keeps what was found so far, after each attack on each batch. A run that was killed goes
            on from there to the same report; another run's folder is refused.
        finished: where the report.json of this run may lie already. It is returned then, and nothing is attacked;
            another run's report is refused.
        accelerator: of several processes that all make this call: batches are dealt out to them whole, and the report,
            the same on each, does not depend on their number. None means this process only.
        about: what else the report's protocol is to say, such as the data set, the split and the weights' origin, by
            names and in JSON's types.

    Returns:
        The report, with a verdict for each image and candidate.

    Raises:
        ValueError: no module, bad images, labels, threat, protocol, batch size, seed, `about`, sizes or mixes of
            neighbours, names of surrogates or attacks, a model in train mode, or a `resume` folder or `finished`
            report of another run.
        NonFiniteLogitsError: the classifier answered NaN or infinity to a clean image, which the message names. Under
            attack that is an error of the classifier, and the report has the flag `non-finite-logits`.
    """
    batch_size, seed = checked_integer("batch_size", batch_size, 1), checked_integer("seed", seed, 0)
    surrogates_at_once = checked_integer("surrogates_at_once", surrogates_at_once, 1)
    threat, about = ThreatModel.of(threat), _in_json({} if about is None else about)
    chosen = find_protocol(protocol)
    for name, value, kind in (("save_adversarial", save_adversarial, str | os.PathLike),
                              ("resume", resume, str | os.PathLike), ("finished", finished, str | os.PathLike),
                              ("accelerator", accelerator, Accelerator)):
        if value is not None and not isinstance(value, kind):
            raise ValueError(f"{name} is {value!r}, of the type {type(value).__name__}; expected "
                             f"{'an Accelerator' if kind is Accelerator else 'a path'} or None")
    if not isinstance(survivors_only, bool):
        raise ValueError(f"survivors_only is {survivors_only!r:.100}; expected True or False")
    rank, processes = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    if save_adversarial is not None and processes > 1 and resume is None:
        raise ValueError(f"save_adversarial with {processes} processes needs resume, a folder that they share")
    check_answers_alike(model)
    if mean is not None or std is not None:
        model = as_pixel_model(model, mean, std)
    images = check_pixels(images, labels)
    if neighbours or neighbours_mixes is not None:
        check_neighbours(neighbours, neighbours_mixes, len(images))
    if save_adversarial is not None:
        writable_folder(Path(save_adversarial).parent)
    start = time.perf_counter()
    images, labels = normal_tensor(images).detach().float().contiguous(), normal_tensor(labels).detach().long()
    with restored(model):
        subject = _Subject.of(model, images, labels, batch_size, seed)
        split = subject.split
        chosen = chosen.changed(None if surrogates is None else split.check_surrogates(surrogates), attacks, budgets,
                                survivors_only)
        names = split.default_surrogates() if chosen.surrogates is None else split.check_surrogates(chosen.surrogates)
        checks = _no_cost()
        flags = subject.flags_before(images, labels, checks)
        usable = _applicable(tuple(chosen.attacks), split, names)
        if any(flag.name == "no-gradient" for flag in flags):
            usable = _without_gradients(usable)
        plan = _plan(split, names, usable, surrogates_at_once, chosen)
        budget_of = {attack: chosen.attacks[attack].for_classes(subject.num_classes) for attack in usable}
        asks_neighbours = bool(neighbours) and split.batch_dependent(split.exact_surrogate())
        summary = replace(chosen, surrogates=names, attacks=budget_of).summary()
        described = subject.described(images, labels, {flag.name for flag in flags}) | {
            "threat": str(threat), "batch_size": batch_size, "protocol_digest": chosen.digest(), **summary,
            "surrogates_at_once": surrogates_at_once, "seed": seed,
        }
        if asks_neighbours:
            described |= {"neighbours": list(neighbours),
                          "neighbours_mixes": neighbours_mixes and list(neighbours_mixes)}
        whole_protocol = about | described
        if finished is not None and Path(finished).exists():
            report = AttackReport.load(finished)
            check_same_run(f"{finished} is the report", report.protocol, whole_protocol)
            return report

        with _progress_folder(resume, save_adversarial, described, accelerator) as folder:
            asked = [(size, mix) for mix in neighbours_mixes or [find_head(model).mix] for size in neighbours
                     ] if asks_neighbours else []
            neighbour_rows = [(number, subject.neighbours(images, labels, threat, number, *asked[number], folder))
                              for number in range(rank, len(asked), processes)]
            run = _Run(subject, threat, plan, budget_of,
                       survivors_only=chosen.survivors_only,
                       with_baseline=split.head is not None and "fc" in names and not chosen.survivors_only,
                       keeps_candidates=save_adversarial is not None, folder=folder)
            mine = range(rank * batch_size, len(images), processes * batch_size)
            with tqdm(total=len(mine) * run.queries(), disable=not progress or rank > 0, unit="query",
                      smoothing=0) as bar:
                steps = [(first, run.attack_batch(first, images[first:first + batch_size],
                                                  labels[first:first + batch_size], bar)) for first in mine]
            earlier = [run.earlier_seconds]
            if accelerator is not None:
                steps = sorted(gather_object(steps), key=lambda batch: batch[0])
                neighbour_rows = sorted(gather_object(neighbour_rows), key=lambda one: one[0])
                earlier = gather_object(earlier)
            if save_adversarial is not None and rank == 0:
                run.save_candidates(save_adversarial, images, labels, whole_protocol)

        found = [step for _, batch in steps for step in batch]
        judged = _joined(step.correct for step in found)
        correct = _in_order(judged, names)
        if split.head is not None:
            # Without gradients an attack on the surrogate that computes the true model's logits is one on that model.
            correct |= {f"{TRUE_MODEL}/{attack}": correct[f"{split.exact_surrogate()}/{attack}"] for attack in usable
                        if not ATTACKS[attack].needs_gradient and f"{split.exact_surrogate()}/{attack}" in correct}
        answers = torch.tensor([answer for step in found for answer in step.answers])
        flags = [*clean_flags(answers, labels.cpu(), subject.num_classes), *flags]
        flags += [*_noted_flags(found), *_not_finite_flags(found)]
        flags += subject.flags_after(images, labels, threat, correct, chosen.survivors_only,
                                     {flag.name for flag in flags}, checks)
        cost = _total_cost(found, checks)
        cost["all"]["seconds"] = time.perf_counter() - start + sum(earlier) / processes
        return AttackReport(
            protocol=whole_protocol,
            correct=correct,
            neighbours=[row for _, rows in neighbour_rows for row in rows],
            assembled=judged.get(ASSEMBLED, ""),
            baseline_correct=_in_order(_joined(step.baseline_correct for step in found), names),
            cost=cost,
            flags=flags,
            examples=_first(example for step in found for example in step.examples),
        )


@contextmanager
def _progress_folder(resume: str | os.PathLike | None, save_adversarial: str | os.PathLike | None,
                     described: dict[str, Any], accelerator: Accelerator | None) -> Iterator[ProgressFolder | None]:
    """Yields the folder `resume`, or where candidates are to be saved, one for the meantime."""
    run = described | {"save_adversarial": save_adversarial is not None}
    if resume is not None:
        with locked(resume, shared=accelerator is not None):
            begins = accelerator is None or accelerator.process_index == 0
            if begins:
                folder = ProgressFolder(Path(resume), run)
            if accelerator is not None:
                accelerator.wait_for_everyone()
            yield folder if begins else ProgressFolder(Path(resume), run, begins=False)
    elif save_adversarial is not None:
        path = Path(save_adversarial)
        temporary = path.with_name(f".{path.name}.progress.{os.getpid()}.tmp")
        try:
            yield ProgressFolder(temporary, run)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    else:
        yield None


# Enough to see what the checks look for.
_NUM_CHECKED: Final = 32


@dataclass
class _Subject:
    """What is attacked: the model, its attacked copy, and what it answered before anything was done to it."""

    model: nn.Module
    pixel_model: nn.Module
    split: AttackedModel
    device: torch.device
    example: Tensor
    answer: Tensor
    batch_size: int
    seed: int

    @classmethod
    def of(cls, model: nn.Module, images: Tensor, labels: Tensor, batch_size: int, seed: int) -> "_Subject":
        """Returns the subject; raises unless the model answers its first batch as a classifier of these classes."""
        pixel_model = pixel_model_for(model, images)
        device = device_of(pixel_model, images)
        example = images[:batch_size].to(device)
        # A model may draw random numbers whenever it is asked.
        with seeded(device, seed, "model"):
            answer = _first_answer(pixel_model, example)
        check_pixels(images, labels, answer.shape[1])
        with seeded(device, seed, "split"), _without_autocast(example):
            split = AttackedModel(pixel_model, example)
        return cls(model, pixel_model, split, device, example, answer, batch_size, seed)

    @property
    def num_classes(self) -> int:
        return self.answer.shape[1]

    def flags_before(self, images: Tensor, labels: Tensor, cost: dict[str, float]) -> list[Flag]:
        """Returns what is suspicious before any attack, on the first of the images, and adds the passes to `cost`."""
        images, labels = images[:_NUM_CHECKED].to(self.device), labels[:_NUM_CHECKED].to(self.device)

        def count(module: nn.Module, inputs: tuple[Tensor]) -> None:
            cost["forward_passes"] += len(inputs[0])

        with seeded(self.device, self.seed, "checks"), self.pixel_model.register_forward_pre_hook(count):
            flags = check_model(self.pixel_model, images, labels, self.batch_size)
        flags += [flag for flag in (probability_flag(self.answer), head_flag(self.model)) if flag is not None]
        cost["backward_passes"] += len(images)
        return flags

    def flags_after(self, images: Tensor, labels: Tensor, threat: ThreatModel, correct: dict[str, str],
                    survivors_only: bool, raised: set[str], cost: dict[str, float]) -> list[Flag]:
        """Returns what the verdicts say, and how the model answers now, and adds the passes of that to `cost`.

        Of a model with an HPM head the gradient of the network with its FC classifier is checked: the head is known.
        `raised` are the names of the flags so far.
        """
        flags = [verdict_flag(correct, survivors_only)]
        if not raised & {"no-gradient", "zero-gradient"}:
            survive = [i for i, right in enumerate(right_in_all(correct.values())) if right][:_NUM_CHECKED]
            before = self.split.forward_passes, self.split.backward_passes
            with seeded(self.device, self.seed, "survivors"), _without_autocast(self.example):
                flags.append(rough_flag(lambda x: self.split.logits("fc", self.split.features(x)),
                                        images[survive].to(self.device), labels[survive].to(self.device), threat,
                                        self.batch_size))
            cost["forward_passes"] += self.split.forward_passes - before[0]
            cost["backward_passes"] += self.split.backward_passes - before[1]
        if "changes-state" not in raised:
            with seeded(self.device, self.seed, "model"):
                flags.append(change_flag(self.pixel_model, self.example, self.answer))
            cost["forward_passes"] += len(self.example)
        return [flag for flag in flags if flag is not None]

    def neighbours(self, images: Tensor, labels: Tensor, threat: ThreatModel, number: int, batch_size: int, mix: float,
                   folder: ProgressFolder | None) -> list[dict[str, Any]]:
        """Returns the rows of `measure_neighbours` for one batch size and mix, which the folder keeps by `number`."""
        rows = None if folder is None else folder.load_neighbours(number)
        if rows is None:
            rows = measure_neighbours(self.model, images, labels, threat, batch_sizes=[batch_size], mixes=[mix],
                                   seed=self.seed)
            if folder is not None:
                folder.save_neighbours(number, rows)
        return rows

    def described(self, images: Tensor, labels: Tensor, raised: set[str]) -> dict[str, Any]:
        """Returns what a report's protocol says of the model, the images, and what they met on.

        `raised` are the names of the flags so far.
        """
        margin = None
        if not raised & {"random-forward", "changes-state"}:
            # Weights do not tell a network from one that computes something else with them.
            margin = float(margin_loss(self.answer.float(), labels[:len(self.answer)].to(self.device)).mean())
        inner = unwrapped(self.model)
        inner = unwrapped(inner.model) if isinstance(inner, PixelModel) else inner
        cfg = getattr(inner, "pretrained_cfg", None) or {}
        head = None if self.split.head is None else find_head(self.model)
        return {
            "architecture": cfg.get("architecture") or type(inner).__name__,
            "weights_digest": weights_digest(inner),
            "normalisation": normalisation_of(self.pixel_model),
            "num_images": len(images),
            "data_digest": data_digest(images, labels),
            "num_classes": self.num_classes,
            "inference": "none" if head is None else head.inference,
            "mix": None if head is None else head.mix,
            "prototypes_fitted": None if head is None else head.is_fitted(),
            "clean_margin": margin,
            "precision": _precision(self.model, self.device),
            "attacked_scale": None if self.split.head is None else float(self.split.head.scale()),
            "device": self.device.type,
            "versions": {"python": platform.python_version()} | {
                package: version(package) for package in ("timm-hpm", "torch", "timm")},
        }


def _without_gradients(attacks: tuple[str, ...]) -> tuple[str, ...]:
    """Returns those of the attacks that need no gradient."""
    usable = tuple(attack for attack in attacks if not ATTACKS[attack].needs_gradient)
    if not usable:
        raise ValueError(f"the model's logits have no gradient with respect to the pixels, which {', '.join(attacks)} "
                         "need; look for a detach() or torch.no_grad() in it, or attack by "
                         + ", ".join(attack.name for attack in ATTACKS.values() if not attack.needs_gradient))
    return usable


def _applicable(attacks: tuple[str, ...], split: AttackedModel, surrogates: tuple[str, ...]) -> tuple[str, ...]:
    """Returns those of the attacks that this model has surrogates for."""
    usable = tuple(attack for attack in attacks if ATTACKS[attack].surrogates(split, surrogates))
    if not usable:
        raise ValueError(f"{', '.join(attacks)} attacks what an HPM head has in batch mode through several surrogates, "
                         f"and there are {', '.join(surrogates)}; choose others of "
                         + ", ".join(attack.name for attack in ATTACKS.values() if attack.by_image))
    return usable


def named(group: tuple[str, ...], attack: str) -> list[str]:
    """Returns the names of an attack's candidates through a group of surrogates, such as `"fc/apgd-ce"`."""
    return [f"{surrogate}/{attack}" for surrogate in group]


def _plan(
        split: AttackedModel,
        surrogates: tuple[str, ...],
        attacks: tuple[str, ...],
        at_once: int,
        protocol: Protocol,
) -> list[tuple[tuple[str, ...], str]]:
    """Returns the (surrogates side by side, attack) of one batch, in order; a round is named `"joint-subset#1"`."""
    def grouped(names: tuple[str, ...]) -> list[tuple[str, ...]]:
        return [names[i:i + at_once] for i in range(0, len(names), at_once)]

    groups, together = grouped(surrogates), []
    for attack in map(ATTACKS.__getitem__, attacks):
        if not attack.by_image:
            names = attack.surrogates(split, surrogates)
            together += [(group, name) for name in attack.rows(protocol.attacks[attack.name].rounds)
                         for group in ([names] if attack.chained else grouped(names))]
    attacks = tuple(attack for attack in attacks if ATTACKS[attack].by_image)
    # Where an image is attacked only until it is broken, the cheap attacks come first, and black-box ones last: what
    # they broke would stand in the rows of the attacks after them.
    if protocol.survivors_only:
        attacks = tuple(sorted(attacks, key=lambda attack: not ATTACKS[attack].needs_gradient))
    plan = [(group, attack) for attack in attacks for group in groups] if protocol.survivors_only else [
        (group, attack) for group in groups for attack in attacks]
    if split.exact_surrogate() not in surrogates:
        plan += [((TRUE_MODEL,), attack) for attack in attacks if not ATTACKS[attack].needs_gradient]
    return plan + together


@dataclass
class _Run:
    """One evaluation: attacks batch after batch, judges what it finds, and keeps that where it is to be kept."""

    subject: _Subject
    threat: ThreatModel
    plan: list[tuple[tuple[str, ...], str]]
    budgets: dict[str, Budget]
    survivors_only: bool
    with_baseline: bool
    keeps_candidates: bool
    folder: ProgressFolder | None
    num_examples: int = 0
    #: What steps took that the folder had kept already.
    earlier_seconds: float = 0.0

    def queries(self) -> int:
        """Returns about how many queries a batch takes, for a progress bar."""
        return sum(self.budgets[attack_of(attack)].queries() for _, attack in self.plan)

    def attack_batch(self, first: int, images: Tensor, labels: Tensor, bar: tqdm) -> list[Step]:
        """Returns the steps of the batch that begins with the image `first`: the clean one, then the plan's."""
        images, labels = images.to(self.subject.device), labels.to(self.subject.device)
        standing, broken = images.clone(), torch.zeros_like(labels, dtype=torch.bool)
        with seeded(self.subject.device, self.subject.seed, "judge", "clean", first):
            clean = self._judged("clean", {"clean": images}, images, labels, first, broken)
        broken[clean.broken] = True
        steps = [clean.without_pixels()]
        for number, (group, attack) in enumerate(self.plan):
            bar.set_postfix_str(f"images {first}–{first + len(images) - 1}, {'+'.join(group)}: {attack}")
            done = bar.n + self.budgets[attack_of(attack)].queries()
            step = None if self.folder is None else self.folder.load(first // self.subject.batch_size, number,
                                                                  named(group, attack))
            if step is None:
                step = self._attacked(group, attack, images, labels, first, standing, broken,
                                      partial(_advance, bar, done))
                if self.folder is not None:
                    self.folder.save(first // self.subject.batch_size, number, step)
            else:
                self.earlier_seconds += step.cost["seconds"]
            bar.update(done - bar.n)
            standing[step.broken] = step.points.to(self.subject.device)
            broken[step.broken] = True
            steps.append(replace(step.without_pixels(),
                                 examples=step.examples if self.num_examples < NUM_EXAMPLES else []))
        self.num_examples += sum(len(step.examples) for step in steps)
        if self.subject.split.batch_dependent(self.subject.split.exact_surrogate()):
            everything = {ASSEMBLED: standing}
            with seeded(self.subject.device, self.subject.seed, "judge", ASSEMBLED, first):
                assembled = self._judged(ASSEMBLED, everything, images, labels, first, torch.ones_like(broken))
            if self.keeps_candidates and self.folder is not None:
                self.folder.save(first // self.subject.batch_size, len(self.plan), assembled)
            steps.append(assembled.without_pixels())
        return steps

    def save_candidates(self, path: str | os.PathLike, images: Tensor, labels: Tensor,
                        protocol: dict[str, Any]) -> None:
        """Writes images, labels and all candidates, each batch's fetched from the folder when it is due."""
        assert self.folder is not None
        tensors = {name: Parts(tensor, tensor.split(self.subject.batch_size))
                   for name, tensor in (("clean", images), ("labels", labels))}
        batches = range(-(-len(images) // self.subject.batch_size))
        for number, (group, attack) in enumerate(self.plan):
            for name in named(group, attack):
                tensors[name] = Parts(images, map(partial(self.folder.candidates, name, named(group, attack), number),
                                                  batches))
        if self.subject.split.batch_dependent(self.subject.split.exact_surrogate()):
            tensors[ASSEMBLED] = Parts(images, map(
                partial(self.folder.candidates, ASSEMBLED, [ASSEMBLED], len(self.plan)), batches))
        save_parts(tensors, path, {"protocol": json.dumps(protocol)})

    def _attacked(self, group: tuple[str, ...], attack: str, images: Tensor, labels: Tensor, first: int,
                  standing: Tensor, broken: Tensor, on_query: Callable[[], None]) -> Step:
        """Returns what one attack on one batch finds through a group of surrogates."""
        split, seed, device = self.subject.split, self.subject.seed, self.subject.device
        notes = Notes(f"{attack} on {', '.join(group)}: ")
        surrogates = [split.exact_surrogate() if name == TRUE_MODEL else name for name in group]
        before = time.perf_counter(), split.forward_passes, split.backward_passes
        record = ATTACKS[attack_of(attack)]
        with seeded(device, seed, record.seed_name(attack), group, first), _without_autocast(images):
            # `joint` starts at the batch that earlier attacks left, `joint-subset` at random points; both move every
            # image of it.
            together = record.whole_batch
            start = standing if self.survivors_only or together else None
            active = ~broken if self.survivors_only and not together else None
            batch = AttackBatch(split, surrogates, images, labels, start=start, active=active, victims=~broken,
                                on_query=on_query)
            found = batch.points
            if len(batch.active):
                found = record.run(batch, self.threat, self.budgets[record.name], notes)
            # The components end in the ball already, up to rounding, if no arithmetic of theirs overflowed.
            found = self.threat.project(torch.where(found.isfinite(), found, batch.clean), batch.clean)
        seconds = time.perf_counter() - before[0]
        candidates = dict(zip(named(group, attack), found.split(len(images)), strict=True))
        with seeded(device, seed, "judge", record.seed_name(attack), group, first):
            step = self._judged(attack, candidates, images, labels, first, broken)
        not_finite: dict[str, list[int]] = {}
        for row in sorted(batch.not_finite):
            search = f"{group[row // batch.size]}/{attack}: in the search, the surrogate's"
            not_finite.setdefault(search, []).append(first + row % batch.size)
        noted = [(*flag, *numbers) for flag, numbers in notes.counts.items()] + step.noted
        return replace(step, noted=noted, not_finite=not_finite | step.not_finite, cost={
            "seconds": seconds, "forward_passes": split.forward_passes - before[1],
            "backward_passes": split.backward_passes - before[2]})

    def _judged(self, attack: str, candidates: dict[str, Tensor], images: Tensor, labels: Tensor, first: int,
                broken: Tensor) -> Step:
        """Returns the judges' verdicts: the true model's, and the FC classifier's on what attacked that classifier."""
        model, batch_size = self.subject.pixel_model, self.subject.batch_size
        correct, baseline, examples, not_finite, notes = {}, {}, [], {}, Notes()
        newly, points = torch.zeros_like(broken), torch.zeros_like(next(iter(candidates.values())))
        for name, found in candidates.items():
            # A model that does not answer clean images is broken; under attack that is what an adversary wants.
            answers = predictions(model, found, batch_size, first_image=first,
                                  allow_non_finite=attack != "clean").to(labels.device)
            if (answers < 0).any():
                not_finite[f"{name}: on the candidates, the true model's"] = [
                    first + i for i in (answers < 0).nonzero().squeeze(1).tolist()]
                self._note_spread(name, found, answers < 0, notes)
            correct[name] = as_row(answers == labels)
            breaks = (answers != labels) & ~broken & ~newly
            points[breaks] = found[breaks]
            newly |= breaks
            if "/" in name:
                examples += [make_example(first + i, int(labels[i]), int(answers[i]), name, images[i], found[i])
                             for i in breaks.nonzero().squeeze(1).tolist()[:NUM_EXAMPLES]]
            if self.with_baseline and (name == "clean" or (
                    name.startswith("fc/") and attack in PROTOCOLS["autoattack"].attacks)):
                with head_mode(self.subject.model, "fc"):
                    baseline[name] = as_row(judge(model, found, labels, batch_size, first_image=first,
                                                  allow_non_finite=True))
        kept = {name: found.cpu() for name, found in candidates.items() if self.keeps_candidates and name != "clean"}
        noted = [(*flag, *numbers) for flag, numbers in notes.counts.items()]
        return Step(attack, correct, baseline, _no_cost(), noted, _first(examples), newly.nonzero().squeeze(1).cpu(),
                    points[newly].cpu(), kept, not_finite, answers.tolist() if attack == "clean" else [])

    @torch.no_grad()
    def _note_spread(self, name: str, found: Tensor, lost: Tensor, notes: Notes) -> None:
        """Notes how many of the `lost` (B,) of the candidates `found` (B, ...) another image of the batch made so."""
        alone = own_logits(self.subject.pixel_model, found, torch.where(lost, torch.nan, 0.0).unsqueeze(1))
        spread = lost & alone.isfinite().all(dim=1)
        notes.count("batch-not-finite", f"{name}: of {{1}} candidates with logits that are not finite, {{0}} have them "
                    "only because of another image in their batch", int(spread.sum()), int(lost.sum()))


def _first(examples: Iterable[Example]) -> list[Example]:
    return sorted(examples, key=lambda example: example.image)[:NUM_EXAMPLES]


def _joined(parts: Iterable[dict[str, str]]) -> dict[str, str]:
    """Returns the verdicts of all batches, given in order, name by name."""
    rows: dict[str, str] = {}
    for part in parts:
        for name, row in part.items():
            rows[name] = rows.get(name, "") + row
    return rows


def _noted_flags(steps: Iterable[Step]) -> list[Flag]:
    """Returns a flag for each thing that attacks warned of, over all batches."""
    counts: dict[tuple[str, str], list[int]] = {}
    for step in steps:
        for name, text, affected, total in step.noted:
            count = counts.setdefault((name, text), [0, 0])
            count[0] += affected
            count[1] += total
    return [Flag(name, text.format(*count)) for (name, text), count in counts.items() if count[0]]


def _not_finite_flags(steps: Iterable[Step]) -> list[Flag]:
    """Returns a flag for each place at which logits were not finite, over all batches."""
    images: dict[str, list[int]] = {}
    for step in steps:
        for where, some in step.not_finite.items():
            images.setdefault(where, []).extend(some)
    return [Flag("non-finite-logits", f"{where} logits are not finite for {len(some)} images, the first image "
                                      f"{min(some)}") for where, some in images.items()]


def _in_order(verdicts: dict[str, str], surrogates: tuple[str, ...]) -> dict[str, str]:
    """Returns the verdicts by surrogate and attack in the order of the tables, the clean ones first."""
    columns = list(ATTACKS)

    def place(name: str) -> tuple[int, int, int]:
        surrogate, _, attack = name.partition("/")
        return ((*surrogates, TRUE_MODEL).index(surrogate), columns.index(attack_of(name)),
                int(attack.partition("#")[2] or 0))

    return {name: verdicts[name] for name in ["clean", *sorted((name for name in verdicts if "/" in name), key=place)]
            if name in verdicts}


def _total_cost(steps: list[Step], checks: dict[str, float]) -> dict[str, dict[str, float]]:
    """Returns seconds and passes of each attack, and of all with the checks and the judges' passes."""
    cost: dict[str, dict[str, float]] = {}
    total = dict(checks)
    for step in steps:
        for key, value in step.cost.items():
            if step.attack not in ("clean", ASSEMBLED):
                row = cost.setdefault(attack_of(step.attack), _no_cost())
                row[key] += value
            total[key] += value
        total["forward_passes"] += sum(map(len, [*step.correct.values(), *step.baseline_correct.values()]))
    return cost | {"all": total}


@torch.no_grad()
def _first_answer(pixel_model: nn.Module, images: Tensor) -> Tensor:
    """Returns the logits (B, C); raises unless they are logits, finite, and the HPM head's answer if there is one."""
    answers: list[Tensor] = []
    name = head_name(pixel_model)
    head = nn.Identity() if name is None else pixel_model.get_submodule(name)
    with head.register_forward_hook(lambda module, inputs, output: answers.append(output.clone())):
        logits = check_logits(ask(pixel_model, images), len(images))
    check_finite(own_logits(pixel_model, images, logits), partial(image_name, 0))
    if name is not None and not (answers and torch.equal(answers[-1].float(), logits.float())):
        raise ValueError(f"the model's answer is not what its HPM head ({name}) answers: something follows the head, "
                         "which the surrogates would not see. Attack it without its HPM head")
    return logits


def _without_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Returns a context in which what is on the device of `x` keeps its precision."""
    return torch.autocast(x.device.type, enabled=False) if in_autocast(x) else nullcontext()


def _in_json(about: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `about` as JSON gives it back, such as lists in the place of tuples; raises a ValueError if it cannot."""
    if not isinstance(about, Mapping):
        raise ValueError(f"about is a {type(about).__name__}; expected a dictionary")
    for name, value in about.items():
        try:
            if not isinstance(name, str):
                raise TypeError("its name is no text")
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"about[{name!r}] cannot be written as JSON ({error}); expected texts, finite numbers, "
                             "None, and lists or dictionaries of them") from error
    return json.loads(json.dumps(dict(about)))


def _no_cost() -> dict[str, float]:
    return {"seconds": 0.0, "forward_passes": 0, "backward_passes": 0}


def _advance(bar: tqdm, most: int) -> None:
    bar.update(bar.n < most)


def _precision(model: nn.Module, device: torch.device) -> str:
    """Returns the dtype that the judge computes in."""
    dtype = next((str(p.dtype) for p in model.parameters() if p.is_floating_point()), "torch.float32")
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        dtype = f"autocast to {torch.get_autocast_dtype(device.type)}"
    return dtype.replace("torch.", "")
