"""timm's architectures with an HPM head: `hpm_{base}` for the bases listed here, any other by `register_hpm`."""

from functools import partial
from typing import Any

import timm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import DefaultCfg, model_entrypoint

from ..names import did_you_mean
from ._builder import build_variant, converter, register_entrypoint
from .tags import XCIT_WEIGHTS, pretrained_tags, variant_cfg, weight_notes

#: The bases that `import timm_hpm` registers; `register_hpm` adds others.
BASES = (
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2",
    "convnext_tiny", "convnext_small", "convnext_base", "convnext_large", "convnextv2_tiny", "convnextv2_base",
    "swin_small_patch4_window7_224", "swin_base_patch4_window7_224", "swin_large_patch4_window7_224",
    "vit_small_patch16_224", "vit_base_patch16_224",
    "deit_small_patch16_224", "deit_base_patch16_224", "deit3_small_patch16_224", "deit3_base_patch16_224",
    "xcit_small_12_p16_224", "xcit_medium_24_p16_224", "xcit_large_24_p16_224",
    "efficientnet_b0", "mobilenetv3_large_100", "regnety_016",
)

__all__ = ["register_hpm"]

# Fields of every public ImageNet checkpoint below, whatever the base's default is.
_IMAGENET = {
    "num_classes": 1000,
    "input_size": (3, 224, 224),
    "test_input_size": None,
    "test_crop_pct": None,
    "test_pool_size": None,
    "crop_pct": 0.875,
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
}

# Salman et al. 2020, "Do Adversarially Robust ImageNet Models Transfer Better?": published clean accuracies in %, of
# the radii Linf in 255ths and L2. The base's name and the radius make the file's name.
_SALMAN2020_RADII = {
    "linf": ("4.0", "0.5", "1.0", "2.0", "8.0"),
    "l2": ("3", "0.01", "0.03", "0.05", "0.1", "0.25", "0.5", "1", "5"),
}
_SALMAN2020_CLEAN = {
    ("resnet18", "linf"): (52.49, 66.13, 63.46, 59.63, 42.11),
    ("resnet18", "l2"): (53.12, 69.90, 69.24, 69.15, 68.77, 67.43, 65.49, 62.32, 45.59),
    ("resnet50", "linf"): (63.86, 73.73, 72.05, 69.10, 54.53),
    ("resnet50", "l2"): (62.83, 75.68, 75.76, 75.59, 74.78, 74.14, 73.16, 70.43, 56.13),
    ("wide_resnet50_2", "linf"): (68.41, 75.82, 74.65, 72.35, 60.82),
    ("wide_resnet50_2", "l2"): (66.90, 77.25, 77.26, 77.17, 76.74, 76.21, 75.11, 73.41, 60.94),
}

# Liu et al. 2023 (ARES 2.0), "A Comprehensive Study on Robustness of Image Classification Models": the base to its part
# of the file's name, the published accuracies if known, and the model arguments.
_LIU2023: dict[str, tuple[str, str, dict[str, Any]]] = {
    "resnet50": ("ResNet50", "67.0 % clean, 34.1 % under PGD-100", {}),
    "resnet101": ("ResNet101", "", {}),
    "resnet152": ("ResNet152", "", {"act_layer": "gelu"}),
    "wide_resnet50_2": ("Wide_ResNet50_2", "", {"act_layer": "gelu"}),
    "convnext_small": ("ConvNext_Small", "77.3 % clean, 54.3 % under PGD-100", {}),
    "convnext_base": ("ConvNext_Base", "77.2 % clean, 56.8 % under PGD-100, 55.82 % under AutoAttack", {}),
    "convnext_large": ("ConvNext_Large", "78.8 % clean, 60.1 % under PGD-100, 58.48 % under AutoAttack", {}),
    "vit_small_patch16_224": ("ViT_small_patch16_224", "70.7 % clean, 43.7 % under PGD-100", {}),
    "vit_base_patch16_224": ("ViT_base_patch16_224", "74.7 % clean, 49.7 % under PGD-100", {}),
    "swin_small_patch4_window7_224": (
        "Swin_small_patch4_window7_224", "76.6 % clean, 55.6 % under PGD-100", {}),
    "swin_base_patch4_window7_224": (
        "Swin_base_patch4_window7_224", "76.6 % clean, 57.3 % under PGD-100, 56.16 % under AutoAttack", {}),
    "swin_large_patch4_window7_224": (
        "Swin_large_patch4_window7_224", "79.7 % clean, 62.3 % under PGD-100, 59.56 % under AutoAttack", {}),
}

default_cfgs: dict[str, DefaultCfg] = {}


