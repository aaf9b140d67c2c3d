"""The folder of an evaluation: a run by its options that writes its reports there, judged again, and merged."""

import json
import sys
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from ..data import ImageSplit, as_pixel_model, first_images
from ..deadline import time_limit
from ..files import LOCK, locked, remove_unfinished, writable_folder, write_text
from ..head import find_head, own_mode
from ..models.constructors import is_constructor, named_again
from ..models.create import class_names, create_model, open_split_for, usable_device
from ..models.saving import saved_training, weights_path
from ..report import TRUE_MODEL, AttackReport, merge_reports
from ..report.html import write_report
from ..report.shell import DATA_OPTIONS, DOOR, MODEL_OPTIONS
from ..subset import keep_classes, read_subset
from ..threat import ThreatModel
from .config import OPTIONS, EvaluateConfig, saved_options
from .header import evaluation_header
from .judge import rejudge, saved_protocol
from .msa import REPORT, STOPPED
from .neighbours import BATCH_SIZES
from .processes import is_first, several_processes
from .protocols import PROTOCOLS
from .robustbench import save_model_info
from .sweep import SWEEP, save_sweep, sweep
from .threads import use_threads

_SMALL_IMAGE = 64 * 64
_SURROGATES_AT_ONCE = 5


def run(config: EvaluateConfig, output: Path, *, resume: bool = False,
        robustbench_json: Path | None = None) -> list[AttackReport]:
    """Loads, attacks, and writes each report into the folder `output`, which is locked meanwhile.

    Several reports are in folders below it, with a page of all. With `resume` the folder may hold a run of the same
    options, any other is refused. Returns the reports on the first of several processes, [] on the others.
    """
    if robustbench_json and (config.eps_sweep or len(config.inference or ()) > 1):
        raise ValueError("--robustbench-json is of one evaluation; give one --inference and no --eps-sweep")
    with several_processes(config.device) as accelerator:
        if accelerator is not None:
            # The name may hold the time, and another one on each process.
            output = Path(broadcast_object_list([str(output)])[0])
        with locked(output, shared=accelerator is not None):
            if robustbench_json:
                writable_folder(robustbench_json.parent)
            reports = _evaluate(config, output, accelerator, resume)
            if not is_first(accelerator):
                return []
            finished = STOPPED not in reports[-1].protocol
            if finished and (len(reports) > 1 or config.eps_sweep):
                save_sweep(reports, output)
            if finished and robustbench_json:
                save_model_info(reports[0], robustbench_json)
            return reports


def _evaluate(config: EvaluateConfig, output: Path, accelerator: Accelerator | None,
              resume: bool) -> list[AttackReport]:
    model = load_model(config, accelerator)
    split = open_images(config, model)
    threat = ThreatModel.of(config.threat or split.threat)
    images, labels = first_images(split, config.num_images, config.workers)
    options = _attack_options(config, model, images)
    pixel_model = as_pixel_model(model, config.mean, config.std, config.eot)
    config = replace(config, threads=use_threads(config.threads, pixel_model, images[:config.batch_size]))
    about = _about(config, model, split)
    with time_limit(config.seconds()), mixed_precision(config):
        if is_first(accelerator):
            if not (output / REPORT).exists():
                print(evaluation_header(about, pixel_model, images, threat, options["protocol"], radii=config.radii(),
                                        modes=config.inference, batch_size=config.batch_size, accelerator=accelerator,
                                        time_limit=config.time_limit), file=sys.stderr)
            begin(config, output, resume)
        try:
            return list(sweep(
                pixel_model, images, labels, threat.norm, config.radii() or [threat.eps], config.inference,
                folder=output, save_adversarial=config.save_adversarial, accelerator=accelerator, progress=True,
                about=about, **options))
        except Exception:
            # The same command, mended, is to find no earlier run if nothing was attacked.
            if is_first(accelerator) and {file.name for file in output.iterdir()} <= {OPTIONS, LOCK}:
                (output / OPTIONS).unlink(missing_ok=True)
            raise


def mixed_precision(config: EvaluateConfig) -> AbstractContextManager[Any]:
    """Returns the autocast of the options, in which the model is judged; attacks search in float32."""
    if not config.amp:
        return nullcontext()
    return torch.autocast(torch.device(config.device).type, getattr(torch, config.amp_dtype))


