"""PreActResNet with an HPM head: `hpm_preact_resnet18`."""

from typing import Any

from ._builder import build_preact_net, register_entrypoint
from .preact import PreActNet
from .tags import cifar_cfg, pretrained_tags, weight_notes

_PAPERS = ("arXiv:1603.05027", "arXiv:2606.01746")

default_cfgs = pretrained_tags({
    "hpm_preact_resnet18.du2026_cifar10_linf": cifar_cfg(
        hf_hub_id="KaiwenDu/robust-overfitting-checkpoints",
        hf_hub_filename="epoch_105.pt",
        pool_size=(4, 4),
        license="mit",
        origin_url="https://github.com/ItsKaiwenDu/Robust-Overfitting",
        paper_ids=("arXiv:2002.11569", *_PAPERS),
        paper_name="Overfitting in adversarially robust deep learning",
        notes=weight_notes("Linf:8/255"),
    ),
    "hpm_preact_resnet18.untrained": cifar_cfg(
        pool_size=(4, 4),
        origin_url="https://github.com/locuslab/robust_overfitting",
        paper_ids=_PAPERS,
    ),
    "hpm_preact_resnet18.untrained_deepmind": cifar_cfg(
        pool_size=(4, 4),
        origin_url="https://github.com/google-deepmind/deepmind-research",
        paper_ids=_PAPERS,
        model_args={"layout": "deepmind", "shortcut": "raw3x3"},
    ),
})


def _build(variant: str, pretrained: bool, kwargs: dict[str, Any]) -> PreActNet:
    return build_preact_net(variant, pretrained, kwargs, depths=(2, 2, 2, 2), channels=(64, 128, 256, 512), stem_chs=64)


register_entrypoint(
    __name__, "hpm_preact_resnet18",
    "PreActResNet-18 for small images, 11.2M parameters, with a BatchNorm after the last stage.", _build)
