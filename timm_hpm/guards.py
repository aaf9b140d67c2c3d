"""Guards against strangers' files and servers: no pickle runs code, no network outgrows the machine, no token leaks."""

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, Final

import huggingface_hub as hf
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.torch_version import TorchVersion

_FORCE: Final = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
_FORCE_NOT: Final = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
# timm's networks create 3,132 tensors at most, and no more numbers than classes.
_MOST_TENSORS: Final = 10_000
_LARGEST_NUMBER: Final = 10_000_000


class OldTorchError(RuntimeError):
    """A pickled file was not read, because this version of torch would run the code in it."""


class TooLargeError(ValueError):
    """A network beyond any network's size, or this machine's memory."""


# The number of open `weights_only` blocks of all threads, and the environment and torch.load before the first one.
_BLOCKS: Final = SimpleNamespace(lock=threading.Lock(), open=0, before={}, load=None)


def refuse_pickles(version: str) -> None:
    """Raises an OldTorchError if this version of torch runs a pickled file's code in spite of `weights_only=True`."""
    if TorchVersion(version) < "2.6":
        raise OldTorchError(
            f"torch {version} can run the code in a pickled file (CVE-2025-32434), so it was not read. Update torch to "
            "2.6 or newer, or convert the file on a machine that has it: timm-hpm convert FILE --model NAME "
            "--output FOLDER")


def _load(*args: Any, **kwargs: Any) -> Any:
    refuse_pickles(torch.__version__)
    return _BLOCKS.load(*args, **kwargs)


@contextmanager
def weights_only() -> Iterator[None]:
    """Keeps PyTorch in the block, in the whole process, from loading anything but weights, and before 2.6 any pickle.

    timm asks for that, and asks once more without it after a TypeError, which a crafted file can cause.
    """
    with _BLOCKS.lock:
        if _BLOCKS.open == 0:
            _BLOCKS.before = {name: os.environ.pop(name) for name in (_FORCE, _FORCE_NOT) if name in os.environ}
            os.environ[_FORCE] = "1"
            # timm's functions call it by this name, too.
            _BLOCKS.load, torch.load = torch.load, _load
        _BLOCKS.open += 1
    try:
        yield
    finally:
        with _BLOCKS.lock:
            _BLOCKS.open -= 1
            if _BLOCKS.open == 0:
                torch.load = _BLOCKS.load
                os.environ.pop(_FORCE, None)
                os.environ.update(_BLOCKS.before)


class _Counted(TorchFunctionMode):
    """Counts the tensors that this thread creates, and refuses the one that is too many."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors = self.bytes = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # A function without a tensor as its first argument creates one.
        if isinstance(result, Tensor) and not any(isinstance(arg, Tensor) for arg in args[:1]):
            self.tensors += 1
            self.bytes += result.nbytes
            if self.tensors > _MOST_TENSORS or self.bytes > _memory() / 2:
                raise TooLargeError(
                    f"the network has more than {_MOST_TENSORS} tensors, or takes more than half of this machine's "
                    f"memory of {_memory() / 2**30:.3g} GiB; check its depths, widths and number of classes")
        return result


def check_size(make: Callable[[], Any], arguments: Mapping[str, Any]) -> None:
    """Makes a network on the meta device, and raises a TooLargeError if it would not fit this machine.

    Without `arguments`, those that a file or a caller gave, the registered networks fit.
    """
    _check_numbers(arguments)
    asked = {name for name, value in arguments.items() if value is not None and not isinstance(value, str)}
    if asked <= {"cache_dir", "device"}:
        return
    try:
        with torch.device("meta"), _Counted():
            make()
    except TooLargeError:
        raise
    except Exception:  # making the network with memory raises it again
        pass


def _memory() -> float:
    """Returns the machine's memory in bytes, or infinity if the system does not tell it."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return float("inf")


def _check_numbers(arguments: Any) -> None:
    """Raises a TooLargeError for a whole number beyond any network's."""
    if isinstance(arguments, Mapping):
        arguments = arguments.values()
    if isinstance(arguments, Iterable) and not isinstance(arguments, str | bytes | Tensor):
        for argument in arguments:
            _check_numbers(argument)
    elif isinstance(arguments, int) and abs(arguments) > _LARGEST_NUMBER:
        raise TooLargeError(f"a number of {len(str(arguments))} digits; expected at most {_LARGEST_NUMBER}")


def without_tokens(text: str, *tokens: str | None) -> str:
    """Returns a text without `tokens` and without the token that the Hub's client finds by itself."""
    for secret in (*tokens, hf.get_token()):
        if secret:
            text = text.replace(secret, "<token>")
    return text


def shortened(text: str, limit: int = 1000) -> str:
    """Returns the first `limit` characters of a text, and an ellipsis if there are more."""
    return text if len(text) <= limit else f"{text[:limit]}..."
