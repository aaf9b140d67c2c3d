#!/usr/bin/env python3
"""`python -m timm_hpm train` as a file, for `torchrun train.py` and `accelerate launch train.py`."""

from timm_hpm.commands.train import main, parse_args
from timm_hpm.console import run_command

__all__ = ["main", "parse_args"]

if __name__ == "__main__":
    run_command("train.py", main)
