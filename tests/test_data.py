"""The digits splits, and the boundary between pixels in [0, 1] and a model's inputs."""

import hashlib

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from protocols import run_attack
from sklearn.datasets import load_digits
from torch import nn

from timm_hpm import PixelModel, ThreatModel, find_head, fit_prototypes, load_split
from timm_hpm.data import check_pixels, random_shift
from timm_hpm.evaluation import Budget
from timm_hpm.evaluation.judge import judge


def tiny_timm_model() -> nn.Module:
    """Returns a real timm model with random weights, and a mean and std that differ by channel."""
    overlay = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.25, 2.0)}
    return timm.create_model("test_resnet", num_classes=7, pretrained_cfg_overlay=overlay).eval()


def test_the_splits_of_the_digits_are_always_the_same():
    state, rows = torch.get_rng_state(), []
    for split, number, digest in (
            ("train", 1077, "f4cae45f7d2bfa9c6744c4e47b36cd554291ccb63e404eb872b743b02fa46107"),
            ("val", 360, "9f02c27e0062726ec3adcd8370a2d5b9d43534f6ebae08b1cc25421e3ec5af5d"),
            ("test", 360, "8110e5c2c9d024b578f2c2692341cc0a635dc6f45899bb78b73bbee43d45a90f")):
        images, labels = load_split("digits", split).tensors
        assert images.shape == (number, 1, 8, 8) and images.dtype == torch.float32 and labels.dtype == torch.int64
        assert hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest() == digest
        rows += [(image.numpy().tobytes(), int(label)) for image, label in zip(images, labels, strict=True)]
    assert torch.equal(torch.get_rng_state(), state)
    # As multisets: each of scikit-learn's images is in exactly one split.
    digits = load_digits()
    assert sorted(rows) == sorted(zip([(image / 16).astype("float32").tobytes() for image in digits.images],
                                      digits.target.tolist(), strict=True))


def test_pixel_model_normalises_by_the_pretrained_cfg():
    model, pixels = tiny_timm_model(), torch.rand(2, 3, 32, 32)
    normalised = torch.stack([(pixels[:, 0] - 0.1) / 0.5, (pixels[:, 1] - 0.2) / 0.25, (pixels[:, 2] - 0.3) / 2], 1)
    torch.testing.assert_close(PixelModel(model).normalise(pixels), normalised)
    torch.testing.assert_close(PixelModel(model)(pixels), model(normalised))
    assert (PixelModel(model)(pixels) - model(pixels)).abs().max() > 1e-3
    assert {key.removeprefix("model.") for key in PixelModel(model).state_dict()} == model.state_dict().keys()
    for training in (False, True):
        assert PixelModel(model.train(training)).training is training and model.training is training
    *_, frozen = model.train().modules()
    frozen.eval()
    assert PixelModel(model).training and not frozen.training
    plain = PixelModel(model, mean=[0.0, 0.0, 0.0], std=[1.0, 1.0, 1.0])  # which win over the cfg
    assert torch.equal(plain(pixels), model(pixels))
    with pytest.raises(ValueError, match=r"images have 1 channels, the model's mean and std 3; .*PixelModel"):
        PixelModel(model)(torch.rand(2, 1, 32, 32))


def test_pixel_model_answers_in_float32_for_a_bfloat16_model():
    model, pixels = tiny_timm_model(), torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected = PixelModel(model)(pixels)
        with torch.autocast("cpu", torch.bfloat16):
            assert model(pixels).dtype == torch.bfloat16
            logits = PixelModel(model)(pixels)
        cast = PixelModel(model).to(torch.bfloat16)(pixels.bfloat16())
        mixed = PixelModel(model.bfloat16())(pixels)
    for answer in (logits, cast, mixed):
        assert answer.dtype == torch.float32
        assert (answer - expected).abs().max() <= 0.05 * expected.abs().max()


def images_with(value: float) -> torch.Tensor:
    images = torch.full((4, 3, 2, 2), 0.5)
    images[2:, 1, 0, 1] = value
    return images


FOUR = torch.zeros(4).long()


