"""`Plan`: the attacks that are run on each batch, in order, through which surrogates."""

import math
from collections.abc import Collection
from dataclasses import dataclass, replace

from ..report import TRUE_MODEL
from ..report.metrics import attack_of
from .attacked import AttackedModel
from .batch import Budget
from .protocols import Protocol
from .table import ATTACKS

#: Surrogates that are attacked side by side, and the row of an attack such as `"joint-subset#1"`.
Stage = tuple[tuple[str, ...], str]


@dataclass(frozen=True)
class Plan:
    """The attacks on one batch, in order."""

    protocol: Protocol  # with the surrogates, attacks and budgets that this model gets
    cascade: bool  # whether a broken image is attacked no more
    steps: list[Stage]

    @property
    def surrogates(self) -> tuple[str, ...]:
        return self.protocol.surrogates or ()

    def budget(self, row: str) -> Budget:
        return self.protocol.attacks[attack_of(row)]

    def queries(self, row: str) -> int:
        """Returns at most about how many queries of a whole batch a row takes."""
        return math.ceil(ATTACKS[attack_of(row)].nearest * self.budget(row).queries())

    def all_queries(self) -> int:
        """Returns the queries of all steps, for a progress bar."""
        return sum(self.queries(row) for _, row in self.steps)


def make_plan(protocol: Protocol, model: AttackedModel, num_classes: int, flags: Collection[str]) -> Plan:
    """Returns the plan of a protocol for a model, by the names of its `flags` so far."""
    protocol = protocol.for_classifier(plain=model.is_plain())
    surrogates = model.surrogates(protocol.surrogates)
    applicable = [ATTACKS[name] for name in protocol.attacks if ATTACKS[name].surrogates(model, surrogates)]
    if not applicable:
        raise ValueError(f"{', '.join(protocol.attacks)} needs an HPM head in batch mode or several surrogates, and "
                         f"there are {', '.join(surrogates)}; choose others of "
                         + ", ".join(attack.name for attack in ATTACKS.values() if attack.by_image))
    usable = [attack for attack in applicable if "no-gradient" not in flags or not attack.needs_gradient]
    if not usable:
        raise ValueError("the model's logits have no gradient with respect to the pixels, which "
                         f"{', '.join(attack.name for attack in applicable)} need; look for a detach() or "
                         "torch.no_grad() in it, or attack by "
                         + ", ".join(attack.name for attack in ATTACKS.values() if not attack.needs_gradient))
    budgets = {attack.name: protocol.attacks[attack.name].for_classes(num_classes) for attack in usable}
    # Broken images can be left out if a prediction depends neither on the batch nor on earlier predictions.
    cascade = not (protocol.full_grid or model.batch_dependent(model.exact_surrogate())
                   or {"batch-dependent", "changes-state"} & set(flags))
    protocol = replace(protocol, surrogates=surrogates, attacks=budgets, full_grid=not cascade)
    return Plan(protocol, cascade, _steps(protocol, model, cascade))


def named(group: tuple[str, ...], attack: str) -> list[str]:
    """Returns the names of an attack's candidates through a group of surrogates, such as `"fc/apgd-ce"`."""
    return [f"{surrogate}/{attack}" for surrogate in group]


def _steps(protocol: Protocol, model: AttackedModel, cascade: bool) -> list[Stage]:
    """Returns the steps in order.

    In a cascade the cheapest attack comes first, and attacks without gradients come last: they check the others. In a
    full grid one group of surrogates comes after another, then the true model, the attacks on batches and the chains.
    """
    surrogates, size = protocol.surrogates or (), protocol.surrogates_at_once
    ranked: list[tuple[tuple[int, ...], Stage]] = []
    for attack in (ATTACKS[name] for name in protocol.attacks):
        names = attack.surrogates(model, surrogates)
        groups = [names] if attack.chained else [names[i:i + size] for i in range(0, len(names), size)]
        if attack.by_image and not attack.needs_gradient and model.exact_surrogate() not in surrogates:
            groups.append((TRUE_MODEL,))
        budget = protocol.attacks[attack.name]
        for row in attack.rows(budget.restarts):
            for number, group in enumerate(groups):
                rank: tuple[int, ...] = (0, number) if attack.by_image else (1,)
                if cascade:
                    rank = (group == (TRUE_MODEL,), not attack.needs_gradient, budget.queries())
                ranked.append((rank, (group, row)))
    return [step for _, step in sorted(ranked, key=lambda step: step[0])]
