"""`seeded`: repeatable random numbers that leave the caller's random states alone."""

import hashlib
import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch


@contextmanager
def seeded(device: torch.device, seed: int, *place: Any) -> Iterator[None]:
    """Seeds the global random states in the block by `seed` and a place in the run; restores the caller's."""
    digest = hashlib.sha256(repr((seed, *place)).encode()).digest()
    number = int.from_bytes(digest[:6], "big")
    # The attacks draw from PyTorch only, but a model may draw from these.
    states = random.getstate(), np.random.get_state()
    random.seed(number)
    np.random.seed(number % 2**32)
    try:
        with _seeded_torch(device, number):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def seeded_verdict(device: torch.device, seed: int, name: str, first: int) -> AbstractContextManager[None]:
    """Seeds the verdicts on a batch of candidates by their name and first image, so that a randomised model repeats."""
    return seeded(device, seed, "judge", name, first)


@contextmanager
def _seeded_torch(device: torch.device, number: int) -> Iterator[None]:
    on_cpu = device.type == "cpu"
    if device.type == "mps":
        # It has one device, and functions without a number.
        state = torch.mps.get_rng_state()
        try:
            with _seeded_torch(torch.device("cpu"), number):
                torch.mps.manual_seed(number)
                yield
        finally:
            torch.mps.set_rng_state(state)
        return
    with torch.random.fork_rng([] if on_cpu else [device.index or 0], device_type="cuda" if on_cpu else device.type):
        # Not torch.manual_seed, which would seed devices too whose state is not kept.
        torch.default_generator.manual_seed(number)
        if not on_cpu:
            accelerator = getattr(torch, device.type)
            with accelerator.device(device.index or 0):
                accelerator.manual_seed(number)
        yield
