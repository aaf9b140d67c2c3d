#!/usr/bin/env python3
"""Tries an HPM head on timm's, torchvision's and RobustBench's architectures, without their weights.

    python benchmarks/coverage.py                       # about 15 minutes on one CPU core
    python benchmarks/coverage.py --filter 'resnet*'

timm's are those with pretrained weights, torchvision's its classifiers, RobustBench's all that the modules of its
`architectures` make (`pip install --no-deps robustbench==1.1.1`). Each is made on the meta device, or on the CPU if it
reads its numbers, and given an HPM head. It counts if a forward pass shows that the head's input is pooled features
(B, d) and that its logits are the model's, and if timm's `reset_classifier(0)` and `reset_classifier(5)` and
`remove_hpm_head` work: the last gives the class and the keys of before.
"""

import argparse
import fnmatch
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
import torchvision
from _robustbench import zoo_module
from torch import nn

import timm_hpm
from timm_hpm.head import HPMConvHead, head_name

# A name to a constructor, and the sides of its images in pixels.
Architectures = dict[str, tuple[Callable[[], Any], int | None]]


def timm_architectures() -> Architectures:
    """Returns timm's architectures that have pretrained weights, with 10 classes."""
    names = {name.partition(".")[0] for name in timm.list_pretrained()}
    return {name: (partial(timm.create_model, name, num_classes=10), None)
            for name in sorted(names) if not name.startswith("hpm_")}


def torchvision_architectures() -> Architectures:
    """Returns torchvision's classifiers of images."""
    quick = {"init_weights": False}
    return {name: (partial(torchvision.models.get_model, name, weights=None,
                           **(quick if name in ("googlenet", "inception_v3") else {})),
                   299 if name == "inception_v3" else 224)
            for name in torchvision.models.list_models(module=torchvision.models)}


def robustbench_architectures() -> Architectures:
    """Returns the networks that the modules of RobustBench's `architectures` make."""
    try:
        zoo_module("architectures")
    except ModuleNotFoundError:
        return {}

    def of(module: str, name: str, *args: Any, **kwargs: Any) -> Any:
        return getattr(zoo_module(f"architectures.{module}"), name)(*args, **kwargs)

    small = {"CARD_resnet": "LRR_ResNet WidePreActResNet", "Meansparse_wrn_70_16": "DMWideResNet DMPreActResNet",
             "Meansparse_wrn_94_16": "MeanSparse_DMWideResNet", "boosting_wide_resnet": "BoostingWideResNet",
             "dm_rn": "WideResNet", "dm_wide_resnet": "DMWideResNet DMPreActResNet",
             "paf_wide_resnet": "pssilu_wrn_28_10", "resnest": "ResNest152",
             "resnet": "ResNet18 ResNet34 ResNet50 ResNet101 ResNet152 PreActResNet18",
             "robust_resnet": "PreActResNet", "robust_wide_resnet": "RobustWideResNet", "wide_resnet": "WideResNet",
             "xcit": " ".join(f"debenedetti2022light_xcit_{size}12_cifar10_linf" for size in "sml")}
    large = {"MIMIR_swin_transformer": "build_swin_base build_swin_large",
             "Meansparse_swin_L": "swin_large_patch4_window7_224_with_MeanSparse",
             "alexnet": "alexnet_imagenet_corruptions TimmAlexNet",
             "convnext_v2": "convnextv2_atto convnextv2_tiny convnextv2_base convnextv2_large",
             "deit": "tian2022deeper_deit_s_imagenet_corruptions tian2022deeper_deit_b_imagenet_corruptions",
             "xcit": " ".join(f"debenedetti2022light_xcit_{size}12_imagenet_linf" for size in "sml")}
    made = {f"{module}.{name}": (partial(of, module, name), size)
            for table, size in ((small, 32), (large, 224)) for module, names in table.items() for name in names.split()}
    for module in ("bit_rn", "bit_rn_v2"):
        made[f"{module}.ResNetV2"] = partial(of, module, "ResNetV2", [3, 4, 6, 3], 1, 10), 32
    for module, name, size in (("Meansparse_ra_wrn_70_16", "ra_wrn70_16", 32), ("robust_resnet", "WRN-A4", 32),
                               ("robustarch_wide_resnet", "ra_wrn70_16", 32),
                               ("robustarch_wide_resnet", "ra_wrn101_2", 224)):
        made[f"{module}.get_model({name!r})"] = partial(of, module, "get_model", name), size
    for name in ("convnext_t", "convnext_s", "convnext_b", "convnext_l", "vit_s", "vit_b"):
        make = partial(of, "convstem_models", "get_convstem_models", f"{name}_cvst")
        made[f"convstem_models.{name}_cvst"] = make, 224

    def resnext() -> nn.Module:
        module = zoo_module("architectures.resnext")
        return module.CifarResNeXt(module.ResNeXtBottleneck, 29, 4, 32, 10)

    def normalised() -> nn.Module:
        return of("utils_architectures", "normalize_model", timm.create_model("resnet18"), (0.5,) * 3, (0.5,) * 3)

    def mapped() -> nn.Module:
        return of("output_maps", "MappedModel", timm.create_model("resnet18"), of("output_maps", "ScaleMap"))

    return {**made, "resnext.CifarResNeXt": (resnext, 32), "utils_architectures.normalize_model": (normalised, 64),
            "output_maps.MappedModel": (mapped, 64),
            "comp_model.get_nonlin_mixed_classifier": (
                partial(of, "comp_model", "get_nonlin_mixed_classifier", "cifar10"), 32),
            "sodef_layers.rebuffi_sodef": (partial(of, "sodef_layers", "rebuffi_sodef"), 32)}


