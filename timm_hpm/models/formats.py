"""Formats of other projects' checkpoints, by their keys, and their names in our networks.

Keys that a format does not account for are an error that lists them: a checkpoint of another network may fit by chance,
and then gives silently wrong predictions.
"""

import re
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from timm.data import IMAGENET_DEFAULT_MEAN
from torch import Tensor

from ..checkpoints import CheckpointError, NormalisationWarning, unwrap

# Prefixes of every key: of nn.DataParallel, torch.compile, a wrapper's attribute, and a Sequential.
_PREFIXES: Final = ("module.", "_orig_mod.", "model.", "0.", "1.")

# Modules that normalise pixels, and the names of their buffers. Our networks take normalised images.
_NORMALISERS: Final = ("", "0.", "normalize.", "normalizer.", "attacker.normalize.")

_MEANS: Final = ("mean", "mu", "new_mean")
_STDS: Final = ("std", "sigma", "new_std")
# A regular expression and its replacement.
_Rename = tuple[str, "str | Callable[[re.Match[str]], str]"]


@dataclass(frozen=True)
class Format:
    """Names of a residual network in another project, and the arguments that its weights need of a `PreActNet`."""

    name: str  # in messages
    marks: tuple[str, ...]  # keys of every such checkpoint
    layout: str | None  # None if the keys do not show it
    shortcuts: tuple[str, ...]  # those that the weights may need; none if no `PreActNet` computes the network
    renames: tuple[_Rename, ...] = ()  # applied to each key in order
    without: tuple[str, ...] = ()  # keys of no such checkpoint
    unused: str = "(?!)"  # a regular expression of keys that the network never uses

    def fits(self, keys: Collection[str]) -> bool:
        """Returns whether a state dict with these keys has this format."""
        return all(mark in keys for mark in self.marks) and not any(mark in keys for mark in self.without)

    def rename(self, key: str) -> str:
        """Returns the name of `key` in our network; unknown keys do not change."""
        for pattern, target in self.renames:
            key = re.sub(pattern, target, key)
        return key


def _block(first: int) -> Callable[[re.Match[str]], str]:
    """Returns the replacement of a block's prefix, with stages counted from `first`."""
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
    # No known one activates before its shortcuts.
    Format(
        "a PreActResNet for small images without a final BatchNorm", ("layer1.0.conv1.weight", "linear.weight"),
        "trades", ("raw",), _PREACT_RESNET, without=("bn1.weight", "bn.weight"),
    ),
    _SMALL_RESNET,
)


def num_classes_of(state_dict: Mapping[str, Tensor], classifier: Any) -> int | None:
    """Returns the number of classes of a network's weights, whose names are its own or those of one of the `FORMATS`.

    None if they have no `classifier`, the path of the network's.
    """
    known = next((known for known in FORMATS if known.fits(state_dict)), None)
    names = {known.rename(key) if known else key: key for key in state_dict}
    weight = state_dict.get(names.get(f"{classifier}.weight", ""))
    return None if weight is None else len(weight)


def warn_of_normalisation(
        place: str, mean: Sequence[float], std: Sequence[float], given: Collection[str], state_dict: Collection[str],
) -> bool:
    """Warns if neither the caller nor weights without a config state a normalisation; returns whether it warned.

    `mean` and `std` are the network's, `given` the fields of its pretrained cfg that the caller set.
    """
    silent = not {"mean", "std"} <= {*given} and not any(key.rpartition(".")[2] in _MEANS for key in state_dict)
    if silent:
        warnings.warn(f"{place} do not say how they expect pixels normalised: mean {tuple(mean)} and std {tuple(std)} "
                      "are assumed, those of the network's name. Weights trained with others give wrong predictions. "
                      "Pass pretrained_cfg_overlay=dict(mean=..., std=...), or --mean and --std to evaluate.py",
                      NormalisationWarning, stacklevel=2)
    return silent


