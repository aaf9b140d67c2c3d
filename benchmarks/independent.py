#!/usr/bin/env python3
"""Attacks the robust images of a Mixed Surrogate Attack by independent implementations, at larger budgets.

    pip install -e '.[benchmarks]' && pip install --no-deps adv-lib==0.2.8
    python evaluate.py --output output/digits && python benchmarks/independent.py output/digits/report.json

PGD, APGD and FAB are adv-lib's and Square is ART's, not this project's or pyautoattack's. (adv-lib is installed without
its dependencies: visdom cannot be built with today's setuptools. torchattacks needs an old `requests` and installs its
own `robustbench`.) Each attacks the true model in its inference mode, and each surrogate with other logits.

Each run is judged by the true model in the report's whole batches, with each image at its point of largest loss. In
batch mode all images of a batch are attacked, and each whole batch is judged, too, in which the run misclassified an
image for the first time; in the other modes only the robust images are attacked.
"""

import argparse
import json
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import timm_hpm
from timm_hpm.attacks import margin_loss
from timm_hpm.data import first_images
from timm_hpm.evaluation.attacked import AttackedModel
from timm_hpm.evaluation.config import EvaluateConfig
from timm_hpm.evaluation.folder import load_model
from timm_hpm.evaluation.judge import as_row, device_of, judge, pixel_model_for
from timm_hpm.files import writable_folder, write_text
from timm_hpm.models.create import open_split_for
from timm_hpm.report import TRUE_MODEL, data_digest, weights_digest
from timm_hpm.report.metrics import right_in_all

Logits = Callable[[Tensor], Tensor]
NORMS = {"Linf": math.inf, "L2": 2}


def import_attacks() -> tuple[ModuleType, Any, Any]:
    """Returns adv-lib's attacks, ART's Square and ART's black box.

    Raises:
        ModuleNotFoundError: one of the two is not installed; the message says how to.
    """
    try:
        with warnings.catch_warnings():
            # adv-lib compares versions by distutils.
            warnings.simplefilter("ignore")
            from art.attacks.evasion import SquareAttack
            from art.estimators.classification import BlackBoxClassifierNeuralNetwork

            # For plots, which are not drawn here.
            sys.modules.setdefault("visdom", ModuleType("visdom"))
            from adv_lib import attacks
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error}; the independent attackers need: pip install -e '.[benchmarks]' && "
                                  "pip install --no-deps adv-lib==0.2.8") from error
    return attacks, SquareAttack, BlackBoxClassifierNeuralNetwork


@dataclass(frozen=True)
class Budgets:
    """Limits of the attackers for an image. A restart is a run, judged by itself; apgd-t and fab-t try all targets.

    Twice the standard protocol's steps and queries, and restarts besides.
    """

    pgd_steps: int = 200
    pgd_restarts: int = 5
    apgd_steps: int = 200
    apgd_restarts: int = 3
    apgd_t_steps: int = 200
    fab_t_steps: int = 200
    square_queries: int = 10_000

    def scaled(self, scale: float) -> "Budgets":
        """Returns the budgets with `scale` times as many steps and queries, and as many restarts."""
        if not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"the budgets' scale is {scale}; expected a finite number above 0")
        return Budgets(**{name: value if "restarts" in name else max(1, round(scale * value))
                          for name, value in asdict(self).items()})


class Watched:
    """The logits of one whole batch, with a record of each image's queried point of largest loss in the ball.

    The libraries return different points: the last successful one, or the clean image if there is none. If predictions
    depend on the batch, an image may be misclassified only among its neighbours of that query: `whole` keeps each batch
    in which an image was misclassified for the first time.

    Arguments:
        logits_fn: pixels (B, channels, H, W) in [0, 1] to logits (B, C).
        clean: (B, channels, H, W), the centres of the balls.
        labels: (B,), class indices.
        keeps_whole: whether to keep whole batches.
    """

    def __init__(self, logits_fn: Logits, clean: Tensor, labels: Tensor, threat: timm_hpm.ThreatModel,
                 keeps_whole: bool = False):
        self.logits_fn, self.clean, self.labels, self.threat = logits_fn, clean, labels, threat
        self.points, self.margins = clean.clone(), torch.full(labels.shape, -math.inf, device=clean.device)
        self.keeps_whole, self.whole = keeps_whole, list[Tensor]()
        self.wrong = torch.zeros_like(labels, dtype=torch.bool)

    def __call__(self, pixels: Tensor) -> Tensor:
        logits = self.logits_fn(pixels)
        pixels, margins = pixels.detach(), margin_loss(logits.detach(), self.labels)
        margins = margins.where(logits.isfinite().all(dim=1), math.inf)  # no class: an error
        inside = self.threat.distance(pixels, self.clean) <= self.threat.eps + 1e-6
        if self.keeps_whole and inside.all() and ((margins > 0) & ~self.wrong).any():
            self.wrong |= margins > 0
            self.whole.append(self.threat.project(pixels, self.clean))
        better = inside & (margins > self.margins)
        self.points[better], self.margins[better] = pixels[better], margins[better]
        return logits

    def candidates(self) -> Tensor:
        """Returns the worst points (B, channels, H, W), in the ball to the last digit."""
        return self.threat.project(self.points, self.clean)


