#!/usr/bin/env python3
"""Trials of other forms of the head, on validation images: training, attack and the tables of all.

    python benchmarks/trials.py run --output output/trials [--groups digits ...] [--trials fc ...] [--seeds 0 1 ...]
    python benchmarks/trials.py table

A trial of trials.yaml is a form of the head (`Form`) and its training. All trials of a group and a seed see the same
images in the same order with the same random numbers. Results go to benchmarks/reports/trials; a trial that has one is
not run again. Nothing in a trial sees a test image, unless `--split test` asks for it. docs/results.md has the
findings.
"""

import argparse
import copy
import json
import math
import time
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from timm_hpm import PROTOCOLS, HPMHead, Protocol, create_model, functional, load_split, mixed_surrogate_attack, pgd
from timm_hpm.attacks import margin_loss
from timm_hpm.data import random_flip, random_shift
from timm_hpm.evaluation.joint import softened_errors
from timm_hpm.files import write_text
from timm_hpm.prototypes import fit_log_scale
from timm_hpm.surrogates import SURROGATES, Surrogate
from timm_hpm.training.trunk import PixelTrunk, inputs_only

ROOT = Path(__file__).parents[1]
CONFIGS = Path(__file__).with_suffix(".yaml")
REPORTS = Path(__file__).parent / "reports" / "trials"
FOLDS = 4  # of a small data set, a fold a seed
#: Lead of the best logit above which a surrogate's logits are scaled down: its cross-entropy must keep a gradient.
LEAD = 12.0


