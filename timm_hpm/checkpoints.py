"""Checkpoints of other projects: what they hold, and their names in ours.

A format is known by its keys. Whatever it does not account for is an error that lists it: a checkpoint of another
network may fit by chance, and then answers wrongly without a word.
"""

import os
import re
import warnings
from argparse import Namespace
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from safetensors.torch import load_file
from timm.data import IMAGENET_DEFAULT_MEAN
from torch import Tensor

from .guards import shortened, weights_only, without_tokens

# Where training scripts keep the weights, best first: an average of them comes before the raw ones.
_WRAPPERS: Final = (
    "state_dict_ema", "ema_state_dict", "model_ema", "ema", "model_state_dict", "state_dict", "model", "net", "last")
# Prefixes that every key has: of nn.DataParallel, torch.compile, a wrapper's attribute, and a Sequential.
_PREFIXES: Final = ("module.", "_orig_mod.", "model.", "0.", "1.")
# Modules that normalise pixels, and what they call their buffers. Our networks get normalised images.
_NORMALISERS: Final = ("", "0.", "normalize.", "normalizer.", "attacker.normalize.")
_MEANS: Final = ("mean", "mu", "new_mean")
_STDS: Final = ("std", "sigma", "new_std")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read, or is not of the network that it is loaded into; the message says why."""


class DroppedClassifierWarning(UserWarning):
    """Weights were loaded without their classifier, which has another number of classes than was asked for."""


class NormalisationWarning(UserWarning):
    """Weights do not say how they expect pixels normalised, and the network's own mean and std are assumed."""


# A regular expression, and what replaces a match of it.
_Rename = tuple[str, "str | Callable[[re.Match[str]], str]"]


@dataclass(frozen=True)
class Format:
    """Names of a residual network elsewhere, and what else its weights need of a `PreActNet`.

    Arguments:
        name: as messages call it.
        marks: keys that it has.
        without: keys that it has not.
        layout: the `layout` that its weights need; None where the keys do not tell.
        shortcuts: every `shortcut` that its weights may need; empty where no `PreActNet` computes it.
        renames: regular expressions and their replacements, applied to each key one after the other.
        unused: a regular expression of keys that its network holds and never uses.
    """

    name: str
    marks: tuple[str, ...]
    layout: str | None
    shortcuts: tuple[str, ...]
    renames: tuple[_Rename, ...] = ()
    without: tuple[str, ...] = ()
    unused: str = "(?!)"

    def fits(self, keys: Collection[str]) -> bool:
        """Returns whether a state dict with these keys is of this format."""
        return all(mark in keys for mark in self.marks) and not any(mark in keys for mark in self.without)

    def rename(self, key: str) -> str:
        """Returns the name of `key` in our network; a key of no known place stays as it is."""
        for pattern, target in self.renames:
            key = re.sub(pattern, target, key)
        return key


def _block(first: int) -> Callable[[re.Match[str]], str]:
    """Returns what replaces the prefix of a block, where stages are counted from `first`."""
    return lambda match: f"stages.{int(match[1]) - first}.{match[2]}."


_BLOCK: Final = r"^(stages\.\d+\.\d+)\."

_PREACT_RESNET: Final[tuple[_Rename, ...]] = (
    (r"^bn\.", "norm."), (r"^linear\.", "fc."), (r"^layer(\d+)\.(\d+)\.", _block(1)),
    (_BLOCK + r"shortcut\.0\.", r"\1.shortcut."),
)

# The entry `function` of our XCiT for small images: the size of its patches, in pixels.
XCIT_FUNCTION: Final = (4,)

# After timm's ResNet; no `PreActNet` computes it.
_SMALL_RESNET: Final = Format(
    "a ResNet for small images", ("layer1.0.conv1.weight", "linear.weight", "bn1.weight"), "trades", (),
    ((r"^linear\.", "fc."), (r"^(layer\d+\.\d+)\.shortcut\.", r"\1.downsample.")),
)

