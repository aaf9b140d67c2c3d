"""`Protocol`: which attacks an evaluation runs, through which surrogates, at which budgets."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from .components import COMPONENTS, Budget
from .joint import IN_ROUNDS, JOINT_ATTACKS, apgd_chain
from .surrogates import check_names

#: All attacks: AutoAttack's components, and those on what is special about an HPM head.
ATTACKS: Final = {**COMPONENTS, "apgd-chain": apgd_chain, **JOINT_ATTACKS}


@dataclass(frozen=True)
class Protocol:
    """What a Mixed Surrogate Attack runs.

    Arguments:
        name: stands in the report.
        attacks: names of `ATTACKS`, with the budget of each; those that do not apply to a model are left out.
        surrogates: names of `SURROGATES`; None means all that differ in the head's inference mode.
        survivors_only: an image that was broken is attacked no more. The worst case counts the same, but the rows of
            single attacks do not: in those that follow, the image stands at what broke it.
    """

    name: str
    attacks: Mapping[str, Budget]
    surrogates: tuple[str, ...] | None = None
    survivors_only: bool = False

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
            budgets: Mapping[str, Budget] | None = None,
            survivors_only: bool = False,
    ) -> "Protocol":
        """Returns the protocol with other surrogates, attacks or budgets, or for survivors only.

        It is named `"custom"` if that changes it.

        An attack that is not the protocol's own has the standard budget.

        Raises:
            ValueError: unknown attacks, a budget without targets for an attack that needs them, or with rounds for
                one that has none.
        """
        budget_of = {**PROTOCOLS["standard"].attacks, **self.attacks, **(budgets or {})}
        check_names("attack", list(budget_of), tuple(ATTACKS))
        for attack, standard in PROTOCOLS["standard"].attacks.items():
            if standard.targets and not budget_of[attack].targets:
                raise ValueError(f"the budget of {attack} has no targets, and would leave the clean images as they "
                                 f"are; expected such as Budget({budget_of[attack].iterations}, "
                                 f"targets={standard.targets})")
        for attack, budget in budget_of.items():
            if attack in IN_ROUNDS:
                usual = self.attacks.get(attack) or PROTOCOLS["standard"].attacks[attack]
                budget_of[attack] = replace(budget, rounds=budget.rounds or usual.rounds)
            elif budget.rounds:
                raise ValueError(f"the budget of {attack} has {budget.rounds} rounds; only {', '.join(IN_ROUNDS)} is "
                                 "run in rounds")
        names = tuple(self.attacks) if attacks is None else check_names("attack", attacks, tuple(ATTACKS))
        other = replace(self, attacks={name: budget_of[name] for name in names},
                        surrogates=self.surrogates if surrogates is None else tuple(surrogates),
                        survivors_only=self.survivors_only or survivors_only)
        return self if other == self else replace(other, name="custom")


#: `standard`: each of AutoAttack's components at its standard budget through every surrogate, Square on the true model,
#: and on an HPM head the attacks on its surrogates in turn and on its batches as a whole. `fast`: the same without
#: FAB, with fewer targets and fewer queries of Square.
PROTOCOLS: Final = {
    protocol.name: protocol
    for protocol in (
        Protocol("standard", {"apgd-ce": Budget(100), "apgd-t": Budget(100, targets=9),
                              "fab-t": Budget(100, targets=9), "square": Budget(5_000),
                              "apgd-chain": Budget(50), "joint": Budget(100), "joint-rest": Budget(25, rounds=30)}),
        Protocol("fast", {"apgd-ce": Budget(100), "apgd-t": Budget(100, targets=3), "square": Budget(1_000),
                          "apgd-chain": Budget(50), "joint": Budget(100), "joint-rest": Budget(25, rounds=30)}),
    )
}


def find_protocol(name: str) -> Protocol:
    """Returns the protocol of that name, or raises a ValueError that lists the names."""
    return PROTOCOLS[check_names("protocol", [name], tuple(PROTOCOLS))[0]]
