"""WideResNets and PreActResNet-18 with an HPM head: `hpm_wrn{depth}_{width}` and `hpm_preact_resnet18`."""

from pathlib import Path
from typing import Any

from ..data import DATASETS
from ._builder import build_preact_net, register_entrypoint
from .preact import PreActNet
from .tags import cifar_cfg, pretrained_tags, weight_notes

_PAPERS = ("arXiv:1605.07146", "arXiv:2606.01746")
_RESNET_PAPERS = ("arXiv:1603.05027", "arXiv:2606.01746")
_TRADES_URL = "https://github.com/yaodongyu/TRADES"
_DEEPMIND_URL = "https://github.com/google-deepmind/deepmind-research"

# Depth, width, and a description.
_VARIANTS = {
    "hpm_wrn10_2": (10, 2, "0.3M parameters: for tests and small images"),
    "hpm_wrn16_4": (16, 4, "2.7M parameters"),
    "hpm_wrn28_10": (28, 10, "36.5M parameters: the usual network of robust CIFAR models"),
    "hpm_wrn34_10": (34, 10, "46.2M parameters: the network of TRADES"),
    "hpm_wrn34_20": (34, 20, "184.5M parameters"),
    "hpm_wrn70_16": (70, 16, "266.8M parameters"),
}

def _statistics(data: str) -> dict[str, Any]:
    return {"mean": DATASETS[data].mean, "std": DATASETS[data].std}


_CIFAR100 = {"num_classes": 100, **_statistics("torch/cifar100")}
_SVHN = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
_TINY_IMAGENET = {
    "num_classes": 200,
    "input_size": (3, 64, 64),
    "pool_size": (16, 16),
    "mean": (0.4802, 0.4481, 0.3975),
    "std": (0.2302, 0.2265, 0.2262),
}
# Wang et al. 2023, "Better Diffusion Models Further Improve Adversarial Training": architecture and tag, repository
# and file, threat model, published accuracies in % (clean, AutoAttack), and the fields that differ from CIFAR-10.
_WANG2023: tuple[tuple[str, str, str, tuple[float, float], dict[str, Any]], ...] = (
    ("hpm_wrn28_10.wang2023_cifar10_linf", "DM-Improves-AT/cifar10_linf_wrn28-10", "Linf:8/255", (92.44, 67.31), {}),
    ("hpm_wrn28_10.wang2023_cifar10_l2", "DM-Improves-AT/cifar10_l2_wrn28-10", "L2:128/255", (95.16, 83.63), {}),
    ("hpm_wrn28_10.wang2023_cifar100_linf", "DM-Improves-AT/cifar100_linf_wrn28-10", "Linf:8/255", (72.58, 38.83),
     _CIFAR100),
    ("hpm_wrn28_10.wang2023_svhn_linf", "DM-Improves-AT1/svhn_linf_wrn28-10", "Linf:8/255", (95.56, 64.01), _SVHN),
    ("hpm_wrn28_10.wang2023_tiny_linf", "DM-Improves-AT1/tiny_linf_wrn28-10", "Linf:8/255", (65.19, 31.30),
     _TINY_IMAGENET),
    ("hpm_wrn70_16.wang2023_cifar10_linf", "DM-Improves-AT/cifar10_linf_wrn70-16", "Linf:8/255", (93.25, 70.69), {}),
    ("hpm_wrn70_16.wang2023_cifar10_l2", "DM-Improves-AT/cifar10_l2_wrn70-16", "L2:128/255", (95.54, 84.86), {}),
    ("hpm_wrn70_16.wang2023_cifar100_linf", "DM-Improves-AT/cifar100_linf_wrn70-16", "Linf:8/255", (75.22, 42.67),
     _CIFAR100),
)

# Weights inside the package: data set, threat model, the fields of its cfg, and the model arguments.
_EMBEDDED: tuple[tuple[str, str, dict[str, Any], dict[str, Any]], ...] = (
    ("digits", "Linf:0.1", {"input_size": (1, 8, 8), **_statistics("digits")}, {"stem_stride": 2}),
    ("fashion_mnist", "Linf:0.1", {"input_size": (1, 28, 28), **_statistics("fashion_mnist")}, {"stem_stride": 4}),
    # Trained on a folder of images, hence ImageNet's normalisation, and on its FC classifier.
    ("cifar10", "Linf:8/255", _statistics("folder"), {"stem_stride": 2, "inference": "fc"}),
)

