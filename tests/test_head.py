"""`HPMHead` and its surrogates against a plain NumPy reading of the equations; the equations' gradients; loading."""

import copy
import math

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from nets import same_tensors
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import timm_hpm
from timm_hpm import INFERENCE_MODES, HPMHead, UnfittedHeadWarning, find_head, functional, head_mode
from timm_hpm.evaluation.attacked import AttackedModel
from timm_hpm.surrogates import SURROGATES

HPM_ENTRIES = {"prototypes", "num_updates", "log_scale"}


def fitted(in_features: int = 16, num_classes: int = 10, *, log_scale: float = -1.0, mean: float = 0.0,
           **kwargs) -> HPMHead:
    """Returns a head with random prototypes around `mean`."""
    head = HPMHead(in_features, num_classes, **kwargs)
    head.set_prototypes(mean + torch.randn(num_classes, in_features))
    nn.init.constant_(head.log_scale, log_scale)
    return head


def linear_logits(head: HPMHead, features: Tensor) -> np.ndarray:
    """Returns the logits Wz + b."""
    z, weight = (t.detach().double().numpy() for t in (features, head.weight))
    bias = np.zeros(len(weight)) if head.bias is None else head.bias.detach().double().numpy()
    return np.array([[row @ image + b for row, b in zip(weight, bias, strict=True)] for image in z])


def softmax(logits: np.ndarray) -> np.ndarray:
    return np.array([np.exp(row - row.max()) / np.exp(row - row.max()).sum() for row in logits])


def one_hot(logits: np.ndarray) -> np.ndarray:
    return np.array([[float(c == row.argmax()) for c in range(len(row))] for row in logits])


def mixed_prototypes_logits(head: HPMHead, features: Tensor, assignment: np.ndarray, mode: str) -> np.ndarray:
    """Returns −s·‖z − Q_c‖², Q_c mixed of P_c and the mean that `assignment` gives the batch, or the image alone."""
    z, prototypes = features.double().numpy(), head.prototypes.double().numpy()
    logits = np.zeros_like(assignment)
    for i, image in enumerate(z):
        members = {"batch": range(len(z)), "sample": [i], "dataset": []}[mode]
        for c, q in enumerate(prototypes):
            total = sum(assignment[j, c] for j in members)
            if total > 0:
                mean = sum(assignment[j, c] * z[j] for j in members) / total
                presence = 1 - math.prod(1 - assignment[j, c] for j in members)
                q = q + head.mix * presence * (mean - q)
            logits[i, c] = -math.exp(head.log_scale.item()) * sum((a - b) ** 2 for a, b in zip(image, q, strict=True))
    return logits


def reference(surrogate: str, head: HPMHead, features: Tensor) -> np.ndarray:
    """Returns a surrogate's logits in the head's mode, in float64 (docs/method.md); those of ste are the head's own."""
    linear, mode = linear_logits(head, features), head.inference
    if surrogate == "fc" or (mode == "fc" and surrogate in ("soft", "ste")):
        return linear
    if surrogate == "dataset":
        return mixed_prototypes_logits(head, features, one_hot(linear), "dataset")
    if surrogate in ("soft", "ste"):
        return mixed_prototypes_logits(head, features, (softmax if surrogate == "soft" else one_hot)(linear), mode)
    return sum(np.log(softmax(reference(part, head, features))) for part in ("fc", "dataset", "soft")) / 3


@pytest.mark.parametrize(("arguments", "batch"), [
    ({"mix": 0.0}, 40), ({"mix": 1.0}, 40), ({"bias": False}, 12), ({}, 1),
    ({"num_classes": 50}, 5),  # absent classes and a shared one
    ({"mean": 50.0}, 40), ({"mean": 1000.0}, 40),
])
@pytest.mark.parametrize("inference", INFERENCE_MODES)
def test_logits_equal_the_reference(inference, arguments, batch):
    head, features = fitted(**arguments, inference=inference), torch.randn(batch, 16)
    if "num_classes" in arguments:
        features[3] = features[0] + 0.01 * torch.randn(16)
        predicted = head.fc_logits(features).argmax(dim=1)
        assert predicted[0] == predicted[3] and len(predicted.unique()) < 5
    if "mean" in arguments:
        nn.init.zeros_(head.weight[:, 0])
        features = (arguments["mean"] + features).relu()
    expected = reference("ste", head, features)
    with torch.no_grad():
        error = np.abs(head(features).double().numpy() - expected).max()
    assert error <= 1e-5 * np.abs(expected).max()
    assert head(torch.zeros(0, 16)).shape == (0, head.out_features)
    meta = HPMHead(16, 10, inference=inference, device="meta")
    assert meta(torch.randn(batch, 16, device="meta")).shape == (batch, 10)


