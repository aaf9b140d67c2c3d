"""`Run`: the steps of a plan on each batch: attack, judge, keep."""

import json
import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..deadline import is_over
from ..files import Parts, save_parts
from ..head import head_mode
from ..report import ASSEMBLED, NUM_EXAMPLES, TRUE_MODEL, Example, make_example
from ..report.metrics import attack_of
from ..seeding import seeded, seeded_verdict
from ..threat import ThreatModel
from .batch import AttackBatch
from .judge import as_row, judge, own_logits, predictions
from .plan import Plan, named
from .resume import ProgressFolder, Step, no_cost
from .subject import Subject, without_autocast
from .table import ATTACKS


@dataclass
class Run:
    """Attacks batch after batch, judges the candidates, and keeps both in the run's folder, if it has one."""

    subject: Subject
    threat: ThreatModel
    plan: Plan
    images: Tensor
    labels: Tensor
    keeps_candidates: bool  # for `save_candidates`
    folder: ProgressFolder | None = None
    num_examples: int = 0
    earlier_seconds: float = 0.0  # of the steps that an earlier process had finished
    has_progress: bool = False  # whether this process has made a step in the folder or, without one, a whole batch
    clean: dict[int, Step] = field(default_factory=dict)  # the clean steps so far, by the first image of the batch

    def judge_clean(self, batches: Iterable[int]) -> None:
        """Judges the clean images of the batches that begin with `batches`, until a `time_limit` is over."""
        for first in batches:
            if is_over():
                return
            self._clean_step(self._batch(first))

    def attack_batch(self, first: int, bar: tqdm) -> list[Step] | None:
        """Returns the steps of the batch that begins with the image `first`, None if a `time_limit` cut them."""
        state = self._batch(first)
        place = first // self.subject.batch_size
        clean = self._clean_step(state)
        state.add(replace(clean, points=state.images[clean.broken]))
        steps = [clean.without_pixels()]
        for number, (group, attack) in enumerate(self.plan.steps):
            bar.set_postfix_str(f"images {first}–{first + len(state.images) - 1}, {'+'.join(group)}: {attack}")
            done = bar.n + self.plan.queries(attack)
            step = self.folder.load(place, number, named(group, attack)) if self.folder else None
            if step is None:
                if self.has_progress and is_over():
                    return None
                step = self._attacked(group, attack, state, partial(_advance, bar, done))
                if self.folder is not None:
                    self.folder.save(place, number, step)
                    self.has_progress = True
            else:
                self.earlier_seconds += step.cost["seconds"]
            bar.update(done - bar.n)
            state.add(step)
            steps.append(replace(step.without_pixels(),
                                 examples=step.examples if self.num_examples < NUM_EXAMPLES else []))
        self.num_examples += sum(len(step.examples) for step in steps)
        if self.subject.judges_whole_batches():
            assembled = self._judged(ASSEMBLED, {ASSEMBLED: state.standing}, state)
            if self.keeps_candidates and self.folder is not None:
                self.folder.save(place, len(self.plan.steps), assembled)
            steps.append(assembled.without_pixels())
        self.has_progress |= self.folder is None
        return steps

    def _batch(self, first: int) -> "_State":
        images, labels = (part[first:first + self.subject.batch_size] for part in (self.images, self.labels))
        return _State(first, images.to(self.subject.device), labels.to(self.subject.device))

    def _clean_step(self, state: "_State") -> Step:
        if state.first not in self.clean:
            step = self._judged("clean", {"clean": state.images}, state)
            self.clean[state.first] = replace(step.without_pixels(), broken=step.broken)
        return self.clean[state.first]

    def save_candidates(self, path: str | os.PathLike, protocol: dict[str, Any]) -> None:
        """Writes images, labels and all candidates, each batch's fetched from the folder when it is due."""
        assert self.folder is not None
        tensors = {name: Parts(tensor, tensor.split(self.subject.batch_size))
                   for name, tensor in (("clean", self.images), ("labels", self.labels))}
        sets = [(number, named(group, attack)) for number, (group, attack) in enumerate(self.plan.steps)]
        if self.subject.judges_whole_batches():
            sets.append((len(sets), [ASSEMBLED]))
        batches = range(-(-len(self.images) // self.subject.batch_size))
        for number, names in sets:
            for name in names:
                tensors[name] = Parts(self.images, map(partial(self.folder.candidates, name, names, number), batches))
        save_parts(tensors, path, {"protocol": json.dumps(protocol)})

    def _attacked(self, group: tuple[str, ...], row: str, state: "_State", on_query: Callable[[], None]) -> Step:
        model, attack = self.subject.attacked, ATTACKS[attack_of(row)]
        surrogates = [model.exact_surrogate() if name == TRUE_MODEL else name for name in group]
        cascade = self.plan.cascade
        gone = state.broken & cascade
        active = torch.stack([~(gone & state.fc_broken if self._judges_fc(f"{name}/{row}") else gone)
                              for name in group])
        left = int(active.any(dim=0).sum())
        active &= state.nearest(attack.nearest)
        # In a full grid each set of candidates is of that attack alone, in the whole batch, which logits may depend on.
        rows = (active.any(dim=0) if cascade else torch.ones_like(state.broken)).nonzero().squeeze(1)
        found = (state.standing if cascade else state.images).repeat(len(group), 1, 1, 1, 1)
        not_finite: dict[str, list[int]] = {}
        flags: list[tuple[str, str, int, int]] = []
        before = time.perf_counter(), model.forward_passes, model.backward_passes
        if active.any():
            with seeded(self.subject.device, self.subject.seed, attack.seed_name(row), group, state.first), \
                    without_autocast(state.images):
                batch = AttackBatch(
                    model, surrogates, state.images[rows], state.labels[rows], active=active[:, rows],
                    victims=~state.broken[rows], start=state.standing[rows] if attack.whole_batch else None,
                    on_query=on_query)
                points = attack.candidates(batch, self.threat, self.plan.budget(row))
            points = points.view(len(group), len(rows), *points.shape[1:])
            found[:, rows] = torch.where(active[:, rows, None, None, None], points, found[:, rows])
            for lost in sorted(batch.not_finite):
                search = f"{group[lost // batch.size]}/{row}: in the search, the surrogate's"
                not_finite.setdefault(search, []).append(state.first + int(rows[lost % batch.size]))
            flags = [(name, f"{row} on {', '.join(group)}: {text}", *numbers)
                     for (name, text), numbers in batch.flags.items()]
        cost = {"seconds": time.perf_counter() - before[0], "forward_passes": model.forward_passes - before[1],
                "backward_passes": model.backward_passes - before[2]}
        step = self._judged(row, dict(zip(named(group, row), found, strict=True)), state)
        return replace(step, flags=flags + step.flags, not_finite=not_finite | step.not_finite, cost=cost,
                       attacked=left)

    def _judged(self, row: str, candidates: dict[str, Tensor], state: "_State") -> Step:
        """Returns the verdicts: the true model's, and the FC classifier's on the candidates of that classifier."""
        model, batch_size, labels = self.subject.pixel_model, self.subject.batch_size, state.labels
        correct, baseline, examples, not_finite, flags, kept = {}, {}, [], {}, [], {}
        cascade, newly, points = self.plan.cascade, torch.zeros_like(state.broken), torch.zeros_like(state.images)
        margins = torch.full(labels.shape, torch.inf)
        # The assembled batch breaks no image for the first time.
        broken = torch.ones_like(newly) if row == ASSEMBLED else state.broken
        for name, found in candidates.items():
            drawing = partial(seeded_verdict, self.subject.device, self.subject.seed, name, state.first)
            if self._judges_fc(name):
                with head_mode(self.subject.model, "fc"), drawing():
                    right = judge(model, found, labels, batch_size, first_image=state.first, allow_non_finite=True)
                baseline[name] = as_row(right & ~(state.fc_broken.cpu() & cascade))
            if cascade:
                found = torch.where(broken.view(-1, 1, 1, 1), state.standing, found)
            with drawing():
                # A model that fails on clean images is broken; under attack that is the adversary's aim.
                classes, ahead = predictions(model, found, batch_size, first_image=state.first,
                                             allow_non_finite=row != "clean")
            classes = classes.to(labels.device)
            margins = margins.minimum(torch.where(classes.cpu() == labels.cpu(), ahead, 0.0))
            lost = (classes < 0) & ~(broken & cascade)
            if lost.any():
                not_finite[f"{name}: on the candidates, the true model's"] = [
                    state.first + i for i in lost.nonzero().squeeze(1).tolist()]
                with drawing():
                    flags += self._spread(name, found, lost)
            right = (classes == labels) & ~(broken & cascade)
            correct[name] = as_row(right)
            breaks = ~right & ~broken & ~newly
            points[breaks] = found[breaks]
            newly |= breaks
            if self.keeps_candidates and name != "clean":
                kept[name] = found.cpu()
            if "/" in name:
                examples += [make_example(state.first + i, int(labels[i]), int(classes[i]), name, state.images[i],
                                          found[i]) for i in breaks.nonzero().squeeze(1).tolist()[:NUM_EXAMPLES]]
        return Step(row, correct, baseline, no_cost(), flags, first_examples(examples),
                    newly.nonzero().squeeze(1).cpu(), points[newly].cpu(), kept, not_finite,
                    classes.tolist() if row == "clean" else [], margins.tolist())

    def _judges_fc(self, name: str) -> bool:
        """Returns whether the FC classifier is judged on the candidates `name`: those of the attacks on it."""
        surrogate, _, row = name.rpartition("/")
        return (self.subject.attacked.head is not None and "fc" in self.plan.surrogates
                and (name == "clean" or (surrogate == "fc" and ATTACKS[attack_of(row)].by_image)))

    @torch.no_grad()
    def _spread(self, name: str, found: Tensor, lost: Tensor) -> list[tuple[str, str, int, int]]:
        """Returns a flag on candidates `found` (B, ...) that are `lost` (B,) because of another image of the batch."""
        alone = own_logits(self.subject.pixel_model, found, torch.where(lost, torch.nan, 0.0).unsqueeze(1))
        return [("batch-not-finite", f"{name}: of {{1}} candidates with logits that are not finite, {{0}} have them "
                 "only because of another image in their batch", int((lost & alone.isfinite().all(dim=1)).sum()),
                 int(lost.sum()))]


@dataclass
class _State:
    """A batch between its steps, which begins with the image `first` of all."""

    first: int
    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        self.standing = self.images.clone()  # or the first successful candidate of each image
        self.broken = torch.zeros_like(self.labels, dtype=torch.bool)  # by the true model's verdicts
        self.fc_broken = self.broken.clone()  # by the FC classifier's on the candidates of the attacks on it
        self.leads = torch.full_like(self.labels, torch.inf, dtype=torch.float32)  # smallest so far of the right logit

    def add(self, step: Step) -> None:
        self.standing[step.broken] = step.points.to(self.images.device)
        self.broken[step.broken] = True
        self.leads = self.leads.minimum(torch.tensor(step.margins, device=self.leads.device))
        for row in step.baseline_correct.values():
            self.fc_broken |= torch.tensor([verdict == "0" for verdict in row], device=self.labels.device)

    def nearest(self, part: float) -> Tensor:
        """Returns whether each image (B,) is among the `part` of the unbroken images with the smallest leads."""
        if part == 1:
            return torch.ones_like(self.broken)
        left = (~self.broken).nonzero().squeeze(1)
        chosen = left[self.leads[left].argsort(stable=True)[:math.ceil(part * len(left))]]
        return torch.zeros_like(self.broken).index_fill(0, chosen, True)


def first_examples(examples: Iterable[Example]) -> list[Example]:
    """Returns the examples of the first few images."""
    return sorted(examples, key=lambda example: example.image)[:NUM_EXAMPLES]


def _advance(bar: tqdm, most: int) -> None:
    if is_over():
        bar.set_postfix_str("the time is over: this attack is the last one", refresh=False)
    bar.update(bar.n < most)