FORMATS: Final = (
    Format("timm_hpm", ("conv1.weight", "stages.0.0.conv1.weight"), None, ("activated", "raw", "raw3x3")),
    Format(
        "DeepMind's WideResNet", ("init_conv.weight", "logits.weight"), "deepmind", ("activated",),
        (
            (r"^init_conv\.", "conv1."), (r"^batchnorm\.", "norm."), (r"^logits\.", "fc."),
            (r"^layer\.(\d+)\.block\.(\d+)\.", _block(0)),
            (_BLOCK + r"conv_1\.", r"\1.conv2."), (_BLOCK + r"conv_0\.", r"\1.conv1."),
            (_BLOCK + r"batchnorm_1\.", r"\1.bn2."), (_BLOCK + r"batchnorm_0\.", r"\1.bn1."),
        ),
    ),
    Format(
        "DeepMind's PreActResNet", ("conv_2d.weight", "logits.weight"), "deepmind", ("raw3x3",),
        (
            (r"^conv_2d\.", "conv1."), (r"^batchnorm\.", "norm."), (r"^logits\.", "fc."),
            (r"^layer_(\d+)\.(\d+)\.", _block(0)),
            (_BLOCK + r"conv_2d_(\d)\.", r"\1.conv\2."),
            (_BLOCK + r"batchnorm_1\.", r"\1.bn2."), (_BLOCK + r"batchnorm_0\.", r"\1.bn1."),
        ),
    ),
    Format(
        "TRADES' WideResNet", ("conv1.weight", "block1.layer.0.conv1.weight"), "trades", ("activated",),
        (
            (r"^bn1\.", "norm."), (r"^block(\d+)\.layer\.(\d+)\.", _block(1)),
            (_BLOCK + r"convShortcut\.", r"\1.shortcut."),
        ),
        unused=r"sub_block1\.layer\..*",
    ),
    Format(
        "a PreActResNet for small images", ("layer1.0.conv1.weight", "linear.weight", "bn.weight"), "trades",
        ("activated", "raw"), _PREACT_RESNET, without=("bn1.weight",),
    ),
    # None that is known here activates in front of its shortcuts.
    Format(
        "a PreActResNet for small images without a final BatchNorm", ("layer1.0.conv1.weight", "linear.weight"),
        "trades", ("raw",), _PREACT_RESNET, without=("bn1.weight", "bn.weight"),
    ),
    _SMALL_RESNET,
)


def read_file(path: str | os.PathLike) -> Any:
    """Returns the content of a weights file: safetensors, or a PyTorch file of tensors and plain values.

    Raises:
        Exception: whatever a missing or damaged file causes; call it inside `reading`.
    """
    if str(path).endswith(".safetensors"):
        return load_file(path)
    with torch.serialization.safe_globals([Namespace]):  # timm's train.py saves its options so
        return torch.load(path, map_location="cpu", weights_only=True)


def function_error(key: str, entry: Any, own: Sequence[int]) -> str | None:
    """Returns the message about an entry `function` of another form than a network's `own`, or None."""
    if isinstance(entry, Tensor) and entry.dtype == torch.int64 and entry.shape == (len(own),):
        return None
    found = f"{entry.dtype} of the shape {tuple(entry.shape)}" if isinstance(entry, Tensor) else type(entry).__name__
    return (f"the entry {key} is {found}; expected {len(own)} int64 numbers. The file is damaged, or of another "
            "version of timm_hpm: save the weights again")


def unwrap(checkpoint: Any) -> dict[str, Tensor]:
    """Returns the state dict inside a training script's checkpoint; of several, the average of the weights.

    An average that is no whole state dict (empty, a list of tensors, parameters without BatchNorm's statistics) gives
    way to the weights beside it.

    Raises:
        CheckpointError: no state dict; the message says what was found.
    """
    if not isinstance(checkpoint, Mapping):
        raise CheckpointError(f"the checkpoint is a {type(checkpoint).__name__}; expected a state dict, alone or under "
                              f"one of the names {', '.join(_WRAPPERS)}")
    found = _state_dicts(checkpoint)
    if not found:
        others = [str(key) for key, value in checkpoint.items() if not isinstance(value, Tensor)]
        raise CheckpointError(f"the checkpoint holds no state dict: {', '.join(others) or 'it is empty'}. Expected "
                              f"named tensors, alone or under one of the names {', '.join(_WRAPPERS)}")
    return next((each for each in found if _has_statistics(each)), found[0])