def few_images(mode: str) -> tuple[HPMHead, Tensor]:
    """Returns a head and features; two images in seven are the FC's class 0, none its class 3."""
    generator = torch.Generator().manual_seed(2)
    head = HPMHead(6, 4, inference=mode, mix=0.4)
    with torch.no_grad():
        head.weight.copy_(torch.randn(4, 6, generator=generator))
        head.bias.copy_(torch.tensor([0.3, -0.2, 0.1, -9.0]))
        head.log_scale.fill_(-0.7)
    head.set_prototypes(torch.randn(4, 6, generator=generator))
    return head, torch.randn(7, 6, generator=generator)


@pytest.mark.parametrize("mode", INFERENCE_MODES)
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_a_surrogate_s_logits_are_the_reference_s_and_depend_on_the_batch_if_a_neighbour_changes_them(surrogate, mode):
    head, features = few_images(mode)
    logits = SURROGATES[surrogate].logits(head, features)
    np.testing.assert_allclose(logits.detach().double().numpy(), reference(surrogate, head, features),
                               rtol=1e-4, atol=1e-4)
    model = nn.Sequential(nn.Flatten(), head).eval()
    split = AttackedModel(model, features)
    if surrogate == split.exact_surrogate():
        torch.testing.assert_close(split.logits(surrogate, features), model(features), rtol=1e-5, atol=1e-5)
    moved = features.clone()
    moved[1:] += 1.0
    changed = (split.logits(surrogate, features)[0] - split.logits(surrogate, moved)[0]).abs().max() > 1e-3
    assert split.batch_dependent(surrogate) == changed


@pytest.mark.parametrize("fc_size", [1.0, 1e4])
@pytest.mark.parametrize("inference", INFERENCE_MODES)
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_gradients_are_finite(surrogate, inference, fc_size):
    head = fitted(inference=inference)
    with torch.no_grad():
        head.weight.mul_(fc_size)
    z = torch.randn(8, 16)
    z[0] = head.prototypes[3]
    z[1] = z[2]
    z.requires_grad_()
    loss = F.cross_entropy(SURROGATES[surrogate].logits(head, z), torch.arange(8))
    gradients = torch.autograd.grad(loss, [z, *head.parameters()], allow_unused=True)
    assert loss.isfinite() and all(g is None or g.isfinite().all() for g in gradients)
    assert gradients[0].abs().sum() > 0


@pytest.mark.parametrize("inference", ["batch", "dataset"])
@pytest.mark.parametrize("updates", ["some", "all"])
def test_every_parameter_gets_a_gradient(updates, inference):
    head = HPMHead(16, 4, inference=inference)
    labels = {"some": [0, 2], "all": [0, 1, 2, 3]}[updates]
    head.update_prototypes(torch.randn(len(labels), 16), torch.tensor(labels, dtype=torch.long))
    F.cross_entropy(head(torch.randn(8, 16)), torch.arange(8) % 4).backward()
    for parameter in head.parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all()
    assert (head.weight.grad != 0).any() == (updates != "all" or inference == "batch")
    assert (head.log_scale.grad != 0) == (updates == "all")


@pytest.mark.parametrize("updated", [[], [0, 2]])
@pytest.mark.parametrize("inference", INFERENCE_MODES)
def test_a_head_that_is_not_fully_fitted_is_its_fc_classifier(inference, updated):
    head, features = HPMHead(16, 4, inference=inference), torch.randn(9, 16)
    linear = F.linear(features, head.weight, head.bias)
    head.update_prototypes(torch.randn(len(updated), 16), torch.tensor(updated, dtype=torch.long))
    assert not head.is_fitted() and torch.equal(head(features), linear)
    head.update_prototypes(torch.randn(4, 16), torch.arange(4))
    assert head.is_fitted() and torch.equal(head(features), linear) == (inference == "fc")


@pytest.mark.parametrize("inference", INFERENCE_MODES)
def test_forward_changes_no_entry(inference):
    head = fitted(inference=inference).train()
    before = copy.deepcopy(head.state_dict())
    first = head(torch.randn(8, 16))
    first.sum().backward()
    assert same_tensors(head.state_dict(), before)


