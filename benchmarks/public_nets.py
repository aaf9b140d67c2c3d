#!/usr/bin/env python3
"""What the protocols find on public robust networks, and at which part of AutoAttack's time.

    OMP_NUM_THREADS=1 python benchmarks/public_nets.py --nets DIR [--only mnist_cnn_a_adv] [--output FOLDER]
    OMP_NUM_THREADS=1 python benchmarks/public_nets.py --nets DIR --seed 1 --reference FOLDER --protocols fast

DIR holds the networks and their images; NETWORKS names them, with the published bounds. Fashion-MNIST is read as by
`--dataset fashion_mnist`. AutoAttack is pyautoattack's standard version. All run one after another in this process; the
ratios are of its CPU time. Each image that a protocol breaks is checked again in float64: it must be misclassified, in
the ball and in [0, 1]. FOLDER gets a JSON file of each network, with a verdict for each image; as a reference it saves
AutoAttack's time, which the ratios then take from that other run.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyautoattack
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import timm_hpm
from timm_hpm import PixelModel, ThreatModel
from timm_hpm.checkpoints import read_file
from timm_hpm.files import write_text

PROTOCOLS: Final = ("fast", "standard", "thorough")
CIFAR_MEAN, CIFAR_STD = (125.3 / 255, 123 / 255, 113.9 / 255), (63 / 255, 62.1 / 255, 66.7 / 255)
# Above eps, as float32 rounds a pixel at the surface of the ball.
_ROUNDING: Final = 2 ** -23


@dataclass(frozen=True)
class Network:
    """A public network: its file, its images, the threat model, and published bounds on its robust accuracy in %."""

    file: str
    images: str
    threat: str
    verified: float
    attacked: float
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)


NETWORKS: Final = {
    "mnist_cnn_a_adv": Network("mnist_cnn_a_adv.model", "mnist", "Linf:0.3", 76.0, 76.5),
    "cifar_cnn_a_adv4": Network("cifar_cnn_a_adv4.model", "cifar", "Linf:2/255", 48.5, 49.5, CIFAR_MEAN, CIFAR_STD),
    "cifar_cnn_a_mix4": Network("cifar_cnn_a_mix4.model", "cifar", "Linf:2/255", 56.5, 57.5, CIFAR_MEAN, CIFAR_STD),
    "convex_fashion_mnist": Network("convex_fashion_mnist.pth", "fashion_mnist", "Linf:0.1", 65.47, 68.37),
}


def cnn_a(in_chans: int = 1) -> nn.Module:
    """Returns their architecture with random weights, for images of 28x28 (1 channel) or 32x32 pixels."""
    return nn.Sequential(
        nn.Conv2d(in_chans, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 4, 2, 1), nn.ReLU(), nn.Flatten(),
        nn.Linear(1_568 if in_chans == 1 else 2_048, 100), nn.ReLU(), nn.Linear(100, 10))


def load_network(network: Network, folder: Path) -> nn.Module:
    """Returns the network, in eval mode, as a module of pixels in [0, 1]."""
    state = read_file(folder / network.file)
    state = state.get("state_dict", state)
    state = state[0] if isinstance(state, list) else state
    model = cnn_a(state["0.weight"].shape[1])
    model.load_state_dict(state)
    return PixelModel(model, network.mean, network.std).eval().requires_grad_(False)


def load_images(network: Network, folder: Path, count: int) -> tuple[Tensor, Tensor]:
    """Returns at most `count` images (N, channels, H, W) in [0, 1] and labels (N,)."""
    if network.images == "fashion_mnist":
        images, labels = timm_hpm.load_split("fashion_mnist", "test").tensors
    else:
        pixels, classes = (np.load(folder / f"{network.images}_{part}.npy", allow_pickle=False) for part in "Xy")
        images, labels = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(classes).long()
    return images[:count], labels[:count]


class Counted(nn.Module):
    """A model that counts the images that go forward and backward."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.forward_passes, self.backward_passes = model, 0, 0

    def forward(self, x: Tensor) -> Tensor:
        """Returns the model's logits (B, C) of pixels (B, ...), and counts them."""
        self.forward_passes += len(x)
        self.backward_passes += len(x) if torch.is_grad_enabled() and x.requires_grad else 0
        return self.model(x)


def autoattack(model: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, seed: int,
               batch_size: int) -> tuple[Tensor, dict[str, float]]:
    """Returns the adversarial images of pyautoattack's standard version, and its passes."""
    counted = Counted(model)
    attack = pyautoattack.AutoAttack(counted, norm=threat.norm, eps=threat.eps, version="standard", seed=seed,
                                     device="cpu")
    found, _ = attack.run_standard_evaluation(images, labels, batch_size=batch_size)
    return found, {"forward_passes": counted.forward_passes, "backward_passes": counted.backward_passes}


def by_protocol(name: str, model: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, seed: int,
                batch_size: int) -> tuple[Tensor, dict[str, float]]:
    """Returns the images, those that a protocol breaks at the candidate that broke them, and its passes."""
    with tempfile.TemporaryDirectory() as folder:
        report = timm_hpm.mixed_surrogate_attack(model, images, labels, threat, protocol=name, seed=seed,
                                                 batch_size=batch_size, folder=folder, save_adversarial=True)
        # In a cascade the last row has every image's successful candidate.
        found = load_file(Path(folder) / "adversarial.safetensors")[list(report.correct)[-1]]
    return found, {name: report.cost["all"][name] for name in ("forward_passes", "backward_passes")}


