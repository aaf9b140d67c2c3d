"""The benchmark of independent attackers: they find what there is to find."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from protocols import run_attack
from torch import nn

import timm_hpm
from timm_hpm import AttackReport, ThreatModel
from timm_hpm.evaluation import Budget

ROOT = Path(__file__).parent.parent
THREAT = ThreatModel("Linf", 0.3)


@pytest.fixture(scope="module")
def independent():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        import independent
    try:
        independent.import_attacks()
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    return independent


def digits_model(**kwargs) -> nn.Module:
    return timm.create_model("hpm_wrn10_2.digits_linf", pretrained=True, **kwargs).eval()


def forged_report(model: nn.Module, inference: str = "batch") -> AttackReport:
    """A report of 8 digits in two batches, all robust, though the ball is so large that each can be broken."""
    images, labels = (part[:8] for part in timm_hpm.load_split("digits", "test").tensors)
    with timm_hpm.head_mode(model, inference):
        report = run_attack(model, images, labels, THREAT, batch_size=4, surrogates=["fc"],
                            attacks=["apgd-ce"], budgets={"apgd-ce": Budget(1)})
    assert report.correct["clean"] == "1" * 8
    return replace(report, correct=dict.fromkeys(report.correct, "1" * 8), assembled="")


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_every_attacker_breaks_a_linear_classifier_where_that_is_possible(independent, norm):
    # Far from the pixels' bounds the best margin in the ball is known: the clean one and eps times the dual norm.
    weight, images = torch.randn(5, 64), 0.5 + 0.1 * torch.rand(32, 1, 8, 8)
    threat = ThreatModel(norm, {"Linf": 0.015, "L2": 0.09}[norm])
    clean = images.flatten(1) @ weight.t()
    labels = clean.argmax(dim=1)
    dual = (weight[:, None] - weight).norm(p=1 if norm == "Linf" else 2, dim=2)
    margins = clean - clean.gather(1, labels[:, None]) + threat.eps * dual[labels]
    best = margins.scatter(1, labels[:, None], -math.inf).amax(dim=1)
    assert 4 < (best > 0).sum() < 28
    clear = best.abs() > 0.5 * best.abs().mean()
    runs = independent.attackers(threat, 5, independent.Budgets().scaled(0.3))
    assert list(runs) == {"Linf": ["pgd", "apgd-ce", "apgd-dlr", "apgd-t", "fab-t", "square"],
                          "L2": ["apgd-ce", "apgd-dlr", "apgd-t", "fab-t"]}[norm]
    for name, functions in runs.items():
        logits = independent.Watched(lambda x: x.flatten(1) @ weight.t(), images, labels, threat)
        functions[0](logits, images, labels)
        found = logits.candidates()
        assert threat.distance(found, images).max() <= threat.eps + 1e-6
        broken = (found.flatten(1) @ weight.t()).argmax(dim=1) != labels
        assert torch.equal(broken[clear], best[clear] > 0), name


@pytest.mark.parametrize("inference", ["batch", "sample"])
def test_images_wrongly_called_robust_are_reported_as_missed_and_no_others(independent, inference):
    model = digits_model()
    images, labels = (part[:8] for part in timm_hpm.load_split("digits", "test").tensors)
    report = forged_report(model, inference)
    report.correct["fc/apgd-ce"] = "10111101"
    budgets = independent.Budgets(pgd_steps=5, pgd_restarts=1, apgd_steps=5, apgd_restarts=2, apgd_t_steps=3,
                                  fab_t_steps=2, square_queries=20)
    missed = independent.find_missed(model, images, labels, report, budgets)
    assert list(missed) == ["true", "fc", "dataset", "soft", "mixed"]
    assert independent.found_by(missed) == [0, 2, 3, 4, 5, 7]
    assert missed["true"]["apgd-t"] == [0, 2, 3, 4, 5, 7]
    assert independent.to_markdown(missed, report).endswith(
        "robust accuracy by MSA custom: 75.0 %, with these attackers: 0.0 %\n"
        "missed by MSA: 6 of 8 images, 75.0 points")


def test_a_report_is_attacked_again_unless_it_is_of_something_else(independent, tmp_path, capsys):
    path, output = tmp_path / "report.json", tmp_path / "out"
    report = forged_report(digits_model())
    report.protocol.update(threat="Linf:0.001", model="hpm_wrn10_2", dataset="digits", split="test")
    report.save(path)
    options = [str(path), "--device", "cpu", "--output", str(output)]
    assert independent.main([*options, "--budget-scale", "0.005"]) == 0
    assert capsys.readouterr().out.endswith("missed by MSA: 0 of 8 images, 0.0 points\n")
    written = json.loads((output / "independent.json").read_text())
    assert written["missed_in_all"] == [] and written["protocol"] == report.protocol
    with pytest.raises(ValueError, match=r"the budgets' scale is 0.0"):
        independent.main([*options, "--budget-scale", "0"])
    for change, message in (
            ({"protocol": report.protocol | {"weights_digest": "0" * 16}}, "the weights have the digest .*, those of"),
            ({"protocol": report.protocol | {"split": "val"}}, "the images have the digest .*; they are others now"),
            ({"correct": report.correct | {"clean": "0" * 8}}, "classifies the clean images otherwise")):
        replace(report, **change).save(path)
        with pytest.raises(ValueError, match=message):
            independent.main(options)


def test_results_of_autoattack_on_other_images_are_refused(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import public_nets

    path = tmp_path / "network.json"
    path.write_text(json.dumps({"clean": {"robust": "110"}, "autoattack": {"robust": "100"}}))
    assert public_nets.reference(path, "110") == {"robust": "100"}
    with pytest.raises(SystemExit, match=r"of 3 images instead of 2; give the --num-images of that run"):
        public_nets.reference(path, "11")


def test_a_pair_of_digits_is_of_the_class_of_both(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import many_classes

    digits = {image.numpy().tobytes(): int(label) for image, label in timm_hpm.load_split("digits", "val")}
    images, labels = many_classes.pairs("val", 20)
    for image, label in zip(images, labels, strict=True):
        left, right = (digits[half.contiguous().numpy().tobytes()] for half in image.split(8, dim=2))
        assert 10 * left + right == label