def _attack_options(config: EvaluateConfig, model: nn.Module, images: Tensor) -> dict[str, Any]:
    """Returns the arguments of `sweep` that the options give, checked against model and images."""
    if config.inference:
        find_head(model)
    if config.neighbours and (
            "batch" not in (config.inference or [own_mode(model)]) or not find_head(model).is_fitted()):
        raise ValueError("--neighbours measures how neighbours in a batch flip predictions; it needs a fitted HPM head "
                         "and --inference batch")
    at_once = config.surrogates_at_once
    if at_once is None:
        at_once = _SURROGATES_AT_ONCE if images[0, 0].numel() <= _SMALL_IMAGE else 1
    protocol = PROTOCOLS[config.protocol].changed(config.surrogates or None, config.attacks or None, config.budgets(),
                                                  config.full_grid or None, at_once)
    neighbours = config.neighbours
    if neighbours is None:
        skips = protocol.name == "custom" or config.eps_sweep or config.eot > 1
        neighbours = () if skips else tuple(
            size for size in BATCH_SIZES if size <= min(len(images), config.batch_size))
    return {"protocol": protocol, "batch_size": config.batch_size, "seed": config.seed, "neighbours": neighbours}


def _about(config: EvaluateConfig, model: Any, split: ImageSplit) -> dict[str, Any]:
    names = split.class_names or class_names(model)
    options = {name: value for name, value in config.to_saved().items()
               if name in (*MODEL_OPTIONS, *DATA_OPTIONS) and value not in (None, {})
               and (name == "pretrained" or value is not False)}
    about: dict[str, Any] = {"model": config.model, "weights": weights_of(model, config), "dataset": config.dataset,
                             "split": config.split, "options": options}
    if config.threads is not None:
        about["threads"] = config.threads
    if config.class_subset:
        about["class_subset"] = f"{model.num_classes} of the model's {len(model.class_map)} classes"
    return about | ({"class_names": list(names)} if names else {})


def begin(config: EvaluateConfig, output: Path, resume: bool = False) -> None:
    """Writes the options of a run into its folder, unless that holds another run."""
    found = [name for name in ("report.json", "adversarial.safetensors", SWEEP, OPTIONS) if (output / name).exists()]
    if found and not (resume and OPTIONS in found):
        raise ValueError(f"{output} holds the {found[0]} of an earlier run"
                         + (f" without its {OPTIONS}" if resume else "") + "; choose another --output, "
                         + ("go on with it by --resume, " if found[0] == OPTIONS else "") + "or remove it")
    remove_unfinished(output)
    if resume and OPTIONS not in found:
        print(f"{output} holds no run yet; this begins one there", file=sys.stderr)
    write_text(output / OPTIONS, json.dumps(config.to_saved(), indent=1) + "\n")


def load_model(config: EvaluateConfig, accelerator: Accelerator | None = None) -> Any:
    """Returns the model of the options, in eval mode, on this process's device."""
    device = usable_device(config.device)
    pretrained = config.checkpoint is None if config.pretrained is None else config.pretrained
    arguments = (config.model_kwargs or {}) | config.given("num_classes", "in_chans")
    own = config.given("mean", "std")
    if config.checkpoint and own:
        arguments["pretrained_cfg_overlay"] = {**(arguments.get("pretrained_cfg_overlay") or {}), **own}
    model = create_model(config.model, pretrained=pretrained, checkpoint=config.checkpoint, **arguments)
    if config.class_subset:
        keep_classes(model, read_subset(config.class_subset))
    if config.channels_last:
        model.to(memory_format=torch.channels_last)
    return model.to(device if accelerator is None else accelerator.device).eval()


def open_images(config: EvaluateConfig, model: Any) -> ImageSplit:
    """Returns the images of the options, as the model takes them."""
    if config.split == "val":
        _warn_of_seen(model, config)
    return open_split_for(model, config.dataset, config.split, img_size=config.img_size, crop_pct=config.crop_pct,
                          interpolation=config.interpolation, data_dir=config.data_dir,
                          download=config.dataset_download, class_map=config.class_map,
                          val_fraction=None if config.split == "test" else config.val_fraction)


def _warn_of_seen(model: Any, config: EvaluateConfig) -> None:
    """Warns if the weights' training may have had a smaller validation split of the same data set."""
    file = Path(config.checkpoint) if config.checkpoint else weights_path(model)
    options = (saved_training(file) or {}).get("options") or {}
    theirs, ours = options.get("val_fraction"), config.val_fraction
    # None holds out a tenth at most.
    if options.get("dataset") == config.dataset and theirs != ours and (theirs is None or theirs < (ours or 0.1)):
        warnings.warn(f"{file} was trained with {f'--val-fraction {theirs:g}' if theirs else 'no --val-fraction'}, and "
                      "the validation split of this run may have images of that training; give the same", stacklevel=3)


