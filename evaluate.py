#!/usr/bin/env python3
"""Measures the robust accuracy of a classifier with the Mixed Surrogate Attack.

Without options: the embedded `hpm_wrn10_2` on the first 100 held-out digits, at AutoAttack's standard budgets.
Prints a table, and writes report.json, report.md and report.html into the output folder, and what it was called with
(options.json). Several processes share the work:

    torchrun --nproc_per_node 2 evaluate.py --device cpu --batch-size 50

Each attacks whole batches, so where there are fewer batches than processes some have nothing to do.
"""

import argparse
import io
import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list
from timm.utils import ParseKwargs

import timm_hpm
from timm_hpm import compare, comparison_markdown, report_markdown
from timm_hpm.console import run_command
from timm_hpm.data import DATASETS, SPLITS, as_pixel_model, first_images, normalisation_of
from timm_hpm.evaluation import ATTACKS, PROTOCOLS, Budget
from timm_hpm.evaluation.judge import saved_protocol
from timm_hpm.evaluation.neighbours import BATCH_SIZES, check_neighbours
from timm_hpm.evaluation.protocols import as_budget
from timm_hpm.evaluation.robustbench import AUTHORS_FIELDS, parse_known, save_model_info
from timm_hpm.evaluation.sweep import SWEEP, own_mode, parse_radii, save_sweep, sweep, sweep_markdown
from timm_hpm.files import LOCK, default_folder, locked, remove_unfinished, use_any_console, writable_folder, write_text
from timm_hpm.head import check_inference
from timm_hpm.models.create import class_names, create_model, open_split_for, usable_device
from timm_hpm.report import TRUE_MODEL
from timm_hpm.report.command import DATA_OPTIONS, MODEL_OPTIONS, shell_line
from timm_hpm.report.tables import pixels_note
from timm_hpm.surrogates import SURROGATES


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    group = parser.add_argument_group("model")
    group.add_argument("--model", default="hpm_wrn10_2", help="timm model, with or without an HPM head (%(default)s)")
    group.add_argument("--pretrained", action=argparse.BooleanOptionalAction, default=None,
                       help="the model's pretrained weights (the default, unless --checkpoint is given)")
    group.add_argument("--checkpoint", metavar="FILE", help="weights to load instead, such as train.py's "
                                                            "model.safetensors")
    group.add_argument("--num-classes", type=int, metavar="N", help="classes of the --checkpoint (the model's)")
    group.add_argument("--model-kwargs", nargs="*", default={}, action=ParseKwargs, metavar="NAME=VALUE",
                       help="arguments of timm.create_model")
    for name in ("mean", "std"):
        group.add_argument(f"--{name}", type=float, nargs="+", metavar="X",
                           help=f"{name} that pixels in [0, 1] are normalised by, a value a channel (the model's "
                                "pretrained_cfg)")
    group.add_argument("--inference", type=_names, metavar="MODES",
                       help=f"inference mode of the HPM head, of {', '.join(timm_hpm.INFERENCE_MODES)} (the model's "
                            "own); several, separated by commas, are measured one after another")
    group.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    group = parser.add_argument_group("data")
    group.add_argument("--dataset", default="digits", help=f"one of {', '.join(DATASETS)} (%(default)s)")
    group.add_argument("--data-dir", metavar="FOLDER", help="where the data set lies; see docs/data.md")
    group.add_argument("--dataset-download", action="store_true", help="let torchvision fetch it")
    group.add_argument("--class-map", metavar="FILE",
                       help="file of class names in the order of the model's classes, as in timm; see docs/data.md")
    group.add_argument("--img-size", type=int, metavar="N",
                       help="pixels a side, for images that are decoded (the model's)")
    group.add_argument("--split", default="test", help=f"one of {', '.join(SPLITS)} (%(default)s)")
    group.add_argument("--num-images", type=int, metavar="N", help="the first N images of the split, 0 for all (100)",
                       default=100)
    group = parser.add_argument_group("attack")
    group.add_argument("--threat", metavar="NORM:EPS", help="such as Linf:8/255 or L2:0.5 (the data set's usual one)")
    group.add_argument("--eps-sweep", metavar="FIRST:LAST:STEP",
                       help="measure at each of these radii in the norm of --threat, such as 0:0.2:0.02 or "
                            "0:8/255:2/255; at 0 the robust accuracy is the clean one")
    group.add_argument("-b", "--batch-size", type=int, default=100, metavar="N",
                       help="images in a judged batch; in batch mode the answers depend on it (%(default)s)")
    group.add_argument("--protocol", default="standard", choices=[*PROTOCOLS, "custom"],
                       help="what is run (%(default)s); the next four options make it a custom one")
    group.add_argument("--surrogates", type=_names,
                       help=f"comma-separated, of {', '.join(SURROGATES)} (those that differ)")
    group.add_argument("--attacks", type=_names, help=f"comma-separated, of {', '.join(ATTACKS)} (the protocol's)")
    group.add_argument("--budget", nargs="+", default=[], metavar="ATTACK=N",
                       help="iterations, and with an x the number of targets, or of rounds: apgd-ce=50 apgd-t=50x4 "
                            "joint-subset=25x40 (the protocol's)")
    group.add_argument("--survivors-only", action="store_true",
                       help="attack an image no more once it is broken: faster where much is, and the rows of single "
                            "attacks become those of a cascade, as AutoAttack's are")
    group.add_argument("--neighbours", type=_sizes, metavar="N,N",
                       help="also ask what neighbours in batches of these sizes do, in batch mode, to an image that is "
                            f"left untouched; none: do not ask (by standard and fast: those of "
                            f"{','.join(map(str, BATCH_SIZES))} up to --batch-size; others and --eps-sweep do not ask)")
    group.add_argument("--neighbours-mix", type=_fractions, metavar="X,X",
                       help="do that for these values of the head's mix (its own)")
    group.add_argument("--surrogates-at-once", type=int, metavar="N",
                       help="surrogates attacked side by side: N times the memory, faster for small nets (5 for images "
                            "of up to 64x64 pixels, 1 for larger ones); a run is kept after each attack on so many")
    group.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    group = parser.add_argument_group("output")
    group.add_argument("--output", type=Path, metavar="FOLDER", help="(output/<model>-<date>)")
    group.add_argument("--resume", type=Path, metavar="FOLDER",
                       help="go on with a run that was stopped, by its output folder, or look at one that is finished; "
                            "other options are not needed, and refused where they differ from that run's, but for "
                            "RobustBench's and --dataset-download. An empty folder begins a run")
    group.add_argument("--save-adversarial", action="store_true",
                       help="also write adversarial.safetensors: every candidate, for --rejudge; by standard on an HPM "
                            "head in batch mode 88 times the images")
    group.add_argument("--rejudge", type=Path, metavar="FOLDER",
                       help="attack nothing: judge that folder's adversarial.safetensors again, by that run's model "
                            "or the one given, compare with its report.json, and say whether they agree")
    group.add_argument("--compare", nargs=2, type=Path, metavar=("A", "B"),
                       help="attack nothing: print two reports (files or folders) on the same images side by side, "
                            "with the paired significance of their difference (McNemar)")
    group.add_argument("--robustbench-json", type=Path, metavar="FILE", help="also write RobustBench's model_info")
    group.add_argument("--robustbench-info", nargs="*", default=[], metavar="NAME=VALUE",
                       help=f"fields of it that only the authors know, of {', '.join(AUTHORS_FIELDS)}")
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Returns the command line's options, after those of the run that --resume or --rejudge names."""
    parser = make_parser()
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    if args.rejudge and (args.rejudge / _OPTIONS).exists():
        # The report says the inference mode, and it may be another machine.
        return parser.parse_args([*saved_arguments(args.rejudge / _OPTIONS, without=("inference", "device")), *argv])
    if args.resume and args.output and args.resume.resolve() != args.output.resolve():
        raise ValueError(f"--resume {args.resume} goes on in that folder, and --output {args.output} is another one; "
                         "leave out --output, or copy the folder there and resume the copy")
    file = args.resume and args.resume / _OPTIONS
    if file and file.exists():
        saved = saved_arguments(file)
        there = _options(parser.parse_args(saved))
        args = parser.parse_args([*saved, *argv])
        now = _options(args)
        different = [f"--{name.replace('_', '-')} {now[name]} (there: {there[name]})" for name in now
                     if now[name] != there[name]]
        if different:
            raise ValueError(f"{args.resume} holds a run of other options: {', '.join(different)}. Leave them out, or "
                             "choose another folder")
    return args


