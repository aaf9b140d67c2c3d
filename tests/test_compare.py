"""Reports compared image by image or merged, and RobustBench's file: against answers counted by hand and by SciPy."""

import copy
import dataclasses
import json
import math
from dataclasses import replace

import protocols
import pytest
from protocols import run_attack
from scipy.stats import binomtest

import evaluate
import timm_hpm
from timm_hpm import AttackReport, compare, comparison_markdown
from timm_hpm.evaluation.robustbench import model_info, save_model_info
from timm_hpm.report import Flag, PairedRow, mcnemar_p_value
from timm_hpm.report.metrics import right_in_all

PROTOCOL = protocols.PROTOCOL | {"dataset": "digits"}


@pytest.fixture
def a() -> AttackReport:
    return AttackReport(
        protocol=copy.deepcopy(PROTOCOL),
        correct={"clean": "1111111110", "fc/apgd-ce": "1111100011", "ste/apgd-ce": "1111110001"},
        baseline_correct={"clean": "1111111111", "fc/apgd-ce": "0000011111"})


@pytest.fixture
def b() -> AttackReport:
    return AttackReport(
        protocol=PROTOCOL | {"seed": 1, "mix": 0.25},
        correct={"clean": "1111111101", "fc/apgd-ce": "0111111111", "ste/apgd-ce": "1111111111"},
        baseline_correct={"clean": "1111111111", "fc/apgd-ce": "1111111111"})


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (1, 0), (3, 3), (2, 9), (9, 2), (40, 61), (1500, 1700)])
def test_the_p_value_is_the_binomial_test_s(only_a, only_b):
    expected = binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    assert mcnemar_p_value(only_a, only_b) == pytest.approx(expected)


def test_images_are_paired_if_they_are_the_same(a, b):
    clean, robust, baseline = compare(a, b).rows
    assert (clean.a, clean.b, clean.only_a, clean.only_b, clean.p_value) == (0.9, 0.9, 1, 1, 1.0)
    # a is right throughout on images 0 to 4, b on 1 to 7 and 9.
    assert (robust.a, robust.b, robust.only_a, robust.only_b) == (0.5, 0.8, 1, 4)
    assert robust.difference == pytest.approx(0.3) and robust.p_value == pytest.approx(2 * (1 + 5) / 32)
    assert (baseline.only_a, baseline.only_b) == (0, 5) and baseline.p_value == 2 / 32
    assert len(compare(a, dataclasses.replace(b, baseline_correct={})).rows) == 2
    b.protocol["data_digest"] = "f" * 16
    with pytest.raises(ValueError, match=r"different images or labels.*10 images of digits \(data_digest ffff"):
        compare(a, b)


@pytest.mark.parametrize(("right", "only_a", "only_b"), [(0, 0, 0), (50, 0, 0), (100, 0, 0), (60, 3, 7), (90, 9, 0)])
def test_the_interval_of_the_difference_holds_it_and_is_wide_even_where_no_image_differs(right, only_a, only_b):
    def row(n: int) -> PairedRow:
        return PairedRow("robust", 100 * n, right / 100, (right - only_a + only_b) / 100, n * only_a, n * only_b)

    low, high = row(1).difference_interval
    assert -1 <= low < row(1).difference < high <= 1 and high - low > 0.02
    turned = PairedRow("robust", 100, row(1).b, row(1).a, only_b, only_a).difference_interval
    assert turned == pytest.approx((-high, -low))
    # Of many images it is the usual one, of the standard error of a mean of −1, 0 and 1.
    se = math.sqrt(((only_a + only_b) / 100 - row(1).difference ** 2) / 1_000_000)
    assert row(10_000).difference_interval == pytest.approx(
        (row(1).difference - 1.96 * se, row(1).difference + 1.96 * se), abs=2e-5)


