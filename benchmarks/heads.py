#!/usr/bin/env python3
"""FC, ℓ2 and HPM heads fine-tuned alike from one base, attacked alike: training, evaluation and the table of all.

    python benchmarks/heads.py run --output output/heads [--bases digits ...] [--modes fc ...] [--seeds 0 1 2]
    python benchmarks/heads.py table > docs/results.md

`run` trains each base of heads.yaml if it has one to train, fine-tunes it through each inference mode and each seed
with the same images, order, noise and steps, and evaluates each result in the mode it was trained through; the FC
classifier's network also with the other heads, fitted but not trained. A command that was stopped goes on. The reports
go to benchmarks/reports/heads, from which `table` makes docs/results.md.
"""

import argparse
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import yaml
from scipy.stats import ttest_1samp
from torch.utils.data import DataLoader

from timm_hpm import INFERENCE_MODES, AttackReport, compare, fit_prototypes, load_split
from timm_hpm.files import new_folder, write_text
from timm_hpm.models.create import create_model
from timm_hpm.models.saving import write_model
from timm_hpm.report.metrics import worst_accuracy

ROOT = Path(__file__).parents[1]
CONFIGS = Path(__file__).with_suffix(".yaml")
REPORTS = Path(__file__).parent / "reports" / "heads"
NAMES = {"fc": "FC", "dataset": "ℓ2 (dataset)", "sample": "HPM, sample", "batch": "HPM, batch"}


def command(script: str, options: dict[str, Any], folder: Path) -> None:
    """Runs a script with options in a folder, or resumes it there."""
    config = folder.with_suffix(".yaml")
    folder.parent.mkdir(parents=True, exist_ok=True)
    write_text(config, yaml.safe_dump(options))
    begun = any((folder / name).exists() for name in ("args.yaml", "options.json"))
    where = ["--resume", str(folder)] if begun else ["-c", str(config), "--output", str(folder)]
    subprocess.run([sys.executable, str(ROOT / script), *where], check=True)


def train(options: dict[str, Any], folder: Path) -> Path:
    """Trains in a folder if that is not done; returns the weights."""
    finished = folder / "finished"
    if not finished.exists():
        command("train.py", options, folder)
        finished.touch()
    return folder / "model.safetensors"


def fitted(base: dict[str, Any], weights: Path) -> Path:
    """Returns the weights with prototypes fitted on clean and adversarial training images, but not trained for."""
    folder = weights.parent.with_name(f"{weights.parent.name}-fitted")
    if not folder.exists():
        options = base["train"]
        model = create_model(options["model"], pretrained=False, checkpoint=str(weights),
                             **options.get("model_kwargs", {})).eval()
        images = DataLoader(load_split(options["dataset"], "train"), batch_size=128)
        fit_prototypes(model, images, options["threat"])
        with new_folder(folder) as place:
            write_model(model, place)
    return folder / "model.safetensors"


def evaluate(base: dict[str, Any], weights: Path, mode: str, folder: Path, report: Path) -> None:
    """Evaluates weights in a mode if that is not done."""
    if report.exists():
        return
    given = base["train"]
    command("evaluate.py", {
        "model": given["model"], "checkpoint": str(weights), "model_kwargs": given.get("model_kwargs", {}),
        "threat": given["threat"], "inference": [mode], "split": "test", "protocol": "fast", **base["evaluate"],
    }, folder)
    report.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / "report.json", report)


def run(args: argparse.Namespace) -> None:
    """Trains and evaluates all that is asked for."""
    configs = yaml.safe_load(CONFIGS.read_text(encoding="utf-8"))
    for seed in args.seeds:
        for name in args.bases or configs:
            base, folder = configs[name], args.output / name
            first = {} if "base" not in base else {
                "initial_checkpoint": str(train({**base["base"], "seed": seed}, folder / f"base-{seed}"))}
            for mode in args.modes:
                kwargs = {**base["train"].get("model_kwargs", {}), "inference": mode}
                options = {**base["train"], **first, "model_kwargs": kwargs, "seed": seed}
                weights = train(options, folder / f"{mode}-{seed}")
                if args.train_only:
                    continue
                for judged in INFERENCE_MODES if mode == "fc" else (mode,):
                    label = f"{name}-{mode}-{judged}-{seed}"
                    judged_weights = weights if judged == mode else fitted(base, weights)
                    evaluate(base, judged_weights, judged, folder / label, REPORTS / f"{label}.json")


def claimed(report: AttackReport) -> float:
    """Returns the accuracy that attacks on the FC classifier alone would claim."""
    rows = [row for key, row in report.correct.items() if key == "clean" or key.startswith("fc/")]
    return worst_accuracy(rows)


def spread(values: Sequence[float]) -> str:
    """Returns mean ± standard error in points."""
    error = f" ± {100 * stdev(values) / len(values) ** 0.5:.1f}" if len(values) > 1 else ""
    return f"{100 * mean(values):.1f}{error}"


def row(reports: dict[int, AttackReport], fc: dict[int, AttackReport]) -> list[str]:
    """Returns the cells of one head: its accuracies over the seeds, and its difference from FC of the same seeds."""
    cells = [spread([value(report) for report in reports.values()]) for value in (
        lambda report: report.clean_accuracy, lambda report: report.robust_accuracy,
        lambda report: report.realised_robust_accuracy, claimed)]
    pairs = [compare(fc[seed], reports[seed]).rows[1] for seed in sorted(reports.keys() & fc.keys())]
    differences = [pair.difference for pair in pairs]
    if not any(differences):
        return [*cells, "0", "", ""]
    p = f"{ttest_1samp(differences, 0).pvalue:.3f}" if len(set(differences)) > 1 else ""
    return [*cells, spread(differences), ", ".join(f"{pair.p_value:.3f}" for pair in pairs), p]


def table(_: argparse.Namespace) -> None:
    """Prints the table of each base."""
    found: dict[str, dict[tuple[str, str], dict[int, AttackReport]]] = {}
    for file in sorted(REPORTS.glob("*.json")):
        name, mode, judged, seed = file.stem.rsplit("-", 3)
        found.setdefault(name, {}).setdefault((mode, judged), {})[int(seed)] = AttackReport.load(file)
    for name, heads in found.items():
        fc = heads.get(("fc", "fc"), {})
        any_report = next(iter(next(iter(heads.values())).values()))
        print(f"## {name}\n\n{any_report.num_images} test images, {any_report.protocol['threat']}, protocol "
              f"`{any_report.protocol['protocol']}`, batches of {any_report.protocol['batch_size']}, seeds "
              f"{', '.join(str(seed) for seed in sorted(fc))}\n")
        print("| head | clean | worst case | realised | attacks on FC alone claim | worst case less FC's | McNemar's p "
              "by seed | t-test's p |\n|---|---:|---:|---:|---:|---:|---|---:|")
        for mode, judged in sorted(heads, key=lambda key: (key[0] != "fc" or key[1] != "fc", key)):
            title = NAMES[judged] if mode == judged else f"{NAMES[judged]}, not trained"
            print("| " + " | ".join([title, *row(heads[mode, judged], fc)]) + " |")
        print()


def main() -> None:
    """Runs a command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    running = commands.add_parser("run")
    running.set_defaults(run=run)
    running.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    running.add_argument("--bases", nargs="+", metavar="NAME", help="bases of heads.yaml (all)")
    running.add_argument("--modes", nargs="+", choices=INFERENCE_MODES, default=["fc", "dataset", "sample", "batch"])
    running.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N")
    running.add_argument("--train-only", action="store_true", help="no evaluations")
    commands.add_parser("table").set_defaults(run=table)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