@torch.no_grad()
def broken(model: nn.Module, found: Tensor, clean: Tensor, labels: Tensor, threat: ThreatModel) -> Tensor:
    """Returns whether each of the `found` (N, ...) is misclassified in float64, in the ball and in [0, 1]."""
    double, found, clean = model.double(), found.double(), clean.double()
    wrong = double(found).argmax(dim=1) != labels
    model.float()
    inside = threat.distance(found, clean) <= threat.eps * (1 + 1e-6) + _ROUNDING
    return wrong & inside & ((found >= 0) & (found <= 1)).flatten(1).all(dim=1)


def measured(attack: Callable[[], tuple[Tensor, dict[str, float]]], model: nn.Module, images: Tensor, labels: Tensor,
             threat: ThreatModel) -> dict[str, Any]:
    """Returns verdicts (a text, "1" for robust), CPU seconds and passes of an attack; `lost` fail the check again."""
    start = time.process_time()
    found, passes = attack()
    spent = time.process_time() - start
    claimed = model(found).argmax(dim=1) != labels
    holds = broken(model, found, images, labels, threat)
    return {"robust": "".join("0" if one else "1" for one in holds), "lost": int((claimed & ~holds).sum()),
            "cpu_seconds": spent, **passes}


def reference(path: Path, clean: str) -> dict[str, Any]:
    """Returns AutoAttack's measurements of an earlier run with the same verdicts on `clean` images."""
    kept = json.loads(path.read_text(encoding="utf-8"))
    if kept["clean"]["robust"] != clean:
        raise SystemExit(f"{path} has other verdicts on clean images, of {len(kept['clean']['robust'])} images instead "
                         f"of {len(clean)}; give the --num-images of that run")
    return kept["autoattack"]


def measure(name: str, folder: Path, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Returns the measurements of AutoAttack and of each protocol on the network `name`."""
    network = NETWORKS[name]
    model, threat = load_network(network, folder), ThreatModel.of(network.threat)
    images, labels = load_images(network, folder, args.num_images)
    run = (model, images, labels, threat)
    clean = "".join("1" if one else "0" for one in model(images).argmax(dim=1) == labels)
    results: dict[str, dict[str, Any]] = {"clean": {"robust": clean}}
    results["autoattack"] = (
        measured(lambda: autoattack(*run, args.seed, args.batch_size), *run) if args.reference is None
        else reference(args.reference / f"{name}.json", clean))
    for protocol in args.protocols:
        results[protocol] = measured(
            lambda protocol=protocol: by_protocol(protocol, *run, args.seed, args.batch_size), *run)
    return results


def to_row(name: str, results: dict[str, dict[str, Any]], protocols: list[str]) -> str:
    """Returns one network's row of the table."""
    network, reference = NETWORKS[name], results["autoattack"]
    percent = {key: 100 * value["robust"].count("1") / len(value["robust"]) for key, value in results.items()}
    cells = [f"{name}, {network.threat}, {len(results['clean']['robust']):,} images",
             *(f"{percent[key]:.2f}" for key in ("clean", "autoattack"))]
    for key in protocols:
        pairs = list(zip(reference["robust"], results[key]["robust"], strict=True))
        cells += [f"{percent[key]:.2f} (−{pairs.count(('1', '0'))}, +{pairs.count(('0', '1'))})",
                  f"{results[key]['cpu_seconds'] / reference['cpu_seconds']:.2f}"]
    cells += [f"{network.attacked:.2f}, {network.verified:.2f}", str(sum(r.get("lost", 0) for r in results.values()))]
    return "| " + " | ".join(cells) + " |"


def main() -> int:
    """Prints the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", type=Path, required=True, metavar="DIR", help="folder of the networks and images")
    parser.add_argument("--only", nargs="+", choices=tuple(NETWORKS), default=list(NETWORKS), help="networks (all)")
    parser.add_argument("--protocols", nargs="+", default=list(PROTOCOLS), help="protocols (fast standard thorough)")
    parser.add_argument("--num-images", type=int, default=2_000, metavar="N", help="first images of each (2000)")
    parser.add_argument("--batch-size", type=int, default=250, metavar="N", help="images per batch (250)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all attacks (0)")
    parser.add_argument("--reference", type=Path, metavar="FOLDER",
                        help="the --output of an earlier run, for AutoAttack's results")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="folder for a JSON file of each network")
    args = parser.parse_args()
    print("| network | clean | AutoAttack |" + "".join(f" {name} | of its time |" for name in args.protocols)
          + " published: attacked, verified | lost in float64 |")
    print("|---|" + "---:|" * (4 + 2 * len(args.protocols)))
    for name in args.only:
        results = measure(name, args.nets, args)
        print(to_row(name, results, args.protocols), flush=True)
        if args.output:
            args.output.mkdir(parents=True, exist_ok=True)
            write_text(args.output / f"{name}.json", json.dumps(
                {"batch_size": args.batch_size, "seed": args.seed, **results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
