"""Communication between the processes of a run."""

import hashlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def num_processes() -> int:
    """Returns the number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_index() -> int:
    """Returns this process's number, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def reduced(tensor: Tensor) -> Tensor:
    """Returns the sum of a tensor over all processes, without a gradient."""
    if num_processes() == 1:
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total


def average_(tensors: list[Tensor]) -> None:
    """Sets each of the floating-point tensors to its mean over all processes, in one message."""
    if num_processes() == 1 or not tensors:
        return
    mean = reduced(torch.cat([tensor.flatten() for tensor in tensors])) / num_processes()
    for tensor, part in zip(tensors, mean.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def seed_at(seed: int, *place: Any) -> None:
    """Sets torch's random state to a function of the run's seed and of a place in the run.

    Places whose first part is `"batch"` differ between the processes; all others are equal on all.
    """
    text = repr((seed, place, process_index() if place[0] == "batch" else 0))
    torch.manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1)
