"""`evaluate`, `sweep`, `compare` and `rejudge`: the Mixed Surrogate Attack and its reports."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import PartialState

from ..console import show
from ..deadline import OutOfTime
from ..evaluation.config import OPTIONS, EvaluateConfig, chosen
from ..evaluation.folder import load_report, merged, rejudge_folder, run
from ..evaluation.msa import PARTIAL, STOPPED
from ..evaluation.sweep import PAGE, SWEEP
from ..files import default_folder
from ..options import given_options
from ..report import compare as compare_reports
from ..report.markdown import comparison_markdown, report_markdown
from ..report.sweep_page import sweep_markdown
from .parser import Parser, resuming

_ABOUT = """\
Measures the robust accuracy of a classifier with the Mixed Surrogate Attack. Without options: the embedded
hpm_wrn10_2 on the first 100 held-out digits, at AutoAttack's standard budgets. Prints a table, and writes report.json,
report.md, report.html and the options (options.json) into the output folder. Several processes share the batches:
torchrun --nproc_per_node 2 -m timm_hpm evaluate --device cpu --batch-size 50"""
_EXAMPLES = ("", "--model hpm_wrn10_2 --inference batch --num-images 0", "--resume output/run")


def parse_args(argv: list[str] | None = None) -> tuple[Any, dict[str, Any]]:
    """Returns the arguments of the command itself, and the given options of `EvaluateConfig`."""
    parser = Parser("evaluate", _EXAMPLES, _ABOUT)
    _add_folders(parser)
    parser.add_argument("--rejudge", type=Path, metavar="FOLDER",
                        help="folder of a run whose adversarial.safetensors is judged again, by its model or the one "
                             "given, and compared with its report.json")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("A", "B"),
                        help="two reports (files or folders) to print side by side, with McNemar's test of them")
    parser.add_argument("--merge", nargs="+", type=Path, metavar="REPORT",
                        help="two or more reports (files or folders) of several seeds, whose worst case is printed and "
                             "written into --output")
    return given_options(parser, EvaluateConfig, argv)


def _add_folders(parser: Parser) -> None:
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="(output/<model>-<date>)")
    parser.add_argument("--resume", type=Path, metavar="FOLDER",
                        help="folder of a run to resume, or to show if it is finished; its options are not needed, and "
                             "refused if they differ. An empty folder begins a run")
    parser.add_argument("--robustbench-json", type=Path, metavar="FILE",
                        help="file for RobustBench's model_info; the fields that only its authors know are empty")


def main(argv: list[str] | None = None) -> int:
    """Runs an evaluation; returns the exit code."""
    args, given = parse_args(argv)
    if args.compare:
        return _compare(*args.compare)
    if args.rejudge:
        return _rejudge(args.rejudge, given)
    if args.merge:
        output = args.output or default_folder("merged")
        show(report_markdown(merged(args.merge, output)))
        print(f"written: {output / PAGE}, and the files beside it")
        return 0
    return _evaluate(args, given)


def sweep(argv: list[str] | None = None) -> int:
    """Runs an evaluation at each of several radii; returns the exit code."""
    parser = Parser("sweep", ("0:0.2:0.02", "0:8/255:2/255 --model hpm_resnet18 --dataset folder --data-dir data",
                              "0:0.2:0.05 --inference batch,sample --protocol fast"), """\
Measures the robust accuracy at several radii of the threat model, in one inference mode or several: a report for each,
and a page with the curves. The other options are those of evaluate.""")
    parser.add_argument("radii", metavar="FIRST:LAST:STEP", help="radii in the norm of --threat, LAST included")
    _add_folders(parser)
    args, given = given_options(parser, EvaluateConfig, argv)
    return _evaluate(args, given | {"eps_sweep": args.radii})


def compare(argv: list[str] | None = None) -> int:
    """Prints two reports side by side; returns the exit code."""
    parser = Parser("compare", ("output/a output/b", "output/a/report.json output/b/report.json",
                                "output/sweep/batch-Linf-0.1 output/sweep/sample-Linf-0.1"), """\
Prints two reports side by side, image by image, with McNemar's test of the difference.""")
    for name in ("a", "b"):
        parser.add_argument(name, type=Path, metavar=name.upper(), help="a report.json, or the folder of a run")
    args = parser.parse_args(argv)
    return _compare(args.a, args.b)


def rejudge(argv: list[str] | None = None) -> int:
    """Judges the saved candidates of a run again; returns 1 if a verdict differs, else 0."""
    parser = Parser("rejudge", ("output/run", "output/run --device cpu", "output/run --checkpoint other.pt"), """\
Judges the candidates of a run again (evaluate --save-adversarial), by its model or the one given, and compares the
verdicts with those of its report. The other options are those of evaluate.""")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder of the run")
    args, given = given_options(parser, EvaluateConfig, argv)
    return _rejudge(args.folder, given)


def _evaluate(args: Any, given: Mapping[str, Any]) -> int:
    config, output = chosen(given, args.output, args.resume)
    more = ["--robustbench-json", str(args.robustbench_json)] if args.robustbench_json else []
    again = resuming("evaluate", config, output, *more)
    finished = any((output / name).exists() for name in (PAGE, SWEEP))
    try:
        reports = run(config, output, resume=args.resume is not None, robustbench_json=args.robustbench_json)
    except OutOfTime as stopped:
        if PartialState().is_main_process:
            print(f"stopped {stopped}; to go on: {again}")
        return 0
    except KeyboardInterrupt:
        if not (output / OPTIONS).exists():
            raise
        print(f"\nstopped; to go on: {again}", file=sys.stderr)
        return 130
    if not reports:
        return 0
    cut = reports[-1].protocol.get(STOPPED)
    several = not cut and (len(reports) > 1 or config.eps_sweep)
    show(sweep_markdown(reports) if several else report_markdown(reports[-1]))
    if cut:
        pages = ", ".join(map(str, sorted(output.rglob(f"{PARTIAL}/report.html"))))
        print(f"stopped {cut}; written: {pages}; to go on: {again}")
    elif finished:
        print(f"{output} holds a finished run")
    else:
        print(f"written: {output / (SWEEP if several else PAGE)}, and the files beside it")
    return 0


def _compare(a: Path, b: Path) -> int:
    show(comparison_markdown(compare_reports(load_report(a), load_report(b))))
    return 0


def _rejudge(folder: Path, given: Mapping[str, Any]) -> int:
    agrees, text = rejudge_folder(folder, given)
    print(text)
    return int(not agrees)
