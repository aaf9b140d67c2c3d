"""The sensitivity study: closed forms on linear features, the trap of a saturated cross-entropy, its file and page."""

import copy
import dataclasses

import pytest
import timm
import torch
from html_page import Page
from nets import same_tensors
from torch import nn

import timm_hpm
from timm_hpm.__main__ import main
from timm_hpm.head import HPMHead, find_head
from timm_hpm.report.sensitivity_page import sensitivity_markdown, sensitivity_page
from timm_hpm.sensitivity import Sensitivity, measure_sensitivity

NUM_DIGITS = 30


class LinearFeatures(nn.Module):
    """Features A·x of 2×1 pixels, and an HPM head of two classes on them."""

    def __init__(self, log_scale: float = 0.0):
        super().__init__()
        self.features = nn.Linear(2, 3, bias=False)
        self.features.weight.data = torch.tensor([[1.0, 0.5], [-0.5, 1.0], [0.25, 0.25]])
        self.head = HPMHead(3, 2)
        self.head.weight.data = torch.tensor([[0.5, -1.0, 0.0], [-0.5, 1.0, 0.5]])
        self.head.bias.data.zero_()
        self.head.set_prototypes(torch.tensor([[0.5, 0.0, 0.0], [0.0, 1.0, 0.5]]))
        self.head.log_scale.data.fill_(log_scale)

    def forward(self, pixels):
        return self.head(self.features(pixels.flatten(1)))


