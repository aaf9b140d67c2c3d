"""The model_info file by which RobustBench lists a model."""

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..files import write_text
from ..report import TRUE_MODEL, AttackReport
from ..report.metrics import worst_accuracy
from ..surrogates import exact_surrogate
from .protocols import PROTOCOLS


def model_info(report: AttackReport, known: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Returns RobustBench's model_info of an evaluated model; unknown fields are empty (`""` or None).

    `autoattack_acc` is the accuracy under AutoAttack's four components at their standard budgets on the model itself,
    empty if the report has other attacks. `external` is the report's worst case if it has more surrogates or seeds than
    that. The `known` fields are the authors', such as `name`, `link` and `venue`.
    """
    protocol = report.protocol
    # Attacks on the surrogate that computes the true model's logits are AutoAttack on the model.
    own = exact_surrogate(protocol["inference"], protocol["prototypes_fitted"] is not False)
    measured = {
        "link": "", "name": "", "authors": "", "additional_data": None,
        "number_forward_passes": protocol.get("eot", 1),
        "dataset": protocol.get("dataset", "").removeprefix("torch/"), "venue": "",
        "architecture": protocol["architecture"],
        "eps": protocol["threat"].partition(":")[2],
        "clean_acc": _percent(report.clean_accuracy), "reported": "",
        "autoattack_acc": _percent(_accuracy_under(report, own)) if _is_standard(protocol, own) else "",
    }
    if protocol["surrogates"] != [own] or "seeds" in protocol or not measured["autoattack_acc"]:
        measured["external"] = _percent(report.robust_accuracy)
    if report.unreliable:
        measured["unreliable"] = True
    mode = "" if protocol["inference"] == "none" else (
        f", inference mode {protocol['inference']}, batches of {protocol['batch_size']}")
    return measured | {"footnote": f"Measured by timm_hpm on {report.num_images} images{mode}."} | dict(known or {})


def save_model_info(report: AttackReport, path: str | os.PathLike, known: Mapping[str, Any] | None = None) -> None:
    """Writes `model_info` as JSON, whole or not at all."""
    write_text(path, json.dumps(model_info(report, known), indent=2, ensure_ascii=False) + "\n")


def _is_standard(protocol: Mapping[str, Any], own: str) -> bool:
    named = PROTOCOLS["autoattack"]
    standard = replace(named, attacks={attack: budget.for_classes(protocol["num_classes"])
                                       for attack, budget in named.attacks.items()}).summary()["attacks"]
    # In the rows of a cascade other attacks and surrogates count, too.
    alone = protocol["surrogates"] == [own] and protocol["attacks"].keys() == standard.keys()
    return (own in protocol["surrogates"] and (alone or protocol.get("full_grid", True))
            and {attack: protocol["attacks"].get(attack) for attack in named.attacks} == standard)


def _accuracy_under(report: AttackReport, surrogate: str) -> float:
    """Returns the accuracy, point by point, on the clean images and the candidates of AutoAttack's components."""
    # If the surrogate that computes the true model's logits is left out, Square attacks the true model by itself.
    names = ["clean", *(f"{surrogate}/{attack}" for attack in PROTOCOLS["autoattack"].attacks), f"{TRUE_MODEL}/square"]
    return worst_accuracy(report.correct[name] for name in names if name in report.correct)


def _percent(value: float) -> str:
    return f"{100 * value:.2f}"