def main(argv: list[str] | None = None) -> int:
    """Runs the evaluation; returns the exit code."""
    use_any_console()
    args = parse_args(argv)
    if args.compare:
        first, second = (timm_hpm.AttackReport.load(report_file(path)) for path in args.compare)
        print(comparison_markdown(compare(first, second)))
        return 0
    if args.batch_size < 1:
        raise ValueError(f"--batch-size is {args.batch_size}; expected at least 1")
    if args.rejudge and args.inference:
        raise ValueError("--rejudge judges in the inference mode of the saved report; leave out --inference")
    if args.protocol == "custom" and not (args.surrogates or args.attacks or args.budget or args.survivors_only):
        raise ValueError("--protocol custom says nothing by itself; give --surrogates, --attacks, --budget or "
                         "--survivors-only")
    budgets = dict(_budget(text) for text in args.budget)
    attacks = args.attacks or PROTOCOLS["standard" if args.protocol == "custom" else args.protocol].attacks
    unused = [name for name in budgets if name in ATTACKS and name not in attacks]
    if unused:
        raise ValueError(f"--budget is given for {', '.join(unused)}, which is not among the attacks that are run, "
                         f"{', '.join(attacks)}; name it in --attacks, or leave its budget out")
    with several_processes(args.device) as accelerator:
        if args.rejudge:
            model = load_model(args, accelerator)
            given = args.mean is not None or args.std is not None
            return rejudge(as_pixel_model(model, args.mean, args.std) if given else model, args.rejudge)
        chosen = [args.resume or args.output or default_folder(args.model)]
        if accelerator is not None:
            broadcast_object_list(chosen)
        with locked(chosen[0], shared=accelerator is not None):
            return evaluate(args, budgets, chosen[0], accelerator)


