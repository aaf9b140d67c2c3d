"""The `hpm_*` models; importing this registers them with timm."""

from . import hpm_preact_resnet, hpm_wrn
from .preact import PreActNet

__all__ = ["PreActNet", "hpm_preact_resnet", "hpm_wrn"]
