"""`fold_batch_norms`: the same network with fewer operations, for those who only ask it for answers and gradients."""

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from ..data import ask


def fold_batch_norms(model: nn.Module, example: Tensor) -> int:
    """Multiplies BatchNorms into the convolutions whose output only they take, in place; returns how many.

    What takes what is seen on `example` (B, channels, H, W), a batch that the network can answer: a convolution and a
    BatchNorm that are each asked once, the one's output being the other's input and nobody else's.

    Arguments:
        model: in eval mode, its parameters without gradients. Up to rounding it answers as before.
        example: any images.
    """
    convolutions: list[tuple[nn.Conv2d, Tensor]] = []
    norms: list[tuple[nn.BatchNorm2d, Tensor]] = []
    handles = []
    for module in model.modules():
        if type(module) is nn.Conv2d:
            handles.append(module.register_forward_hook(lambda m, _, output: convolutions.append((m, output))))
        elif isinstance(module, nn.BatchNorm2d):
            handles.append(module.register_forward_pre_hook(lambda m, inputs: norms.append((m, inputs[0]))))
    try:
        with torch.enable_grad():
            output = ask(model, example.detach().requires_grad_())
    finally:
        for handle in handles:
            handle.remove()
    if output.grad_fn is None:
        return 0
    uses = _uses(output.grad_fn)
    asked = Counter(id(module) for module, _ in [*convolutions, *norms])
    made = {id(tensor): conv for conv, tensor in convolutions}
    pairs = [(made[id(tensor)], norm) for norm, tensor in norms
             if id(tensor) in made and uses[tensor.grad_fn] == 1 and asked[id(norm)] == 1
             and asked[id(made[id(tensor)])] == 1 and norm.running_mean is not None and norm.running_var is not None
             and keeps_its_weight(made[id(tensor)])]
    for conv, norm in pairs:
        _fold(conv, norm)
    replaced = {id(norm): rest_of(norm) for _, norm in pairs}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if id(child) in replaced:
                setattr(parent, name, replaced[id(child)])
    return len(pairs)


def keeps_its_weight(conv: nn.Conv2d) -> bool:
    """Returns whether a convolution's weight is a parameter; spectral and weight norm make it anew at each call."""
    return "weight" in conv._parameters and not conv._forward_pre_hooks


def _uses(node: Any) -> Counter:
    """Returns how many operations take the result of each, in the graph that ends with `node`."""
    uses: Counter = Counter()
    todo, seen = [node], {node}
    while todo:
        for following, _ in todo.pop().next_functions:
            if following is not None:
                uses[following] += 1
                if following not in seen:
                    seen.add(following)
                    todo.append(following)
    return uses


@torch.no_grad()
def _fold(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    assert norm.running_mean is not None and norm.running_var is not None
    scale = (norm.running_var + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight
    shift = -norm.running_mean if conv.bias is None else conv.bias - norm.running_mean
    shift = shift * scale if norm.bias is None else shift * scale + norm.bias
    conv.weight = nn.Parameter(conv.weight * scale.view(-1, 1, 1, 1), requires_grad=False)
    conv.bias = nn.Parameter(shift, requires_grad=False)


def rest_of(norm: nn.BatchNorm2d) -> nn.Module:
    """Returns what a BatchNorm does beside normalising: timm's have an activation."""
    return nn.Sequential(*[part for part in norm.children() if not isinstance(part, nn.Identity)])
