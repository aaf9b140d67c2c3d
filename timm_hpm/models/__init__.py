"""The `hpm_*` models; importing this registers them with timm."""

from . import hpm_cifar, hpm_preact_resnet, hpm_timm, hpm_wrn
from .hpm_timm import register_hpm
from .preact import PreActNet

__all__ = ["PreActNet", "hpm_cifar", "hpm_preact_resnet", "hpm_timm", "hpm_wrn", "register_hpm"]
