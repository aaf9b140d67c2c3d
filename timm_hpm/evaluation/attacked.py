"""`AttackedModel`: the frozen copy of a classifier that attacks search, made fast."""

import copy
import math
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ..data import ask, unwrapped
from ..head import HPMHead, find_head, head_name, without_head
from ..surrogates import PLAIN, SURROGATES, check_names, dataset_logits, exact_surrogate

# Images on which a faster network is compared, and the rounding allowed: the same products in another order, also in
# TF32, and folded BatchNorms.
_FEW_IMAGES: Final = 8
_ROUNDING_IN_FORMAT: Final = 1e-2
_ROUNDING: Final = 1e-4

# Lead of the best ℓ2 logit that one in 20 images may exceed: from about 16 on, float32 rounds p − 1 to 0.
_LARGEST_LEAD: Final = 12.0


def moderate_scale(head: HPMHead, features: Tensor) -> None:
    """Lowers a head's scale, in place, if its ℓ2 logits of `features` (B, d) leave the cross-entropy no gradient."""
    # No prediction depends on the scale, but an attack does: a saturated softmax looks robust and is not.
    best = dataset_logits(head, features.to(head.weight.dtype)).topk(2, dim=1).values
    lead = float((best[:, 0] - best[:, 1]).quantile(0.95))
    if lead > _LARGEST_LEAD:
        head.log_scale.sub_(math.log(lead / _LARGEST_LEAD))


def differs(one: Tensor, other: Tensor, rounding: float) -> Tensor:
    """Returns the entries (B, C) at which logits of the same images differ by more than rounding.

    `rounding` is relative to the largest of three sizes: the entry's own, that of the two largest logits of its row,
    and the median of the latter. The largest of all is no measure: a class masked by −1e4 would hide all others.
    """
    one, other = one.float(), other.float()
    leading = one.topk(min(2, one.shape[1]), dim=1).values.abs().amax(dim=1, keepdim=True)
    return ~((one - other).abs() <= rounding * one.abs().maximum(leading).maximum(leading.median()))


def _all_unwrapped(module: nn.Module) -> nn.Module:
    module = unwrapped(module)
    # Not named_children(), which yields a module that has two names once.
    for name, child in list(module._modules.items()):
        if child is not None:
            if unwrapped(child) is not child:
                setattr(module, name, unwrapped(child))
            _all_unwrapped(child)
    return module


def _private_copy(model: nn.Module, example: Tensor) -> nn.Module:
    """Returns a frozen copy in eval mode, uncompiled and not wrapped for several devices.

    It is in float32, or in the model's own precision if it casts in its forward and fails in float32. State in plain
    attributes, such as a counter of calls, goes its own way in the copy.
    """
    try:
        with torch.no_grad():  # the copies of a ScriptModule's parameters would be no leaves
            frozen = _all_unwrapped(copy.deepcopy(model))
    except torch.cuda.OutOfMemoryError:
        raise
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"{type(model).__name__} cannot be copied ({error}), and attacks work on a copy; keep what "
                         "has no copy, such as locks and random generators, out of the module") from error
    for parameter in frozen.eval().parameters():  # a ScriptModule has no requires_grad_
        parameter.requires_grad_(False)
    if all(p.dtype == torch.float32 for p in frozen.parameters()):
        return frozen
    own = copy.deepcopy(frozen)
    try:
        with torch.no_grad():
            ask(frozen.float(), example)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception:  # some operation met two precisions
        return own
    return frozen


class _HeadInput(nn.Module):
    """A whole classifier that outputs its HPM head's inputs of `draws` passes side by side, (B, draws·d)."""

    def __init__(self, model: nn.Module, draws: int):
        super().__init__()
        self.model, self.draws = model, draws

    def forward(self, pixels: Tensor) -> Tensor:
        inputs: list[Tensor] = []
        # A hook of the head may write into its input.
        with find_head(self.model).register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(1).clone()),
                                                             prepend=True):
            self.model(pixels)
        return torch.cat(inputs[-self.draws:], dim=1)


def _in_channels_last(backbone: nn.Module, _: Tensor) -> nn.Module:
    return copy.deepcopy(backbone).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _folded(backbone: nn.Module, example: Tensor) -> nn.Module:
    folded = copy.deepcopy(backbone)
    return folded if fold_batch_norms(folded, example) else backbone