def _public_tags(base: str) -> dict[str, dict[str, Any]]:
    """Returns the tags of `hpm_{base}` with public weights, the default first, and their fields."""
    tags = {}
    for norm, accuracies in ((norm, clean) for (name, norm), clean in _SALMAN2020_CLEAN.items() if name == base):
        for radius, clean in zip(_SALMAN2020_RADII[norm], accuracies, strict=True):
            eps = radius.removesuffix(".0")
            tags[f"salman2020_imagenet_{norm}_eps{eps.replace('.', '_')}"] = {
                **_IMAGENET,
                "hf_hub_id": "madrylab/robust-imagenet-models",
                "hf_hub_filename": f"{base}_{norm}_eps{radius}.ckpt",
                "interpolation": "bilinear",
                "license": "mit",
                "origin_url": "https://github.com/microsoft/robust-models-transfer",
                "paper_ids": ("arXiv:2007.08489", "arXiv:2606.01746"),
                "paper_name": "Do Adversarially Robust ImageNet Models Transfer Better?",
                "notes": weight_notes(
                    f"Linf:{eps}/255" if norm == "linf" else f"L2:{eps}",
                    f"{clean:.2f} % clean (its authors' README; no robust accuracy there)"),
            }
    if base == "xcit_small_12_p16_224":
        tags["debenedetti2022_imagenet_linf"] = {
            **_IMAGENET,
            "url": f"{XCIT_WEIGHTS}-s-imagenet-linf.pth.tar",
            "mean": (0.0,) * 3,  # trained on pixels in [0, 1]
            "std": (1.0,) * 3,
            "crop_pct": 1.0,
            "interpolation": "bicubic",
            "license": "mit",
            "origin_url": "https://github.com/dedeswim/vits-robustness-torch",
            "paper_ids": ("arXiv:2209.07399", "arXiv:2606.01746"),
            "paper_name": "A Light Recipe to Train Robust Vision Transformers",
            "notes": weight_notes("Linf:4/255", "72.34 % clean, 41.78 % under AutoAttack (its authors' README)"),
        }
    if base in _LIU2023:
        file, published, model_args = _LIU2023[base]
        tags["liu2023_imagenet_linf"] = {
            **_IMAGENET,
            **({"model_args": model_args} if model_args else {}),
            "url": f"https://ml.cs.tsinghua.edu.cn/~xiaoyang/aresbench/ckpt-imagenet/ARES_{file}_AT.pth",
            "interpolation": "bicubic",
            "license": "apache-2.0",
            "origin_url": "https://github.com/thu-ml/ares",
            "paper_ids": ("arXiv:2302.14301", "arXiv:2606.01746"),
            "paper_name": "A Comprehensive Study on Robustness of Image Classification Models: Benchmarking and "
                          "Rethinking",
            "notes": weight_notes(
                "Linf:4/255", f"{published} (its authors' benchmark, 1,000 images)" if published else None),
        }
    return tags


def register_hpm(base: str) -> str:
    """Registers `hpm_{base}`, timm's architecture `base` with an HPM head, and returns that name.

    Its tag `untrained` has no weights; bases of public robust checkpoints have further tags. The first of those is the
    default, unless it needs another activation or normalisation than the base: under the bare name the base's own
    weights must give the same logits as in timm. A registered name stays as it is. If an HPM head cannot replace the
    base's classifier, creating a model raises `UnsupportedHeadError`. A base that timm does not know, or with a tag, is
    a ValueError.
    """
    name = f"hpm_{base}"
    if name in default_cfgs:
        return name
    cfg = variant_cfg(base) if timm.is_model(base) and "." not in base else None
    if cfg is None or base.startswith("hpm_"):
        near = did_you_mean(base.partition(".")[0], timm.list_models(exclude_filters="hpm_*"))
        raise ValueError(f"unknown base {base!r}; expected one of timm.list_models(), without hpm_ and a tag{near}")
    public = _public_tags(base)
    first = next(iter(public.values()), {})
    another = "model_args" in first or any(field in first and first[field] != getattr(cfg, field)
                                           for field in ("mean", "std"))
    # The star makes a tag the default, before those with weights.
    tags = {**public, f"untrained{'*' if another else ''}": {}}
    default_cfgs.update(pretrained_tags({f"{name}.{tag}": vars(cfg) | fields for tag, fields in tags.items()}))

    build = partial(build_variant, model_entrypoint(base), convert=converter(base))
    register_entrypoint(__name__, name, f"timm's `{base}` with an HPM head; see `timm_hpm.add_hpm_head`.", build)
    return name


def register_saved(architecture: str) -> None:
    """Registers a saved model's `hpm_*` architecture; raises a ValueError if its base is unknown."""
    if architecture.startswith("hpm_") and not timm.is_model(architecture):
        register_hpm(architecture.removeprefix("hpm_"))


for _base in BASES:
    register_hpm(_base)
