#!/usr/bin/env python3
"""Tries an HPM head on each of timm's architectures with pretrained weights, without their weights.

    python benchmarks/coverage.py                       # about 10 minutes on one CPU core; rewrites docs/coverage.md
    python benchmarks/coverage.py --filter 'resnet*' --output -

Each architecture is made on the meta device with 10 classes and given an HPM head. It counts if a forward pass shows
that the head's input is pooled features (B, d) and that its logits are the model's, and if `reset_classifier(0)`,
`reset_classifier(5)` and `remove_hpm_head` work.
"""

import argparse
import fnmatch
import time
import warnings
from collections import defaultdict
from pathlib import Path

import timm
import torch
from torch import nn

import timm_hpm
from timm_hpm.head import HPMConvHead, head_name

DOCUMENT = Path(__file__).parent.parent / "docs" / "coverage.md"


def architectures(pattern: str) -> list[str]:
    """Returns timm's architectures that have pretrained weights."""
    names = {name.partition(".")[0] for name in timm.list_pretrained()}
    return sorted(name for name in names if not name.startswith("hpm_") and fnmatch.fnmatch(name, pattern))


def kind_of_head(model: nn.Module) -> str:
    """Returns the kind of the classifier that the HPM head of `model` replaces."""
    name = head_name(model)
    parent = model.get_submodule(name.rpartition(".")[0])
    if isinstance(model.get_submodule(name), HPMConvHead):
        return "1×1 convolution behind the pooling"
    if "AttentionPool2d" in type(parent).__name__:
        return "projection of an attention pooling"
    if model.get_classifier() is not model.get_submodule(name):
        return f"linear layer inside `{type(model.get_classifier()).__name__}`"
    return "linear layer"


def check(model: nn.Module) -> str:
    """Gives `model` an HPM head and returns its kind; raises if a check fails."""
    base = type(model)
    timm_hpm.add_hpm_head(model, inference="fc")  # the other modes ask for the autocast of a device
    kind = kind_of_head(model)
    head, seen = timm_hpm.find_head(model), []
    with head.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0].shape, output))):
        logits = model(torch.empty(2, *model.pretrained_cfg["input_size"], device="meta"))
    (shape, output), = seen
    assert shape == (2, head.in_features), f"the head's input has the shape {tuple(shape)}"
    assert output is logits and logits.shape == (2, 10), "the model's logits are not its head's"
    model.reset_classifier(0)
    assert head_name(model) is None, "reset_classifier(0) leaves an HPM head"
    model.reset_classifier(5)
    assert timm_hpm.find_head(model).out_features == 5
    assert type(timm_hpm.remove_hpm_head(model)) is base
    return kind


def walk(names: list[str]) -> tuple[dict[str, list[str]], dict[str, list[tuple[str, str]]]]:
    """Returns the architectures that take a head by its kind, and the modules and names of the others by the reason."""
    supported, refused = defaultdict(list), defaultdict(list)
    for name in names:
        try:
            supported[check(timm.create_model(name, num_classes=10, device="meta").eval())].append(name)
        except Exception as error:
            module = timm.models.model_entrypoint(name).__module__.rpartition(".")[2]
            refused[reason(error)].append((module, name))
    return supported, refused


def reason(error: Exception) -> str:
    """Returns the start of an error, without the class of the model that it begins with."""
    return str(error).partition(": ")[0].partition(" ")[2]


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Returns a Markdown table."""
    lines = ["| " + " | ".join(cell.replace("\n", " ") for cell in line) + " |" for line in (head, *rows)]
    return "\n".join((lines[0], "|---" * len(head) + "|", *lines[1:]))


def report(supported: dict[str, list[str]], refused: dict[str, list[tuple[str, str]]], without_classes: int) -> str:
    """Returns the document."""
    count = sum(map(len, supported.values()))
    total = count + sum(map(len, refused.values()))
    kinds = sorted(supported.items(), key=lambda item: -len(item[1]))
    reasons = sorted(refused.items(), key=lambda item: -len(item[1]))
    return f"""# timm models that take an HPM head

    python benchmarks/coverage.py

`add_hpm_head`, `register_hpm` and `reset_classifier` work on **{count} of {total}** architectures with
pretrained weights (timm {timm.__version__}). {without_classes} of them have no classifier by default and are given one
of 10 classes.

{table(("classifier that the HPM head replaces", "architectures", "such as"),
       [(kind, str(len(names)), f"`{names[0]}`") for kind, names in kinds])}

The other {total - count} are refused with an `UnsupportedHeadError`, and the model is left as it was:

{table(("error: the model ...", "architectures", "in timm's modules"),
       [(f"... {why}", str(len(names)), ", ".join(f"`{module}`" for module in sorted({module for module, _ in names})))
        for why, names in reasons])}
"""


def main() -> None:
    """Prints the counts and the exceptions, and writes the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--filter", default="*", help="only architectures that match this pattern")
    parser.add_argument("--output", default=DOCUMENT, help="path of the document, or - for none")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    start, names = time.perf_counter(), architectures(args.filter)
    without_classes = sum(timm.get_pretrained_cfg(name).num_classes == 0 for name in names)
    supported, refused = walk(names)
    document = report(supported, refused, without_classes)
    print(document)
    print(f"architectures with an HPM head: {sum(map(len, supported.values()))} of {len(names)}, "
          f"in {time.perf_counter() - start:.0f} s")
    if str(args.output) != "-":
        Path(args.output).write_text(document)


if __name__ == "__main__":
    main()
