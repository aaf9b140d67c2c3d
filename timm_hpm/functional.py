"""The equations of Hybrid Prototype Mixing (arXiv 2606.01746 and our reading of it, docs/method.md), as pure functions.

Letters of the shapes: B images in a batch, C classes, d features. `batch_logits` and its parts also take several
batches, as leading dimensions of every argument but the dataset-level prototypes. Nothing here keeps state, and every
matrix product leaves autocast, because a distance is a small difference of large numbers.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def in_autocast(x: Tensor) -> bool:
    """Returns whether autocast is enabled on the device of `x`; the device meta has none."""
    # Not torch.amp.is_autocast_available, which older torch cannot trace.
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


@torch.fx.wrap
def linear_without_autocast(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns `x` (m, k) @ `weight`ᵀ (k, n) + `bias` (n,) in their own precision, also inside an autocast region."""
    if not torch.jit.is_scripting():  # noqa: SIM102  (TorchScript would compile a joint condition)
        if in_autocast(x):
            with torch.autocast(x.device.type, enabled=False):
                return F.linear(x, weight, bias)
    return F.linear(x, weight, bias)


@torch.fx.wrap
def product_without_autocast(x: Tensor, y: Tensor) -> Tensor:
    """Returns `x` (m, k) @ `y`ᵀ (n, k) in their own precision, also inside an autocast region."""
    if not torch.jit.is_scripting():  # noqa: SIM102  (TorchScript would compile a joint condition)
        if in_autocast(x):
            with torch.autocast(x.device.type, enabled=False):
                return x @ y.transpose(-2, -1)
    return x @ y.transpose(-2, -1)


def straight_through_assignment(logits: Tensor) -> Tensor:
    """Returns the one-hot of each row's arg-max (B, C), with the gradient of the softmax (straight-through estimator).

    `logits` is (B, C). Its value is exactly one-hot: the softmax enters as p − stop_gradient(p).
    """
    p = F.softmax(logits, dim=-1)
    hard = torch.zeros_like(p).scatter(-1, p.argmax(dim=-1, keepdim=True), 1.0)
    return hard + (p - p.detach())


def hard_presence(assignment: Tensor) -> Tensor:
    """Returns 1 for each class that some row of a one-hot `assignment` (B, C) predicts and 0 for the others, as (C,).

    No gradient flows through it: a class that was not predicted has none.
    """
    return (assignment.detach().sum(dim=-2) > 0).to(assignment.dtype)


def soft_presence(assignment: Tensor) -> Tensor:
    """Returns w_c = 1 − Π_i (1 − a_ic), the probability that a class is predicted at all, as (C,).

    `assignment` (B, C) holds probabilities. Without this weight one soft image would be the prototype of every class.
    """
    # The bound keeps log(1 − a) and its gradient finite if a softmax saturates at 1.
    return -torch.expm1(torch.log1p(-assignment.clamp(max=1.0 - 1e-6)).sum(dim=-2))


def prototype_weights(assignment: Tensor) -> Tensor:
    """Returns a_ic / Σ_i a_ic (B, C), the weight of image i in the batch-level prototype of class c.

    A class without mass has weights 0, with finite gradients.
    """
    mass = assignment.sum(dim=-2, keepdim=True)
    # With less mass a softly predicted class counts as absent: a smaller denominator would overflow in the gradient.
    return assignment / torch.where(mass > 1e-12, mass, torch.ones_like(mass))


def batch_prototypes(features: Tensor, assignment: Tensor) -> Tensor:
    """Returns m_c = Σ_i a_ic z_i / Σ_i a_ic, the batch-level prototypes (C, d).

    `features` is (B, d), `assignment` (B, C). The row of a class without mass is zero, with finite gradients;
    `mix_prototypes` masks it by the presence.
    """
    return product_without_autocast(prototype_weights(assignment).transpose(-2, -1), features.transpose(-2, -1))


def mix_prototypes(prototypes: Tensor, batch_means: Tensor, presence: Tensor, mix: float) -> Tensor:
    """Returns Q_c = P_c + mix·w_c·(m_c − P_c) as (C, d): the dataset-level prototype if a class is absent.

    `prototypes` P and `batch_means` m are (C, d), `presence` w is (C,) in [0, 1], `mix` in [0, 1] is the weight of the
    batch-level prototypes.
    """
    return prototypes + (mix * presence).unsqueeze(-1) * (batch_means - prototypes)


def squared_distances(features: Tensor, prototypes: Tensor) -> Tensor:
    """Returns ‖z_i − Q_c‖² as (B, C), for `features` (B, d) and `prototypes` (C, d), in O(B·C + C·d) memory."""
    # Distances do not change with the origin, but the rounding of the expanded square does: features behind a ReLU
    # share a large mean.
    origin = prototypes.detach().mean(dim=-2, keepdim=True)
    z, q = features - origin, prototypes - origin
    cross = product_without_autocast(z, q)
    return z.square().sum(dim=-1, keepdim=True) - 2 * cross + q.square().sum(dim=-1).unsqueeze(-2)


