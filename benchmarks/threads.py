#!/usr/bin/env python3
"""Time of `evaluate.py` with the number of threads that it measures, as ratios of two times in one run.

    python benchmarks/threads.py [--runs 3] [-- OPTION ... of evaluate.py, instead of --protocol fast --num-images 20]

- busy over quiet: beside two processes that compute all the time, over alone.
- eight threads over four: if PyTorch begins with eight threads, over four, whatever the number of processors. Both
  begin by a measurement, which tries no more threads than processors.

Each time is the median of the runs. Other work on the machine spoils the first ratio: it makes the quiet runs busy.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
RUN = """
import sys, torch
sys.path.insert(0, sys.argv.pop(1))
torch.set_num_threads(int(sys.argv.pop(1)))
import evaluate
sys.exit(evaluate.main())
"""
BUSY = "while True: sum(range(10_000))"
FREE = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}


def seconds(options: list[str], runs: int, threads: int) -> float:
    """Returns the median time of runs of evaluate.py in which PyTorch begins with so many threads."""
    found = []
    for _ in range(runs):
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", RUN, str(ROOT), str(threads), *options, "--device", "cpu", "--output",
                            f"{folder}/run"], check=True, stdout=subprocess.DEVNULL,
                           stderr=subprocess.DEVNULL, env=FREE)
            found.append(time.perf_counter() - start)
    return statistics.median(found)


def main() -> None:
    """Prints the times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="(3)")
    parser.add_argument("options", nargs="*", default=["--protocol", "fast", "--num-images", "20"],
                        metavar="OPTION", help="options of evaluate.py, after --")
    args = parser.parse_args()
    cores = os.cpu_count() or 1
    quiet = seconds(args.options, args.runs, cores)
    busy = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(2)]
    try:
        beside = seconds(args.options, args.runs, cores)
    finally:
        for process in busy:
            process.kill()
    print(f"busy over quiet: {beside / quiet:.2f}  ({beside:.1f} s over {quiet:.1f} s)")
    eight, four = (seconds(args.options, args.runs, threads) for threads in (8, 4))
    print(f"eight threads over four: {eight / four:.2f}  ({eight:.1f} s over {four:.1f} s)")


if __name__ == "__main__":
    main()