def attackers(threat: timm_hpm.ThreatModel, num_classes: int, budgets: Budgets) -> dict[str, list[Callable]]:
    """Returns the runs of each attacker: functions of the `Watched` logits, the clean images and the labels."""
    library, square_attack, black_box = import_attacks()
    norm, eps = NORMS[threat.norm], threat.eps
    apgd = partial(library.apgd, eps=eps, norm=norm)
    # DLR compares four classes.
    losses = ["ce", "dlr"] if num_classes >= 4 else ["ce"]

    def apgd_targeted(logits: Watched, clean: Tensor, labels: Tensor) -> None:
        with torch.no_grad():
            ranked = logits(clean).scatter(1, labels.unsqueeze(1), -math.inf).argsort(dim=1, descending=True)
        for target in ranked[:, :-1].t():
            apgd(logits, clean, target, targeted=True, n_iter=budgets.apgd_t_steps, loss_function=losses[-1])

    def fab(logits: Watched, clean: Tensor, labels: Tensor) -> None:
        found = library.fab(logits, clean, labels, norm, n_iter=budgets.fab_t_steps, targeted_restarts=True)
        with torch.no_grad():
            logits(threat.project(found, clean))

    def square(logits: Watched, clean: Tensor, labels: Tensor) -> None:
        points = best = None

        @torch.no_grad()
        def lead(x: np.ndarray, y: np.ndarray) -> np.ndarray:
            nonlocal points, best
            # Before each proposal it queries the present points again.
            if points is not None and np.array_equal(x, points):
                return best
            loss = -margin_loss(logits(torch.from_numpy(x[..., :-1, :-1]).to(clean)), labels).cpu().numpy()
            if points is None:
                points, best = x.copy(), loss
            better = loss - best < 0
            points, best = np.where(better[:, None, None, None], x, points), np.where(better, loss, best)
            return loss

        # No image leaves its batch, also after it is misclassified: it may fool the true model only later.
        # Its squares never reach the last row and column: it gets images that have one more of each.
        padded = F.pad(clean, [0, 1, 0, 1])
        model = black_box(lambda x: np.zeros((len(x), num_classes)), tuple(padded.shape[1:]), num_classes,
                          clip_values=(0, 1))
        square_attack(model, adv_criterion=lambda answers, y: np.zeros(len(y), dtype=bool), loss=lead,
                      max_iter=budgets.square_queries, eps=eps, batch_size=len(clean),
                      verbose=False).generate(padded.cpu().numpy(), labels.cpu().numpy())

    apgd_run = partial(apgd, n_iter=budgets.apgd_steps)
    runs = {f"apgd-{loss}": [partial(apgd_run, loss_function=loss)] * budgets.apgd_restarts for loss in losses} | {
        "apgd-t": [apgd_targeted], "fab-t": [fab]}
    if threat.norm == "Linf":
        # adv-lib's PGD knows no L2, and ART's Square there divides by zero on small images.
        pgd = partial(library.pgd_linf, ε=eps, steps=budgets.pgd_steps)
        runs = {"pgd": [pgd] * budgets.pgd_restarts} | runs | {"square": [square]}
    return runs


