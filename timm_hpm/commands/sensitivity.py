"""`sensitivity`: how far an attack moves the features of networks, and how far each head's margin follows."""

import re
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from ..data import SPLITS, as_pixel_model, first_images
from ..evaluation.config import EvaluateConfig
from ..evaluation.folder import load_model, open_images
from ..evaluation.sweep import parse_radii
from ..files import default_folder, writable_folder, write_text
from ..head import INFERENCE_MODES
from ..models.create import class_names
from ..names import some
from ..options import CommonOptions, given_options, option
from ..report.sensitivity_page import sensitivity_markdown, sensitivity_page
from ..sensitivity import Sensitivity, measure_sensitivity
from ..threat import ThreatModel
from .parser import Parser

_ABOUT = """\
Attacks the FC, ℓ2 and HPM heads of a network at several radii, by a loss that no scale of the logits saturates and by
the cross-entropy, and measures how far the features and each head's margin move. Several --checkpoint, such as of a
normally and a robustly trained network, share a page. Writes sensitivity.html and a JSON file for each network."""
_EXAMPLES = ("", "--checkpoint normal.safetensors robust.safetensors --num-images 500",
             "--radii 0:8/255:2/255 --inference fc,dataset --num-images 0")


@dataclass(frozen=True)
class SensitivityConfig(CommonOptions):
    """The options of a sensitivity study."""

    checkpoint: tuple[str, ...] = option(
        (), "model", "files of weights, each a network of its own (the pretrained ones)")
    inference: tuple[str, ...] = option(
        (), "model", f"inference modes of the HPM head, each a head of its own, of {', '.join(INFERENCE_MODES)} (all)",
        choices=INFERENCE_MODES)
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "model", "device of PyTorch")
    split: str = option("val", "data", "split of the data set", choices=SPLITS)
    num_images: int = option(100, "data", "number of images, the first of the split; 0 for all", least=0)
    radii: str | None = option(
        None, "attack", "FIRST:LAST:STEP in the norm of --threat, such as 0:0.2:0.05 (five steps to 1.5 times the "
                        "radius of --threat)")
    iterations: int = option(50, "attack", "steps of each attack", least=1)
    batch_size: int = option(100, "attack", "images per batch, on which the batch head's logits depend", "-b", least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.radii is not None:
            parse_radii(self.radii)


def main(argv: list[str] | None = None) -> int:
    """Measures the networks; returns the exit code."""
    parser = Parser("sensitivity", _EXAMPLES, _ABOUT)
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="(output/sensitivity-<model>-<date>)")
    args, given = given_options(parser, SensitivityConfig, argv)
    config = SensitivityConfig(**given)
    output = args.output or default_folder(config.model, "sensitivity-")
    networks = {re.sub(r"[^\w-]", "-", checkpoint or config.model).strip("-"): checkpoint
                for checkpoint in config.checkpoint or (None,)}
    if len(networks) < len(config.checkpoint):
        raise ValueError(f"--checkpoint names {len(config.checkpoint)} files, whose studies would be {len(networks)} "
                         f"files in {output} ({some(f'{name}.json' for name in networks)}); expected names that differ "
                         "in letters or digits: give each file once, or rename one")
    writable_folder(output)
    studies: list[Sensitivity] = []
    names: tuple[str, ...] = ()
    for name, checkpoint in networks.items():
        study, names = _study(config, checkpoint)
        studies.append(study)
        study.save(output / f"{name}.json")
        print(f"{study.name}\n\n{sensitivity_markdown(study)}")
    write_text(output / "sensitivity.html", sensitivity_page(studies, names))
    print(f"written: {output / 'sensitivity.html'}, and the files beside it")
    return 0


def _study(config: SensitivityConfig, checkpoint: str | None) -> tuple[Sensitivity, tuple[str, ...]]:
    shared = {one.name: getattr(config, one.name) for one in fields(CommonOptions)}
    options = EvaluateConfig(**shared, checkpoint=checkpoint, device=config.device, split=config.split)
    model = load_model(options)
    split = open_images(options, model)
    threat = ThreatModel.of(config.threat or split.threat)
    radii = parse_radii(config.radii) if config.radii else [threat.eps * i * 0.3 for i in range(6)]
    images, labels = first_images(split, config.num_images, config.workers)
    study = measure_sensitivity(as_pixel_model(model, config.mean, config.std), images, labels, threat.norm, radii,
                                config.inference or INFERENCE_MODES[::-1], iterations=config.iterations,
                                batch_size=config.batch_size, seed=config.seed, name=checkpoint or config.model,
                                progress=True)
    return study, tuple(split.class_names or class_names(model) or ())
