#!/usr/bin/env python3
"""Measures the robust accuracy of a classifier with the Mixed Surrogate Attack.

Without options: the embedded `hpm_wrn10_2` on the first 100 held-out digits, at AutoAttack's standard budgets.
Prints a table, and writes report.json, report.md, report.html and the options (options.json) into the output folder.
Several processes share the work, a batch at a time:

    torchrun --nproc_per_node 2 evaluate.py --device cpu --batch-size 50
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from timm_hpm import compare, comparison_markdown, report_markdown
from timm_hpm.console import run_command
from timm_hpm.evaluation.command import load_report, rejudge_folder, run
from timm_hpm.evaluation.config import OPTIONS, EvaluateConfig, chosen
from timm_hpm.evaluation.robustbench import AUTHORS_FIELDS
from timm_hpm.evaluation.sweep import SWEEP, sweep_markdown
from timm_hpm.files import use_any_console
from timm_hpm.options import given_options
from timm_hpm.report.command import shell_line


def parse_args(argv: list[str] | None = None) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Returns the arguments of this script, and the given options of `EvaluateConfig`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="(output/<model>-<date>)")
    parser.add_argument("--resume", type=Path, metavar="FOLDER",
                        help="folder of a run to resume, or to show if it is finished; its options are not needed, and "
                             "refused if they differ. An empty folder begins a run")
    parser.add_argument("--rejudge", type=Path, metavar="FOLDER",
                        help="folder of a run whose adversarial.safetensors is judged again, by its model or the one "
                             "given, and compared with its report.json")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("A", "B"),
                        help="two reports (files or folders) to print side by side, with McNemar's test of them")
    parser.add_argument("--robustbench-json", type=Path, metavar="FILE", help="file for RobustBench's model_info")
    parser.add_argument("--robustbench-info", nargs="*", default=[], metavar="NAME=VALUE",
                        help=f"its fields that only the authors know, of {', '.join(AUTHORS_FIELDS)}")
    return given_options(parser, EvaluateConfig, argv)


def main(argv: list[str] | None = None) -> int:
    """Runs the evaluation; returns the exit code."""
    use_any_console()
    args, given = parse_args(argv)
    if args.compare:
        print(comparison_markdown(compare(*map(load_report, args.compare))))
        return 0
    if args.rejudge:
        agrees, text = rejudge_folder(args.rejudge, given)
        print(text)
        return int(not agrees)
    config, output = chosen(given, args.output, args.resume)
    finished = any((output / name).exists() for name in ("report.json", SWEEP))
    try:
        reports = run(config, output, resume=args.resume is not None, robustbench_json=args.robustbench_json,
                      robustbench_info=args.robustbench_info)
    except KeyboardInterrupt:
        if not (output / OPTIONS).exists():
            raise
        again = ["python", "evaluate.py", "--resume", str(output)]
        if args.robustbench_json:
            again += ["--robustbench-json", str(args.robustbench_json), "--robustbench-info", *args.robustbench_info]
        print(f"\nstopped; to go on: {shell_line(again)}", file=sys.stderr)
        return 130
    if reports:
        several = len(reports) > 1 or config.eps_sweep
        print(sweep_markdown(reports) if several else report_markdown(reports[0]))
        page = output / (SWEEP if several else "report.html")
        print(f"{output} holds a finished run" if finished else f"written: {page}, and the files beside it")
    return 0


if __name__ == "__main__":
    run_command("evaluate.py", main)