FAMILIES: dict[str, Callable[[], Architectures]] = {
    f"timm {timm.__version__}": timm_architectures,
    f"torchvision {torchvision.__version__.partition('+')[0]}": torchvision_architectures,
    "RobustBench 1.1.1": robustbench_architectures,
}


def kind_of_head(model: nn.Module) -> str:
    """Returns the kind of the classifier that the HPM head of `model` replaces."""
    name = head_name(model)
    parent = model.get_submodule(name.rpartition(".")[0])
    if isinstance(model.get_submodule(name), HPMConvHead):
        return "1×1 convolution behind the pooling"
    if "AttentionPool2d" in type(parent).__name__:
        return "projection of an attention pooling"
    return "linear layer"


def check(model: nn.Module, size: int | None) -> str:
    """Gives `model` an HPM head and returns its kind; raises if a check fails."""
    base, keys = type(model), list(model.state_dict())
    timm_hpm.add_hpm_head(model, inference="fc")  # the other modes ask for the autocast of a device
    kind = kind_of_head(model)
    head, seen = timm_hpm.find_head(model), []
    shape = model.pretrained_cfg["input_size"] if size is None else (3, size, size)
    with torch.no_grad(), head.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output))):
        logits = model(torch.zeros(2, *shape, device=head.weight.device))
    assert isinstance(logits, torch.Tensor), f"the model returns a {type(logits).__name__}, not logits"
    (features, output), = seen
    assert features.flatten(1).shape == (2, head.in_features), f"the head's input has the shape {tuple(features.shape)}"
    same = output is logits or (output.ndim == 4 and output.shape[:2] == logits.shape)
    assert same and logits.shape == (2, head.out_features), "the model's logits are not its head's"
    if hasattr(base, "reset_classifier"):
        model.reset_classifier(0)
        assert head_name(model) is None, "reset_classifier(0) leaves an HPM head"
        model.reset_classifier(5)
        assert timm_hpm.find_head(model).out_features == 5
    assert type(timm_hpm.remove_hpm_head(model)) is base and list(model.state_dict()) == keys
    return kind


def tried(make: Callable[[], Any], size: int | None) -> str:
    """Returns the kind of the head that an architecture takes, on the meta device or else on the CPU, or raises."""
    try:
        with torch.device("meta"):
            model = make().eval()
        return check(model, size)
    except (NotImplementedError, RuntimeError):  # it reads the numbers of tensors
        return check(make().eval(), size)


def walk(architectures: Architectures) -> tuple[dict[str, list[str]], dict[str, list[tuple[str, str]]]]:
    """Returns the architectures that take a head by its kind, and the modules and names of the others by the reason."""
    supported, refused = defaultdict(list), defaultdict(list)
    for name, (make, size) in architectures.items():
        try:
            supported[tried(make, size)].append(name)
        except Exception as error:
            module = timm.models.model_entrypoint(name).__module__.rpartition(".")[2] if size is None else name
            refused[reason(error)].append((module, name))
    return supported, refused


def reason(error: Exception) -> str:
    """Returns the start of an error, with the model's class left out."""
    text = str(error).strip().partition("\n")[0].partition(": ")[0].partition(". ")[0]
    for sign in (" has ", " sees features without pooling"):
        if sign in text and isinstance(error, timm_hpm.UnsupportedHeadError):
            return text[text.index(sign) + 1:]
    return text


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Returns a Markdown table."""
    lines = ["| " + " | ".join(cell.replace("\n", " ") for cell in line) + " |" for line in (head, *rows)]
    return "\n".join((lines[0], "|---" * len(head) + "|", *lines[1:]))


def report(family: str, supported: dict[str, list[str]], refused: dict[str, list[tuple[str, str]]]) -> str:
    """Returns the chapter of a family."""
    count = sum(map(len, supported.values()))
    total = count + sum(map(len, refused.values()))
    kinds = sorted(supported.items(), key=lambda item: -len(item[1]))
    reasons = sorted(refused.items(), key=lambda item: -len(item[1]))
    return f"""## {family}: {count} of {total}

{table(("classifier that the HPM head replaces", "architectures", "such as"),
       [(kind, str(len(names)), f"`{names[0]}`") for kind, names in kinds])}

{table(("the others", "architectures", "in the modules"),
       [(why, str(len(names)), ", ".join(f"`{module}`" for module in sorted({module for module, _ in names})))
        for why, names in reasons]) if refused else ""}
"""


def main() -> None:
    """Prints the counts and the exceptions, of which docs/models.md has a summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--filter", default="*", help="only architectures that match this pattern")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    for family, architectures in FAMILIES.items():
        start = time.perf_counter()
        chosen = {name: made for name, made in architectures().items() if fnmatch.fnmatch(name, args.filter)}
        supported, refused = walk(chosen)
        print(report(family, supported, refused))
        print(f"{family}, architectures with an HPM head: {sum(map(len, supported.values()))} of {len(chosen)}, "
              f"in {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