def test_weights_without_prototypes_leave_none_of_other_weights():
    model, plain = nn.Sequential(nn.Linear(8, 16), fitted()), nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 10))
    before, features = copy.deepcopy(model.state_dict()), torch.randn(5, 8)
    # What says nothing of the classifier, or says all of the head, leaves it as it is.
    model.load_state_dict(plain[0].state_dict(prefix="0."), strict=False)
    model.load_state_dict({**model.state_dict(), "1.bias": plain[1].bias}, strict=False)
    assert all(torch.equal(model.state_dict()[f"1.{entry}"], before[f"1.{entry}"]) for entry in HPM_ENTRIES)

    with pytest.warns(UnfittedHeadWarning, match="hold no prototypes, and those of the HPM head were of other weights"):
        keys = model.load_state_dict(plain.state_dict(), strict=False)
    assert set(keys.missing_keys) == {f"1.{entry}" for entry in HPM_ENTRIES}
    assert torch.equal(model(features), plain(features))
    assert not any(model.state_dict()[f"1.{entry}"].any() for entry in HPM_ENTRIES)
    model.load_state_dict(plain.state_dict(), strict=False)  # nothing is lost any more, so nothing is said
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "1.log_scale", "1.prototypes"'):
        model.load_state_dict(plain.state_dict())
    HPMHead(16, 10, device="meta").load_state_dict(plain[1].state_dict(), strict=False, assign=True)


@pytest.mark.parametrize(("ema_decay", "dtype"), [(0.0, torch.int64), (0.9, torch.uint8), (1.0, torch.uint64)])
def test_update_prototypes_sets_first_then_averages_in_closed_form(ema_decay, dtype):
    head = HPMHead(3, 4, ema_decay=ema_decay)
    batches = [(torch.randn(12, 3, requires_grad=True), torch.arange(12) % 3) for _ in range(4)]
    expected = torch.zeros(4, 3, dtype=torch.float64)
    for step, (z, labels) in enumerate(batches):
        head.update_prototypes(z, labels.to(dtype))
        for c in range(3):
            mean = z[labels == c].detach().double().mean(dim=0)
            expected[c] = mean if step == 0 else ema_decay * expected[c] + (1 - ema_decay) * mean
        torch.testing.assert_close(head.prototypes.double(), expected, rtol=1e-6, atol=1e-6)
    assert head.num_updates.tolist() == [4, 4, 4, 0] and not head.prototypes.requires_grad
    assert torch.equal(head.prototypes[3], torch.zeros(3))


BAD_UPDATES = [
    (torch.zeros(2, 5), torch.tensor([0, 1]), r"shape \(2, 5\); expected \(B, 3\)"),
    (torch.zeros(2, 3), torch.tensor([0, 1, 1]), r"labels have the shape \(3,\).*expected \(2,\)"),
    (torch.zeros(2, 3), torch.tensor([[0.0, 1.0], [1.0, 0.0]]), "Soft targets have no class mean"),
    (torch.zeros(2, 3), torch.tensor([0, 1], device="meta"), "features are on cpu and labels on meta.*on cpu"),
    (torch.zeros(2, 3), torch.tensor([-1, 0]), "labels span -1 to 0; expected 0 to 3"),
    (torch.tensor([[0.0, 0.0, 0.0], [0.0, float("nan"), 0.0]]), torch.tensor([0, 1]), "not finite"),
    (torch.full((4, 3), float("nan")), None, "not finite"),
    (torch.zeros(3, 4), None, r"\(3, 4\); expected \(num_classes, in_features\) = \(4, 3\)"),
]


@pytest.mark.parametrize(("features", "labels", "message"), BAD_UPDATES)
def test_bad_features_or_prototypes_are_refused_and_change_nothing(features, labels, message):
    head = fitted(3, 4)
    before = copy.deepcopy(head.state_dict())
    with pytest.raises(ValueError, match=message):
        head.set_prototypes(features) if labels is None else head.update_prototypes(features, labels)
    assert same_tensors(head.state_dict(), before)


@pytest.mark.parametrize(("kwargs", "message"), [
    ({"num_classes": 0}, "num_classes is 0"), ({"mix": float("nan")}, r"mix is nan; expected a number in \[0, 1\]"),
    ({"ema_decay": 2}, "ema_decay is 2"),
    ({"inference": "bach"}, "unknown inference mode 'bach'; expected one of batch, sample, dataset, fc"),
])
def test_bad_arguments_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        HPMHead(**{"in_features": 3, "num_classes": 2, **kwargs})