def _state_dicts(checkpoint: Mapping[str, Any], levels: int = 4) -> list[dict[str, Tensor]]:
    """Returns the state dicts in a checkpoint, in the order of `_WRAPPERS`; one may hold itself, so few `levels` count.

    Raises:
        CheckpointError: tensors that are not plain values of their own.
    """
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
    """Returns whether a tensor holds its values one by one; a few that are expanded do no harm."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        return False
    return tensor.nbytes <= max(tensor.untyped_storage().nbytes(), 2**20)


def _has_statistics(state_dict: Mapping[str, Tensor]) -> bool:
    return any(key.endswith("running_mean") for key in state_dict)


def num_classes_of(state_dict: Mapping[str, Tensor], classifier: Any) -> int | None:
    """Returns how many classes the weights of a network have; None if they hold no classifier.

    Arguments:
        state_dict: the weights, by the names of the network or of one of the `FORMATS`.
        classifier: the path of the network's classifier.
    """
    known = next((known for known in FORMATS if known.fits(state_dict)), None)
    names = {known.rename(key) if known else key: key for key in state_dict}
    weight = state_dict.get(names.get(f"{classifier}.weight", ""))
    return None if weight is None else len(weight)


def check_architecture(config: Mapping[str, Any], architecture: str) -> None:
    """Raises a CheckpointError if weights were saved of another architecture, as their config says."""
    if config["architecture"] != architecture:
        raise CheckpointError(f"the weights are of {config['architecture']}, and the network is {architecture}; "
                              f"make a model of the name {config['architecture']}")


def warn_of_normalisation(
        place: str, mean: Sequence[float], std: Sequence[float], given: Collection[str], state_dict: Collection[str],
) -> bool:
    """Warns if neither the caller nor weights without a config say how pixels are normalised; returns whether it did.

    Arguments:
        place: of the weights.
        mean, std: the network's.
        given: the names of the fields of its pretrained cfg that the caller gave.
        state_dict: the weights, or their names; some hold a module that normalises.
    """
    silent = not {"mean", "std"} <= {*given} and not any(key.rpartition(".")[2] in _MEANS for key in state_dict)
    if silent:
        warnings.warn(f"{place} do not say how they expect pixels normalised: mean {tuple(mean)} and std {tuple(std)} "
                      "are assumed, those of the network's name. Weights trained with others give wrong answers. Pass "
                      "pretrained_cfg_overlay=dict(mean=..., std=...), or --mean and --std to evaluate.py",
                      NormalisationWarning, stacklevel=2)
    return silent


def plain_state_dict(checkpoint: Any, mean: Sequence[float], std: Sequence[float]) -> dict[str, Tensor]:
    """Returns the network's own state dict: without wrappers, prefixes, a second copy, and normalisation.

    Arguments:
        checkpoint: what a file holds.
        mean, std: the normalisation that the network is to be used with, a value a channel; what the checkpoint says
            about its own must agree.

    Raises:
        CheckpointError: no state dict, another normalisation, or a second copy that differs from the first.
    """
    state_dict = unwrap(checkpoint)
    while True:
        state_dict = _without_second_copy(_without_normaliser(state_dict, mean, std))
        prefix = next((p for p in _PREFIXES if state_dict and all(key.startswith(p) for key in state_dict)), None)
        if prefix is None:
            return state_dict
        state_dict = {key.removeprefix(prefix): value for key, value in state_dict.items()}


def _without_normaliser(
        state_dict: dict[str, Tensor], mean: Sequence[float], std: Sequence[float]) -> dict[str, Tensor]:
    """Returns a state dict without the buffers that normalise pixels, once they agree with mean and std."""
    rest = dict(state_dict)
    for names, expected, argument in ((_MEANS, mean, "mean"), (_STDS, std, "std")):
        for key in [module + name for module in _NORMALISERS for name in names if module + name in rest]:
            found = rest.pop(key).flatten().float()
            wanted = torch.tensor(expected, dtype=torch.float32)
            # Published figures have four digits.
            if found.shape != wanted.shape or not torch.allclose(found, wanted, rtol=0, atol=1e-4):
                values = tuple(round(value, 4) for value in found.tolist())
                raise CheckpointError(f"the checkpoint normalises by {key} = {values}, the network by {argument} = "
                                      f"{tuple(expected)}. Where the checkpoint is right, pass pretrained_cfg_overlay="
                                      f"dict({argument}={values})")
    return rest


def _without_second_copy(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns a state dict without MadryLab's `attacker.model.*`, the same network once more."""
    copies = [key for key in state_dict if key.startswith("attacker.model.")]
    first = {key: state_dict.get(key.removeprefix("attacker.")) for key in copies}
    different = [key for key, value in first.items() if value is None or not torch.equal(value, state_dict[key])]
    if different:
        raise CheckpointError("the checkpoint holds two networks, model.* and attacker.model.*, that differ in "
                              f"{', '.join(different)}; expected the same one twice")
    return {key: value for key, value in state_dict.items() if key not in first}