@contextmanager
def several_processes(device: str) -> Iterator[Accelerator | None]:
    """Yields the accelerator of several processes, or None where there is but one.

    In the end they part in an orderly way; a process that only stops is aborted now and then, and torchrun fails.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield None
        return
    # One process may have a batch more than another, and a batch may take hours.
    patience = InitProcessGroupKwargs(timeout=timedelta(days=30))
    accelerator = Accelerator(cpu=device == "cpu", kwargs_handlers=[patience])
    yield accelerator
    accelerator.end_training()  # not after an error: the others' own errors would be of a lost connection


def evaluate(args: argparse.Namespace, budgets: dict[str, Budget], output: Path,
             accelerator: Accelerator | None) -> int:
    """Loads, attacks, prints and writes into the folder `output`, which is `locked`; returns the exit code."""
    if args.robustbench_json and (args.eps_sweep or len(args.inference or ()) > 1):
        raise ValueError("--robustbench-json is of one evaluation; give one --inference and no --eps-sweep")
    radii = parse_radii(args.eps_sweep) if args.eps_sweep else None
    for mode in args.inference or ():
        check_inference(mode)
    authors = parse_known(args.robustbench_info)
    if args.robustbench_json:
        writable_folder(args.robustbench_json.parent)
    model = load_model(args, accelerator)
    split = open_split_for(model, args.dataset, args.split, img_size=args.img_size, data_dir=args.data_dir,
                           download=args.dataset_download, class_map=args.class_map)
    threat = timm_hpm.ThreatModel.parse(args.threat or split.threat)
    images, labels = first_images(split, args.num_images)
    names = split.class_names or class_names(model)
    if args.inference:
        timm_hpm.find_head(model)
    neighbours = args.neighbours
    if neighbours is None:
        changed = args.protocol == "custom" or args.surrogates or args.attacks or args.budget or args.survivors_only
        neighbours = [] if changed or radii else [
            size for size in BATCH_SIZES if size <= min(len(images), args.batch_size)]
    if args.neighbours or args.neighbours_mix:
        check_neighbours(neighbours, args.neighbours_mix, len(images))
        check_asks_batches(model, args.inference or [own_mode(model)])
    at_once = args.surrogates_at_once
    if at_once is None:
        at_once = 5 if images[0, 0].numel() <= 64 * 64 else 1
    if accelerator is not None and accelerator.is_main_process:
        print(idle_note(len(images), args.batch_size, accelerator.num_processes), end="", file=sys.stderr)
    if accelerator is None or accelerator.is_main_process:
        print(pixels_note({"normalisation": normalisation_of(as_pixel_model(model, args.mean, args.std))}),
              file=sys.stderr)
    begins = (accelerator is None or accelerator.is_main_process) and begin(args, output)
    finished = any((output / name).exists() for name in ("report.json", SWEEP))
    try:
        reports = list(sweep(
            model, images, labels, threat.norm, radii or [threat.eps], args.inference,
            folder=output, save_adversarial=args.save_adversarial, accelerator=accelerator,
            protocol="standard" if args.protocol == "custom" else args.protocol, batch_size=args.batch_size,
            surrogates=args.surrogates, attacks=args.attacks, budgets=budgets,
            survivors_only=args.survivors_only, mean=args.mean, std=args.std,
            surrogates_at_once=at_once, seed=args.seed, progress=True, neighbours=neighbours,
            neighbours_mixes=args.neighbours_mix,
            about={"model": args.model, "weights": weights_of(model, args), "dataset": args.dataset,
                   "split": args.split, "options": {
                       name: value for name, value in _options(args).items()
                       if name in (*MODEL_OPTIONS, *DATA_OPTIONS) and value not in (None, {})},
                   } | ({"class_names": list(names)} if names else {}),
        ))
    except ValueError:
        # What is wrong was found before anything was kept: the command, mended, is to find no other run there.
        if begins and [path.name for path in output.rglob("*") if path.is_file() and path.name != LOCK
                       ] == [_OPTIONS]:
            (output / _OPTIONS).unlink()
        raise
    except KeyboardInterrupt:
        again = ["python", "evaluate.py", "--resume", str(output), *(
            ["--robustbench-json", str(args.robustbench_json), "--robustbench-info", *args.robustbench_info]
            if args.robustbench_json else [])]
        print(f"\nstopped; to go on: {shell_line(again)}", file=sys.stderr)
        return 130
    if accelerator is None or accelerator.is_main_process:
        several = len(reports) > 1 or radii is not None
        if several:
            save_sweep(reports, output)
            print(sweep_markdown(reports))
        else:
            print(report_markdown(reports[0]))
        if args.robustbench_json:
            save_model_info(reports[0], args.robustbench_json, authors)
        print(f"{output} holds a finished run" if finished else
              f"written: {output / (SWEEP if several else 'report.html')}, and what lies beside it")
    return 0


def idle_note(num_images: int, batch_size: int, processes: int) -> str:
    """Returns a line that says how many processes have nothing to attack, or nothing where each has a batch."""
    batches = -(-num_images // batch_size)
    if batches >= processes:
        return ""
    return (f"{num_images} images in batches of {batch_size} make {batches} to attack, so {processes - batches} of the "
            f"{processes} processes have none. A smaller --batch-size makes more; in batch mode the answers depend on "
            "it\n")


def check_asks_batches(model: torch.nn.Module, modes: list[str]) -> None:
    """Raises a ValueError where --neighbours has nothing to ask in any of the modes; names those where it has not."""
    others = [mode for mode in modes if mode != "batch"]
    if others == modes or not timm_hpm.find_head(model).is_fitted():
        raise ValueError("--neighbours asks what neighbours in a batch do, and here they do nothing (inference mode "
                         f"{', '.join(modes)}); it needs a fitted HPM head and --inference batch")
    if others:
        print(f"--neighbours is asked in batch mode only, not in {', '.join(others)}", file=sys.stderr)


# What a run was called with; and what only the command line says: an options.json may be a stranger's, and these name
# other folders and files, some of them to write.
_OPTIONS = "options.json"
_NOT_SAVED = ("resume", "rejudge", "output", "compare", "robustbench_json", "robustbench_info", "dataset_download")
_COMMA_SEPARATED = ("inference", "surrogates", "attacks", "neighbours", "neighbours_mix")


def begin(args: argparse.Namespace, output: Path) -> bool:
    """Writes the options of this run into its folder; returns whether it begins there, and is not resumed.

    Raises:
        ValueError: if the folder holds a run, and --resume does not say so; nothing is written then.
    """
    found = [name for name in ("report.json", "adversarial.safetensors", SWEEP, _OPTIONS) if (output / name).exists()]
    if found and not (args.resume and _OPTIONS in found):
        raise ValueError(f"{output} holds the {found[0]} of an earlier run"
                         + (f" without its {_OPTIONS}" if args.resume else "") + "; choose another --output, "
                         + ("go on with it by --resume, " if found[0] == _OPTIONS else "") + "or remove it")
    remove_unfinished(output)
    if args.resume and _OPTIONS not in found:
        print(f"{output} holds no run yet; this begins one there", file=sys.stderr)
    write_text(output / _OPTIONS, json.dumps(_options(args), indent=1) + "\n")
    return _OPTIONS not in found


def saved_arguments(file: Path, without: Iterable[str] = ()) -> list[str]:
    """Returns the command line that gives the options of the run in a folder, but for those in `without`.

    The file may be a stranger's: each value must be one that the command line gives, and none that says where to write
    is heeded (`_NOT_SAVED`).

    Raises:
        ValueError: if the file holds no options of this script, or a value of another type; the message names it.
    """
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        saved = None
    parser = make_parser()
    if not isinstance(saved, dict) or not saved.keys() <= vars(parser.parse_args([])).keys():
        raise ValueError(f"{file} is not what this evaluate.py was called with, or damaged; choose another folder")
    arguments = []
    for name, value in saved.items():
        if name in _NOT_SAVED:
            continue
        words = _as_arguments(name, value)
        try:
            with redirect_stderr(io.StringIO()):
                given = _options(parser.parse_args(words))[name]
        except (SystemExit, ValueError):
            given = None
        if repr(given) != repr(value):
            raise ValueError(f"{file} says that {name} is {value!r:.100}, which is no value of "
                             f"--{name.replace('_', '-')}; mend it, or choose another folder")
        if name not in without:
            arguments += words
    return arguments


def _as_arguments(name: str, value: Any) -> list[str]:
    """Returns the words of the command line that give an option's value, which is of one of JSON's types."""
    option = f"--{name.replace('_', '-')}"
    if value is None or value is False:
        return [option.replace("--", "--no-", 1)] if value is False and name == "pretrained" else []
    if value is True:
        return [option]
    if isinstance(value, dict):
        value = [f"{key}={part!r}" for key, part in value.items()]
    elif isinstance(value, list) and name in _COMMA_SEPARATED:
        value = ",".join(map(str, value)) or ("none" if name == "neighbours" else "")
    if isinstance(value, list):
        return [option, *map(str, value)] if value else []
    return [f"{option}={value}"]


def load_model(args: argparse.Namespace, accelerator: Accelerator | None) -> Any:
    """Returns the model of the command line, in eval mode, on this process's device."""
    device = usable_device(args.device)
    pretrained = args.checkpoint is None if args.pretrained is None else args.pretrained
    given: dict[str, Any] = {} if args.num_classes is None else {"num_classes": args.num_classes}
    other = args.model_kwargs.get("num_classes", args.num_classes)
    if args.num_classes is not None and other != args.num_classes:
        raise ValueError(f"--num-classes is {args.num_classes} and --model-kwargs num_classes={other}; give one of "
                         "them")
    normalised = {name: tuple(value) for name, value in (("mean", args.mean), ("std", args.std)) if value is not None}
    if args.checkpoint and normalised:
        given["pretrained_cfg_overlay"] = {**(args.model_kwargs.get("pretrained_cfg_overlay") or {}), **normalised}
    model = create_model(args.model, pretrained=pretrained, checkpoint=args.checkpoint, **args.model_kwargs | given)
    return model.to(device if accelerator is None else accelerator.device).eval()


