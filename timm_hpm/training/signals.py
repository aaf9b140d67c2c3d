"""Signals of a training run: SIGTERM and SIGINT ask it to stop, and its DataLoader workers outlive them."""

import math
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, Final, TypeVar

import torch
from torch import Tensor

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)
#: The end of a run's time, among the signals.
TIME_LIMIT: Final = -1
_CAUSES: Final = (*SIGNALS, TIME_LIMIT)
# Neither Windows nor macOS can tell a worker who sent it a signal.
_HAS_MASKS: Final = hasattr(signal, "sigwaitinfo")

Batch = TypeVar("Batch")


class Stopped(Exception):
    """A signal or the time limit stopped the run. Its progress is in a checkpoint; `signal` is the signal's number."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {'the time limit' if number == TIME_LIMIT else signal.Signals(number).name}")
        self.signal = number


@contextmanager
def noted_signals(seconds: float | None = None) -> Iterator[list[int]]:
    """Within the block SIGTERM and SIGINT are noted in the list that it yields; a second Ctrl-C acts at once.

    After so many seconds `TIME_LIMIT` is noted, too.
    """
    before: dict[int, Any] = {}
    asked: list[int] = []
    first = 0.0

    def note(number: int, frame: Any) -> None:
        nonlocal first
        # A launcher repeats the signals that its processes already got, within milliseconds.
        if number == signal.SIGINT and asked and time.monotonic() - first > 2:
            raise KeyboardInterrupt
        first = first or time.monotonic()
        asked.append(number)

    if threading.current_thread() is threading.main_thread():  # no other may
        before = {number: signal.signal(number, note) for number in SIGNALS}
    timer = threading.Timer(math.inf if seconds is None else seconds, asked.append, [TIME_LIMIT])
    timer.daemon = True
    if seconds is not None:
        timer.start()
    try:
        yield asked
    finally:
        timer.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)


class StopRequest:
    """The signals of this process (`asked`), and the one that stops all processes (`number`; 0 means none yet)."""

    def __init__(self, asked: Sequence[int] = ()):
        self.asked = asked
        self.number = 0

    def votes(self) -> Tensor:
        """Returns a 1 for the signal that this process was given first, of `SIGNALS`; the processes add them up."""
        return torch.tensor([float(number in self.asked[:1]) for number in _CAUSES])

    def agree(self, votes: Sequence[float]) -> None:
        """Takes the first signal that any process was given, by the sum of all their `votes`."""
        self.number = next((number for number, count in zip(_CAUSES, votes, strict=True) if count), 0)

    def batches(self, loader: Iterable[Batch]) -> Iterator[Batch]:
        """Yields the batches of a loader; raises `Stopped` before the next one if this process was asked to stop."""
        for batch in shielded_batches(loader):
            if self.asked:
                raise Stopped(self.asked[0])
            yield batch


def shielded_batches(loader: Iterable[Batch]) -> Iterator[Batch]:
    """Yields the batches of a loader whose workers start with SIGTERM and SIGINT blocked; see `obey_parent`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS) if _HAS_MASKS else None
    try:
        iterator = iter(loader)
        first = list(islice(iterator, 1))  # Accelerate starts the workers here
    finally:
        if before is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    yield from first
    yield from iterator


def obey_parent(worker: int) -> None:
    """Makes a DataLoader worker ignore SIGINT and SIGTERM, unless its own parent sends the SIGTERM; a `worker_init_fn`.

    A terminal, `timeout`, SLURM and systemd signal all processes of a run at once. Without its workers the run could
    not finish the update that a checkpoint needs. The parent must still be able to end a worker as it exits.
    """
    if not _HAS_MASKS:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        return
    # Blocked, not ignored: only a blocked signal can be waited for, and only then it tells its sender.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    threading.Thread(target=_wait_for_parent, args=(os.getppid(),), daemon=True).start()


def _wait_for_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