def test_find_head_finds_the_one_head():
    head = HPMHead(3, 2)
    assert find_head(head) is head
    assert find_head(nn.Sequential(nn.Flatten(), nn.Sequential(head))) is head
    # One head in two places is one head.
    assert find_head(nn.ModuleDict({"a": head, "b": head})) is head
    with pytest.raises(ValueError, match="Linear has no HPM head"):
        find_head(nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"2 HPM heads, at 0, 1\.0"):
        find_head(nn.Sequential(HPMHead(3, 3), nn.Sequential(HPMHead(3, 2))))


def test_head_mode_switches_and_restores_also_after_an_exception():
    assert timm_hpm.inference_mode is head_mode  # its old name
    model = nn.Sequential(nn.Flatten(), HPMHead(3, 2, inference="sample"))
    with head_mode(model, "fc") as head:
        assert head is model[1] and head.inference == "fc"
        with head_mode(model, "dataset"):
            assert head.inference == "dataset"
        assert head.inference == "fc"
    assert head.inference == "sample"
    with pytest.raises(KeyError), head_mode(model, "fc"):
        raise KeyError
    assert head.inference == "sample"
    head.inference = "bach"  # by hand
    with pytest.raises(ValueError, match="expected one of batch, sample, dataset, fc"):
        head(torch.randn(2, 3))


@pytest.mark.parametrize("inference", INFERENCE_MODES)
def test_a_lower_precision_changes_little(inference):
    head, features = fitted(64, inference=inference), torch.randn(2048, 64)
    dtype = torch.bfloat16 if inference == "fc" else torch.float32
    with torch.no_grad():
        expected, of_few = head(features), head(features[:64])
        with torch.autocast("cpu", torch.bfloat16):
            logits = head(features)
            from_half = head(features.bfloat16())
    assert logits.dtype == dtype and (inference == "fc" or torch.equal(logits, expected))
    assert (logits - expected).abs().max() <= 1e-2 * expected.abs().max()
    half, few = copy.deepcopy(head).bfloat16(), features[:64].bfloat16()
    same = half.fc_logits(few).argmax(dim=1) == head.fc_logits(features[:64]).argmax(dim=1)
    assert half(few).dtype == dtype
    assert (half(few) - of_few)[same].abs().max() <= 3e-2 * of_few.abs().max()
    for answers in (logits, from_half):
        assert (answers.argmax(dim=1) == expected.argmax(dim=1)).float().mean() >= 0.99


@pytest.mark.parametrize("cast", [
    lambda head: head.to(torch.bfloat16), lambda head: head.double(),
    lambda head: HPMHead(16, 10, dtype=torch.bfloat16),
    lambda head: nn.Sequential(head).to(torch.float16)[0],
])
def test_prototypes_stay_in_float32_and_an_average_of_them_moves(cast, tmp_path):
    """In bfloat16 an average that begins at 1 stays there: a step of a hundredth is below its rounding."""
    before = fitted()
    before.prototypes.normal_()
    head = cast(copy.deepcopy(before))
    head.set_prototypes(before.prototypes)
    assert head.prototypes.dtype == torch.float32 and torch.equal(head.prototypes, before.prototypes)
    head.set_prototypes(torch.ones(10, 16))
    features, labels = torch.full((10, 16), 1.3, dtype=head.weight.dtype), torch.arange(10)
    for _ in range(300):
        with torch.autocast("cpu", torch.bfloat16):
            head.update_prototypes(features, labels)
    expected = features[0, 0].float() + (1 - features[0, 0].float()) * 0.99**300
    torch.testing.assert_close(head.prototypes, expected.expand(10, 16), rtol=0, atol=1e-4)
    save_file(head.state_dict(), tmp_path / "head.safetensors")
    for assign in (False, True):
        other = HPMHead(16, 10, dtype=head.weight.dtype)
        other.load_state_dict(load_file(tmp_path / "head.safetensors"), assign=assign)
        assert same_tensors(other.state_dict(), head.state_dict())
        assert torch.equal(other(features), head(features))
        other.load_state_dict({name: value.half() for name, value in head.state_dict().items()}, assign=assign)
        assert other.prototypes.dtype == torch.float32


