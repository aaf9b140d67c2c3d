"""The number of CPU threads: a small network spends more time on waiting for its threads than they save."""

import os
import sys
import time
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor, nn

from ..data import ask
from ..seeding import seeded
from .checks import restored

#: Seconds of passes with each number of threads, at least three passes; seconds of one pass that are long enough.
_SECONDS: Final = 0.3
_LONG_ENOUGH: Final = 0.05
#: How many times faster the next number of threads must be: fewer suffer less from other processes.
_GAIN: Final = 1.15
_LAUNCHED_BY: Final = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "WORLD_SIZE")


def use_threads(threads: int | None, model: nn.Module, images: Tensor) -> int | None:
    """Sets the number of CPU threads of PyTorch, and returns it; None if the model is on another device.

    If neither `threads` nor the environment gives it, passes of the model on `images` (N, channels, H, W) are timed.
    """
    if not all(parameter.is_cpu for parameter in model.parameters()):
        return None
    if threads is not None:
        torch.set_num_threads(threads)
    elif not any(name in os.environ for name in _LAUNCHED_BY):
        # More threads than the processors that this process may use wait for each other.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        most = min(torch.get_num_threads(), cores)
        fastest = _measured(model, images, most) if most > 1 else None
        if fastest is not None:
            print(f"CPU threads: {fastest} of {most}, the fastest in a short measurement; --threads and "
                  "OMP_NUM_THREADS give another number", file=sys.stderr)
            torch.set_num_threads(fastest)
    return torch.get_num_threads()


def fastest_threads(work: Callable[[], object], most: int) -> int:
    """Returns the number of threads among 1, 2, 4, … and `most` with which `work` is the fastest; sets others."""
    counts, seconds = [*(2**i for i in range(most.bit_length()) if 2**i < most), most], []
    for i, count in enumerate(counts):
        torch.set_num_threads(count)
        work()  # the threads begin
        start, calls = time.perf_counter(), 0
        while calls < 3 or time.perf_counter() - start < _SECONDS:
            work()
            calls += 1
        # The mean: a median would hide the passes that wait for another process's time slice.
        seconds.append((time.perf_counter() - start) / calls)
        if i and seconds[i] * _GAIN > seconds[i - 1]:
            return counts[i - 1]
    return most


def _measured(model: nn.Module, images: Tensor, most: int) -> int | None:
    """Returns the fastest number of threads for as many images as a long pass needs; None if the model fails."""
    before, count = torch.get_num_threads(), 1
    with restored(model), seeded(torch.device("cpu"), 0):
        try:
            torch.set_num_threads(1)
            while count < len(images) and seconds_of_pass(model, images[:count]) < _LONG_ENOUGH:
                count = min(2 * count, len(images))
            return fastest_threads(lambda: seconds_of_pass(model, images[:count]), most)
        except Exception:  # the model's own, which the attack or the training explains
            return None
        finally:
            torch.set_num_threads(before)


def seconds_of_pass(logits_fn: Callable[[Tensor], Tensor], images: Tensor, gradient: bool = True) -> float:
    """Returns the seconds of a pass of images (B, ...) forwards and, if there is a gradient, backwards to them."""
    start, x = time.perf_counter(), images.float().clone().requires_grad_(gradient)
    with torch.set_grad_enabled(gradient):
        total = ask(logits_fn, x).sum()
        if total.requires_grad:
            torch.autograd.grad(total, x, allow_unused=True)
    total.item()  # waits for the device
    return time.perf_counter() - start
