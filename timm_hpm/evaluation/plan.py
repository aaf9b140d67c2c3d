"""`Plan`: the attacks that are run on each batch, in order, through which surrogates."""

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

from ..report import TRUE_MODEL
from ..report.metrics import attack_of
from .attacked import AttackedModel
from .budget import Budget
from .protocols import Protocol
from .table import ATTACKS, Attack

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
        """The surrogates of the protocol."""
        return self.protocol.surrogates or ()

    def budget(self, row: str) -> Budget:
        """Returns the budget of a row's attack."""
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
    fitted = replace(protocol, surrogates=surrogates, attacks=budgets, full_grid=not cascade)
    return Plan(fitted, cascade, _cascade(fitted, model) if cascade else _full_grid(fitted, model))


def named(group: tuple[str, ...], attack: str) -> list[str]:
    """Returns the names of an attack's candidates through a group of surrogates, such as `"fc/apgd-ce"`."""
    return [f"{surrogate}/{attack}" for surrogate in group]


def _full_grid(protocol: Protocol, model: AttackedModel) -> list[Stage]:
    """Returns the steps, a group of surrogates after another, then the attacks on batches and chains."""
    attacks = [ATTACKS[name] for name in protocol.attacks]
    by_image = [attack for attack in attacks if attack.by_image]
    steps = [(group, row) for group in _grouped(protocol.surrogates or (), protocol.surrogates_at_once)
             for attack in by_image for row in _rows(attack, protocol)]
    steps += _true_model(by_image, protocol, model)
    return steps + [step for attack in attacks if not attack.by_image for step in _steps(attack, protocol, model)]


def _cascade(protocol: Protocol, model: AttackedModel) -> list[Stage]:
    """Returns the steps, the cheapest attack first, and attacks without gradients last: they check the others."""
    attacks = sorted((ATTACKS[name] for name in protocol.attacks),
                     key=lambda attack: (not attack.needs_gradient, protocol.attacks[attack.name].queries()))
    steps = [step for attack in attacks for step in _steps(attack, protocol, model)]
    return steps + _true_model(attacks, protocol, model)


def _steps(attack: Attack, protocol: Protocol, model: AttackedModel) -> list[Stage]:
    names = attack.surrogates(model, protocol.surrogates or ())
    groups = [names] if attack.chained else _grouped(names, protocol.surrogates_at_once)
    return [(group, row) for row in _rows(attack, protocol) for group in groups]


def _true_model(attacks: Iterable[Attack], protocol: Protocol, model: AttackedModel) -> list[Stage]:
    """Returns the steps on the true model itself, unless a surrogate computes its logits."""
    return [] if model.exact_surrogate() in (protocol.surrogates or ()) else [
        ((TRUE_MODEL,), row) for attack in attacks if not attack.needs_gradient for row in _rows(attack, protocol)]


def _rows(attack: Attack, protocol: Protocol) -> list[str]:
    return attack.rows(protocol.attacks[attack.name].restarts)


def _grouped(names: tuple[str, ...], size: int) -> list[tuple[str, ...]]:
    return [names[i:i + size] for i in range(0, len(names), size)]