def test_the_table_names_what_differs(a, b):
    text = comparison_markdown(compare(a, b))
    assert "| robust, worst case | 50.0 (23.7 to 76.3) | 80.0 (49.0 to 94.3) | +30.0 (" in text
    assert " | 1 | 4 | 0.38 |" in text
    assert "| seed | 0 | 1 |" in text and "| mix | 0.5 | 0.25 |" in text and "| threat |" not in text
    assert "unreliable" not in text
    flagged = dataclasses.replace(b, flags=[Flag("zero-gradient", "everywhere")])
    assert "**Report b is unreliable**" in comparison_markdown(compare(a, flagged))


def test_a_missing_report_and_a_field_without_a_meaning_are_named(a, tmp_path):
    a.save(tmp_path / "a.json")
    with pytest.raises(ValueError, match=r"there is no report .*c\.json"):
        evaluate.main(["--compare", str(tmp_path / "a.json"), str(tmp_path / "c.json")])


def test_model_info_of_a_report(a, tmp_path):
    known = {"name": "A title", "additional_data": False, "reported": "51.0"}
    save_model_info(a, tmp_path / "info.json", known)
    assert json.loads((tmp_path / "info.json").read_text(encoding="utf-8")) == {
        "link": "", "name": "A title", "authors": "", "additional_data": False, "number_forward_passes": 1,
        "dataset": "digits", "venue": "", "architecture": "hpm_wrn10_2", "eps": "8/255", "clean_acc": "90.00",
        "reported": "51.0",
        # Under the attacks on the model itself six images are right, under those on every surrogate five.
        "autoattack_acc": "60.00", "external": "50.00",
        "footnote": "Measured by timm_hpm on 10 images, inference mode batch, batches of 10."}
    a.protocol["eot"] = 8
    assert model_info(a)["number_forward_passes"] == 8


def test_only_autoattack_s_components_on_the_model_itself_count_as_autoattack(a):
    # Images 0 and 1 fall to what is ours, 2 to a surrogate, and 3 to a component.
    a.correct.update({"ste/apgd-chain": "0111111111", "ste/joint": "1011111111", "soft/square": "1101111111"})
    a.protocol["dataset"] = "torch/cifar10"
    assert model_info(a)["autoattack_acc"] == "60.00" and model_info(a)["dataset"] == "cifar10"
    a.correct["true/square"] = "1110111111"
    assert model_info(a)["autoattack_acc"] == "50.00"
    # Other budgets or targets than AutoAttack's are another attack; of fewer classes it has fewer targets.
    for change in ({"square": {"iterations": 100}}, {"apgd-t": {"iterations": 100, "targets": 2}}):
        other = dataclasses.replace(a, protocol=a.protocol | {"attacks": a.protocol["attacks"] | change})
        assert model_info(other)["autoattack_acc"] == ""
    a.protocol["num_classes"] = 3
    a.protocol["attacks"] |= {"apgd-t": {"iterations": 100, "targets": 2}, "fab-t": {"iterations": 100, "targets": 2}}
    assert model_info(a)["autoattack_acc"] == "50.00"


def test_a_plain_classifier_has_no_external_number_and_a_suspicious_one_says_so():
    protocol = PROTOCOL | {"inference": "none", "surrogates": ["model"], "prototypes_fitted": None, "threat": "L2:0.5"}
    report = AttackReport(protocol, {"clean": "1110", "model/apgd-ce": "1011"}, flags=[Flag("random-forward", "")])
    info = model_info(report)
    assert "external" not in info and info["autoattack_acc"] == "50.00" and info["eps"] == "0.5"
    rows = {"clean": "1110", "model/apgd-ce": "1011", "model/apgd-ce#seed1": "0110"}
    merged = model_info(AttackReport(protocol | {"seeds": [0, 1]}, rows))
    assert merged["autoattack_acc"] == "50.00" and merged["external"] == "25.00"
    assert info["unreliable"] is True


NUM_DIGITS, INFERENCE = 12, "batch"

