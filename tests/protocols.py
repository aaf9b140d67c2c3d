"""Evaluations by a custom protocol in one call; and the protocol of reports that are made by hand and saved."""

import os
from pathlib import Path
from typing import Any

from timm_hpm import AttackReport, ThreatModel, mixed_surrogate_attack
from timm_hpm.evaluation.protocols import find_protocol
from timm_hpm.evaluation.sweep import sweep

PROTOCOL = {
    "architecture": "hpm_wrn10_2", "weights_digest": "0" * 16, "data_digest": "0123456789abcdef",
    "threat": "Linf:8/255", "num_images": 10, "num_classes": 10, "batch_size": 10, "inference": "batch", "mix": 0.5,
    "prototypes_fitted": True, "seed": 0, "device": "cpu", "versions": {"torch": "2.14.1"}, "surrogates": ["fc", "ste"],
    "attacks": {"apgd-ce": {"iterations": 100}, "apgd-t": {"iterations": 100, "targets": 9},
                "fab-t": {"iterations": 100, "targets": 9}, "square": {"iterations": 5000}},
}

#: Options of an evaluation of seconds.
QUICK = ["-b", "4", "--device", "cpu", "--surrogates", "fc", "--attacks", "apgd-ce", "--budget", "apgd-ce=2"]

#: A small budget for every attack of the protocol "standard" in batch mode.
SMALL = {"apgd-ce": 5, "apgd-t": "5x2", "fab-t": "3x2", "square": 20, "apgd-chain": 3, "joint": 3,
         "joint-subset": "3r2"}


def run_attack(model, images, labels, threat, *, protocol="standard", surrogates=None, attacks=None, budgets=None,
               full_grid=None, surrogates_at_once=None, **options: Any) -> AttackReport:
    """Runs a protocol with other surrogates, attacks or budgets; with `neighbours` their rows are in the report."""
    changed = find_protocol(protocol).changed(surrogates, attacks, budgets, full_grid, surrogates_at_once)
    if "neighbours" in options:
        threat = ThreatModel.of(threat)
        report, = sweep(model, images, labels, threat.norm, [threat.eps], protocol=changed, **options)
        return report
    return mixed_surrogate_attack(model, images, labels, threat, protocol=changed, **options)


def unfinished(model, *arguments: Any, folder: Path, **options: Any) -> AttackReport:
    """Runs `run_attack`, and leaves its folder as if the process had been killed before it wrote the report."""
    progress, kept = folder / "progress", folder / "kept"

    def keep(module, inputs, outputs) -> None:
        for path in progress.glob("[!.]*") if module is model else ():
            kept.mkdir(exist_ok=True)
            if not (kept / path.name).exists():
                os.link(path, kept / path.name)

    # The model is called once more when all steps are kept. The attacked copy has this hook, too.
    with model.register_forward_hook(keep):
        report = run_attack(model, *arguments, folder=folder, **options)
    (folder / "report.json").unlink()
    kept.rename(progress)
    return report