def find_missed(
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        report: timm_hpm.AttackReport,
        budgets: Budgets,
        *,
        seed: int = 0,
        progress: bool = False,
) -> dict[str, dict[str, list[int]]]:
    """Returns for each target and attacker which of the images that `report` calls robust it breaks.

    Arguments:
        model: the report's model, in eval mode; it is given the report's inference mode and mix.
        images: (N, channels, H, W), pixels in [0, 1].
        labels: (N,), class indices.

    Raises:
        ValueError: a model or images that are not the report's.
    """
    protocol = report.protocol
    if protocol["inference"] != "none":
        head = timm_hpm.find_head(model)
        head.inference, head.mix = protocol["inference"], protocol["mix"]
    for what, ours, theirs in (("weights", weights_digest(model), protocol["weights_digest"]),
                               ("images", data_digest(images, labels), protocol["data_digest"])):
        if ours != theirs:
            raise ValueError(f"the {what} have the digest {ours}, those of the report {theirs}; they are "
                             "others now")
    size = protocol["batch_size"]
    if as_row(judge(model, images, labels, size)) != report.correct["clean"]:
        raise ValueError("the model classifies the clean images otherwise than the report says; is it of the same "
                         "device and versions?")
    threat = timm_hpm.ThreatModel.of(protocol["threat"])
    robust = torch.tensor(right_in_all(report.verdicts.values()))
    pixel_model = pixel_model_for(model, images).requires_grad_(False)
    device = device_of(pixel_model, images)
    split = AttackedModel(pixel_model, images[:size].to(device))
    targets: dict[str, Logits] = {TRUE_MODEL: pixel_model} | {
        name: lambda x, name=name: split.logits(name, split.features(x)) for name in split.surrogates()
        if name != split.exact_surrogate()}
    runs = attackers(threat, protocol["num_classes"], budgets)
    missed: dict[str, dict[str, list[int]]] = {target: {attacker: [] for attacker in runs} for target in targets}

    def batches() -> Iterator[Tensor]:
        for indices in torch.arange(len(images)).split(size):
            if robust[indices].any():
                yield indices if protocol["inference"] == "batch" else indices[robust[indices]]

    todo = [(indices, target, attacker) for indices in batches() for target in targets for attacker in runs]
    with tqdm(todo, disable=not progress, unit="attack") as bar:
        for indices, target, attacker in bar:
            bar.set_postfix_str(f"images {int(indices[0])}–{int(indices[-1])}, {target}: {attacker}")
            clean, truth = images[indices].to(device), labels[indices].to(device)
            broken = torch.zeros(len(indices), dtype=torch.bool)
            for number, run in enumerate(runs[attacker]):
                torch.manual_seed(seed + number)
                np.random.seed(seed + number)
                logits = Watched(targets[target], clean, truth, threat, protocol["inference"] == "batch")
                run(logits, clean, truth)
                for points in [logits.candidates(), *logits.whole]:
                    broken |= ~judge(model, points, truth, len(clean), allow_non_finite=True)
            missed[target][attacker] += indices[broken & robust[indices]].tolist()
    return missed


def found_by(missed: dict[str, dict[str, list[int]]]) -> list[int]:
    """Returns the images that any attacker broke through any target, in order."""
    return sorted({image for row in missed.values() for images in row.values() for image in images})


def to_markdown(missed: dict[str, dict[str, list[int]]], report: timm_hpm.AttackReport) -> str:
    """Returns the table of the missed images, and their part of all images."""
    names = list(next(iter(missed.values())))
    lines = ["| images missed, through | " + " | ".join(names) + " | any |", "|---|" + "---:|" * (len(names) + 1)]
    for target, row in missed.items():
        cells = [str(len(images)) for images in row.values()] + [str(len(found_by({target: row})))]
        lines.append(f"| {target} | " + " | ".join(cells) + " |")
    number, total = len(found_by(missed)), report.num_images
    points = 100 * number / total
    return "\n".join([
        *lines, "",
        f"robust accuracy by MSA {report.protocol['protocol']}: {100 * report.robust_accuracy:.1f} %, with these "
        f"attackers: {100 * report.robust_accuracy - points:.1f} %",
        f"missed by MSA: {number} of {total} images, {points:.1f} points"])


def main(argv: list[str] | None = None) -> int:
    """Prints the missed images and writes them into a file; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, metavar="REPORT", help="the report.json of an evaluation, which names the "
                        "model, the images, the threat model, the batch size and the inference mode")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    parser.add_argument("--budget-scale", type=float, default=1.0, metavar="X",
                        help=f"times the steps and queries of {Budgets()} (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("output/independent"), metavar="FOLDER",
                        help="folder of independent.json (%(default)s)")
    args = parser.parse_args(argv)
    budgets = Budgets().scaled(args.budget_scale)
    import_attacks()
    writable_folder(args.output)
    report = timm_hpm.AttackReport.load(args.report)
    config = EvaluateConfig(**{name: report.protocol[name] for name in ("model", "dataset", "split")},
                            **(report.protocol.get("options") or {}), device=args.device)
    model = load_model(config)
    split = open_split_for(model, config.dataset, config.split, img_size=config.img_size, data_dir=config.data_dir,
                           class_map=config.class_map)
    images, labels = first_images(split, report.num_images)
    missed = find_missed(model, images, labels, report, budgets, seed=args.seed, progress=True)
    write_text(args.output / "independent.json", json.dumps({
        "missed": missed,
        "missed_in_all": found_by(missed),
        "num_images": report.num_images,
        "robust_accuracy": report.robust_accuracy,
        "budgets": asdict(budgets),
        "seed": args.seed,
        "versions": {package: version(package) for package in ("adv-lib", "adversarial-robustness-toolbox", "torch")},
        "protocol": report.protocol,
    }, indent=1) + "\n")
    print(to_markdown(missed, report))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError, ModuleNotFoundError) as error:
        sys.exit(f"independent.py: {error}")
