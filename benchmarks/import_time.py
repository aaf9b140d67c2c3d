#!/usr/bin/env python3
"""Cost of importing timm_hpm, as a ratio: the median of fresh processes that import timm and then timm_hpm.

    python benchmarks/import_time.py

- import timm_hpm over import timm: time until both are there, over time until timm is.
"""

import statistics
import subprocess
import sys

RUNS = 7
PROGRAM = """
import time
start = time.perf_counter()
import timm
middle = time.perf_counter()
import timm_hpm
print((time.perf_counter() - start) / (middle - start))
"""


def main() -> None:
    """Prints the ratio."""
    ratios = [
        float(subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True).stdout)
        for _ in range(RUNS)
    ]
    print(f"import timm_hpm over import timm: {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
