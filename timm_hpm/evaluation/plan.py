"""`Plan`: the attacks that are run on each batch, in order, through which surrogates."""

from dataclasses import dataclass, replace

from ..report import TRUE_MODEL
from ..report.metrics import attack_of
from .attacked import AttackedModel
from .budget import Budget
from .protocols import Protocol
from .table import ATTACKS


@dataclass(frozen=True)
class Plan:
    """The steps of one batch.

    Arguments:
        protocol: the protocol with the surrogates, attacks and budgets that this model gets.
        steps: surrogates that are attacked side by side, and the row of an attack such as `"joint-subset#1"`.
    """

    protocol: Protocol
    steps: list[tuple[tuple[str, ...], str]]

    @property
    def surrogates(self) -> tuple[str, ...]:
        """The surrogates of the protocol."""
        return self.protocol.surrogates or ()

    def budget(self, row: str) -> Budget:
        """Returns the budget of a row's attack."""
        return self.protocol.attacks[attack_of(row)]

    def queries(self) -> int:
        """Returns about how many queries a batch takes, for a progress bar."""
        return sum(self.budget(row).queries() for _, row in self.steps)


def make_plan(protocol: Protocol, model: AttackedModel, num_classes: int, has_gradients: bool) -> Plan:
    """Returns the plan of a protocol for a model.

    Raises:
        ValueError: if the model has none of the surrogates, or none of the attacks applies to it.
    """
    names = protocol.surrogates
    surrogates = model.default_surrogates() if names is None else model.check_surrogates(names)
    attacks = _applicable(tuple(protocol.attacks), model, surrogates)
    if not has_gradients:
        attacks = _without_gradients(attacks)
    budgets = {attack: protocol.attacks[attack].for_classes(num_classes) for attack in attacks}
    fitted = replace(protocol, surrogates=surrogates, attacks=budgets)
    return Plan(fitted, _by_image(fitted, model) + _together(fitted, model))


def named(group: tuple[str, ...], attack: str) -> list[str]:
    """Returns the names of an attack's candidates through a group of surrogates, such as `"fc/apgd-ce"`."""
    return [f"{surrogate}/{attack}" for surrogate in group]


def _grouped(names: tuple[str, ...], size: int) -> list[tuple[str, ...]]:
    return [names[i:i + size] for i in range(0, len(names), size)]


def _by_image(protocol: Protocol, model: AttackedModel) -> list[tuple[tuple[str, ...], str]]:
    """Returns the steps of the attacks on each image and surrogate by itself."""
    groups = _grouped(protocol.surrogates or (), protocol.surrogates_at_once)
    attacks = [attack for attack in protocol.attacks if ATTACKS[attack].by_image]
    if protocol.survivors_only:
        # Black-box attacks last: the images that they break stay there in the rows of later attacks.
        attacks.sort(key=lambda attack: not ATTACKS[attack].needs_gradient)
        steps = [(group, attack) for attack in attacks for group in groups]
    else:
        steps = [(group, attack) for group in groups for attack in attacks]
    if model.exact_surrogate() not in (protocol.surrogates or ()):
        steps += [((TRUE_MODEL,), attack) for attack in attacks if not ATTACKS[attack].needs_gradient]
    return steps


def _together(protocol: Protocol, model: AttackedModel) -> list[tuple[tuple[str, ...], str]]:
    """Returns the steps of the attacks on whole batches and on chains of surrogates, which come last."""
    steps = []
    for attack in map(ATTACKS.__getitem__, protocol.attacks):
        if not attack.by_image:
            names = attack.surrogates(model, protocol.surrogates or ())
            groups = [names] if attack.chained else _grouped(names, protocol.surrogates_at_once)
            steps += [(group, row) for row in attack.rows(protocol.attacks[attack.name].rounds) for group in groups]
    return steps


def _applicable(attacks: tuple[str, ...], model: AttackedModel, surrogates: tuple[str, ...]) -> tuple[str, ...]:
    """Returns those of the attacks that this model has surrogates for."""
    usable = tuple(attack for attack in attacks if ATTACKS[attack].surrogates(model, surrogates))
    if not usable:
        raise ValueError(f"{', '.join(attacks)} attacks what an HPM head has in batch mode through several surrogates, "
                         f"and there are {', '.join(surrogates)}; choose others of "
                         + ", ".join(attack.name for attack in ATTACKS.values() if attack.by_image))
    return usable


def _without_gradients(attacks: tuple[str, ...]) -> tuple[str, ...]:
    """Returns those of the attacks that need no gradient."""
    usable = tuple(attack for attack in attacks if not ATTACKS[attack].needs_gradient)
    if not usable:
        raise ValueError(f"the model's logits have no gradient with respect to the pixels, which {', '.join(attacks)} "
                         "need; look for a detach() or torch.no_grad() in it, or attack by "
                         + ", ".join(attack.name for attack in ATTACKS.values() if not attack.needs_gradient))
    return usable
