"""timm's architectures with an HPM head: `hpm_{base}` for the bases listed here, any other by `register_hpm`."""

from difflib import get_close_matches
from typing import Any

import timm
from timm.models import DefaultCfg, generate_default_cfgs, register_model
from torch import nn

from ._builder import build_variant, variant_cfg

_BASES = (
    # residual networks
    "resnet18", "resnet34", "resnet50", "resnet101", "wide_resnet50_2",
    # ConvNeXt
    "convnext_tiny", "convnext_small", "convnext_base", "convnext_large", "convnextv2_tiny", "convnextv2_base",
    # transformers
    "swin_small_patch4_window7_224", "swin_base_patch4_window7_224", "swin_large_patch4_window7_224",
    "vit_small_patch16_224", "vit_base_patch16_224",
    "deit_small_patch16_224", "deit_base_patch16_224", "deit3_small_patch16_224", "deit3_base_patch16_224",
    "xcit_small_12_p16_224", "xcit_medium_24_p16_224", "xcit_large_24_p16_224",
    # small networks
    "efficientnet_b0", "mobilenetv3_large_100", "regnety_016",
)

__all__ = ["register_hpm"]

default_cfgs: dict[str, DefaultCfg] = {}


def register_hpm(base: str) -> str:
    """Registers `hpm_{base}`, timm's architecture `base` with an HPM head, and returns that name.

    Its one tag, `untrained`, has no weights. A name registered before stays as it is. The network is made when a model
    is created; a base whose head an HPM head cannot replace fails then, by `UnsupportedHeadError`.

    Arguments:
        base: an architecture of timm's, or one registered with timm, without a tag.

    Raises:
        ValueError: an unknown base; the message names the nearest ones.
    """
    name = f"hpm_{base}"
    if name in default_cfgs:
        return name
    cfg = variant_cfg(base) if timm.is_model(base) and "." not in base else None
    if cfg is None or base.startswith("hpm_"):
        known = [architecture for architecture in timm.list_models() if not architecture.startswith("hpm_")]
        nearest = ", ".join(get_close_matches(base.partition(".")[0], known, n=5)) or "see timm.list_models()"
        raise ValueError(f"unknown base {base!r}; expected an architecture of timm's, without a tag. "
                         f"The nearest: {nearest}")
    default_cfgs.update(generate_default_cfgs({f"{name}.untrained": cfg}))

    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return build_variant(base, name, pretrained, kwargs)

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"timm's `{base}` with an HPM head; see `timm_hpm.add_hpm_head` for mix, ema_decay and inference."
    globals()[name] = register_model(create)
    return name


for _base in _BASES:
    register_hpm(_base)
