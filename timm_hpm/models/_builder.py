"""What the entrypoints of the `hpm_*` models share: pretrained cfgs, model arguments of a tag, and weight loading."""

from collections.abc import Mapping
from typing import Any

from timm.models import build_model_with_cfg, resolve_pretrained_cfg
from torch import Tensor, nn

from ..head import find_head, head_name
from .preact import PreActNet

CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2471, 0.2435, 0.2616)


def cifar_cfg(**kwargs: Any) -> dict[str, Any]:
    """Returns the pretrained cfg of a `PreActNet` for CIFAR-10, with `kwargs` in place of what stands here."""
    return {
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "pool_size": (8, 8),
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": CIFAR10_MEAN,
        "std": CIFAR10_STD,
        "first_conv": "conv1",
        "classifier": "fc",
        "license": "apache-2.0",
        **kwargs,
    }


def tag_args(variant: str, table: Mapping[str, dict[str, Any]], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the model arguments that belong to the pretrained tag which an entrypoint was asked for.

    A pretrained cfg has no room for them, and building a tag's network without them would load its weights into
    another function.

    Arguments:
        variant: name of the architecture.
        table: `"arch.tag"` to model arguments; a tag without an entry has none.
        kwargs: the entrypoint's, of which `pretrained_cfg` and `pretrained_cfg_overlay` count.

    Raises:
        RuntimeError: a tag that the architecture does not have (by timm).
    """
    cfg = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
    return dict(table.get(f"{variant}.{cfg.tag}", {}))


def build_preact_net(
        variant: str,
        pretrained: bool,
        arch_args: Mapping[str, Any],
        table: Mapping[str, dict[str, Any]],
        kwargs: Mapping[str, Any],
) -> PreActNet:
    """Returns the network of an entrypoint; with `features_only` among `kwargs`, timm's wrapper of it.

    `arch_args` are the architecture's model arguments, `table` those of its tags (see `tag_args`). A tag's win over
    the architecture's, and the caller's `kwargs` over both.
    """
    return build_model_with_cfg(
        PreActNet,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={
            "out_indices": tuple(range(len(arch_args["depths"]) + 1)),
            "flatten_sequential": True,
        },
        **{**arch_args, **tag_args(variant, table, kwargs), **kwargs},
    )


def checkpoint_filter_fn(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Returns the entries of a checkpoint that `model` shall load; leaves `state_dict` as it is.

    timm itself drops only the classifier's `weight` and `bias`, where the model's class count is not the pretrained
    cfg's (or the cfg's is overlaid by -1, which asks for a new head). Prototypes belong to the classes just as much:

    - a model without a head gets nothing of the checkpoint's head;
    - a model with other classes, or a new head, gets no prototypes, update counts and scale;
    - plain FC weights are completed with the model's own, so that they load strictly and the head of a fresh model
      answers as its FC classifier.
    """
    cfg = getattr(model, "pretrained_cfg", None) or {}
    name = head_name(model)
    if name is None:
        classifier = cfg.get("classifier") or "fc"
        return {key: value for key, value in state_dict.items() if not key.startswith(f"{classifier}.")}
    head = find_head(model)
    own = {f"{name}.{key}": value for key, value in head.state_dict().items() if key not in ("weight", "bias")}
    if own.keys().isdisjoint(state_dict):
        return {**state_dict, **own}
    prototypes = state_dict.get(f"{name}.prototypes")
    same_classes = prototypes is None or len(prototypes) == head.out_features
    if same_classes and cfg.get("num_classes", head.out_features) == head.out_features:
        return dict(state_dict)
    return {key: value for key, value in state_dict.items() if key not in own}