def images_of(model: LinearFeatures, mode: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Images in the middle of the pixel range, labelled as the head predicts."""
    images = 0.35 + 0.3 * torch.rand(16, 1, 2, 1)
    with torch.no_grad(), timm_hpm.head_mode(model, mode):
        return images, model(images).argmax(dim=1)


@pytest.mark.parametrize("mode", ["fc", "dataset"])
@pytest.mark.parametrize(("norm", "dual", "eps"), [("Linf", 1, 0.02), ("L2", 2, 0.03)])
def test_movements_on_linear_features_are_the_closed_forms(mode, norm, dual, eps):
    model = LinearFeatures().eval()
    head, a = model.head, model.features.weight.detach()
    images, labels = images_of(model, mode)
    # With static prototypes the difference of two ℓ2 logits is linear in the features, too.
    weight = head.weight if mode == "fc" else 2 * head.scale() * head.prototypes
    direction = a.T @ (weight[0] - weight[1]).detach()
    delta = eps * (direction.sign() if norm == "Linf" else direction / direction.norm())
    z = images.flatten(1) @ a.T
    spread = 2 ** 0.5 * (z - z.mean(dim=0)).square().sum(dim=1).mean().sqrt()

    row, = measure_sensitivity(model, images, labels, norm, [0, eps], [mode], iterations=20, batch_size=5).rows

    assert row.overall.margin_lost == pytest.approx(eps * float(direction.norm(dual)), rel=1e-3)
    assert row.overall.feature_shift == pytest.approx(float((a @ delta).norm() / spread), rel=1e-3)
    assert row.overall.sensitivity == pytest.approx(
        row.overall.margin_lost / row.overall.margin / row.overall.feature_shift)


@pytest.mark.parametrize("mode", ["dataset", "sample"])
def test_a_saturated_cross_entropy_claims_robustness_that_the_margin_attack_refutes(mode):
    model = LinearFeatures(log_scale=9.0).eval()
    images, labels = images_of(model, mode)
    # Far enough to cross for every image, but the softmax is exactly one-hot at the start.
    row, = measure_sensitivity(model, images, labels, "Linf", [0.35], [mode], iterations=20).rows
    assert row.overall.accuracy < 0.2 < 0.4 < row.overall.naive_accuracy


def test_no_scale_of_the_logits_changes_the_sensitivity():
    rows = []
    for log_scale in (-2.0, 0.0, 6.0):
        model = LinearFeatures(log_scale).eval()
        torch.manual_seed(0)
        images, labels = images_of(model, "dataset")
        row, = measure_sensitivity(model, images, labels, "Linf", [0.02], ["dataset"], iterations=10).rows
        rows.append(row.overall)
    for row in rows[1:]:
        assert row.sensitivity == pytest.approx(rows[0].sensitivity, rel=1e-3)
        assert row.accuracy == rows[0].accuracy


@pytest.fixture(scope="module")
def study(shared_model, digits):
    before = copy.deepcopy(shared_model.state_dict())
    result = measure_sensitivity(shared_model, *digits, "Linf", [0.05, 0.2], ("fc", "dataset", "batch"),
                                 iterations=5, batch_size=15, name="<digits>")
    assert find_head(shared_model).inference == "dataset" and same_tensors(shared_model.state_dict(), before)
    return result


def test_classes_add_up_to_the_whole(study):
    for row in study.rows:
        parts = row.by_class.values()
        assert sum(part.images for part in parts) == row.overall.images == 30
        for name in ("accuracy", "naive_accuracy", "feature_shift", "margin", "margin_lost"):
            mean = sum(part.images * getattr(part, name) for part in parts) / 30
            assert getattr(row.overall, name) == pytest.approx(mean, rel=1e-4, abs=1e-6)
        assert row.overall.accuracy <= row.overall.naive_accuracy <= study.clean[row.head]


def test_a_study_is_read_back_as_it_was_saved_and_other_files_are_refused(study, tmp_path):
    study.save(tmp_path / "study.json")
    assert Sensitivity.load(tmp_path / "study.json") == study
    for text in ("{}", "[1]", "no JSON", '{"rows": [1]}'):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(ValueError, match=r"other\.json holds no sensitivity"):
            Sensitivity.load(tmp_path / "other.json")


def test_the_page_shows_every_network_head_and_class_and_nothing_from_outside(study):
    robust = dataclasses.replace(study, name="robust")
    text = sensitivity_page([study, robust], [f"digit {i}" for i in range(10)])
    page = Page(text)
    assert text.count("<svg") == 2 and "&lt;digits&gt;" in text and "<digits>" not in text
    assert "digit 9" in text and "<td>batch</td>" in text
    assert page.all("svg") and not page.all("script") and not page.all("img")
    assert sensitivity_markdown(study).count("\n") == 2 + len(study.rows)


@pytest.mark.parametrize(("change", "message"), [
    ({"radii": [0]}, "expected a radius above 0"), ({"modes": ("l2",)}, "l2"), ({"iterations": 0}, "iterations"),
    ({"labels": torch.full((4,), 99)}, "label 99 of image 0 is out of range"), ("unfitted", "fit_prototypes"),
    ("training", "eval"),
])
def test_malformed_arguments_are_named(change, message):
    model = LinearFeatures().train(change == "training")
    if change == "unfitted":
        model.head.reset_prototypes()
    arguments = {"images": torch.rand(4, 1, 2, 1), "labels": torch.zeros(4, dtype=torch.long), "norm": "Linf",
                 "radii": [0.1], "modes": ("fc",), "iterations": 1, "batch_size": 4}
    arguments |= change if isinstance(change, dict) else {}
    with pytest.raises(ValueError, match=message):
        measure_sensitivity(model, **arguments)


def test_the_command_writes_a_page_of_several_networks(tmp_path, capsys):
    for name in ("a.pt", "b.pt"):
        torch.save(timm.create_model("hpm_wrn10_2", pretrained=True).state_dict(), tmp_path / name)
    assert main(["sensitivity", "--checkpoint", str(tmp_path / "a.pt"), str(tmp_path / "b.pt"), "--num-images", "6",
                 "--radii", "0:0.1:0.1", "--iterations", "2", "--inference", "fc,dataset", "--device", "cpu",
                 "--output", str(tmp_path / "out")]) == 0
    page = Page((tmp_path / "out" / "sensitivity.html").read_text())
    assert len(page.all("svg")) == 2 and "a.pt" in page.text and "b.pt" in page.text
    saved = [Sensitivity.load(file) for file in sorted((tmp_path / "out").glob("*.json"))]
    assert [len(study.rows) for study in saved] == [2, 2] and saved[0].rows == saved[1].rows
    assert "| FC | 0.1 |" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"2 files, whose studies would be 1 files.*x-a-pt\.json"):
        main(["sensitivity", "--checkpoint", "x/a.pt", "x-a.pt", "--output", str(tmp_path / "other")])
    with pytest.raises(SystemExit, match="2"):  # it is in float32
        main(["sensitivity", "--amp"])
