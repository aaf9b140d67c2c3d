"""RobustBench's networks, without its packages' own __init__: those import data sets, attacks and a timm of 2024."""

import importlib
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from torch import nn


def zoo_module(name: str) -> ModuleType:
    """Returns a module of `robustbench.model_zoo`, such as `"cifar10"` or `"architectures.resnet"`.

    Raises:
        ModuleNotFoundError: if RobustBench is not installed; the message says how to install it.
    """
    if "robustbench" not in sys.modules:
        spec = find_spec("robustbench")
        if spec is None or spec.submodule_search_locations is None:
            raise ModuleNotFoundError("RobustBench is not installed; run: pip install --no-deps robustbench==1.1.1 "
                                      "(with its dependencies it would replace timm)")
        root = Path(spec.submodule_search_locations[0])
        for package, folder in (("robustbench", root), ("robustbench.model_zoo", root / "model_zoo")):
            sys.modules[package] = ModuleType(package)
            sys.modules[package].__path__ = [str(folder)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return importlib.import_module(f"robustbench.model_zoo.{name}")


def randomised(model: nn.Module) -> nn.Module:
    """Gives a network random BatchNorm statistics and a classifier that tells images apart; returns it in eval mode."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.2)
    return model.eval()