def small_resnet_state_dict(checkpoint: Any, mean: Sequence[float], std: Sequence[float]) -> dict[str, Tensor]:
    """Returns a checkpoint of a ResNet for small images under timm's names; see `plain_state_dict`."""
    state_dict = plain_state_dict(checkpoint, mean, std)
    if not _SMALL_RESNET.fits(state_dict):
        return state_dict
    return {_SMALL_RESNET.rename(key): value for key, value in state_dict.items()}


def xcit_state_dict(
        checkpoint: Any, mean: Sequence[float], std: Sequence[float], *, small: bool = False) -> dict[str, Tensor]:
    """Returns a checkpoint of timm's XCiT, unless it shows that its patches are of another size than the network's.

    RobustBench's XCiT for small images has the keys and shapes of timm's, and other strides. What tells them apart:
    the entry `function` of our own files for small images, ImageNet's normalisation inside the checkpoint or another,
    and ImageNet's thousand classes. A checkpoint with none of these is taken for what the network is.

    Arguments:
        checkpoint, mean, std: see `plain_state_dict`.
        small: whether the network is `hpm_cifar_xcit_*`, not `hpm_xcit_*`; the result then has the entry `function`.

    Raises:
        CheckpointError: what `plain_state_dict` refuses, or patches of another size.
    """
    found = unwrap(checkpoint)
    is_xcit = any("cls_attn_blocks.0." in key for key in found)
    if is_xcit and (shown := _other_patches(found, small)):
        raise CheckpointError(
            f"the checkpoint {shown}: it is of an XCiT with {'larger' if small else 'smaller'} patches than the "
            f"network's. The keys would match, and the logits be others. Load it into hpm_{'' if small else 'cifar_'}"
            "xcit_*; where its patches are the network's all the same, save it without what shows otherwise")
    state_dict = plain_state_dict(found, mean, std)
    return {"function": torch.tensor(XCIT_FUNCTION), **state_dict} if is_xcit and small else state_dict


def _other_patches(state_dict: Mapping[str, Tensor], small: bool) -> str:
    """Returns what shows that an XCiT's patches are not of the network's size, for a message; empty if nothing does."""
    # Whatever their prefixes.
    entries = {key: key.rpartition(".")[2] for key in state_dict}
    imagenet = torch.tensor(IMAGENET_DEFAULT_MEAN)
    for key in (key for key, name in entries.items() if name in _MEANS):
        mean = state_dict[key].flatten().float()
        if (mean.shape == imagenet.shape and torch.allclose(mean, imagenet, rtol=0, atol=1e-4)) == small:
            return f"normalises by {key} = {tuple(round(value, 4) for value in mean.tolist())}"
    stated = "function" in entries.values()
    if stated and not small:
        return "has the entry function, as files of hpm_cifar_xcit_*"
    if not stated and small:
        if "prototypes" in entries.values():
            return "has an HPM head and no entry function, as files of hpm_xcit_*"
        if any(key.endswith("head.weight") and len(value) == 1000 for key, value in state_dict.items()):
            return "has 1000 classes, as ImageNet"
    return ""


