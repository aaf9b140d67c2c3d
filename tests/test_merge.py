"""Reports of several seeds: their worst case, and the refusal of reports that differ in more."""

import json
from dataclasses import replace

import pytest
import timm
from protocols import run_attack

import evaluate
import timm_hpm
from timm_hpm import AttackReport
from timm_hpm.report.metrics import right_in_all

NUM_DIGITS = 12

OPTIONS = {"attacks": ["apgd-ce", "joint"], "budgets": {"apgd-ce": 1, "joint": 2}, "surrogates": ["fc", "ste"],
           "batch_size": 6}


@pytest.fixture(scope="module")
def reports(digits) -> list[AttackReport]:
    model = timm.create_model("hpm_wrn10_2", pretrained=True, inference="batch").eval()
    return [run_attack(model, *digits, "Linf:0.1", seed=seed, **OPTIONS) for seed in (3, 0)]


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
    ({"seed": 3}, "seeds 3, 3; expected different ones"),
])
def test_reports_that_differ_in_more_than_their_seeds_are_refused(reports, changed, message):
    other = replace(reports[1], protocol=reports[1].protocol | changed)
    with pytest.raises(ValueError, match=message):
        timm_hpm.merge_reports([reports[0], other])
    with pytest.raises(ValueError, match="1 report is given; expected two or more"):
        timm_hpm.merge_reports(reports[:1])


def test_the_command_merges_reports(reports, tmp_path, capsys):
    for report in reports:
        timm_hpm.write_report(report, tmp_path / str(report.protocol["seed"]))
    words = ["--merge", str(tmp_path / "3"), str(tmp_path / "0" / "report.json"), "--output", str(tmp_path / "both")]
    assert evaluate.main(words) == 0
    assert json.loads((tmp_path / "both" / "report.json").read_text())["protocol"]["seeds"] == [3, 0]
    assert "seeds" in capsys.readouterr().out
    with pytest.raises(ValueError, match="holds a report; choose another --output"):
        evaluate.main(words)
