"""Guards against strangers' files and servers: no network outgrows the machine, no token leaks."""

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import huggingface_hub as hf
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# timm's networks create 3,132 tensors at most, and no more numbers than classes.
_MOST_TENSORS: Final = 10_000
_LARGEST_NUMBER: Final = 10_000_000


class TooLargeError(ValueError):
    """A network beyond any network's size, or this machine's memory."""


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
        raise TooLargeError(f"a number of {len(str(arguments))} digits among the network's arguments; expected at most "
                         f"{_LARGEST_NUMBER}")


def without_tokens(text: str, *tokens: str | None) -> str:
    """Returns a text without `tokens` and without the token that the Hub's client finds by itself."""
    for secret in (*tokens, hf.get_token()):
        if secret:
            text = text.replace(secret, "<token>")
    return text


def shortened(text: str, limit: int = 1000) -> str:
    """Returns the first `limit` characters of a text, and an ellipsis if there are more."""
    return text if len(text) <= limit else f"{text[:limit]}..."
