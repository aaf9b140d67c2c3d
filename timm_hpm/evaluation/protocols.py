"""`Protocol`: the attacks of an evaluation, their surrogates and budgets."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from numbers import Integral
from typing import Any, Final

from ..data import checked_integer
from ..report.shell import NAMED_PROTOCOLS
from ..surrogates import PLAIN, SURROGATES, check_names
from .batch import Budget
from .table import ATTACKS

# Entries of a budget that a summary leaves out.
_DEFAULTS: Final = {("targets", 0), ("restarts", 1)}


def as_budget(attack: str, value: Budget | int | str) -> Budget:
    """Returns a budget, given as such, as a number of iterations, or as a text such as `"100x9r2"` (`Budget.parse`)."""
    if isinstance(value, Budget):
        return value
    if isinstance(value, str):
        return Budget.parse(value)
    if isinstance(value, Integral) and not isinstance(value, bool):
        return Budget(int(value))
    raise ValueError(f"the budget of {attack} is {value!r:.100}; expected iterations such as 100, or "
                     "timm_hpm.Budget(100, targets=9)")


@dataclass(frozen=True)
class Protocol:
    """The attacks, surrogates and budgets of a Mixed Surrogate Attack.

    Raises:
        ValueError: if a value is malformed; the message names the attack.
    """

    name: str  # stands in the report
    # Budgets by names of `ATTACKS`, as `as_budget` reads them; those that do not apply to a model are left out.
    attacks: Mapping[str, Budget]
    surrogates: tuple[str, ...] | None = None  # of `SURROGATES`; None means all that differ in the head's mode
    # Whether to attack every image through every surrogate by every attack, also after it is broken. That is always so
    # if the predictions depend on the batch. Otherwise a broken image is attacked no more, the cheapest attack comes
    # first, and an image stays in later rows at the candidate that broke it.
    full_grid: bool = False
    # Surrogates attacked side by side in one pass: more memory, less overhead for small nets. The candidates change
    # with it, the protocol's name and digest do not.
    surrogates_at_once: int = field(default=1, compare=False)
    # The attacks, in place of `attacks`, on a classifier whose own logits are differentiable: one without an HPM head,
    # or in the mode `dataset` or `fc`. None means the same.
    plain: Mapping[str, Budget] | None = None

    def __post_init__(self) -> None:
        checked_integer("surrogates_at_once", self.surrogates_at_once, 1)
        if not isinstance(self.full_grid, bool):
            raise ValueError(f"full_grid is {self.full_grid!r:.100}; expected True or False")
        for field_name in ("attacks", "plain"):
            if (attacks := getattr(self, field_name)) is not None:
                object.__setattr__(self, field_name, {name: as_budget(name, value) for name, value in attacks.items()})

    def for_classifier(self, plain: bool) -> "Protocol":
        """Returns the protocol with the attacks of a classifier of one kind only; see `plain`."""
        return replace(self, attacks=self.attacks if self.plain is None or not plain else self.plain, plain=None)

    def digest(self) -> str:
        """Returns 16 hexadecimal digits that tell the protocol, its name and budgets, from any other."""
        return hashlib.sha256(json.dumps(self.summary()).encode()).hexdigest()[:16]

    def summary(self) -> dict[str, Any]:
        """Returns all of it in JSON's types, as a report's protocol shows it."""
        summary: dict[str, Any] = {
            "protocol": self.name,
            "surrogates": None if self.surrogates is None else list(self.surrogates),
            "attacks": _summary(self.attacks),
            "full_grid": self.full_grid,
        }
        return summary if self.plain is None else summary | {"plain": _summary(self.plain)}

    def changed(
            self,
            surrogates: Sequence[str] | None = None,
            attacks: Sequence[str] | None = None,
            budgets: Mapping[str, Budget | int | str] | None = None,
            full_grid: bool | None = None,
            surrogates_at_once: int | None = None,
    ) -> "Protocol":
        """Returns the protocol with other surrogates, attacks or budgets, named `"custom"` if one of these changes it.

        An attack without a budget gets the standard one. Attacks or budgets that are given hold for every classifier.

        Raises:
            ValueError: if an attack is unknown, or its budget lacks targets.
        """
        if not isinstance(budgets, Mapping | None):
            raise ValueError(f"budgets is {budgets!r:.100}; expected a budget by attack, such as {{'apgd-ce': 100}}")
        given = {name: as_budget(name, value) for name, value in (budgets or {}).items()}
        standard = {name: attack.budget for name, attack in ATTACKS.items()}
        budget_of = {**standard, **self.attacks, **given}
        check_names("attack", list(budget_of), tuple(ATTACKS))
        for attack, budget in budget_of.items():
            if standard[attack].targets and not budget.targets:
                raise ValueError(f"the budget of {attack} has no targets, and would leave the clean images as they "
                                 f"are; expected such as {attack}={budget.iterations}x{standard[attack].targets}, or "
                                 f"in Python Budget({budget.iterations}, targets={standard[attack].targets})")
            if budget.targets and not standard[attack].targets:
                raise ValueError(f"the budget of {attack} has {budget.targets} targets; only "
                                 f"{', '.join(name for name in standard if standard[name].targets)} are targeted. "
                                 "Restarts are written 100r2")
        names = tuple(self.attacks) if attacks is None else check_names("attack", attacks, tuple(ATTACKS))
        if surrogates is not None:
            surrogates = check_names("surrogate", surrogates, (*SURROGATES, PLAIN))
        other = replace(
            self, attacks={name: budget_of[name] for name in names},
            surrogates=self.surrogates if surrogates is None else surrogates,
            plain=None if attacks is not None or given else self.plain,
            full_grid=self.full_grid if full_grid is None else full_grid,
            surrogates_at_once=self.surrogates_at_once if surrogates_at_once is None else surrogates_at_once)
        return other if other == self else replace(other, name="custom")


def _summary(attacks: Mapping[str, Budget]) -> dict[str, dict[str, int]]:
    return {name: {key: value for key, value in asdict(budget).items() if (key, value) not in _DEFAULTS}
            for name, budget in attacks.items()}


_AUTOATTACK: Final = ("apgd-ce", "apgd-t", "fab-t", "square")
_STANDARD: Final = {name: ATTACKS[name].budget
                    for name in (*_AUTOATTACK, "apgd-chain", "joint", "joint-subset")}
_FAST: Final = {"apgd-ce": Budget(100), "apgd-t": Budget(100, targets=3), "square": Budget(1_000),
                "apgd-chain": Budget(50), "joint": Budget(100), "joint-subset": Budget(25, restarts=30)}
_STANDARD_PLAIN: Final = {"apgd-ce": Budget(20), "search": Budget(600), "apgd-t": Budget(50, targets=2),
                          "square": Budget(1_000), "square-on": Budget(5_000)}

#: `standard`: each attack at its standard budget through every surrogate, black-box attacks on the true model as well.
#: `fast`: the same without FAB, with fewer targets and fewer queries of Square. A classifier whose own logits are
#: differentiable is attacked by a margin search instead; `thorough` repeats it until that breaks no more. `autoattack`:
#: AutoAttack's standard version alone.
PROTOCOLS: Final = {
    protocol.name: protocol
    for protocol in (
        Protocol("standard", _STANDARD, plain=_STANDARD_PLAIN),
        Protocol("fast", _FAST, plain={"apgd-ce": Budget(10), "search": Budget(250), "square": Budget(100)}),
        Protocol("thorough", _STANDARD | {"search": Budget(1_000)},
                 plain=_STANDARD_PLAIN | {"search-on": Budget(10_000)}),
        Protocol("autoattack", {name: ATTACKS[name].budget for name in _AUTOATTACK}),
    )
}
NAMED_PROTOCOLS.update({name: {protocol.for_classifier(plain).digest() for plain in (False, True)}
                        for name, protocol in PROTOCOLS.items()})


def find_protocol(name: str | Protocol) -> Protocol:
    """Returns the protocol of that name, or the one that is given, or raises a ValueError that lists the names."""
    return name if isinstance(name, Protocol) else PROTOCOLS[check_names("protocol", [name], tuple(PROTOCOLS))[0]]
