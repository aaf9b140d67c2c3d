#!/usr/bin/env python3
"""Cost of the HPM head in batch mode: ratios of the processor's time in one run, medians of paired runs, on one thread.

    python benchmarks/head.py

- hpm_resnet50 (224², batch 16) and hpm_wrn28_10 (32², batch 16) over the same network with its plain FC classifier.
- the head alone (batch 256, d = 2,048, C = 1,000) over F.linear, and over the same head by mixed prototypes and
  torch.cdist.
- the memory that a forward and backward pass of the head takes at its peak beside its parameters and inputs, over
  (B·C + C·d) numbers, at C = 21,841.
"""

import argparse
import copy
import resource
from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F
from _timing import paired_ratio
from torch import Tensor, nn

from timm_hpm import HPMHead, find_head, functional
from timm_hpm.head import head_name

NET_RUNS = 3
HEAD_RUNS = 31


def fitted_(head: HPMHead) -> HPMHead:
    """Gives a head prototypes like features behind a ReLU, and returns it."""
    head.set_prototypes(torch.randn_like(head.prototypes).relu())
    return head


def backward_pass(forward: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Computes the gradients of every parameter and of the input."""
    forward(x.requires_grad_()).square().mean().backward()


def print_ratios(name: str, forward: Callable[[Tensor], Tensor], other: Callable[[Tensor], Tensor], x: Tensor,
                 runs: int) -> None:
    """Prints the ratio of two functions of `x`, forward and with the backward pass."""
    with torch.no_grad():
        ratio = paired_ratio(lambda: forward(x), lambda: other(x), runs)
    print(f"{name}, forward: {ratio:.3f}", flush=True)
    ratio = paired_ratio(lambda: backward_pass(forward, x), lambda: backward_pass(other, x), runs)
    print(f"{name}, forward and backward: {ratio:.3f}", flush=True)


def nets() -> None:
    """Prints the cost of the head in whole networks."""
    for name, size in (("hpm_resnet50", 224), ("hpm_wrn28_10", 32)):
        model = timm.create_model(f"{name}.untrained", inference="batch").eval()
        head = fitted_(find_head(model))
        plain = copy.deepcopy(model)
        classifier = nn.Linear(head.in_features, head.out_features)
        plain.set_submodule(head_name(model), classifier)
        print_ratios(f"{name} over its FC network", model, plain, torch.randn(16, 3, size, size), NET_RUNS)


def cdist_logits(head: HPMHead, features: Tensor) -> Tensor:
    """Returns the head's logits in the obvious way: mixed prototypes, and torch.cdist."""
    assignment = functional.straight_through_assignment(head.fc_logits(features))
    mixed = functional.mix_prototypes(
        head.prototypes,
        functional.batch_prototypes(features, assignment),
        functional.hard_presence(assignment),
        head.mix,
    )
    return -head.scale() * torch.cdist(features, mixed).square()


def head_alone() -> None:
    """Prints the cost of the head alone."""
    head = fitted_(HPMHead(2048, 1000, inference="batch"))
    features = torch.randn(256, 2048).relu()
    print_ratios("head over F.linear", head, lambda x: F.linear(x, head.weight, head.bias), features, HEAD_RUNS)
    print_ratios("head over cdist", head, lambda x: cdist_logits(head, x), features, HEAD_RUNS)


def memory() -> None:
    """Prints the peak memory of the head at ImageNet-21k's size; before anything larger has been in this process."""
    batch, width, num_classes = 256, 1024, 21_841
    head = fitted_(HPMHead(width, num_classes, inference="batch"))
    features = torch.randn(batch, width)
    numbers = batch * num_classes + num_classes * width
    for parameter in (*head.parameters(), features):
        parameter.grad = torch.zeros_like(parameter)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with torch.no_grad():
        head(features)
    forward = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    backward_pass(head, features)
    both = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, peak in (("forward", forward), ("forward and backward", both)):
        print(f"peak memory of the head over (B·C + C·d) numbers, {name}: {(peak - before) * 1024 / 4 / numbers:.2f}")


def main() -> None:
    """Prints the ratios."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    memory()
    head_alone()
    nets()


if __name__ == "__main__":
    main()
