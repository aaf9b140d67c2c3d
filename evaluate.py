#!/usr/bin/env python3
"""`python -m timm_hpm evaluate` as a file, for `torchrun evaluate.py` and `accelerate launch evaluate.py`."""

from timm_hpm.commands.evaluate import main, parse_args
from timm_hpm.console import run_command

__all__ = ["main", "parse_args"]

if __name__ == "__main__":
    run_command("evaluate.py", main)
