"""How far the robust accuracy of a report has converged: its fall with the passes that the attacks spent."""

from typing import NamedTuple

from .metrics import attack_of, worst_accuracy
from .schema import AttackReport


class Fall(NamedTuple):
    """The robust accuracy after an attack.

    Arguments:
        passes: forward and backward passes so far, for each image.
        robust: the accuracy in the worst case so far, a fraction in [0, 1].
        attack: the attack's name.
    """

    passes: float
    robust: float
    attack: str


def falls(report: AttackReport) -> list[Fall]:
    """Returns the robust accuracy after each attack, in the order of their first start; [] without their costs."""
    by_attack: dict[str, list[str]] = {}
    for name, row in report.correct.items():
        by_attack.setdefault(attack_of(name), []).append(row)
    seen, passes = by_attack.pop("clean"), 0.0
    if not by_attack.keys() <= report.cost.keys():
        return []
    found = []
    for attack, cost in report.cost.items():
        passes += (cost["forward_passes"] + cost["backward_passes"]) / report.num_images
        if attack in by_attack and passes > 0:
            seen = [*seen, *by_attack[attack]]
            found.append(Fall(passes, worst_accuracy(seen), attack))
    return found
