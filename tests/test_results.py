"""docs/results.md: the committed reports make it, and its verdicts follow from known accuracies."""

import math
from pathlib import Path

import pytest

from timm_hpm import AttackReport

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def table():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        import heads_table
    return heads_table


def report(correct: dict[str, str], assembled: str = "") -> AttackReport:
    return AttackReport(protocol={"batch_size": 2}, correct=correct, assembled=assembled)


def test_the_committed_page_is_what_the_committed_reports_make(table):
    committed = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert table.page() == committed, "python benchmarks/heads.py table > docs/results.md"


def test_a_verdict_is_given_only_at_two_standard_errors(table):
    gap = table.Difference(1.0, 0.49)
    assert [gap.verdict(claim) for claim in ("above", "below", "not below")] == ["confirmed", "refuted", "confirmed"]
    gap = table.Difference(-0.3, 0.2)
    assert [gap.verdict(claim) for claim in ("above", "below", "not below")] == ["undecided"] * 3
    assert table.Difference(-0.3, 0.04).verdict("not below") == "confirmed"
    assert table.Difference(-1.0, 0.4).verdict("not below") == "undecided"  # perhaps less so by 0.2 only
    assert table.Difference(-1.0, 0.2).verdict("not below") == "refuted"
    for verdicts, total in (("cc", "confirmed"), ("cu", "confirmed in part"), ("ur", "refuted"), ("rc", "mixed"),
                            ("uu", "undecided"), ("", "undecided")):
        words = [{"c": "confirmed", "r": "refuted", "u": "undecided"}[letter] for letter in verdicts]
        assert table.total_verdict(words) == total


def test_the_error_of_a_difference_is_the_larger_of_those_over_images_and_over_seeds(table):
    right, wrong = [True] * 4, [True, True, True, False]
    same = table.difference([(right, wrong)] * 3)  # no seed differs, the images do
    assert (same.mean, same.error) == (-25.0, pytest.approx(100 * 0.5 / math.sqrt(4)))
    apart = table.difference([(right, right), (right, [False] * 4)])  # no image differs, the seeds do
    assert (apart.mean, apart.error) == (-50.0, pytest.approx(100 * math.sqrt(0.5) / math.sqrt(2)))
    assert str(same) == "−25.0 ± 25.0" and str(table.difference([(right, wrong)])) == "−25.0 ± 25.0¹"


def test_a_new_seed_is_held_against_the_spread_of_the_first(table):
    # 50 % and 100 %, then 0 %: 75 less, with a standard deviation of 35.36 times the root of 1 + 1/2.
    assert table.rerun([False, False], [[True, False], [True, True]]) == "0.0 (−75.0 ± 43.3)"


def test_realised_takes_each_batch_in_its_worst_version_and_a_claim_only_attacks_on_the_fc_classifier(table):
    rows = {"clean": "11111", "fc/apgd-ce": "01111", "fc/apgd-t": "01111", "fc/square": "11111", "soft/joint": "10001",
            "fc/apgd-chain": "11110"}
    batch = report(rows, assembled="11111")
    assert table.worst(batch) == [False, False, False, False, False]
    assert table.realised(batch) == [False, True, False, False, False]
    assert table.claimed(batch) == [False, True, True, True, True]
    assert table.realised(report(rows)) == table.worst(report(rows))


def test_the_text_names_each_table_once(table):
    text = "# T\n\n{a}\n\nb: {not a place}\n\n{b}\n"
    assert table.filled(text, {"a": ["1", "2"], "b": ["3"]}) == "# T\n\n1\n2\n\nb: {not a place}\n\n3\n"
    for tables in ({"a": []}, {"a": [], "b": [], "c": []}):
        with pytest.raises(ValueError, match=r"the places a, b; expected one line \{NAME\} for each of a"):
            table.filled(text, tables)


def test_a_base_that_lacks_modes_and_attacks_has_a_row_for_the_others(table):
    digits, alone = ({"digits": heads["digits"]} for heads in table.read_heads())
    fc = {"digits": {key: digits["digits"][key] for key in (table.FC, table.L2)}}
    rows = table.accuracies(fc, {}, {})
    assert [row.split(" | ")[0] for row in rows[2:]] == ["| digits, FC", "| digits, ℓ2"]
    assert rows[2] in table.accuracies(digits, alone, {}) and rows[3].endswith(" |  |  |  |")
    assert len({row.count("|") for row in rows}) == 1
