"""The processes that share an evaluation, by their `Accelerator`; None stands for a single process."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Final

from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, gather_object

from ..deadline import OutOfTime

# Seconds in which a thread of the process group frees the tensors of the last gather.
_FREEING: Final = 0.2


def is_first(accelerator: Accelerator | None) -> bool:
    """Returns whether this process writes the files."""
    return accelerator is None or accelerator.is_main_process


def rank_of(accelerator: Accelerator | None) -> tuple[int, int]:
    """Returns this process's number, from 0, and the number of processes."""
    return (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)


def gathered(accelerator: Accelerator | None, items: list[Any]) -> list[Any]:
    """Returns the items of all processes, in their order."""
    return items if accelerator is None else gather_object(items)


@contextmanager
def several_processes(device: str) -> Iterator[Accelerator | None]:
    """Yields the accelerator of the processes that torchrun or `accelerate launch` started, None for a single one."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield None
        return
    # One process may have a batch more than another, and a batch may take hours.
    patience = InitProcessGroupKwargs(timeout=timedelta(days=30))
    accelerator = Accelerator(cpu=device == "cpu", kwargs_handlers=[patience])
    try:
        yield accelerator
    except OutOfTime:  # in all processes
        leave(accelerator)
        raise
    leave(accelerator)  # after an error of one the others would report a lost connection


def leave(accelerator: Accelerator) -> None:
    """Ends the use of an accelerator and leaves the group of its processes, or torchrun may abort one of them."""
    if accelerator.num_processes > 1:
        # In torch 2.4 a thread that still frees the tensors of a gather would wait for this one, and this one for it.
        time.sleep(_FREEING)
    accelerator.end_training()
