"""`Protocol`: which attacks an evaluation runs, through which surrogates, at which budgets."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from numbers import Integral
from typing import Any, Final

from ..data import checked_integer
from ..surrogates import PLAIN, SURROGATES, check_names
from .budget import Budget
from .table import ATTACKS


def as_budget(attack: str, value: Budget | int | str) -> Budget:
    """Returns a budget, given as such, as a number of iterations, or as a text such as `"100x9"` (`Budget.parse`).

    Raises:
        ValueError: if it is none of these; the message names the attack.
    """
    if isinstance(value, Budget):
        return value
    if isinstance(value, str):
        return Budget.parse(value, "rounds" if attack in ATTACKS and ATTACKS[attack].budget.rounds else "targets")
    if isinstance(value, Integral) and not isinstance(value, bool):
        return Budget(int(value))
    raise ValueError(f"the budget of {attack} is {value!r:.100}; expected iterations such as 100, or "
                     "timm_hpm.Budget(100, targets=9)")


@dataclass(frozen=True)
class Protocol:
    """What a Mixed Surrogate Attack runs.

    Arguments:
        name: stands in the report.
        attacks: names of `ATTACKS`, with the budget of each: what `as_budget` reads; those that do not apply to a model
            are left out.
        surrogates: names of `SURROGATES`; None means all that differ in the head's inference mode.
        survivors_only: a broken image is attacked no more. The worst case is the same, but the rows of single attacks
            are not: in later rows the image stays at the candidate that broke it.
        surrogates_at_once: surrogates attacked side by side in one pass: more memory, less overhead for small nets. The
            candidates change with it, the protocol's name and digest do not.
    """

    name: str
    attacks: Mapping[str, Budget]
    surrogates: tuple[str, ...] | None = None
    survivors_only: bool = False
    surrogates_at_once: int = field(default=1, compare=False)

    def __post_init__(self) -> None:
        checked_integer("surrogates_at_once", self.surrogates_at_once, 1)
        if not isinstance(self.survivors_only, bool):
            raise ValueError(f"survivors_only is {self.survivors_only!r:.100}; expected True or False")
        object.__setattr__(self, "attacks", {name: as_budget(name, value) for name, value in self.attacks.items()})

    def digest(self) -> str:
        """Returns 16 hexadecimal digits that tell the protocol, its name and budgets, from any other."""
        return hashlib.sha256(json.dumps(self.summary()).encode()).hexdigest()[:16]

    def summary(self) -> dict[str, Any]:
        """Returns all of it in JSON's types, as a report's protocol shows it."""
        attacks = {name: {key: value for key, value in asdict(budget).items()
                          if value}
                   for name, budget in self.attacks.items()}
        return {
            "protocol": self.name,
            "surrogates": None if self.surrogates is None else list(self.surrogates),
            "attacks": attacks,
            "survivors_only": self.survivors_only,
        }

    def changed(
            self,
            surrogates: Sequence[str] | None = None,
            attacks: Sequence[str] | None = None,
            budgets: Mapping[str, Budget | int | str] | None = None,
            survivors_only: bool = False,
            surrogates_at_once: int | None = None,
    ) -> "Protocol":
        """Returns the protocol with other surrogates, attacks or budgets, or for survivors only.

        It is named `"custom"` if one of these changes it. An attack without a budget gets the standard one.

        Raises:
            ValueError: unknown attacks, a budget without targets for an attack that needs them, or with rounds for
                one that has none.
        """
        if not isinstance(budgets, Mapping | None):
            raise ValueError(f"budgets is {budgets!r:.100}; expected a budget by attack, such as {{'apgd-ce': 100}}")
        given = {name: as_budget(name, value) for name, value in (budgets or {}).items()}
        standard = {name: attack.budget for name, attack in ATTACKS.items()}
        budget_of = {**standard, **self.attacks, **given}
        check_names("attack", list(budget_of), tuple(ATTACKS))
        for attack, budget in budget_of.items():
            usual = self.attacks.get(attack, standard[attack])
            if usual.targets and not budget.targets:
                raise ValueError(f"the budget of {attack} has no targets, and would leave the clean images as they "
                                 f"are; expected such as Budget({budget.iterations}, targets={usual.targets})")
            if budget.rounds and not usual.rounds:
                raise ValueError(f"the budget of {attack} has {budget.rounds} rounds; only "
                                 f"{', '.join(name for name in standard if standard[name].rounds)} is run in rounds")
            budget_of[attack] = replace(budget, rounds=budget.rounds or usual.rounds)
        names = tuple(self.attacks) if attacks is None else check_names("attack", attacks, tuple(ATTACKS))
        other = replace(self, attacks={name: budget_of[name] for name in names},
                        surrogates=self.surrogates if surrogates is None else check_names(
                            "surrogate", surrogates, (*SURROGATES, PLAIN)),
                        survivors_only=self.survivors_only or survivors_only,
                        surrogates_at_once=self.surrogates_at_once if surrogates_at_once is None
                        else surrogates_at_once)
        return other if other == self else replace(other, name="custom")


_AUTOATTACK: Final = ("apgd-ce", "apgd-t", "fab-t", "square")

#: `standard`: each attack at its standard budget through every surrogate, black-box attacks on the true model as well.
#: `fast`: the same without FAB, with fewer targets and fewer queries of Square. `autoattack`: AutoAttack's standard
#: version alone.
PROTOCOLS: Final = {
    protocol.name: protocol
    for protocol in (
        Protocol("standard", {name: attack.budget for name, attack in ATTACKS.items()}),
        Protocol("fast", {"apgd-ce": Budget(100), "apgd-t": Budget(100, targets=3), "square": Budget(1_000),
                          "apgd-chain": Budget(50), "joint": Budget(100), "joint-subset": Budget(25, rounds=30)}),
        Protocol("autoattack", {name: ATTACKS[name].budget for name in _AUTOATTACK}),
    )
}


def find_protocol(name: str | Protocol) -> Protocol:
    """Returns the protocol of that name, or the one that is given, or raises a ValueError that lists the names."""
    if isinstance(name, Protocol):
        return name
    return PROTOCOLS[check_names("protocol", [name], tuple(PROTOCOLS))[0]]