@pytest.mark.filterwarnings("ignore::timm_hpm.UnfittedHeadWarning")
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("wrong", ["plain", "shape", "unexpected", "missing"])
@pytest.mark.parametrize("make", [
    lambda: fitted(), lambda: timm_hpm.PixelModel(timm.create_model("hpm_wrn10_2.untrained"))])
def test_a_failed_load_changes_nothing(make, wrong, assign, strict):
    model = make()
    head = find_head(model)
    head.set_prototypes(torch.randn_like(head.prototypes))
    mine = {name: value + (not name.endswith("function")) for name, value in model.state_dict().items()}
    name = next(reversed([key for key in mine if key.endswith("bias")]))
    plain = {key: value for key, value in mine.items() if key.rpartition(".")[2] not in HPM_ENTRIES}
    given = {"plain": plain, "shape": {**plain, name: torch.zeros(3)}, "unexpected": {**mine, "more": torch.ones(1)},
             "missing": {key: value for key, value in mine.items() if key != name}}[wrong]
    kept = {key: (value, value.clone()) for key, value in model.state_dict(keep_vars=True).items()}
    given_before = copy.deepcopy(given)
    if strict or wrong == "shape":
        with pytest.raises(RuntimeError, match="Error"):
            model.load_state_dict(given, strict=strict, assign=assign)
        now = model.state_dict(keep_vars=True)
        assert now.keys() == kept.keys()
        assert all(now[key] is tensor and torch.equal(tensor, value) for key, (tensor, value) in kept.items())
    else:
        model.load_state_dict(given, strict=False, assign=assign)
        assert any(torch.equal(head.weight, value) for value in given.values())
        assert head.is_fitted() == (wrong != "plain")
    assert same_tensors(given, given_before)


def test_the_head_forms_nothing_larger_than_its_prototypes_and_logits():
    class LargestTensor(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(tensor, Tensor):
                    self.numel = max(self.numel, tensor.numel())
            return result

    for batch, width, num_classes in [(16, 32, 300), (200, 32, 10), (5, 64, 20), (64, 8, 40)]:
        head, features = fitted(width, num_classes, inference="batch"), torch.randn(batch, width, requires_grad=True)
        with LargestTensor() as largest:
            head(features).sum().backward()
        assert largest.numel <= max(batch * num_classes, num_classes * width, batch * width)


def of_classes(labels: list[int], num_classes: int) -> Tensor:
    return F.one_hot(torch.tensor(labels), num_classes).float()


@pytest.mark.parametrize("size", [1.0, 1e4])
def test_straight_through_is_exactly_one_hot_with_the_gradient_of_the_softmax(size):
    logits = (size * torch.randn(64, 7)).requires_grad_()
    upstream = torch.randn(64, 7)
    assignment = functional.straight_through_assignment(logits)
    assert torch.equal(assignment, F.one_hot(logits.argmax(dim=1), 7).float())
    assert functional.straight_through_assignment(torch.zeros(3, 4)).sum(dim=1).tolist() == [1, 1, 1], "a tie, once"

    gradient, = torch.autograd.grad(assignment, logits, upstream)
    expected, = torch.autograd.grad(F.softmax(logits, dim=1), logits, upstream)
    assert torch.equal(gradient, expected)


def test_soft_presence_of_tiny_probabilities_is_their_sum():
    tiny = torch.tensor([[1e-10, 3e-20], [2e-10, 0.0]])
    torch.testing.assert_close(functional.soft_presence(tiny), torch.tensor([3e-10, 3e-20]), rtol=1e-5, atol=0)


def test_soft_presence_of_a_saturated_softmax_is_hard_with_finite_gradients():
    p = of_classes([2, 2, 0], 4).requires_grad_()
    presence = functional.soft_presence(p)
    torch.testing.assert_close(presence, functional.hard_presence(p), rtol=0, atol=2e-6)
    gradient, = torch.autograd.grad(presence.sum(), p)
    assert gradient.isfinite().all()
    # Nobody predicts classes 1 and 3: there each image's own probability counts in full.
    torch.testing.assert_close(gradient[:, [1, 3]], torch.ones(3, 2))


def test_a_class_that_nobody_predicts_passes_no_gradient():
    logits = (10 * of_classes([1, 3, 1, 1], 5) + torch.randn(4, 5)).requires_grad_()
    z = torch.randn(4, 3, requires_grad=True)
    prototypes = torch.randn(5, 3, requires_grad=True)
    assignment = functional.straight_through_assignment(logits)
    means = functional.batch_prototypes(z, assignment)
    mixed = functional.mix_prototypes(prototypes, means, functional.hard_presence(assignment), 0.5)
    for absent in (0, 2, 4):
        to_z, = torch.autograd.grad(means[absent].sum(), z, retain_graph=True)
        assert torch.equal(to_z, torch.zeros_like(z))
        to_z, to_logits, to_prototypes = torch.autograd.grad(
            mixed[absent].sum(), [z, logits, prototypes], retain_graph=True)
        assert torch.equal(to_z, torch.zeros_like(z)) and torch.equal(to_logits, torch.zeros_like(logits))
        assert torch.equal(to_prototypes, of_classes([absent], 5).t().expand(5, 3))
    # The gradient of the mass of an absent class must not be divided by something tiny.
    to_logits, = torch.autograd.grad(means.sum(), logits)
    assert to_logits.isfinite().all() and 0 < to_logits.abs().max() < 100


@pytest.mark.parametrize("mass", [0.0, 1e-42, 1e-38, 1e-13, 1e-6])
def test_batch_prototypes_of_hardly_any_mass_have_finite_gradients(mass):
    assignment = torch.full((3, 2), mass / 3, requires_grad=True)
    z = torch.randn(3, 4, requires_grad=True)
    means = functional.batch_prototypes(z, assignment)
    mixed = functional.mix_prototypes(torch.randn(2, 4), means, functional.soft_presence(assignment), 0.5)
    assert means.isfinite().all() and mixed.isfinite().all()
    to_means = torch.autograd.grad(means.sum(), [z, assignment], retain_graph=True)
    assert all(gradient.isfinite().all() for gradient in to_means)
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(mixed.square().sum(), [z, assignment]))


