"""The surrogates' logits against plain loops over images and classes in float64 (docs/method.md)."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from timm_hpm import INFERENCE_MODES, HPMHead
from timm_hpm.evaluation.attacked import AttackedModel
from timm_hpm.surrogates import SURROGATES

CLASSES, SIZE, IMAGES, MIX = 4, 6, 7, 0.4


def problem(mode: str) -> tuple[HPMHead, Tensor]:
    """Returns a head and features; two images in seven are the FC's class 0, none its class 3."""
    generator = torch.Generator().manual_seed(2)
    head = HPMHead(SIZE, CLASSES, inference=mode, mix=MIX)
    with torch.no_grad():
        head.weight.copy_(torch.randn(CLASSES, SIZE, generator=generator))
        head.bias.copy_(torch.tensor([0.3, -0.2, 0.1, -9.0]))
        head.log_scale.fill_(-0.7)
    head.set_prototypes(torch.randn(CLASSES, SIZE, generator=generator))
    return head, torch.randn(IMAGES, SIZE, generator=generator)


def fc(head: HPMHead, features: Tensor) -> np.ndarray:
    """Returns the logits Wz + b."""
    z, weight, bias = (t.detach().double().numpy() for t in (features, head.weight, head.bias))
    return np.array([[sum(w * v for w, v in zip(weight[c], image, strict=True)) + bias[c] for c in range(CLASSES)]
                     for image in z])


def softmax(logits: np.ndarray) -> np.ndarray:
    return np.array([[math.exp(v) / sum(map(math.exp, row)) for v in row] for row in logits])


def one_hot(logits: np.ndarray) -> np.ndarray:
    return np.array([[float(c == row.argmax()) for c in range(CLASSES)] for row in logits])


def mixed_prototypes_logits(head: HPMHead, features: Tensor, assignment: np.ndarray, mode: str) -> np.ndarray:
    """Returns −s·‖z − Q_c‖², Q_c mixed of P_c and the mean that `assignment` gives the batch, or the image alone."""
    z, prototypes = features.double().numpy(), head.prototypes.double().numpy()
    s = math.exp(head.log_scale.item())
    logits = np.zeros((IMAGES, CLASSES))
    for i in range(IMAGES):
        members = {"batch": range(IMAGES), "sample": [i], "dataset": []}[mode]
        for c in range(CLASSES):
            total = sum(assignment[j, c] for j in members)
            q = prototypes[c]
            if total > 0:
                mean = sum(assignment[j, c] * z[j] for j in members) / total
                presence = 1 - math.prod(1 - assignment[j, c] for j in members)
                q = q + MIX * presence * (mean - q)
            logits[i, c] = -s * sum((a - b) ** 2 for a, b in zip(z[i], q, strict=True))
    return logits


def expected(surrogate: str, head: HPMHead, features: Tensor) -> np.ndarray:
    """Returns a surrogate's logits in the head's inference mode."""
    linear, mode = fc(head, features), head.inference
    if surrogate == "fc" or (mode == "fc" and surrogate in ("soft", "ste")):
        return linear
    if surrogate == "dataset":
        return mixed_prototypes_logits(head, features, one_hot(linear), "dataset")
    if surrogate == "soft":
        return mixed_prototypes_logits(head, features, softmax(linear), mode)
    if surrogate == "ste":
        return mixed_prototypes_logits(head, features, one_hot(linear), mode)
    parts = [expected(part, head, features) for part in ("fc", "dataset", "soft")]
    return sum(np.log(softmax(part)) for part in parts) / 3


@pytest.mark.parametrize("mode", INFERENCE_MODES)
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_logits_equal_plain_loops(surrogate, mode):
    head, features = problem(mode)
    logits = SURROGATES[surrogate].logits(head, features)
    np.testing.assert_allclose(logits.detach().double().numpy(), expected(surrogate, head, features),
                               rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", INFERENCE_MODES)
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_a_surrogate_depends_on_the_batch_exactly_if_a_neighbour_changes_its_logits(surrogate, mode):
    head, features = problem(mode)
    split = AttackedModel(nn.Sequential(nn.Flatten(), head).eval(), features)
    moved = features.clone()
    moved[1:] += 1.0
    changed = (split.logits(surrogate, features)[0] - split.logits(surrogate, moved)[0]).abs().max() > 1e-3
    assert split.batch_dependent(surrogate) == changed


@pytest.mark.parametrize("mode", INFERENCE_MODES)
def test_the_exact_surrogate_has_the_logits_of_the_model(mode):
    head, features = problem(mode)
    model = nn.Sequential(nn.Flatten(), head).eval()
    split = AttackedModel(model, features)
    torch.testing.assert_close(split.logits(split.exact_surrogate(), split.features(features)), model(features),
                               rtol=1e-5, atol=1e-5)
