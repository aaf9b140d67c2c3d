"""Reading the weights file of any project: safely, with errors that name the file, the cause and the remedy."""

import os
import re
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import torch
from safetensors.torch import load_file
from torch import Tensor

from .guards import OldTorchError, refuse_pickles, shortened, weights_only, without_tokens

# Names of the weights in the checkpoints of training scripts: averages of the weights before the raw ones.
_WRAPPERS: Final = (
    "state_dict_ema", "ema_state_dict", "model_ema", "ema", "model_state_dict", "state_dict", "model", "net", "last")


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read, or does not fit the network; the message gives the reason."""


class DroppedClassifierWarning(UserWarning):
    """Weights were loaded without their classifier, because the model has another number of classes."""


class NormalisationWarning(UserWarning):
    """Weights do not state the normalisation of their pixels, and the network's mean and std are assumed."""


def read_file(path: str | os.PathLike) -> Any:
    """Returns the content of a weights file: safetensors, or a PyTorch file of tensors and plain values."""
    if str(path).endswith(".safetensors"):
        return load_file(path)
    refuse_pickles(torch.__version__)
    with torch.serialization.safe_globals([Namespace]):  # timm's train.py saves its options so
        return torch.load(path, map_location="cpu", weights_only=True)


def unwrap(checkpoint: Any) -> dict[str, Tensor]:
    """Returns the state dict inside a training script's checkpoint; of several, the average of the weights.

    If the average is no whole state dict (empty, a list of tensors, parameters without BatchNorm's statistics), returns
    the weights beside it.
    """
    if not isinstance(checkpoint, Mapping):
        raise CheckpointError(f"the checkpoint is a {type(checkpoint).__name__}; expected a state dict, alone or under "
                              f"one of the names {', '.join(_WRAPPERS)}")
    found = _state_dicts(checkpoint)
    if not found:
        others = [str(key) for key, value in checkpoint.items() if not isinstance(value, Tensor)]
        raise CheckpointError(f"the checkpoint holds no state dict: {', '.join(others) or 'it is empty'}. Expected "
                              f"named tensors, alone or under one of the names {', '.join(_WRAPPERS)}")
    return next((each for each in found if any(key.endswith("running_mean") for key in each)), found[0])


def _state_dicts(checkpoint: Mapping[str, Any], levels: int = 4) -> list[dict[str, Tensor]]:
    """Returns a checkpoint's state dicts in the order of `_WRAPPERS`; it may hold itself, so few `levels` count."""
    inner = [checkpoint[name] for name in _WRAPPERS if isinstance(checkpoint.get(name), Mapping)]
    if inner:
        return [found for each in inner for found in _state_dicts(each, levels - 1)] if levels else []
    odd = [str(key) for key, value in checkpoint.items() if isinstance(value, Tensor) and not _is_plain(value)]
    if odd:
        raise CheckpointError(f"{shortened(', '.join(odd), 300)}: the tensors are sparse, quantised, or far larger "
                              "than their values in the file. Save them as plain, contiguous tensors")
    state_dict = dict(checkpoint)
    if all(str(key).startswith("module.") for key in state_dict if key != "n_averaged"):
        state_dict.pop("n_averaged", None)  # torch's AveragedModel counts its updates there
    tensors = state_dict and all(isinstance(value, Tensor) for value in state_dict.values())
    return [state_dict] if tensors else []