@pytest.mark.parametrize(("images", "labels", "message"), [
    (images_with(1.001), FOUR,
     r"image 2 has values from 0\.5 to 1\.001, up to 0\.001 outside of \[0, 1\]; expected pixels in \[0, 1\]"),
    (images_with(-2e-6), FOUR, r"from -2e-06 to 0\.5, up to 2e-06 outside.*PixelModel"),
    (images_with(float("nan")), FOUR, "image 2 has values from nan"),
    (torch.zeros(4, 2, 2), FOUR, r"images have the shape \(4, 2, 2\)"),
    (torch.zeros(4, 3, 2, 2).byte(), FOUR, "dtype torch.uint8; expected .* in floating point"),
    (torch.zeros(0, 3, 2, 2), torch.zeros(0).long(), "each above 0"),
    (images_with(0), torch.zeros(3).long(), r"labels have the shape \(3,\).*expected \(4,\) class indices"),
    (images_with(0), torch.tensor([0, 2, 3, -1]), "label 3 of image 2 is out of range; .* classes 0 to 2"),
])
def test_check_pixels_names_the_first_fault(images, labels, message):
    with pytest.raises(ValueError, match=message):
        check_pixels(images, labels, 3)


ONE, MINUS = float(np.nextafter(np.float32(1), np.float32(2))), -3e-8


@pytest.mark.parametrize(("value", "dtype"), [
    (ONE, torch.float32), (-9e-7, torch.float32), (MINUS, torch.float64), (1.0009765625, torch.float16),
    (-0.0078, torch.bfloat16), (-1e-40, torch.float32),
])
def test_rounding_out_of_the_range_is_clamped(value, dtype):
    images = images_with(value).to(dtype)
    before = images.clone()
    clamped = check_pixels(images, torch.zeros(4).long())
    assert torch.equal(images, before) and clamped.dtype == dtype
    assert torch.equal(clamped, before.clamp(0, 1)) and not torch.equal(clamped, before)


def test_pixels_rounded_out_of_range_give_the_results_of_clamped_ones():
    labels = load_split("digits", "test").tensors[1][:60]
    rounded = (load_split("digits", "test").tensors[0][:60] - 0.3053) / 0.376 * 0.376 + 0.3053
    rounded[:, 0, 0, 0], rounded[:, 0, 0, 1] = MINUS, ONE
    results = []
    for images in (rounded, rounded.clamp(0, 1)):
        model = timm.create_model("hpm_wrn10_2", pretrained=True).eval()
        report = run_attack(model, images[:8], labels[:8], ThreatModel("Linf", 0.1), batch_size=8,
                                        attacks=["apgd-ce"], surrogates=["fc"], budgets={"apgd-ce": Budget(2)})
        fit_prototypes(model, [(images, labels)])
        results.append([report.correct, report.protocol, judge(model, images, labels, 60).tolist(),
                        find_head(model).prototypes.tolist()])
    assert results[0] == results[1]


def shifted(image: torch.Tensor, down: int, right: int) -> torch.Tensor:
    """Returns `image` (C, 4, 5) moved by at most two pixels."""
    return F.pad(image, (2, 2, 2, 2))[:, 2 - down:6 - down, 2 - right:7 - right]


@pytest.mark.parametrize("pixels", [1, 2])
def test_random_shift_draws_one_of_all_shifts_for_each_image(pixels):
    image = torch.rand(2, 4, 5) + 0.1
    steps = range(-pixels, pixels + 1)
    possible = torch.stack([shifted(image, down, right) for down in steps for right in steps])
    assert torch.equal(random_shift(image[None], 0), image[None])
    results = random_shift(image.expand(400, -1, -1, -1), pixels)
    assert results.shape == (400, 2, 4, 5) and results.is_contiguous()
    matches = (results[:, None] == possible[None]).flatten(2).all(dim=2)
    assert torch.equal(matches.sum(dim=1), torch.ones(400).long())
    # Every shift about as often as any other.
    counts = matches.sum(dim=0)
    assert len(counts) == (2 * pixels + 1) ** 2 and counts.min() > 0 and counts.max() < 4 * 400 / len(counts)