# A tag's cfg and, as `model_args`, the arguments that its weights need. An architecture's first tag with weights is its
# default.
default_cfgs = pretrained_tags({
    **{
        f"hpm_wrn10_2.{data}_linf": cifar_cfg(
            file=str(Path(__file__).parent / "weights" / f"hpm_wrn10_2.{data}_linf.safetensors"),
            pool_size=(1, 1),
            origin_url="https://arxiv.org/abs/2606.01746",
            paper_ids=_PAPERS,
            notes=weight_notes(threat),
            model_args=args,
            **fields,
        )
        for data, threat, fields, args in _EMBEDDED
    },
    **{
        name: cifar_cfg(
            hf_hub_id=f"wzekai99/{file.partition('/')[0]}",
            hf_hub_filename=f"checkpoint/{file.partition('/')[2]}.pt",
            license="mit",
            origin_url="https://github.com/wzekai99/DM-Improves-AT",
            paper_ids=("arXiv:2302.04638", *_PAPERS),
            paper_name="Better Diffusion Models Further Improve Adversarial Training",
            notes=weight_notes(threat, f"{clean:.2f} % clean, {robust:.2f} % under AutoAttack (its authors' README)"),
            model_args={"layout": "deepmind"},
            **data,
        )
        for name, file, threat, (clean, robust), data in _WANG2023
    },
    **{f"{name}.untrained": cifar_cfg(origin_url=_TRADES_URL, paper_ids=_PAPERS) for name in _VARIANTS},
    **{f"{name}.untrained_deepmind": cifar_cfg(origin_url=_DEEPMIND_URL, paper_ids=_PAPERS,
                                               model_args={"layout": "deepmind"}) for name in _VARIANTS},
    "hpm_preact_resnet18.du2026_cifar10_linf": cifar_cfg(
        hf_hub_id="KaiwenDu/robust-overfitting-checkpoints",
        hf_hub_filename="epoch_105.pt",
        pool_size=(4, 4),
        license="mit",
        origin_url="https://github.com/ItsKaiwenDu/Robust-Overfitting",
        paper_ids=("arXiv:2002.11569", *_RESNET_PAPERS),
        paper_name="Overfitting in adversarially robust deep learning",
        notes=weight_notes("Linf:8/255"),
    ),
    "hpm_preact_resnet18.untrained": cifar_cfg(
        pool_size=(4, 4),
        origin_url="https://github.com/locuslab/robust_overfitting",
        paper_ids=_RESNET_PAPERS,
    ),
    "hpm_preact_resnet18.untrained_deepmind": cifar_cfg(
        pool_size=(4, 4),
        origin_url=_DEEPMIND_URL,
        paper_ids=_RESNET_PAPERS,
        model_args={"layout": "deepmind", "shortcut": "raw3x3"},
    ),
})


def _build_wrn(variant: str, pretrained: bool, kwargs: dict[str, Any]) -> PreActNet:
    depth, width, _ = _VARIANTS[variant]
    # Two convolutions a block, three stages, and four other layers: the stem and the three projections.
    blocks = (depth - 4) // 6
    return build_preact_net(variant, pretrained, kwargs, depths=(blocks,) * 3,
                            channels=(16 * width, 32 * width, 64 * width), stem_chs=16)


def _build_resnet(variant: str, pretrained: bool, kwargs: dict[str, Any]) -> PreActNet:
    return build_preact_net(variant, pretrained, kwargs, depths=(2, 2, 2, 2), channels=(64, 128, 256, 512), stem_chs=64)


for _name, (_depth, _width, _about) in _VARIANTS.items():
    register_entrypoint(__name__, _name, f"WideResNet-{_depth}-{_width}, {_about}.", _build_wrn)
register_entrypoint(
    __name__, "hpm_preact_resnet18",
    "PreActResNet-18 for small images, 11.2M parameters, with a BatchNorm after the last stage.", _build_resnet)