def _is_plain(tensor: Tensor) -> bool:
    """Returns whether a tensor is dense and holds its values one by one; small expanded tensors pass."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        return False
    return tensor.nbytes <= max(tensor.untyped_storage().nbytes(), 2**20)


def check_architecture(config: Mapping[str, Any], architecture: str) -> None:
    """Raises a CheckpointError if the config of the weights names another architecture."""
    if config["architecture"] != architecture:
        raise CheckpointError(f"the weights are of {config['architecture']}, and the network is {architecture}; "
                              f"make a model of the name {config['architecture']}")


@contextmanager
def fitting(place: str, network: str, num_classes: int | None = None) -> Iterator[None]:
    """Turns the block's errors about weights that do not fit into CheckpointErrors with the place and the network.

    `num_classes` is the checkpoint's, for the advice if only the classifier's size does not fit.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if not isinstance(error, CheckpointError) and "loading state_dict" not in text:
            raise
        sizes = [line for line in text.splitlines() if "size mismatch" in line]
        if sizes and all(re.search(rf"shape torch\.Size\(\[{num_classes}[],]", line) for line in sizes):
            text = (f"the checkpoint has {num_classes} classes, and the network another number. Give num_classes="
                    f"{num_classes} (on a command line: --num-classes {num_classes}). {text}")
        raise CheckpointError(f"cannot load {place} into {network}: {text}") from error


@contextmanager
def reading(place: str) -> Iterator[None]:
    """Turns any error of the block, in which no code of a weights file runs, into a CheckpointError."""
    try:
        with weights_only():
            yield
    # Damaged files and servers cause errors of any type; the block only reads.
    except Exception as error:
        # Without the cause: it may quote a server's response, with the token.
        raise CheckpointError(f"cannot read {place}: {without_tokens(_cause(error))}") from None


_RESAVE: Final = (
    "It holds pickled objects beside tensors. Loading those can run code, so nothing was loaded. If you trust the "
    "file, save its weights alone, on a machine where nothing is at stake: `import torch, dill; checkpoint = "
    "torch.load(FILE, map_location='cpu', pickle_module=dill, weights_only=False); "
    "torch.save({'state_dict': checkpoint['model']}, NEW)` (without dill, leave out pickle_module). Then load "
    "NEW in its place, with pretrained=True by pretrained_cfg_overlay=dict(file=NEW)")


def _cause(error: BaseException) -> str:
    """Returns the meaning of a reading error, and its remedy."""
    if isinstance(error, CheckpointError | OldTorchError):
        return str(error)
    chain = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__
    text = " ".join(str(link) for link in chain)
    lines = [line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    # The first line of the Hub's client is the status, the second its subject.
    first = ": ".join(lines[:2]) if re.search(r"^\d{3} .* Error", lines[0]) else lines[0]
    names = {kind.__name__ for link in chain for kind in type(link).__mro__}
    # urllib's errors have a code, those of the Hub's client a response.
    codes = [getattr(link, "code", None) or getattr(getattr(link, "response", None), "status_code", None)
             for link in chain]
    status = next((code for code in codes if isinstance(code, int)), None)
    if re.search(r"unsupported (global|class)|not an allowed global", text, re.IGNORECASE):
        refused = re.findall(r"(?:GLOBAL|[Uu]nsupported class) ([\w.]*\w)", text)
        return f"PyTorch refused {', '.join(dict.fromkeys(refused)) or 'what it holds'}. {_RESAVE}"
    if names & {"UnpicklingError", "LookupError", "EOFError"} or "weights_only" in first:
        # The messages of timm and torch advise to load it unsafely, or name an opcode.
        first = "it holds nothing that torch.save writes"
    if "EntryNotFoundError" in names and "LocalEntryNotFoundError" not in names:
        return f"{first}. The repository has no such file; see its list of files"
    if names & {"RepositoryNotFoundError", "GatedRepoError", "RevisionNotFoundError"}:
        return f"{first}. Check the name and revision; a private repository needs a token (`hf auth login`)"
    if status in (401, 403):
        return f"{first} (HTTP {status}). It needs a login with access: `hf auth login`, or HF_TOKEN, for the Hub"
    if status is None and names & {
            "LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectError", "URLError", "ConnectionError"}:
        return (f"{first}. There is no connection and no copy in the cache; download the file elsewhere and pass "
                "pretrained_cfg_overlay=dict(file=...)")
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if status is not None or names & {"HfHubHTTPError", "HTTPError", "TimeoutError"}:
        return f"{first}. Try again later"
    return (f"{first}. The file is cut short, damaged, or no checkpoint; remove it (from the cache as well) and "
            "download it again")