def weights_of(model: Any, config: EvaluateConfig) -> str:
    if config.checkpoint:
        return config.checkpoint
    if is_constructor(config.model):
        return f"those that {config.model} gives it"
    if config.pretrained is False:
        return "random"
    overlay = (config.model_kwargs or {}).get("pretrained_cfg_overlay") or {}
    if own := next((overlay[name] for name in ("file", "url", "hf_hub_id") if name in overlay), None):
        return str(own)
    return f"pretrained, tag {model.pretrained_cfg.get('tag') or '(none)'}"


def load_report(path: Path) -> AttackReport:
    """Returns the report in a run's folder, or in the file `path`."""
    if (path / SWEEP).exists() and not (path / "report.json").exists():
        names = sorted(file.parent.name for file in path.glob("*/report.json"))
        raise ValueError(f"{path} holds several reports, {', '.join(names)}; give the folder of one")
    file = path / "report.json" if path.is_dir() else path
    if not file.exists():
        raise ValueError(f"there is no report {file}; expected the report.json that evaluate.py wrote, or its folder"
                         + (f". The run there is not finished: {' '.join(DOOR)} evaluate --resume {path}"
                            if (path / OPTIONS).exists() else ""))
    return AttackReport.load(file)


def merged(paths: Sequence[Path], output: Path) -> AttackReport:
    """Returns the merged report of several seeds (`merge_reports`), written into a new folder."""
    report = merge_reports([load_report(path) for path in paths])
    if (output / REPORT).exists():
        raise ValueError(f"{output} holds a report; choose another --output")
    write_report(report, output)
    return report


def rejudge_folder(folder: Path, given: Mapping[str, Any]) -> tuple[bool, str]:
    """Judges a run's saved candidates again; returns whether every verdict is the report's, and a text that says so."""
    if "inference" in given:
        raise ValueError("--rejudge judges in the inference mode of the saved report; leave out --inference")
    # The report says the inference mode, and it may be another machine.
    saved = saved_options(folder, without=("inference", "device"))
    named_again(saved.get("model", ""), given, folder)
    config = EvaluateConfig(**{**saved, **given})
    model = as_pixel_model(load_model(config), config.mean, config.std, config.eot)
    if config.threads is not None:
        torch.set_num_threads(config.threads)  # others round differently
    report = load_report(folder)
    candidates = folder / "adversarial.safetensors"
    if not candidates.exists():
        raise ValueError(f"the run in {folder} has kept no candidates ({candidates.name}); attack again in another "
                         "folder, with --save-adversarial")
    if saved_protocol(candidates) != report.protocol:
        raise ValueError(f"adversarial.safetensors and report.json in {folder} are of different runs; run the attack "
                         "again with --save-adversarial")
    with mixed_precision(config):
        verdicts, expected = rejudge(model, candidates), report.verdicts
    if {"random-forward", "averaged-draws"} & {flag.name for flag in report.flags} and not report.protocol["full_grid"]:
        verdicts, expected = (_of_unbroken(rows, report.verdicts) for rows in (verdicts, expected))
    # A row of the true model may be a second name of a set that is there.
    different = [name for name in {**expected, **verdicts} if verdicts.get(name) != expected.get(name)
                 and (name in verdicts or not name.startswith(f"{TRUE_MODEL}/"))]
    if different:
        return False, (f"{len(different)} of {len(verdicts)} sets are judged otherwise than in the report: "
                       f"{', '.join(different)}. Is it the same model, device and version?")
    return True, (f"{len(verdicts)} sets of {report.num_images} images, judged again in batches of "
                  f"{report.protocol['batch_size']}: the images are the run's, every candidate is within "
                  f"{report.protocol['threat']} of them, and every verdict as in the report")


def _of_unbroken(rows: Mapping[str, str], verdicts: Mapping[str, str]) -> dict[str, str]:
    """Returns the rows, by set, with a 0 for each image that an earlier set of `verdicts` broke."""
    # A cascade draws no more for it.
    found, standing = {}, "1" * len(next(iter(verdicts.values())))
    for name, row in verdicts.items():
        if name in rows:
            found[name] = "".join(map(min, rows[name], standing))
        standing = "".join(map(min, row, standing))
    return found