def plain_state_dict(checkpoint: Any, mean: Sequence[float], std: Sequence[float]) -> dict[str, Tensor]:
    """Returns the network's own state dict: without wrappers, prefixes, a second copy, and normalisation.

    `mean` and `std` are the network's normalisation; the checkpoint's own, if any, must agree.
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
    """Returns a state dict without the buffers that normalise pixels, which must agree with mean and std."""
    rest = dict(state_dict)
    for names, expected, argument in ((_MEANS, mean, "mean"), (_STDS, std, "std")):
        for key in [module + name for module in _NORMALISERS for name in names if module + name in rest]:
            found = rest.pop(key).flatten().float()
            wanted = torch.tensor(expected, dtype=torch.float32)
            # Published figures have four digits.
            if found.shape != wanted.shape or not torch.allclose(found, wanted, rtol=0, atol=1e-4):
                values = tuple(round(value, 4) for value in found.tolist())
                raise CheckpointError(f"the checkpoint normalises by {key} = {values}, the network by {argument} = "
                                      f"{tuple(expected)}. If the checkpoint is right, pass pretrained_cfg_overlay="
                                      f"dict({argument}={values})")
    return rest


def _without_second_copy(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns a state dict without MadryLab's `attacker.model.*`, the same network once more."""
    copies = {key: value for key, value in state_dict.items() if key.startswith("attacker.model.")}
    if not all(torch.equal(value, state_dict.get(key.removeprefix("attacker."), torch.empty(0)))
               for key, value in copies.items()):
        raise CheckpointError("the checkpoint holds two networks, model.* and attacker.model.*, that differ")
    return {key: value for key, value in state_dict.items() if key not in copies}


def small_resnet_state_dict(checkpoint: Any, mean: Sequence[float], std: Sequence[float]) -> dict[str, Tensor]:
    """Returns a checkpoint of a ResNet for small images under timm's names; see `plain_state_dict`."""
    state_dict = plain_state_dict(checkpoint, mean, std)
    if not _SMALL_RESNET.fits(state_dict):
        return state_dict
    return {_SMALL_RESNET.rename(key): value for key, value in state_dict.items()}


def xcit_state_dict(
        checkpoint: Any, mean: Sequence[float], std: Sequence[float], *, small: bool = False) -> dict[str, Tensor]:
    """Returns a checkpoint of timm's XCiT, unless it shows that its patches have another size than the network's.

    RobustBench's XCiT for small images (`small`: `hpm_cifar_xcit_*`) has the keys and shapes of timm's, but other
    strides. They can differ in the entry `function` of our own files, in the normalisation inside the checkpoint
    (ImageNet's or another), and in ImageNet's thousand classes. A checkpoint with none of these passes.
    """
    found = unwrap(checkpoint)
    is_xcit = any("cls_attn_blocks.0." in key for key in found)
    if is_xcit and (shown := _other_patches(found, small)):
        raise CheckpointError(
            f"the checkpoint {shown}: it is of an XCiT with {'larger' if small else 'smaller'} patches than the "
            f"network's. The keys would match, and the logits be others. Load it into hpm_{'' if small else 'cifar_'}"
            "xcit_*; if its patches have the network's size, save it without that evidence")
    state_dict = plain_state_dict(found, mean, std)
    return {"function": torch.tensor(XCIT_FUNCTION), **state_dict} if is_xcit and small else state_dict


def _other_patches(state_dict: Mapping[str, Tensor], small: bool) -> str:
    """Returns the evidence, for a message, that an XCiT's patches have another size than the network's, or ""."""
    # By their last names, under any prefix.
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


def native_state_dict(checkpoint: Any, model: Any) -> dict[str, Tensor]:
    """Returns a checkpoint of any of the `FORMATS` under the names of a `PreActNet`; see `plain_state_dict`."""
    layout, shortcut, expected = model.layout, model.shortcut, model.state_dict().keys()
    state_dict = plain_state_dict(checkpoint, model.pretrained_cfg["mean"], model.pretrained_cfg["std"])
    found = next((known for known in FORMATS if known.fits(state_dict)), None)
    if found is None:
        known = ", ".join(known.name for known in FORMATS)
        raise CheckpointError(f"unknown format: no known network has the keys {', '.join(state_dict)}. Known: {known}")
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
    # Files of old versions of PyTorch lack BatchNorm's update counts, which are not used.
    missing = [name for name in expected if name not in renamed and not name.startswith("fc.") and name != "function"
               and not name.endswith("num_batches_tracked")]
    if unknown or missing:
        raise CheckpointError(f"the checkpoint, of {found.name}, is of another network. Keys that this one has no "
                              f"place for: {', '.join(unknown) or 'none'}. Entries that it lacks: "
                              f"{', '.join(missing) or 'none'}")
    return {name: state_dict[key] for name, key in renamed.items()}
