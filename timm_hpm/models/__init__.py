"""The `hpm_*` models; importing this registers them with timm."""

from . import hpm_cifar, hpm_preact, hpm_timm
from .hpm_timm import register_hpm
from .preact import PreActNet

__all__ = ["PreActNet", "hpm_cifar", "hpm_preact", "hpm_timm", "register_hpm"]
