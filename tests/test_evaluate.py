"""`timm_hpm.evaluate`: any model, and images by name, as a data set or as tensors."""

import pytest
import timm
import torch
from torch import nn
from torch.utils.data import TensorDataset

import timm_hpm

SHORT = timm_hpm.Protocol("short", {"apgd-ce": 3})
OPTIONS = {"protocol": SHORT, "batch_size": 5, "inference": "sample"}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return timm.create_model("hpm_wrn10_2", pretrained=True).eval()


@pytest.fixture(scope="module")
def by_name(model) -> timm_hpm.AttackReport:
    return timm_hpm.evaluate(model, "digits", num_images=10, split="val", **OPTIONS)


def test_a_data_set_by_name_is_the_attack_on_its_first_images(model, by_name):
    images, labels = (part[:10] for part in timm_hpm.load_split("digits", "val").tensors)
    with timm_hpm.head_mode(model, "sample"):
        expected = timm_hpm.mixed_surrogate_attack(model, images, labels, "Linf:0.1", protocol=SHORT, batch_size=5)
    assert by_name.correct == expected.correct
    assert by_name.protocol["dataset"] == "digits" and by_name.protocol["inference"] == "sample"
    assert by_name.protocol["threat"] == "Linf:0.1"
    assert model.fc.inference == "dataset"


@pytest.mark.parametrize("wrap", [tuple, list, lambda parts: TensorDataset(*parts)], ids=["tuple", "list", "dataset"])
def test_tensors_and_data_sets_give_the_same(model, by_name, wrap):
    data = wrap(timm_hpm.load_split("digits", "val").tensors)
    report = timm_hpm.evaluate(model, data, "Linf:0.1", num_images=10, **OPTIONS)
    assert report.correct == by_name.correct


def test_a_network_of_ones_own_and_its_normalisation():
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
    report = timm_hpm.evaluate(net, "digits", num_images=10, mean=[0.3], std=[0.4], protocol=SHORT)
    assert report.protocol["normalisation"]["mean"] == pytest.approx([0.3])
    assert set(report.correct) == {"clean", "model/apgd-ce"}
    assert not report.baseline


@pytest.mark.parametrize(("data", "change", "message"), [
    ("digitz", {}, "digitz"),
    ((torch.rand(4, 1, 8, 8), torch.zeros(4, dtype=torch.long)), {"threat": None}, "threat is None"),
    (7, {}, "data is a int"),
    ([(torch.rand(1, 8, 8), 0), (torch.rand(1, 4, 4), 0)], {}, "one size"),
    ([1, 2, 3], {}, "image, label"),
    ([(torch.rand(1, 8, 8), 0)], {"num_images": -3}, "num_images is -3"),
    ((torch.rand(4, 1, 8, 8), torch.zeros(4, dtype=torch.long)), {"num_images": 5}, "0 to 4"),
    ((torch.rand(4, 1, 8, 8), torch.zeros(4, dtype=torch.long)), {"inference": "l2"}, "l2"),
])
def test_malformed_data_are_named(model, data, change, message):
    with pytest.raises(ValueError, match=message):
        timm_hpm.evaluate(model, data, **{"threat": "Linf:0.1", "protocol": SHORT} | change)