OPTIONS = {"attacks": ["apgd-ce", "joint"], "budgets": {"apgd-ce": 1, "joint": 2}, "surrogates": ["fc", "ste"],
           "batch_size": 6}


@pytest.fixture(scope="module")
def reports(shared_model, digits) -> list[AttackReport]:
    return [run_attack(shared_model, *digits, "Linf:0.1", seed=seed, **OPTIONS) for seed in (3, 0)]


def test_a_merged_report_is_the_worst_case_and_what_one_adversary_can_do(reports, tmp_path):
    merged = timm_hpm.merge_reports(reports)
    assert merged.robust == [a and b for a, b in zip(*(report.robust for report in reports), strict=True)]
    rows = [[*report.baseline_correct.values()] for report in reports]
    assert merged.baseline["worst"] == sum(right_in_all([*rows[0], *rows[1]])) / 12
    assert merged.protocol["seeds"] == [3, 0] and merged.clean_accuracy == reports[0].clean_accuracy
    # Every judged batch is there by itself, so that no batch has more errors than one of the two found.
    kept = sorted(row for report in reports for name, row in report.verdicts.items() if name != "clean")
    assert sorted(row for name, row in merged.verdicts.items() if name != "clean") == kept
    assert merged.realised_robust_accuracy == sum(
        min(row[first:first + 6].count("1") for report in reports for row in report.verdicts.values())
        for first in (0, 6)) / 12
    assert merged.cost["joint"]["forward_passes"] == sum(row.cost["joint"]["forward_passes"] for row in reports)
    assert set(merged.by_surrogate["ste"]) == {"apgd-ce", "joint", "worst"}
    merged.save(tmp_path / "report.json")
    assert AttackReport.load(tmp_path / "report.json") == merged
    assert "python evaluate.py" not in timm_hpm.report_markdown(merged)


@pytest.mark.parametrize(("changed", "message"), [
    ({"weights_digest": "0" * 16}, "differ in more than their seeds: weights_digest "),
    ({"data_digest": "0" * 16}, "data_digest "), ({"threat": "Linf:0.2"}, "threat Linf:0.1 and Linf:0.2"),
    ({"attacks": {"apgd-ce": {"iterations": 2}}}, "attacks "), ({"inference": "sample"}, "inference batch and sample"),
    ({"seed": 3}, "seeds 3, 3; expected different ones"), ({"clean_margin": 99.0}, "clean_margin .* and 99.0"),
])
def test_reports_that_differ_in_more_than_their_seeds_are_refused(reports, changed, message):
    other = replace(reports[1], protocol=reports[1].protocol | changed)
    with pytest.raises(ValueError, match=message):
        timm_hpm.merge_reports([reports[0], other])
    with pytest.raises(ValueError, match="1 report is given; expected two or more"):
        timm_hpm.merge_reports(reports[:1])


def test_reports_of_other_machines_merge(reports):
    machine = {"threads": 5, "device": "cuda", "clean_margin": 1.001 * reports[1].protocol["clean_margin"]}
    other = replace(reports[1], protocol=reports[1].protocol | machine)
    assert timm_hpm.merge_reports([reports[0], other]).robust == timm_hpm.merge_reports(reports).robust


def test_the_command_merges_reports(reports, tmp_path, capsys):
    for report in reports:
        timm_hpm.write_report(report, tmp_path / str(report.protocol["seed"]))
    words = ["--merge", str(tmp_path / "3"), str(tmp_path / "0" / "report.json"), "--output", str(tmp_path / "both")]
    assert evaluate.main(words) == 0
    assert json.loads((tmp_path / "both" / "report.json").read_text())["protocol"]["seeds"] == [3, 0]
    assert f"written: {tmp_path / 'both' / 'report.html'}" in capsys.readouterr().out
    with pytest.raises(ValueError, match="holds a report; choose another --output"):
        evaluate.main(words)
