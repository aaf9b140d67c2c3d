"""Commands in processes of their own, as a user runs them."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
ENVIRON = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}"}


def python(*words: str | Path, folder: Path, code: int = 0, **environ: str) -> subprocess.CompletedProcess:
    """Runs Python with these words in a folder, and asserts its exit code."""
    done = subprocess.run([sys.executable, *map(str, words)], cwd=folder, capture_output=True, text=True, timeout=1800,
                          env=ENVIRON | environ)
    assert done.returncode == code, done.stderr
    return done


def snapshot(folder: Path) -> dict[Path, tuple[int, bool | bytes]]:
    """Returns the times and contents of everything in a folder."""
    return {path: (path.stat().st_mtime_ns, path.is_dir() or path.read_bytes()) for path in folder.rglob("*")}


def start(*words: str | Path, folder: Path, **options: Any) -> subprocess.Popen:
    """Starts Python with these words in a folder."""
    return subprocess.Popen([sys.executable, *map(str, words)], cwd=folder, env=ENVIRON, text=True,
                            **{"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL} | options)