def weights_of(model: Any, args: argparse.Namespace) -> str:
    """Returns what the report says of the weights' origin."""
    if args.checkpoint:
        return args.checkpoint
    if args.pretrained is False:
        return "random"
    overlay = args.model_kwargs.get("pretrained_cfg_overlay") or {}
    if own := next((overlay[name] for name in ("file", "url", "hf_hub_id") if name in overlay), None):
        return str(own)
    return f"pretrained, tag {model.pretrained_cfg.get('tag') or '(none)'}"


def report_file(path: Path) -> Path:
    """Returns the report.json of a run's folder, or `path` itself if that is no folder.

    Raises:
        ValueError: if there is no report, or the folder holds several.
    """
    if (path / SWEEP).exists() and not (path / "report.json").exists():
        names = sorted(file.parent.name for file in path.glob("*/report.json"))
        raise ValueError(f"{path} holds several reports, {', '.join(names)}; give the folder of one")
    file = path / "report.json" if path.is_dir() else path
    if not file.exists():
        raise ValueError(f"there is no report {file}; expected the report.json that evaluate.py wrote, or its folder"
                         + (f". The run there is not finished: python evaluate.py --resume {path}"
                            if (path / _OPTIONS).exists() else ""))
    return file


def rejudge(model: torch.nn.Module, folder: Path) -> int:
    """Judges saved candidates again and prints whether they give the report's verdicts; returns the exit code."""
    report = timm_hpm.AttackReport.load(report_file(folder))
    if saved_protocol(folder / "adversarial.safetensors") != report.protocol:
        raise ValueError(f"adversarial.safetensors and report.json in {folder} are of different runs; run the attack "
                         "again with --save-adversarial")
    verdicts = timm_hpm.rejudge(model, folder / "adversarial.safetensors")
    # Square on the true model may be a second name of a set that is there.
    different = [name for name in {**report.verdicts, **verdicts} if verdicts.get(name) != report.verdicts.get(name)
                 and (name in verdicts or name != f"{TRUE_MODEL}/square")]
    if different:
        print(f"{len(different)} of {len(verdicts)} sets are judged otherwise than in the report: "
              f"{', '.join(different)}. Is it the same model, device and version?")
        return 1
    print(f"{len(verdicts)} sets of {report.num_images} images, judged again in batches of "
          f"{report.protocol['batch_size']}: the images are the run's, every candidate is within "
          f"{report.protocol['threat']} of them, and every verdict as in the report")
    return 0


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the options that belong to a run, in JSON's types; where it is written is not among them."""
    options = {name: value for name, value in vars(args).items() if name not in _NOT_SAVED}
    return json.loads(json.dumps(options, default=str))


def _budget(text: str) -> tuple[str, Budget]:
    name, _, value = text.partition("=")
    return name, as_budget(name, value)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _sizes(text: str) -> list[int]:
    return [] if text == "none" else [int(number) for number in text.split(",")]


def _fractions(text: str) -> list[float]:
    return [float(number) for number in text.split(",")]


if __name__ == "__main__":
    run_command("evaluate.py", main)
