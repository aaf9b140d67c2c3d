#!/usr/bin/env python3
"""Finds our name for each model id of RobustBench's Linf and L2 leaderboards, and rewrites docs/robustbench_ids.csv.

    pip install --no-deps robustbench==1.1.1
    python benchmarks/from_robustbench.py                      # about 15 minutes on one CPU core
    python benchmarks/from_robustbench.py --filter '*R18*' --output -

Each of its networks gets random weights. One of ours counts as the same if it loads them by the options in the table
and gives the same logits. No weights are downloaded. Counts the ids without one of ours.
"""

import argparse
import csv
import fnmatch
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import timm
import torch
from _robustbench import randomised, zoo_module
from torch import Tensor, nn

import timm_hpm

DOCUMENT = Path(__file__).parent.parent / "docs" / "robustbench_ids.csv"
COLUMNS = ("dataset", "norm", "robustbench", "tag", "convert", "file")
DATASETS = {"cifar10": (10, 32), "cifar100": (100, 32), "imagenet": (1000, 224)}  # classes, and pixels a side
NORMS = {"linf": "Linf", "l2": "L2"}
RADII = {("cifar10", "linf"): "Linf:8/255", ("cifar100", "linf"): "Linf:8/255", ("cifar10", "l2"): "L2:128/255",
         ("imagenet", "linf"): "Linf:4/255"}
PREACT: tuple[dict[str, Any], ...] = ({"shortcut": "raw"}, {"shortcut": "raw", "final_norm": False})


@dataclass(frozen=True)
class Ours:
    """A network of ours that computes one of RobustBench's: its name, model arguments and normalisation."""

    name: str
    model_kwargs: tuple[tuple[str, Any], ...]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def options(self) -> str:
        """Returns the options by which `timm-hpm convert` reads a file."""
        words = ["--model", self.name]
        if self.num_classes != timm.get_pretrained_cfg(self.name).num_classes:
            words += ["--num-classes", str(self.num_classes)]
        if self.model_kwargs:
            words += ["--model-kwargs", *(f"{name}={value}" for name, value in self.model_kwargs)]
        return " ".join([*words, "--mean", *(f"{x:g}" for x in self.mean), "--std", *(f"{x:g}" for x in self.std)])


class StandIns:
    """Gives empty modules for packages that RobustBench's dictionaries import and no network here needs."""

    NAMES = ("geotorch", "torchdiffeq", "gdown")

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """Returns a spec for a stand-in, or None for every other module."""
        return ModuleSpec(name, self) if name.partition(".")[0] in self.NAMES else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> Any:
        """Returns the stand-in."""
        return MagicMock(__path__=[], __spec__=spec)

    def exec_module(self, module: object) -> None:
        """Does nothing."""


def zoo() -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """Yields the data set, the norm, the id and the entry of RobustBench's adversarially robust models."""
    sys.meta_path.append(StandIns())  # type: ignore[arg-type]
    for dataset in DATASETS:
        module = zoo_module(dataset)
        for norm in NORMS:
            for name, entry in getattr(module, norm, {}).items():
                yield dataset, norm, name, entry


def shapes(model: nn.Module) -> Counter:
    """Returns the shapes of the convolutions' and linear layers' weights, with their numbers."""
    return Counter(tuple(value.shape) for name, value in model.named_parameters()
                   if value.ndim > 1 and not name.endswith("prototypes"))


@cache
def our_networks(num_classes: int, size: int) -> list[tuple[str, dict[str, Any], Counter]]:
    """Returns our networks: a tag without weights, the model arguments beside it, and the shapes of the weights."""
    large = timm.list_models("hpm_*", module="hpm_timm")
    # timm's DeiT is its ViT under another name.
    models = [name for name in timm.list_models("hpm_*") if (name in large) == (size > 32) and "deit" not in name]
    names = [f"{name}.{tag}" for name in models for tag in ("untrained", "untrained_deepmind")]
    variants: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in names]
    variants += [("hpm_preact_resnet18.untrained", kwargs) for kwargs in PREACT if size == 32]
    networks = []
    for name, kwargs in variants:
        with suppress(RuntimeError):  # most architectures have no second layout
            model = timm.create_model(name, num_classes=num_classes, device="meta", **kwargs)
            networks.append((name, kwargs, shapes(model)))
    return networks