def fold_batch_norms(model: nn.Module, example: Tensor) -> int:
    """Multiplies BatchNorms into the convolutions before them, in place; returns their number.

    A pair is folded if each is called once on `example` (B, channels, H, W), and the BatchNorm alone takes the
    convolution's output. The model is in eval mode, its parameters without gradients; up to rounding its outputs stay.
    """
    convolutions: list[tuple[nn.Conv2d, Tensor]] = []
    norms: list[tuple[nn.BatchNorm2d, Tensor]] = []
    with ExitStack() as hooks, torch.enable_grad():
        for module in model.modules():
            if type(module) is nn.Conv2d:
                hooks.enter_context(module.register_forward_hook(
                    lambda m, _, output: convolutions.append((m, output))))
            elif isinstance(module, nn.BatchNorm2d):
                hooks.enter_context(module.register_forward_pre_hook(
                    lambda m, inputs: norms.append((m, inputs[0]))))
        output = ask(model, example.detach().requires_grad_())
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
    todo = [node]
    while todo:
        for following, _ in todo.pop().next_functions:
            if following is not None:
                if following not in uses:
                    todo.append(following)
                uses[following] += 1
    return uses


def _if_alike(change: Callable[[nn.Module, Tensor], nn.Module], model: nn.Module, example: Tensor,
              rounding: float) -> nn.Module:
    """Returns a model changed to be faster, or the model itself if the other fails or outputs something else."""
    output = ask(model, example)
    try:
        changed = change(model, example)
        return model if differs(output, ask(changed, example), rounding).any() else changed
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception:  # such as a view of another memory format, or an attribute that is gone
        return model


class AttackedModel:
    """A private, frozen copy of a classifier, cut in front of its HPM head: one backbone pass serves every surrogate.

    It predicts in eval mode and in float32, or in the model's own precision if the model casts in its forward and fails
    in float32. A classifier without an HPM head is all backbone.

    Arguments:
        pixel_model: pixels (B, channels, H, W) in [0, 1] to logits (B, C).
        example: some images. A faster memory format and folded BatchNorms are kept if they leave the outputs as they
            are; the scale of the ℓ2 logits is moderated (`moderate_scale`).
    """

    def __init__(self, pixel_model: nn.Module, example: Tensor):
        self.head: HPMHead | None = None
        self.backbone = _private_copy(pixel_model, example[:2])
        self._draws = getattr(pixel_model, "draws", 1)
        #: Images that went forward and backward through the backbone so far, each draw of a randomised model by itself.
        self.forward_passes = 0
        self.backward_passes = 0
        changes: list[Any] = [(_in_channels_last, _ROUNDING_IN_FORMAT), (_folded, _ROUNDING)]
        if head_name(self.backbone) is not None:
            self.head, self.backbone = find_head(self.backbone), _HeadInput(self.backbone, self._draws)
            if self._draws == 1:  # without its head the model would average features
                changes.insert(0, (lambda backbone, _: without_head(backbone.model), _ROUNDING))
        with torch.no_grad():
            for change, rounding in changes:
                self.backbone = _if_alike(change, self.backbone, example[:_FEW_IMAGES], rounding)
            if self.head is not None and self.head.is_fitted():
                moderate_scale(self.head, torch.cat(ask(self.backbone, example).chunk(self._draws, dim=1)))

    def features(self, pixels: Tensor) -> Tensor:
        """Returns the head's input (B, d), of N draws side by side (B, N·d); the logits (B, C) if there is no head."""
        self.forward_passes += self._draws * len(pixels)
        if torch.is_grad_enabled() and pixels.requires_grad:
            self.backward_passes += self._draws * len(pixels)
        return ask(self.backbone, pixels)

    def logits(self, surrogate: str, features: Tensor, temperature: float | None = None) -> Tensor:
        """Returns a surrogate's logits (B, C) for the `features` (B, d) of a whole batch, the mean over the draws."""
        if self.head is None:
            return features.float()
        chosen, head = SURROGATES[surrogate], self.head
        draws = [chosen.logits(head, part) if temperature is None else chosen.at(temperature, head, part)
                 for part in features.to(head.weight.dtype).chunk(self._draws, dim=1)]
        return draws[0] if len(draws) == 1 else torch.stack(draws).mean(dim=0)

    def batch_dependent(self, surrogate: str) -> bool:
        """Returns whether an image's logits under the surrogate depend on the other images of its batch."""
        return self.head is not None and self.head.inference == "batch" and SURROGATES[surrogate].batch_dependent

    def exact_surrogate(self) -> str:
        """Returns the surrogate that computes the true model's own logits."""
        return PLAIN if self.head is None else exact_surrogate(self.head.inference, self.head.is_fitted())

    def is_plain(self) -> bool:
        """Returns whether its own logits are differentiable: without an HPM head, or in the mode `dataset` or `fc`."""
        exact = self.exact_surrogate()
        return exact == PLAIN or not SURROGATES[exact].batch_dependent

    def surrogates(self, names: Sequence[str] | None = None) -> tuple[str, ...]:
        """Returns `names` without repetitions, by default all surrogates that differ in the head's inference mode."""
        if names is not None:
            return check_names("surrogate", names, (PLAIN,) if self.head is None else tuple(SURROGATES))
        if self.head is None:
            return (PLAIN,)
        if self.head.inference == "fc" or not self.head.is_fitted():
            return ("fc",)
        return ("fc", "dataset", "mixed") if self.head.inference == "dataset" else tuple(SURROGATES)
