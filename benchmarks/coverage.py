#!/usr/bin/env python3
"""Which of timm's architectures take an HPM head: walks all those with pretrained weights, without their weights.

    python benchmarks/coverage.py                       # about 10 minutes on one CPU core; rewrites docs/coverage.md
    python benchmarks/coverage.py --filter 'resnet*' --output -

Each architecture is made on the meta device with 10 classes and given an HPM head. It counts if a forward pass shows
that the head sees pooled features (B, d) and that its answer is the model's, and if `reset_classifier(0)`,
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
    (shape, answer), = seen
    assert shape == (2, head.in_features), f"the head sees features of the shape {tuple(shape)}"
    assert answer is logits and logits.shape == (2, 10), "the model's answer is not its head's"
    model.reset_classifier(0)
    assert head_name(model) is None, "reset_classifier(0) leaves an HPM head"
    model.reset_classifier(5)
    assert timm_hpm.find_head(model).out_features == 5
    assert type(timm_hpm.remove_hpm_head(model)) is base
    return kind


def walk(names: list[str]) -> tuple[dict[str, list[str]], dict[tuple[str, str], list[str]]]:
    """Returns the architectures that take a head by its kind, and the others by their module and the reason."""
    supported, refused = defaultdict(list), defaultdict(list)
    for name in names:
        try:
            supported[check(timm.create_model(name, num_classes=10, device="meta").eval())].append(name)
        except Exception as error:
            module = timm.models.model_entrypoint(name).__module__.rpartition(".")[2]
            refused[module, f"{type(error).__name__}: {error}"].append(name)
    return supported, refused


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Returns a Markdown table."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("\n", " ") for cell in line) + " |" for line in lines)


def report(supported: dict[str, list[str]], refused: dict[tuple[str, str], list[str]], without_classes: int) -> str:
    """Returns the document."""
    count = sum(map(len, supported.values()))
    total = count + sum(map(len, refused.values()))
    kinds = sorted(supported.items(), key=lambda item: -len(item[1]))
    reasons = sorted(refused.items(), key=lambda item: item[0])
    return f"""# Which timm models take an HPM head

`add_hpm_head`, `register_hpm` and `reset_classifier` work on **{count} of {total}** architectures with
pretrained weights (timm {timm.__version__}). {without_classes} of them have no classifier by default and are counted as
they are with 10 classes. Printed by `python benchmarks/coverage.py`, which defines the checks.

{table(("the classifier that the HPM head replaces", "architectures", "such as"),
       [(kind, str(len(names)), ", ".join(f"`{name}`" for name in names[:3])) for kind, names in kinds])}

The other {total - count} are refused, with the model left as it was:

{table(("timm module", "architectures", "such as", "the error"),
       [(f"`{module}`", str(len(names)), f"`{names[0]}`", error) for (module, error), names in reasons])}
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
