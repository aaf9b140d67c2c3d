"""`Run`: the steps of a plan on each batch: attack, judge, keep."""

import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..files import Parts, save_parts
from ..head import head_mode
from ..report import ASSEMBLED, NUM_EXAMPLES, TRUE_MODEL, Example, make_example
from ..report.metrics import attack_of
from ..threat import ThreatModel
from .batch import AttackBatch, Notes
from .judge import as_row, judge, own_logits, predictions
from .plan import Plan, named
from .protocols import PROTOCOLS
from .resume import ProgressFolder, Step, no_cost
from .seeding import seeded
from .subject import Subject, without_autocast
from .table import ATTACKS


@dataclass
class Run:
    """Attacks batch after batch, judges the candidates, and keeps both in the run's folder.

    Arguments:
        subject: the model.
        threat: the threat model.
        plan: the attacks on a batch.
        keeps_candidates: whether the folder keeps every candidate, for `save_candidates`.
        folder: the run's folder, or None.
    """

    subject: Subject
    threat: ThreatModel
    plan: Plan
    keeps_candidates: bool
    folder: ProgressFolder | None
    num_examples: int = 0
    #: Seconds of the steps that an earlier process had finished.
    earlier_seconds: float = 0.0

    def attack_batch(self, first: int, images: Tensor, labels: Tensor, bar: tqdm) -> list[Step]:
        """Returns the steps of the batch that begins with the image `first`: the clean one, then the plan's."""
        images, labels = images.to(self.subject.device), labels.to(self.subject.device)
        standing, broken = images.clone(), torch.zeros_like(labels, dtype=torch.bool)
        with seeded(self.subject.device, self.subject.seed, "judge", "clean", first):
            clean = self._judged("clean", {"clean": images}, images, labels, first, broken)
        broken[clean.broken] = True
        steps = [clean.without_pixels()]
        for number, (group, attack) in enumerate(self.plan.steps):
            bar.set_postfix_str(f"images {first}–{first + len(images) - 1}, {'+'.join(group)}: {attack}")
            done = bar.n + self.plan.budget(attack).queries()
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
        if self.subject.judges_whole_batches():
            everything = {ASSEMBLED: standing}
            with seeded(self.subject.device, self.subject.seed, "judge", ASSEMBLED, first):
                assembled = self._judged(ASSEMBLED, everything, images, labels, first, torch.ones_like(broken))
            if self.keeps_candidates and self.folder is not None:
                self.folder.save(first // self.subject.batch_size, len(self.plan.steps), assembled)
            steps.append(assembled.without_pixels())
        return steps

    def save_candidates(self, path: str | os.PathLike, images: Tensor, labels: Tensor,
                        protocol: dict[str, Any]) -> None:
        """Writes images, labels and all candidates, each batch's fetched from the folder when it is due."""
        assert self.folder is not None
        tensors = {name: Parts(tensor, tensor.split(self.subject.batch_size))
                   for name, tensor in (("clean", images), ("labels", labels))}
        batches = range(-(-len(images) // self.subject.batch_size))
        for number, (group, attack) in enumerate(self.plan.steps):
            for name in named(group, attack):
                tensors[name] = Parts(images, map(partial(self.folder.candidates, name, named(group, attack), number),
                                                  batches))
        if self.subject.judges_whole_batches():
            tensors[ASSEMBLED] = Parts(images, map(
                partial(self.folder.candidates, ASSEMBLED, [ASSEMBLED], len(self.plan.steps)), batches))
        save_parts(tensors, path, {"protocol": json.dumps(protocol)})

    def _attacked(self, group: tuple[str, ...], attack: str, images: Tensor, labels: Tensor, first: int,
                  standing: Tensor, broken: Tensor, on_query: Callable[[], None]) -> Step:
        """Returns what one attack on one batch finds through a group of surrogates."""
        model, seed, device = self.subject.attacked, self.subject.seed, self.subject.device
        notes = Notes(f"{attack} on {', '.join(group)}: ")
        surrogates = [model.exact_surrogate() if name == TRUE_MODEL else name for name in group]
        before = time.perf_counter(), model.forward_passes, model.backward_passes
        record = ATTACKS[attack_of(attack)]
        with seeded(device, seed, record.seed_name(attack), group, first), without_autocast(images):
            # `joint` starts at the batch that earlier attacks left, `joint-subset` at random points; both move every
            # image of it.
            together = record.whole_batch
            start = standing if self.plan.protocol.survivors_only or together else None
            active = ~broken if self.plan.protocol.survivors_only and not together else None
            batch = AttackBatch(model, surrogates, images, labels, start=start, active=active, victims=~broken,
                                on_query=on_query)
            found = batch.points
            if len(batch.active):
                found = record.run(batch, self.threat, self.plan.budget(attack), notes)
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
            "seconds": seconds, "forward_passes": model.forward_passes - before[1],
            "backward_passes": model.backward_passes - before[2]})

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
            if self._judges_fc() and (name == "clean" or (
                    name.startswith("fc/") and attack in PROTOCOLS["autoattack"].attacks)):
                with head_mode(self.subject.model, "fc"):
                    baseline[name] = as_row(judge(model, found, labels, batch_size, first_image=first,
                                                  allow_non_finite=True))
        kept = {name: found.cpu() for name, found in candidates.items() if self.keeps_candidates and name != "clean"}
        noted = [(*flag, *numbers) for flag, numbers in notes.counts.items()]
        return Step(attack, correct, baseline, no_cost(), noted, first_examples(examples),
                    newly.nonzero().squeeze(1).cpu(), points[newly].cpu(), kept, not_finite,
                    answers.tolist() if attack == "clean" else [])

    def _judges_fc(self) -> bool:
        """Returns whether the FC classifier is judged on the candidates of AutoAttack on that classifier."""
        return (self.subject.attacked.head is not None and "fc" in self.plan.surrogates
                and not self.plan.protocol.survivors_only)

    @torch.no_grad()
    def _note_spread(self, name: str, found: Tensor, lost: Tensor, notes: Notes) -> None:
        """Notes how many of the `lost` (B,) of the candidates `found` (B, ...) another image of the batch made so."""
        alone = own_logits(self.subject.pixel_model, found, torch.where(lost, torch.nan, 0.0).unsqueeze(1))
        spread = lost & alone.isfinite().all(dim=1)
        notes.count("batch-not-finite", f"{name}: of {{1}} candidates with logits that are not finite, {{0}} have them "
                    "only because of another image in their batch", int(spread.sum()), int(lost.sum()))


def first_examples(examples: Iterable[Example]) -> list[Example]:
    """Returns the examples of the first few images."""
    return sorted(examples, key=lambda example: example.image)[:NUM_EXAMPLES]


def _advance(bar: tqdm, most: int) -> None:
    bar.update(bar.n < most)
