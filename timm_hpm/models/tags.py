"""Pretrained tags: their cfgs, their notes, and the model arguments that timm's cfgs have no field for."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Final

from timm.models import DefaultCfg, PretrainedCfg, generate_default_cfgs, get_pretrained_cfg, resolve_pretrained_cfg

from ..data import DATASETS
from ..threat import ThreatModel
from .saving import OF_TRAINING, check_cfg

#: Fields of a pretrained cfg that name the caller's own weights; `source` marks those of a folder or a repository.
PLACES: Final = ("source", "state_dict", "file", "url", "hf_hub_id")
# Fields of a pretrained cfg that describe its weights, not the network.
_OF_WEIGHTS: Final = (
    "url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "architecture", "tag", "label_offset",
    "label_names", "label_descriptions", "description", "paper_name", "notes",
)
#: The start of the addresses of Debenedetti et al.'s robust XCiTs.
XCIT_WEIGHTS: Final = "https://github.com/RobustBench/robustbench/releases/download/v1.1/debenedetti2022light-xcit"
# "arch.tag" to model arguments.
_TAG_ARGS: dict[str, dict[str, Any]] = {}


def pretrained_tags(tags: Mapping[str, Mapping[str, Any]]) -> dict[str, DefaultCfg]:
    """Returns timm's `default_cfgs` of a table of tags, and records their model arguments, the field `model_args`.

    An architecture's default tag is the first with weights, or one whose name ends in `*`.
    """
    cfgs: Any = {name: dict(fields) for name, fields in tags.items()}
    _TAG_ARGS.update({name.rstrip("*"): cfg.pop("model_args", {}) for name, cfg in cfgs.items()})
    return generate_default_cfgs(cfgs)


def cifar_cfg(**kwargs: Any) -> dict[str, Any]:
    """Returns the pretrained cfg of a network for CIFAR-10, with the fields `kwargs` replaced."""
    return {
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "pool_size": (8, 8),
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": DATASETS["torch/cifar10"].mean,
        "std": DATASETS["torch/cifar10"].std,
        "first_conv": "conv1",
        "classifier": "fc",
        "license": "apache-2.0",
        **kwargs,
    }


def weight_notes(threat: str, published: str | None = None) -> tuple[str, ...]:
    """Returns the `notes` of a cfg: the threat model, and the accuracies that the weights' authors published."""
    ThreatModel.of(threat)  # raises for a typing error
    notes = (f"threat model: {threat}",)
    return notes if published is None else (*notes, f"published, not re-measured: {published}")


def variant_cfg(base: str) -> PretrainedCfg | None:
    """Returns a cfg without weights for `hpm_{base}`, of the base's preprocessing; None without such a base."""
    cfg = get_pretrained_cfg(base)
    without_weights: dict[str, Any] = {
        **dict.fromkeys(_OF_WEIGHTS),
        "custom_load": False,
        "license": "apache-2.0",
        "origin_url": "https://github.com/huggingface/pytorch-image-models",
        "paper_ids": "arXiv:2606.01746",
    }
    return cfg and dataclasses.replace(cfg, **without_weights)


def tag_args(variant: str, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the model arguments that the weights of the pretrained tag in an entrypoint's `kwargs` need."""
    cfg = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
    return dict(_TAG_ARGS.get(f"{variant}.{cfg.tag}", {}))


def own_cfg(variant: str, pretrained: bool, kwargs: Mapping[str, Any]) -> PretrainedCfg:
    """Returns the pretrained cfg that an entrypoint is called with, without facts about weights that are not loaded.

    A network with random weights, or with the caller's, gets the licence, origin, paper and notes of the tag
    `untrained`, and the caller's weights have no tag. A whole cfg, as from `hf-hub:`, stays as it is.
    """
    asked, overlay = kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay")
    if isinstance(asked, Mapping):
        check_cfg(asked)
    cfg = resolve_pretrained_cfg(variant, asked, overlay)
    foreign = names_weights(kwargs)
    if not foreign and (pretrained or is_whole(asked)):
        return cfg
    if foreign:  # timm would prefer the tag's own places
        others: dict[str, Any] = {name: None for name in (*PLACES, "hf_hub_filename") if name not in (overlay or {})}
        cfg = dataclasses.replace(cfg, **others)
    registered = get_pretrained_cfg(f"{variant}.{cfg.tag}") if cfg.tag else None
    if registered is not None and not registered.has_weights:
        return cfg
    neutral = get_pretrained_cfg(f"{variant}.untrained") if variant.startswith("hpm_") else None
    of_tag: dict[str, Any] = {name: getattr(neutral, name, None) for name in OF_TRAINING}
    return dataclasses.replace(cfg, tag=None if foreign else cfg.tag, **of_tag)


def names_weights(kwargs: Mapping[str, Any]) -> bool:
    """Returns whether an entrypoint's arguments name the caller's own weights."""
    return bool((kwargs.get("pretrained_cfg_overlay") or {}).keys() & {*PLACES})


def is_whole(cfg: Any) -> bool:
    """Returns whether an entrypoint's `pretrained_cfg` is a cfg, as from `hf-hub:` and `local-dir:`, not a tag."""
    return cfg is not None and not isinstance(cfg, str)