class Form(HPMHead):
    """A head of another form: ℓ2 to prototypes with these options, or a sum of that and the FC classifier's logits.

    Arguments:
        kwargs: of HPMHead; `inference` is "fc", "sample" (no image depends on another) or "batch".
        unit: whether features and prototypes are divided by their length.
        leave_one_out: whether an image's batch-level prototypes are those of the other images.
        confidence: whether images enter a batch-level prototype with weight p_c · max p, rather than by their arg-max.
        fc_share: weight of the FC logits in the sum, the ℓ2 logits' being 1 less it; None for a learned one.
        learning: whether the prototypes are set once and then learned as parameters are, rather than kept by an EMA.
    """

    def __init__(self, *args: Any, unit: bool = False, leave_one_out: bool = False, confidence: bool = False,
                 fc_share: float | None = 0.0, learning: bool = False, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.unit, self.leave_one_out, self.confidence = unit, leave_one_out, confidence
        self.fc_share, self.learning = fc_share, learning
        # Not log_scale, which an attack may lower: a sum's prediction depends on the scale.
        self.own_log_scale = nn.Parameter(torch.zeros(()))
        self.share_logit = nn.Parameter(torch.zeros(()), requires_grad=fc_share is None)
        self.shift = nn.Parameter(torch.zeros(self.out_features, self.in_features), requires_grad=learning)

    def forward(self, features: Tensor) -> Tensor:
        """Returns the logits (B, C); a one-hot assignment has the straight-through gradient."""
        return self.fc_logits(features) if self.inference == "fc" else self.answer(features)

    def answer(self, features: Tensor, temperature: float | None = None) -> Tensor:
        """Returns the logits (B, C), with the softmax at a `temperature` in place of a one-hot assignment."""
        fc = self.fc_logits(features)
        l2 = -self.own_log_scale.exp() * self.squared_distances(features, temperature)
        share = torch.sigmoid(self.share_logit) if self.fc_share is None else self.fc_share
        logits = share * fc + (1 - share) * l2
        return torch.where((self.num_updates > 0).all(), logits, fc)

    def squared_distances(self, features: Tensor, temperature: float | None = None) -> Tensor:
        """Returns the squared distances (B, C) to the prototypes, mixed with the batch's in the batch mode."""
        z, prototypes = features, self.prototypes + self.shift
        if self.unit:
            z, prototypes = F.normalize(z, dim=1), F.normalize(prototypes, dim=1)
        if self.inference != "batch":
            return functional.squared_distances(z, prototypes)
        fc = self.fc_logits(features)
        p = F.softmax(fc / (temperature or 1.0), dim=1)
        if self.confidence:
            a = p * p.amax(dim=1, keepdim=True)
        else:
            a = functional.straight_through_assignment(fc) if temperature is None else p
        hard = temperature is None and not self.confidence
        if not self.leave_one_out:
            presence = functional.hard_presence(a) if hard else functional.soft_presence(a)
            return functional.mixed_squared_distances(z, a, presence, prototypes, self.mix)
        others = a.sum(dim=0) - a  # (B, C): the mass without the image's own
        sums = a.t() @ z - a.unsqueeze(2) * z.unsqueeze(1)
        means = sums / torch.where(others > 1e-6, others, 1.0).unsqueeze(2)
        log_absent = torch.log1p(-a.clamp(max=1 - 1e-6))
        presence = (others.detach() > 0.5).to(z.dtype) if hard else -torch.expm1(log_absent.sum(dim=0) - log_absent)
        mixed = prototypes + (self.mix * presence).unsqueeze(2) * (means - prototypes)
        return (z.unsqueeze(1) - mixed).square().sum(dim=2)

    def begin(self, features: Tensor, labels: Tensor) -> None:
        """Sets prototypes and scale of a head without, from the first features (B, d) of a training from scratch."""
        if self.learning:
            self.set_prototypes(self.weight)
        else:
            self.update_prototypes(features, labels)
        if self.is_fitted():
            self.set_scale(features, labels)

    @torch.no_grad()
    def finish(self, fc_is_trained: bool) -> None:
        """Makes the other surrogates attack the form as well as they can, after training; changes no prediction.

        The dataset-level prototypes become the learned ones. An FC classifier that was not trained becomes the linear
        layer that predicts as the ℓ2 logits do.
        """
        self.prototypes += self.shift
        self.shift.zero_()
        self.log_scale.copy_(self.own_log_scale)
        if not fc_is_trained:
            prototypes = F.normalize(self.prototypes, dim=1) if self.unit else self.prototypes
            self.weight.copy_(2 * prototypes)
            self.bias.copy_(0 if self.unit else -prototypes.square().sum(dim=1))

    @torch.no_grad()
    def set_scale(self, features: Tensor, labels: Tensor) -> None:
        """Sets the scale to the one of least NLL on `features` (B, d)."""
        self.own_log_scale.fill_(fit_log_scale(self.squared_distances(features), labels)[0])
        self.log_scale.copy_(self.own_log_scale)


def unsaturated(logits: Tensor) -> Tensor:
    """Returns logits (B, C), scaled down if more than one in 20 images leads by more than `LEAD`."""
    best = logits.detach().topk(2, dim=1).values
    return logits * (LEAD / (best[:, 0] - best[:, 1]).quantile(0.95)).clamp(max=1)


def softened(head: HPMHead, features: Tensor, temperature: float | None = 1.0, **options: Any) -> Tensor:
    """Returns the form's logits (B, C) at a temperature, None for the form's own; `options` make it another form."""
    other = copy.copy(head)
    vars(other).update(options)
    return unsaturated(other.answer(features, temperature))  # type: ignore[operator]


PAPERS: dict[str, Any] = {"unit": False, "leave_one_out": False, "confidence": False, "fc_share": 0.0}
OTHER: dict[str, Any] = {"fc_share": 0.5, "leave_one_out": True, "confidence": True, "mix": 0.75}
#: Further surrogates; a run registers them.
OWN_SURROGATES = (
    # The form itself; of a one-hot assignment by the straight-through gradient, and softened.
    Surrogate("form", partial(softened, temperature=None), batch_dependent=True),
    Surrogate("form-soft", softened, batch_dependent=True, annealed=softened),
    # Other forms on the same network, for transfer.
    Surrogate("paper-soft", partial(softened, **PAPERS), batch_dependent=True),
    Surrogate("other-batch", partial(softened, **OTHER), batch_dependent=True),
)


def protocol_of(options: dict[str, Any], head: Form) -> Protocol:
    """Returns the attacks on a form, or on an FC classifier."""
    chosen = options[{"sample": "single"}.get(head.inference, head.inference)]
    return PROTOCOLS["fast"].changed(surrogates=chosen["surrogates"], attacks=list(chosen["budgets"]),
                                     budgets=chosen["budgets"])


def images_of(group: dict[str, Any], seed: int, split: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the images and labels to train on, and those to measure with: a fold of both if the group has folds."""
    (x, y), (x_val, y_val) = (load_split(group["dataset"], name).tensors for name in ("train", "val"))
    if group.get("folds"):
        x, y = torch.cat([x, x_val]), torch.cat([y, y_val])
        parts = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed // FOLDS)).chunk(FOLDS)
        held_out = parts[seed % FOLDS]
        rest = torch.cat([part for i, part in enumerate(parts) if i != seed % FOLDS])
        x, y, x_val, y_val = x[rest], y[rest], x[held_out], y[held_out]
    if split == "test":
        x_val, y_val = load_split(group["dataset"], "test").tensors
    return x, y, x_val[:group["images"]], y_val[:group["images"]]


def joint_errors(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the joint attack's loss of a whole batch: the log of its softened number of errors."""
    margins = margin_loss(logits, labels)
    unit = margins.detach().abs().median().clamp(min=1e-6)
    return softened_errors(16 / unit * margins[None], torch.ones_like(labels[None], dtype=torch.bool)).sum()


def order_of(x: Tensor, options: dict[str, Any], seed: int) -> list[Tensor]:
    """Returns the rows of each batch of a training, in order."""
    generator, whole = torch.Generator().manual_seed(seed), len(x) // 128
    batches = [rows for _ in range(math.ceil(options["epochs"]))
               for rows in torch.randperm(len(x), generator=generator).split(128)[:whole]]
    return batches[:round(options["epochs"] * whole)]


def crafting_logits(trunk: PixelTrunk, joint: bool, pixels: Tensor) -> Tensor:
    """Returns the logits that the attack of a training step differentiates."""
    features = trunk.backbone(pixels)
    fc = trunk.head.fc_logits(features)
    if trunk.head.inference == "fc":
        return fc
    form = softened(trunk.head, features)
    return form if joint else torch.stack([F.log_softmax(part, dim=1) for part in (fc, form)]).mean(dim=0)


def loss_of(head: Form, features: Tensor, labels: Tensor, options: dict[str, Any]) -> Tensor:
    """Returns the mean of the cross-entropies of the form and of its FC classifier, or the FC classifier's alone."""
    logits, one_hot = head(features), F.one_hot(labels, head.out_features)
    if "margin" in options:  # the label's own distance counts more: arXiv 1803.02988
        logits = logits * (1 + options["margin"] * one_hot)
    if "gap" in options:  # the label's logit must lead by so much more
        logits = logits - options["gap"] * one_hot
    weight = options.get("fc_loss_weight", 1.0) if head.inference != "fc" else 0.0
    return (F.cross_entropy(logits, labels) + weight * F.cross_entropy(head.fc_logits(features), labels)) / (1 + weight)


def train(model: nn.Module, options: dict[str, Any], threat: str, x: Tensor, y: Tensor, seed: int) -> None:
    """Trains a model in place, on images by PGD through the form and its FC classifier."""
    trunk, batches = PixelTrunk(model), order_of(x, options, seed)
    head: Form = trunk.head
    parameters = [{"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": options["weight_decay"]},
                  {"params": [p for p in model.parameters() if p.ndim <= 1]}]
    optimiser = torch.optim.SGD(parameters, lr=options["lr"], momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, options["lr"], total_steps=len(batches),
                                                   cycle_momentum=False, pct_start=0.25)
    joint = options.get("joint", False)
    for step, rows in enumerate(batches):
        torch.manual_seed(1_000_000 * seed + step)
        images, labels = random_flip(random_shift(x[rows], options["shift"]), options["hflip"]), y[rows]
        trunk.eval()
        with inputs_only(trunk):
            images = pgd(partial(crafting_logits, trunk, joint), images, labels, threat, steps=options["steps"],
                         loss=joint_errors if joint else None)
        trunk.train()
        features = trunk.backbone(images)
        if head.inference != "fc" and not head.is_fitted():
            head.begin(features.detach(), labels)
        if step == 0 and "scale" in options:
            head.own_log_scale.data.fill_(math.log(options["scale"]))
        optimiser.zero_grad()
        loss_of(head, features, labels, options).backward()
        optimiser.step()
        schedule.step()
        if head.inference != "fc" and not head.learning:
            head.update_prototypes(features.detach(), labels)
    model.eval()


def fit(model: nn.Module, threat: str, steps: int, x: Tensor, y: Tensor, seed: int) -> None:
    """Sets the prototypes of a trained network to the mean clean and adversarial features, and the scale."""
    trunk = PixelTrunk(model.eval())
    torch.manual_seed(seed)
    found, labels = [], []
    for images, targets in zip(x[:4096].split(128), y[:4096].split(128), strict=True):
        with inputs_only(trunk):
            attacked = pgd(lambda pixels: trunk.head.fc_logits(trunk.backbone(pixels)), images, targets, threat,
                           steps=steps)
        with torch.no_grad():
            found += [trunk.backbone(images), trunk.backbone(attacked)]
        labels += [targets, targets]
    features, all_labels = torch.cat(found), torch.cat(labels)
    sums, counts = functional.class_sums(features, all_labels, trunk.head.out_features)
    trunk.head.set_prototypes(sums / counts.unsqueeze(1))
    trunk.head.set_scale(features[-1024:], all_labels[-1024:])


def created(group: dict[str, Any], head_options: dict[str, Any], seed: int) -> nn.Module:
    """Returns a network with a form in place of its head, with random weights."""
    torch.manual_seed(seed)
    model = create_model("hpm_wrn10_2", pretrained=False, **group.get("model", {}))
    model.fc = Form(model.fc.in_features, model.fc.out_features, **{"inference": "sample", **head_options})
    return model


def run_trial(group_name: str, name: str, seed: int, args: argparse.Namespace, configs: dict[str, Any]) -> None:
    """Trains a trial if its weights are not in the output folder, and attacks it."""
    result = REPORTS / f"{group_name}-{name}-{seed}-{args.protocol}-{args.split}.json"
    if result.exists():
        return
    start = time.process_time()
    group, trial = configs["groups"][group_name], configs["trials"][name]
    x, y, x_val, y_val = images_of(group, seed, args.split)
    model = created(group, trial.get("head", {}), seed)
    weights = args.output / f"{group_name}-{name}-{seed}.safetensors"
    if not weights.exists():
        kind = "scratch" if trial.get("scratch") else "tune"
        options = {**group["train"], **group[kind], **trial.get("train", {})}
        if kind == "tune":
            own_base = args.output / f"{group_name}-fc-scratch-{seed}.safetensors"
            model.load_state_dict(load_file(ROOT / group["base"] if "base" in group else own_base), strict=False)
            fit(model, group["threat"], options["steps"], x, y, seed)
        train(model, options, group["threat"], x, y, seed)
        weights.parent.mkdir(parents=True, exist_ok=True)
        save_file({key: value.contiguous() for key, value in model.state_dict().items()}, weights)
    model.load_state_dict(load_file(weights))
    model.eval()
    model.fc.finish(trial.get("train", {}).get("fc_loss_weight", 1.0) > 0)
    model.fc.inference = trial.get("judge", model.fc.inference)
    trained = time.process_time()
    protocol = protocol_of(configs["protocols"][args.protocol], model.fc)
    report = mixed_surrogate_attack(model, x_val, y_val, group["threat"], protocol=protocol,
                                    batch_size=group["batch_size"])
    if report.unreliable:
        print(result.stem, [flag.name for flag in report.flags])
    write_text(result, json.dumps({
        "group": group_name, "trial": name, "seed": seed, "protocol": args.protocol, "split": args.split,
        "images": len(y_val), "clean": report.clean_accuracy, "robust": report.robust_accuracy,
        "realised": report.realised_robust_accuracy, "rows": {
            key: round(row.count("1") / len(row), 4) for key, row in report.correct.items()},
        "flags": [flag.name for flag in report.flags], "train_seconds": round(trained - start, 1),
        "attack_seconds": round(time.process_time() - trained, 1),
        "config": {key: value for key, value in trial.items() if key != "about"},
        "verdicts": "".join("1" if right else "0" for right in report.robust), "digest": protocol.digest(),
    }, indent=1))
    print(f"{result.stem}: clean {report.clean_accuracy:.4f} worst {report.robust_accuracy:.4f} realised "
          f"{report.realised_robust_accuracy:.4f}, {time.process_time() - start:.0f} s", flush=True)


def run(args: argparse.Namespace) -> None:
    """Runs all trials that are asked for, seed by seed."""
    configs = yaml.safe_load(CONFIGS.read_text(encoding="utf-8"))
    REPORTS.mkdir(parents=True, exist_ok=True)
    SURROGATES.update({surrogate.name: surrogate for surrogate in OWN_SURROGATES})
    for seed in args.seeds:
        for group in args.groups:
            for name in args.trials or configs["groups"][group]["trials"]:
                run_trial(group, name, seed, args, configs)


def spread(values: list[float], error: float = 0.0, sign: str = "") -> str:
    """Returns the mean in points, ± its standard error over 3 seeds or more, or the given error if that is larger."""
    if len(values) > 2:
        error = max(stdev(values) / len(values) ** 0.5, error)
    return f"{100 * mean(values):{sign}.1f}" + (f" ± {100 * error:.1f}" if error else "")


def less_fc(runs: dict[int, dict], control: dict[int, dict], key: str, same_images: bool) -> str:
    """Returns the difference from FC's robust accuracy on the same seeds, and its standard error over the images."""
    seeds = sorted(runs.keys() & control.keys())
    if not seeds or runs is control:
        return ""
    rows = [[int(one) - int(other) for one, other in zip(
        runs[seed]["verdicts"], control[seed]["verdicts"], strict=True)] for seed in seeds]
    differences = [mean(column) for column in zip(*rows, strict=True)] if same_images else \
        [difference for row in rows for difference in row]
    error = stdev(differences) / len(differences) ** 0.5
    return spread([runs[seed][key] - control[seed]["robust"] for seed in seeds], error, "+")


def table(_: argparse.Namespace) -> None:
    """Prints the tables of all trials."""
    configs = yaml.safe_load(CONFIGS.read_text(encoding="utf-8"))
    found: dict[tuple, dict[str, dict[int, dict]]] = {}
    for file in sorted(REPORTS.glob("*.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        key = result["group"], result["split"], result["protocol"]
        found.setdefault(key, {}).setdefault(result["trial"], {})[result["seed"]] = result
    for (group, split, protocol), trials in sorted(found.items()):
        print(f"{group}, {split}, {protocol}\n\n"
              "| trial | | seeds | clean | worst case | less FC's | realised | less FC's |\n"
              "|---|---|---:|---:|---:|---:|---:|---:|")
        for name, trial in configs["trials"].items():
            if name not in trials:
                continue
            runs, control = trials[name], trials.get("fc-scratch" if trial.get("scratch") else "fc", {})
            cells = [f"`{name}`", trial["about"], ", ".join(map(str, runs)),
                     spread([run["clean"] for run in runs.values()])]
            same_images = split == "test" or not configs["groups"][group].get("folds")
            for key in ("robust", "realised"):
                if key == "robust" or any(run["realised"] != run["robust"] for run in runs.values()):
                    cells += [spread([run[key] for run in runs.values()]), less_fc(runs, control, key, same_images)]
                else:
                    cells += ["", ""]
            print("| " + " | ".join(cells) + " |")
        print()


def main() -> None:
    """Runs a command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    running = commands.add_parser("run")
    running.set_defaults(run=run)
    running.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="for the weights")
    running.add_argument("--groups", nargs="+", default=["digits", "fashion_mnist"], metavar="NAME")
    running.add_argument("--trials", nargs="+", metavar="NAME", help="trials of trials.yaml (the group's)")
    running.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3], metavar="N")
    running.add_argument("--protocol", default="screen", help="of trials.yaml: screen or strong")
    running.add_argument("--split", default="val", choices=("val", "test"))
    commands.add_parser("table").set_defaults(run=table)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
