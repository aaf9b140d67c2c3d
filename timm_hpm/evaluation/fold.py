"""`fold_batch_norms`: the same network with fewer operations."""

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ..data import ask


def fold_batch_norms(model: nn.Module, example: Tensor) -> int:
    """Multiplies BatchNorms into the convolutions before them, in place; returns their number.

    A pair is folded if each is called once on `example` (B, channels, H, W), and the BatchNorm alone takes the
    convolution's output. The model is in eval mode, its parameters without gradients; up to rounding its outputs stay.
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
    calls = Counter(id(module) for module, _ in [*convolutions, *norms])
    made = {id(tensor): conv for conv, tensor in convolutions}
    # A convolution with a weight norm computes its weight at each call.
    pairs = [(conv, norm) for norm, tensor in norms
             if (conv := made.get(id(tensor))) is not None and calls[id(norm)] == calls[id(conv)] == 1
             and uses[tensor.grad_fn] == 1 and norm.running_mean is not None and norm.running_var is not None
             and "weight" in conv._parameters and not conv._forward_pre_hooks]
    for conv, norm in pairs:
        conv.weight, conv.bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var,  # type: ignore[arg-type]
            norm.eps, norm.weight, norm.bias)
    # timm's BatchNorms have an activation.
    replaced = {id(norm): nn.Sequential(*[part for part in norm.children() if not isinstance(part, nn.Identity)])
                for _, norm in pairs}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if id(child) in replaced:
                setattr(parent, name, replaced[id(child)])
    return len(pairs)


def _uses(node: Any) -> Counter:
    """Returns for each operation of the graph that ends with `node` how many others take its result."""
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
