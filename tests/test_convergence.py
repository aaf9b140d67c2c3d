"""Whether a robust accuracy has converged: passes until each image fell, margins of the others, and their report."""

import dataclasses
import json
import re

import pytest
import timm
import torch
from protocols import run_attack

import timm_hpm
from timm_hpm import AttackReport, report_markdown, report_page
from timm_hpm.evaluation import Budget
from timm_hpm.evaluation.convergence import measured_convergence
from timm_hpm.evaluation.resume import Step
from timm_hpm.report import Convergence
from timm_hpm.report.tables import convergence_note, falls


def step(attack: str, margins: list[float], passes: int = 0, attacked: int = 0) -> Step:
    row = "".join("1" if margin else "0" for margin in margins)
    cost = {"seconds": 1.0, "forward_passes": passes, "backward_passes": passes}
    return Step(attack, {attack: row}, {}, cost, [], [], torch.empty(0), torch.empty(0), margins=margins,
                attacked=attacked)


# Two batches, of three images and of one: image 1 errs when clean, 0 falls to a, 3 to b; 2 is left.
STEPS = [
    step("clean", [4.0, 0.0, 2.0]), step("a", [0.0, 0.0, 1.0], 30, 2), step("b", [0.0, 0.0, 0.1234567], 40, 1),
    step("clean", [6.0]), step("a", [3.0], 20, 1), step("b", [0.0], 100, 1),
]


def test_passes_and_margins_are_those_of_the_steps_of_each_batch():
    assert measured_convergence(STEPS) == Convergence(
        fell_after=[30.0, 0.0, None, 240.0], spent=110.0, margins=[0.0, 0.0, 0.123457, 0.0], clean_margin=4.0)
    assert measured_convergence(STEPS[3:]).spent == 240.0  # nobody is left


@pytest.fixture(scope="module")
def report() -> AttackReport:
    model = timm.create_model("hpm_wrn10_2", pretrained=True).eval()
    images, labels = timm_hpm.load_split("digits", "test").tensors
    return run_attack(model, images[:12], labels[:12], "Linf:0.2", batch_size=6, attacks=["apgd-ce", "square"],
                      surrogates=["fc", "ste"], budgets={"apgd-ce": Budget(3), "square": Budget(20)})


def test_a_run_has_the_passes_of_each_image_and_the_margins_of_its_survivors(report):
    found = report.convergence
    robust = [passes is None for passes in found.fell_after]
    assert sum(robust) / 12 == report.robust_accuracy < report.clean_accuracy
    assert [passes == 0 for passes in found.fell_after] == [verdict == "0" for verdict in report.correct["clean"]]
    assert [margin > 0 for margin in found.margins] == robust
    # Two surrogates at once: every image costs at least both searches.
    assert found.spent >= 2 * 3 * 2 and max(passes or 0 for passes in found.fell_after) <= found.spent
    assert falls(report)[-1].robust == report.robust_accuracy


def test_a_report_keeps_it_and_says_it_in_words(report, tmp_path):
    found = Convergence([10.0, 0.0, None, 60.0, None, 100.0], 100.0, [0.0, 0.0, 0.5, 0.0, 0.015, 0.0], 5.0)
    report = AttackReport(report.protocol | {"num_images": 6}, {"clean": "101111", "fc/apgd-ce": "001011"} | {
        "fc/square": "001010", "ste/square": "001010"}, convergence=found)
    report.save(tmp_path / "a.json")
    assert AttackReport.load(tmp_path / "a.json") == report
    note = ("2 images of 6 fell in the last doubling of the budget, from 50 to 100 passes for each image: more attacks "
            "may break more. Under attack the right logit of the nearest survivors leads by 0.015, 0.5; of clean "
            "images it leads by 5 (median). 1 of 2 survivors leads by less than a tenth of that.")
    assert convergence_note(report) == note and note in report_markdown(report) and note in report_page(report)
    assert [(fall.passes, fall.robust) for fall in falls(report)] == [
        (10.0, 4 / 6), (60.0, 3 / 6), (100.0, 2 / 6)]
    assert "No image of 6 fell" in convergence_note(dataclasses.replace(
        report, convergence=dataclasses.replace(found, spent=500.0)))


def test_an_older_report_is_shown_without_it(report, tmp_path):
    report.save(tmp_path / "a.json")
    data = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    del data["convergence"], data["date"]
    (tmp_path / "b.json").write_text(json.dumps(data))
    old = AttackReport.load(tmp_path / "b.json")
    assert old.convergence is None and old.same_results(report)
    assert "converged?" not in report_markdown(old) + report_page(old)


@pytest.mark.parametrize(("change", "message"), [
    ({"spent": -1}, "the convergence: its spent is -1, expected a number of 0 or more"),
    ({"margins": [1.0]}, "the convergence: its margins is [1.0], expected 12 entries, one for each image"),
    ({"fell_after": ["a"] * 12}, "the convergence: its fell_after is ['a', "),
    ({"other": 1}, "the convergence: its other entries is ['other']"),
])
def test_a_damaged_one_is_named(report, tmp_path, change, message):
    report.save(tmp_path / "a.json")
    data = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    data["convergence"].update(change)
    (tmp_path / "a.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=re.escape(message)):
        AttackReport.load(tmp_path / "a.json")