def native_state_dict(
        checkpoint: Any,
        expected: Collection[str],
        *,
        layout: str,
        shortcut: str,
        mean: Sequence[float],
        std: Sequence[float],
) -> dict[str, Tensor]:
    """Returns a checkpoint of any of the `FORMATS` under the names of a `PreActNet`.

    Arguments:
        checkpoint: what a file holds; stays as it is.
        expected: the network's own keys.
        layout, shortcut: the network's.
        mean, std: see `plain_state_dict`.

    Raises:
        CheckpointError: another format, or one whose weights need another layout or shortcut, or keys that the network
            and the checkpoint do not share. A missing classifier is none of them: it may be a new one.
    """
    state_dict = plain_state_dict(checkpoint, mean, std)
    found = next((known for known in FORMATS if known.fits(state_dict)), None)
    if found is None:
        known = ", ".join(known.name for known in FORMATS)
        raise CheckpointError(f"unknown format: no network that is known here has the keys {', '.join(state_dict)}. "
                              f"Known: {known}")
    if not found.shortcuts:
        raise CheckpointError(f"the checkpoint is of {found.name}, with activations behind the blocks; a PreActNet has "
                              "them in front and cannot compute it. Take hpm_cifar_resnet18")
    if found.layout is not None and found.layout != layout:
        tag = ".untrained_deepmind" if found.layout == "deepmind" else ".untrained"
        raise CheckpointError(
            f"the checkpoint is of {found.name} and needs layout={found.layout!r}; the network has {layout!r}. The "
            f"keys would match, and the logits be others. Pass layout={found.layout!r}, or take a tag that has it, "
            f"such as {tag} with pretrained_cfg_overlay=dict(file=...)")
    if shortcut not in found.shortcuts:
        raise CheckpointError(f"the checkpoint is of {found.name} and needs shortcut={found.shortcuts[0]!r}; the "
                              f"network has {shortcut!r}. Pass shortcut={found.shortcuts[0]!r}")
    renamed = {found.rename(key): key for key in state_dict if not re.fullmatch(found.unused, key)}
    classifier = {"fc.weight", "fc.bias", "fc.prototypes", "fc.num_updates", "fc.log_scale"}
    unknown = [key for name, key in renamed.items() if name not in expected and name not in classifier]
    # Files of old versions of PyTorch lack the counts of BatchNorm's updates, which nothing here uses.
    missing = [name for name in expected if name not in renamed and not name.startswith("fc.") and name != "function"
               and not name.endswith("num_batches_tracked")]
    if unknown or missing:
        raise CheckpointError(f"the checkpoint, of {found.name}, is of another network. Keys that this one has no "
                              f"place for: {', '.join(unknown) or 'none'}. Entries that it lacks: "
                              f"{', '.join(missing) or 'none'}")
    return {name: state_dict[key] for name, key in renamed.items()}


@contextmanager
def fitting(place: str, network: str, num_classes: int | None = None) -> Iterator[None]:
    """Names the checkpoint and the network where the block finds that they do not fit.

    Arguments:
        num_classes: the checkpoint's, for the advice if a classifier of another size is all that does not fit.

    Raises:
        CheckpointError: for one from the block, and for torch's RuntimeError about keys and shapes.
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
    """Says of any error in the block, which reads a checkpoint, where it happened and what to do.

    Code in the checkpoint does not run.

    Raises:
        CheckpointError: for every error of the block.
    """
    try:
        with weights_only():
            yield
    # What a damaged file or a server can cause is beyond listing; nothing but reading happens here.
    except Exception as error:
        # Without the cause, whose text may hold what a server answered, and that the token.
        raise CheckpointError(f"cannot read {place}: {without_tokens(_cause(error))}") from None


_RESAVE: Final = (
    "It holds pickled objects beside tensors. Loading those can run code, so nothing was loaded. If you trust the "
    "file, save its weights alone, on a machine where nothing is at stake: `import torch, dill; checkpoint = "
    "torch.load(FILE, map_location='cpu', pickle_module=dill, weights_only=False); "
    "torch.save({'state_dict': checkpoint['model']}, NEW)` (without dill, leave out pickle_module). Then load "
    "NEW in its place, with pretrained=True by pretrained_cfg_overlay=dict(file=NEW)")


def _cause(error: BaseException) -> str:
    """Returns what a reading error means, and what to do."""
    if isinstance(error, CheckpointError):
        return str(error)
    chain = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__
    text = " ".join(str(link) for link in chain)
    lines = [line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    # The Hub's client says the status first, and then of what.
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
        # timm's and torch's own texts advise to load it unsafely, or name an opcode.
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