def l2_logits(features: Tensor, prototypes: Tensor, scale: Tensor) -> Tensor:
    """Returns −s·‖z_i − Q_c‖² (B, C): the ℓ2 classifier with `prototypes` (C, d) and a positive `scale` ()."""
    return -scale * squared_distances(features, prototypes)


def batch_logits(features: Tensor, assignment: Tensor, presence: Tensor, prototypes: Tensor, scale: Tensor,
                 mix: float) -> Tensor:
    """Returns the HPM logits (B, C) of a whole batch: ℓ2 logits on dataset- and batch-level prototypes mixed.

    `features` (B, d); `assignment` (B, C) and `presence` (C,), both hard or both soft; `prototypes` (C, d).
    """
    return -scale * mixed_squared_distances(features, assignment, presence, prototypes, mix)


@torch.fx.wrap
def mixed_squared_distances(features: Tensor, assignment: Tensor, presence: Tensor, prototypes: Tensor,
                            mix: float) -> Tensor:
    """Returns ‖z_i − Q_c‖² as (B, C) for the mixed prototypes Q, the cheaper way; see `batch_logits`."""
    num_classes, width = prototypes.shape
    # With small prototypes fewer operations are faster. An exported graph must serve any batch size.
    choose = num_classes * width > 50_000 and not torch.compiler.is_compiling()
    if choose and features.shape[-2] * (num_classes + width) < num_classes * width:
        return mixed_squared_distances_by_products(features, assignment, presence, prototypes, mix)
    mixed = mix_prototypes(prototypes, batch_prototypes(features, assignment), presence, mix)
    return squared_distances(features, mixed)


def mixed_squared_distances_by_products(features: Tensor, assignment: Tensor, presence: Tensor, prototypes: Tensor,
                                        mix: float) -> Tensor:
    """Returns `mixed_squared_distances` from inner products, without forming the mixed or batch-level prototypes.

    With v_jc = a_jc / Σ_i a_ic and k_c = mix·w_c it is the expanded square of z_i − (1 − k_c)·P_c − k_c·Σ_j v_jc z_j.
    That takes less work than `mix_prototypes` if B·(C + d) < C·d, and then also less memory: O(B² + B·C + C·d).
    """
    origin = prototypes.detach().mean(dim=-2, keepdim=True)  # see `squared_distances`
    z, p = features - origin, prototypes - origin
    v, k = prototype_weights(assignment), (mix * presence).unsqueeze(-2)
    zz = product_without_autocast(z, z)
    zp = product_without_autocast(z, p)
    zm = product_without_autocast(zz, v.transpose(-2, -1))
    pp = torch.linalg.vector_norm(p, dim=-1).square()
    pm, mm = (v * zp).sum(dim=-2, keepdim=True), (v * zm).sum(dim=-2, keepdim=True)
    qq = (1 - k).square() * pp + 2 * k * (1 - k) * pm + k.square() * mm
    return zz.diagonal(dim1=-2, dim2=-1).unsqueeze(-1) - 2 * torch.lerp(zp, zm, k) + qq


def sample_logits(features: Tensor, assignment: Tensor, prototypes: Tensor, scale: Tensor, mix: float) -> Tensor:
    """Returns the HPM logits (B, C) if each image is a batch of its own: −s·‖z_i − P_c‖²·(1 − mix·a_ic)².

    The closed form of `batch_logits` for one image: its batch-level prototype is the image's own feature.
    """
    return l2_logits(features, prototypes, scale) * (1 - mix * assignment).square()


def class_sums(features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Returns the sums of `features` (B, d) by label (C, d) and the counts (C,), both in the dtype of `features`.

    Sums and counts of several batches or processes can be added before `ema_update`.
    """
    sums = features.new_zeros(num_classes, features.shape[1]).index_add_(0, labels, features)
    counts = features.new_zeros(num_classes).index_add_(0, labels, torch.ones_like(features[:, 0]))
    return sums, counts


def ema_update(prototypes: Tensor, num_updates: Tensor, sums: Tensor, counts: Tensor,
               decay: float) -> tuple[Tensor, Tensor]:
    """Returns new `prototypes` (C, d) and `num_updates` (C,): P_c ← β·P_c + (1−β)·sums_c/counts_c.

    Only classes with a count change, and the first update of a class sets its prototype. `decay` is β in [0, 1].
    """
    means = sums / counts.clamp(min=1).unsqueeze(1)
    seen = counts > 0
    step = torch.where(num_updates > 0, 1.0 - decay, 1.0) * seen
    updated = torch.lerp(prototypes, means.to(prototypes.dtype), step.to(prototypes.dtype).unsqueeze(1))
    return updated, num_updates + seen
