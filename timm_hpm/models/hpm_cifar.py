"""timm's ResNet and XCiT for images of 32x32 pixels, with an HPM head: `hpm_cifar_*`."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

from timm.models.resnet import BasicBlock, ResNet
from timm.models.xcit import Xcit
from timm.models.xcit import checkpoint_filter_fn as xcit_filter_fn
from torch import nn

from ._builder import build_variant, creator, register_entrypoint
from .formats import XCIT_FUNCTION, small_resnet_state_dict, xcit_state_dict
from .preact import StatedFunction
from .tags import XCIT_WEIGHTS, cifar_cfg, pretrained_tags, weight_notes

_RESNET_PAPERS = ("arXiv:1512.03385", "arXiv:2606.01746")
_XCIT_PAPERS = ("arXiv:2209.07399", "arXiv:2106.09681", "arXiv:2606.01746")

# Size, width, number of heads, and a description. Debenedetti et al. 2022, "A Light Recipe to Train Robust Vision
# Transformers", published the accuracies in % (clean, AutoAttack) on CIFAR-10 and CIFAR-100, whose normalisation is
# their own.
_XCITS = (
    ("small", 384, 8, "26M parameters", (90.06, 56.14), (67.34, 32.19)),
    ("medium", 512, 8, "46M parameters", (91.30, 57.27), (69.21, 34.21)),
    ("large", 768, 16, "103M parameters", (91.73, 57.58), (70.76, 35.08)),
)
_CIFAR100 = {"num_classes": 100, "mean": (0.5071, 0.4867, 0.4408), "std": (0.2675, 0.2565, 0.2761)}


def _xcit_cfg(**kwargs: Any) -> dict[str, Any]:
    return cifar_cfg(**{"pool_size": None, "fixed_input_size": True, "first_conv": "patch_embed.proj.0.0",
                        "classifier": "head", "origin_url": "https://github.com/dedeswim/vits-robustness-torch",
                        "paper_ids": _XCIT_PAPERS, **kwargs})


default_cfgs = pretrained_tags({
    "hpm_cifar_resnet18.untrained": cifar_cfg(
        pool_size=(4, 4),
        origin_url="https://github.com/huggingface/pytorch-image-models",
        paper_ids=_RESNET_PAPERS,
    ),
    **{
        f"hpm_cifar_xcit_{size}_12_p4_32.debenedetti2022_{data}_linf": _xcit_cfg(
            url=f"{XCIT_WEIGHTS}-{size[0]}-{data}-linf.pth.tar",
            license="mit",
            paper_name="A Light Recipe to Train Robust Vision Transformers",
            notes=weight_notes(
                "Linf:8/255", f"{clean:.2f} % clean, {robust:.2f} % under AutoAttack (its authors' README)"),
            **fields,
        )
        for size, _, _, _, *published in _XCITS
        for (data, fields), (clean, robust) in zip((("cifar10", {}), ("cifar100", _CIFAR100)), published, strict=True)
    },
    **{f"hpm_cifar_xcit_{size}_12_p4_32.untrained": _xcit_cfg() for size, *_ in _XCITS},
})


class CifarResNet(ResNet):
    """timm's ResNet of basic blocks with a 3x3 stem of stride 1 and no max pooling."""

    def __init__(self, **kwargs: Any):
        super().__init__(block=BasicBlock, stem_type="", replace_stem_pool=False, **kwargs)  # type: ignore[arg-type]
        stem: Any = self.conv1
        stem = nn.Conv2d(stem.in_channels, stem.out_channels, 3, padding=1, bias=False,
                         device=stem.weight.device, dtype=stem.weight.dtype)
        nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
        self.conv1, self.maxpool = stem, nn.Identity()  # type: ignore[assignment]
        feature_info: list[dict[str, Any]] = self.feature_info
        # Half of timm's after the stem, and a quarter after each stage.
        for level in feature_info:
            level["reduction"] //= 2 if level["module"] == "act1" else 4


class CifarXcit(StatedFunction, Xcit):
    """timm's XCiT with patches of 4 pixels a side: two of four embedding convolutions have stride 1, not 2."""

    def __init__(self, **kwargs: Any):
        super().__init__(patch_size=16, **kwargs)
        embed: Any = self.patch_embed
        for index in (0, 2):
            embed.proj[index][0].stride = (1, 1)
        embed.patch_size, = XCIT_FUNCTION
        embed.num_patches = math.prod(size // embed.patch_size for size in embed.img_size)
        for level in self.feature_info:
            level["reduction"] = embed.patch_size
        # The weights fit timm's own XCiT, too.
        self.state_function(*XCIT_FUNCTION, device=self.cls_token.device)

    def describe_function(self, numbers: Sequence[int]) -> str:
        """Returns the size of the patches."""
        return f"patches of {numbers[0]} pixels a side"


def _build_xcit(embed_dim: int, num_heads: int, variant: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    create = creator(CifarXcit, variant, {"out_indices": 3, "feature_cls": "getter"},
                     pretrained_filter_fn=xcit_filter_fn)
    args = {"embed_dim": embed_dim, "depth": 12, "num_heads": num_heads, "eta": 1.0, "tokens_norm": True}
    return build_variant(create, variant, pretrained, {**args, **kwargs}, partial(xcit_state_dict, small=True))


def _build_resnet(variant: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    args = {"layers": (2, 2, 2, 2), **kwargs}
    return build_variant(creator(CifarResNet, variant, {}), variant, pretrained, args, small_resnet_state_dict)


register_entrypoint(__name__, "hpm_cifar_resnet18",
                    "ResNet-18 for small images, 11.2M parameters, with activations after the blocks.", _build_resnet)
for _size, _width, _heads, _about, *_ in _XCITS:
    register_entrypoint(__name__, f"hpm_cifar_xcit_{_size}_12_p4_32", f"XCiT with patches of 4 pixels, {_about}.",
                        partial(_build_xcit, _width, _heads))
