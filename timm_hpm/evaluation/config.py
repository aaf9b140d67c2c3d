"""`EvaluateConfig`: every option of an evaluation, and the options that a run's folder keeps."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from ..data import SPLITS
from ..files import default_folder
from ..head import INFERENCE_MODES
from ..models.constructors import named_again
from ..options import RunOptions, as_dict, free_names, option, read_options
from ..surrogates import SURROGATES
from .batch import Budget
from .neighbours import BATCH_SIZES
from .protocols import PROTOCOLS, as_budget
from .sweep import parse_radii
from .table import ATTACKS

#: The file in a run's folder that keeps its options.
OPTIONS: Final = "options.json"


@dataclass(frozen=True)
class EvaluateConfig(RunOptions):
    """The options of an evaluation; see `python evaluate.py --help`."""

    pretrained: bool | None = option(None, "model", "the model's pretrained weights (unless --checkpoint is given)")
    checkpoint: str | None = option(None, "model", "file of the weights instead, such as train.py's model.safetensors")
    inference: tuple[str, ...] | None = option(
        None, "model", f"inference modes of the HPM head, of {', '.join(INFERENCE_MODES)}, each with a report of its "
                       "own (the model's mode)", choices=INFERENCE_MODES)
    eot: int = option(1, "model", "draws of a randomised model whose logits and gradients are averaged", least=1)
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "model", "device of PyTorch")

    split: str = option("test", "data", f"one of {', '.join(SPLITS)}")
    class_subset: str | None = option(
        None, "data", "file of the classes that are kept, one a line, by name or number: the logits of the others take "
                      "part in no prediction and no attack, for a 1,000-class model on ImageNet-100, -A or -R (all)")
    num_images: int = option(100, "data", "number of images, the first of the split; 0 for all", least=0)

    eps_sweep: str | None = option(
        None, "attack", "radii FIRST:LAST:STEP in the norm of --threat, such as 0:0.2:0.02 or 0:8/255:2/255, each with "
                        "a report of its own; at 0 the robust accuracy is the clean one")
    batch_size: int = option(
        100, "attack", "images per judged batch; in batch mode the predictions depend on it", "-b", least=1)
    protocol: str = option("standard", "attack", "attacks and budgets; the next four options make it a custom one",
                           choices=PROTOCOLS)
    surrogates: tuple[str, ...] | None = option(
        None, "attack", f"surrogates to attack through, of {', '.join(SURROGATES)} (those that differ)")
    attacks: tuple[str, ...] | None = option(
        None, "attack", f"attacks to run, of {', '.join(ATTACKS)} (the protocol's)")
    budget: tuple[str, ...] = option(
        (), "attack", "ATTACK=N: iterations, after an x the number of targets, and after an r that of restarts: "
                      "apgd-ce=50 apgd-t=50x4r2 joint-subset=25r40 (the protocol's)")
    full_grid: bool = option(
        False, "attack", "attacks on every image through every surrogate, also after it is misclassified; slower. In "
                         "batch mode that is always so")
    neighbours: tuple[int, ...] | None = option(
        None, "attack", "batch sizes at which to measure how often a clean image flips when an adversary controls the "
                        "rest of its batch; none for no measurement (standard and fast: those of "
                        f"{','.join(map(str, BATCH_SIZES))} up to --batch-size; others and --eps-sweep: none)")
    surrogates_at_once: int | None = option(
        None, "attack", "surrogates attacked side by side: N times the memory, faster for small networks (5 for images "
                        "of up to 64x64 pixels, 1 for larger ones); progress is saved once per group", least=1)
    save_adversarial: bool = option(
        False, "output", "adversarial.safetensors, every candidate for --rejudge; by standard on an HPM head in batch "
                         "mode 88 times the images")

    def __post_init__(self) -> None:
        super().__post_init__()
        attacks = self.attacks or PROTOCOLS[self.protocol].attacks
        unused = [name for name in self.budgets() if name in ATTACKS and name not in attacks]
        if unused:
            raise ValueError(f"--budget is given for {', '.join(unused)}, which is not among the attacks that are run, "
                             f"{', '.join(attacks)}; name it in --attacks, or leave its budget out")
        if self.class_subset and self.class_map:
            raise ValueError("--class-subset and --class-map both number the classes; give one of them")
        self.radii()

    def budgets(self) -> dict[str, Budget]:
        return {name: as_budget(name, value) for name, _, value in (text.partition("=") for text in self.budget)}

    def radii(self) -> list[float] | None:
        """Returns the radii of `eps_sweep`; None means the radius of the threat model."""
        return None if self.eps_sweep is None else parse_radii(self.eps_sweep)

    def to_saved(self) -> dict[str, Any]:
        """Returns the options that a run's folder keeps, in JSON's types."""
        return {name: value for name, value in as_dict(self).items() if name not in free_names(EvaluateConfig)}


def saved_options(folder: Path, without: Collection[str] = ()) -> dict[str, Any]:
    """Returns the options that the run in a folder keeps, but for those in `without`; {} if it keeps none."""
    # The file may be a stranger's, so a value must be valid, and no option says which file to write or downloads data.
    file = folder / OPTIONS
    if not file.exists():
        return {}
    try:
        saved = read_options(file, EvaluateConfig)
    except ValueError as error:
        raise ValueError(f"{file} is not what this evaluate.py was called with, or damaged ({error}); choose another "
                         "folder") from error
    try:
        EvaluateConfig(**saved)
    except ValueError as error:
        raise ValueError(f"{file} says that {error}; mend it, or choose another folder") from error
    return {name: value for name, value in saved.items() if name not in (*without, *free_names(EvaluateConfig))}


def chosen(given: Mapping[str, Any], output: Path | None, resume: Path | None) -> tuple[EvaluateConfig, Path]:
    """Returns the options and the folder of a run: a new one in `output`, or the one in the folder `resume`."""
    if resume is None:
        config = EvaluateConfig(**given)
        return config, output or default_folder(config.model)
    if output and resume.resolve() != output.resolve():
        raise ValueError(f"--resume {resume} goes on in that folder, and --output {output} is another one; "
                         "leave out --output, or copy the folder there and resume the copy")
    return resumed(resume, given), resume


def resumed(folder: Path, given: Mapping[str, Any]) -> EvaluateConfig:
    """Returns the options of the run in a folder, or those `given` if it keeps none."""
    saved = saved_options(folder)
    named_again(saved.get("model", ""), given, folder)
    config = EvaluateConfig(**{**saved, **given})
    there, now = EvaluateConfig(**saved).to_saved() if saved else config.to_saved(), config.to_saved()
    different = [f"--{name.replace('_', '-')} {value} (there: {there[name]})" for name, value in now.items()
                 if value != there[name]]
    if different:
        raise ValueError(f"{folder} holds a run of other options: {', '.join(different)}. Leave them out, or choose "
                         "another folder")
    return config