@pytest.mark.parametrize("mix", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("batch", [1, 2, 7])
def test_distances_by_inner_products_are_those_to_the_mixed_prototypes(batch, soft, mix):
    z, logits, prototypes, mean = (torch.randn(shape, dtype=torch.float64) for shape in
                                   [(batch, 9), (batch, 5), (5, 9), (9,)])
    logits[:, 2] = -100.0  # a class that is absent
    inputs = [tensor.requires_grad_() for tensor in (z + 10 * mean, 3 * logits, prototypes + 10 * mean)]
    z, logits, prototypes = inputs
    assignment = F.softmax(logits, dim=1) if soft else functional.straight_through_assignment(logits)
    presence = (functional.soft_presence if soft else functional.hard_presence)(assignment)
    by_products = functional.mixed_squared_distances_by_products(z, assignment, presence, prototypes, mix)
    mixed = functional.mix_prototypes(prototypes, functional.batch_prototypes(z, assignment), presence, mix)
    expected = (z[:, None] - mixed[None]).square().sum(dim=2)
    torch.testing.assert_close(by_products, expected)
    upstream = torch.randn(batch, 5, dtype=torch.float64)
    for gradient, other in zip(torch.autograd.grad(by_products, inputs, upstream, retain_graph=True),
                               torch.autograd.grad(expected, inputs, upstream), strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("classes", [5, 250])
def test_several_batches_are_answered_as_each_by_itself(classes):
    # With 250 classes by inner products, with 5 by the mixed prototypes.
    z, logits = torch.randn(3, 6, 256), 3 * torch.randn(3, 6, classes)
    prototypes, scale = torch.randn(classes, 256), torch.tensor(0.3)

    def answers(z: Tensor, logits: Tensor) -> Tensor:
        hard, soft = functional.straight_through_assignment(logits), F.softmax(logits, dim=-1)
        return torch.stack([functional.batch_logits(z, assignment, presence(assignment), prototypes, scale, 0.5)
                            for assignment, presence in ((hard, functional.hard_presence),
                                                         (soft, functional.soft_presence))])

    each = [answers(*batch) for batch in zip(z, logits, strict=True)]
    torch.testing.assert_close(answers(z, logits), torch.stack(each, dim=1), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("batch", [1, 4])
def test_gradcheck_of_the_soft_path(batch):
    def soft(z: Tensor, weight: Tensor, prototypes: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
        assignment = F.softmax(z @ weight.t(), dim=1)
        presence = functional.soft_presence(assignment)
        return (functional.batch_logits(z, assignment, presence, prototypes, log_scale.exp(), 0.5),
                functional.sample_logits(z, assignment, prototypes, log_scale.exp(), 0.5))

    shapes = [(batch, 3), (4, 3), (4, 3), ()]
    assert torch.autograd.gradcheck(soft, [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes])