def normalisations(model: nn.Module) -> Iterator[tuple[tuple[float, ...], tuple[float, ...]]]:
    """Yields the means and standard deviations that a network may normalise pixels by: its own, none, and 0.5."""
    for module in model.modules():
        for pair in (("mean", "std"), ("mu", "sigma")):
            found = [getattr(module, name, None) for name in pair]
            if all(isinstance(value, Tensor) and value.numel() == 3 for value in found):
                mean, std = (tuple(round(float(x), 4) for x in value.flatten()) for value in found)
                yield mean, std
    yield (0.0,) * 3, (1.0,) * 3
    yield (0.5,) * 3, (0.5,) * 3


@torch.no_grad()
def ours(model: nn.Module, num_classes: int, size: int) -> Ours | None:
    """Returns the network of ours that gives the logits of `model`, or None."""
    theirs, pixels = shapes(model), torch.rand(1, 3, size, size)
    expected, state_dict = model(pixels), dict(model.state_dict())
    for name, kwargs, needed in our_networks(num_classes, size):
        if needed - theirs:
            continue
        for mean, std in dict.fromkeys(normalisations(model)):
            overlay = {"state_dict": state_dict, "mean": mean, "std": std, "num_classes": num_classes}
            try:
                found = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)
            except (ValueError, RuntimeError):
                continue
            logits = timm_hpm.PixelModel(found.eval())(pixels)
            if (logits - expected).norm() < 1e-3 * expected.norm():
                return Ours(name, tuple(kwargs.items()), num_classes, mean, std)
    return None


def network(dataset: str, norm: str, name: str, entry: dict[str, Any]) -> nn.Module:
    """Returns one of RobustBench's networks with random weights; raises if it needs an absent package or a download."""
    if entry["gdrive_id"] is None:
        timm_name = f"{name}_{dataset}_{norm}".lower().replace("-", "_")
        return randomised(timm.create_model(timm_name, num_classes=DATASETS[dataset][0]))
    if not isinstance(entry["gdrive_id"], str) or not entry["gdrive_id"]:
        raise ValueError("several files, or weights of torchvision")
    return randomised(entry["model"]())


def tag_of(found: Ours, dataset: str, norm: str, name: str) -> str | None:
    """Returns the tag on the authors' own file of a RobustBench model, or None."""
    author = re.match(r"[A-Za-z]+\d{4}", name)
    architecture = found.name.partition(".")[0]
    for tag in timm.list_pretrained(f"{architecture}.*"):
        notes = timm.get_pretrained_cfg(tag).notes or ("",)
        if (author and f".{author[0].lower()}_{dataset}_" in tag
                and notes[0] == f"threat model: {RADII[dataset, norm]}"):
            return tag
    return None


def main() -> None:
    """Writes the table, and prints each row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--filter", default="*", help="only ids that match this pattern")
    parser.add_argument("--output", default=DOCUMENT, help="path of the table, or - for none")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    rows, others, known = [], 0, {}
    for dataset, norm, name, entry in zoo():
        if not fnmatch.fnmatch(name, args.filter):
            continue
        try:
            model = network(dataset, norm, name, entry)
            key = (str(model), tuple(normalisations(model)), dataset)
            found = known[key] if key in known else known.setdefault(key, ours(model, *DATASETS[dataset]))
        except Exception as error:
            found = None
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
        tag = found and tag_of(found, dataset, norm, name)
        if found:
            convert = ("", "") if tag else (found.options(), f"https://drive.google.com/file/d/{entry['gdrive_id']}")
            rows.append((dataset, NORMS[norm], name, tag or "", *convert))
        others += not found
        print(f"{dataset} {norm} {name}: {tag or (found.options() if found else 'none')}", flush=True)
    print(f"{len(rows)} ids have a network of ours, {others} have none")
    if str(args.output) != "-":
        with open(args.output, "w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([COLUMNS, *sorted(rows)])


if __name__ == "__main__":
    main()
