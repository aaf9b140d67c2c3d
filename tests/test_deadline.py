"""Time limits: a run stops at the end of a batch, says what is done, and resumes to the same result."""

from contextlib import suppress

import pytest
from protocols import run_attack

import timm_hpm
from timm_hpm import AttackReport, ThreatModel
from timm_hpm.__main__ import main
from timm_hpm.deadline import OutOfTime, is_over, parse_time, time_limit
from timm_hpm.evaluation import Budget

NUM_DIGITS = 10
ATTACK = {"attacks": ["apgd-ce", "joint"], "budgets": {"apgd-ce": Budget(3), "joint": Budget(2)}, "batch_size": 4}
QUICK = ["--num-images", "10", "-b", "4", "--device", "cpu", "--surrogates", "fc", "--attacks", "apgd-ce", "--budget",
         "apgd-ce=3"]


@pytest.mark.parametrize(("text", "seconds"), [
    ("90s", 90), ("30m", 1800), ("2h30m", 9000), ("1.5h", 5400), ("1d", 86400),
    *((text, None) for text in ("", "30", "0m", "m", "-3m", "1e9h", "30 m", "30min", "nanm", "9" * 400 + "d"))])
def test_a_time_is_read_and_another_text_refused(text, seconds):
    if seconds:
        assert parse_time(text) == seconds
    else:
        with pytest.raises(ValueError, match=r"cannot read the time .*expected such as 30m"):
            parse_time(text)


def test_a_block_within_a_block_has_its_own_limit():
    with time_limit(1e-9):
        assert is_over()
        with time_limit(None):
            assert not is_over()
        assert is_over()
    assert not is_over()


def cut_run(*arguments, folder, **options):
    """Returns the first report of a run whose calls have no time: each finishes one attack, of the first batch too."""
    with time_limit(1e-9):
        for call in range(1, 100):
            with suppress(OutOfTime):
                return run_attack(*arguments, folder=folder, **options)
            assert len(list((folder / "progress").glob("batch00000-*"))) == call


def test_a_report_cut_by_time_is_that_of_the_batches_before_and_the_run_resumes(model, digits, tmp_path):
    threat = ThreatModel("Linf", 0.1)
    timm_hpm.find_head(model).inference = "batch"  # each batch has all attacks
    whole = run_attack(model, *digits, threat, **ATTACK)
    cut = cut_run(model, *digits, threat, folder=tmp_path, **ATTACK)
    with time_limit(1e-9):
        assert run_attack(model, *digits, threat, **ATTACK).same_results(cut), "without a folder"
    few = run_attack(model, *(part[:4] for part in digits), threat, **ATTACK)
    assert cut.protocol.pop("stopped") == "by a time limit, after 4 of 10 images"
    for name in ("protocol", "correct", "baseline_correct", "assembled", "examples"):
        assert getattr(cut, name) == getattr(few, name)
    assert not (tmp_path / "report.json").exists()
    assert AttackReport.load(tmp_path / "partial" / "report.json").num_images == 4
    assert run_attack(model, *digits, threat, folder=tmp_path, **ATTACK).same_results(whole)
    assert {path.name for path in tmp_path.iterdir() if path.name[0] != "."} == {"report.json"}


def test_each_call_without_time_goes_on_and_the_studies_of_neighbours_are_cut(model, digits, tmp_path):
    options = {"attacks": ["apgd-ce"], "budgets": {"apgd-ce": Budget(1)}, "surrogates": ["fc"], "batch_size": 5,
               "neighbours": (2, 3), "folder": tmp_path}
    timm_hpm.find_head(model).inference = "batch"
    with time_limit(1e-9):
        for done in ("5 of 10 images", "0 of 2 studies of neighbours", "1 of 2 studies of neighbours"):
            cut = run_attack(model, *digits, "Linf:0.1", **options)
            assert cut.protocol["stopped"] == f"by a time limit, after {done}"
            assert (tmp_path / "partial" / "report.html").exists() and not (tmp_path / "report.html").exists()
        whole = run_attack(model, *digits, "Linf:0.1", **options)
    assert {row["batch_size"] for row in whole.neighbours} == {2, 3} and "stopped" not in whole.protocol
    assert (tmp_path / "report.html").exists() and not (tmp_path / "partial").exists()


def test_the_command_says_what_is_done_and_how_to_go_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", *QUICK, "--output", "run", "--time-limit", "0.001s"]) == 0
    printed = capsys.readouterr().out
    assert "| fc | 100.0 | 100.0 |" in printed
    *_, last = printed.splitlines()
    assert last == ("stopped by a time limit, after 4 of 10 images; written: run/partial/report.html; to go on: python "
                    "-m timm_hpm evaluate --resume run --time-limit 0.001s")
    assert "by a time limit" in (tmp_path / "run" / "partial" / "report.md").read_text()
    assert main(last.split("timm_hpm ")[1].split()[:3]) == 0, "without a limit"
    assert AttackReport.load(tmp_path / "run" / "report.json").num_images == 10
    assert not (tmp_path / "run" / "partial").exists()
    capsys.readouterr()
    assert main(["evaluate", *QUICK, "--attacks", "apgd-ce,apgd-t", "--output", "b", "--time-limit", "0.001s"]) == 0
    assert capsys.readouterr().out.startswith("stopped by a time limit, before the first 4 of 10 images were attacked")


def test_a_training_run_stops_with_a_checkpoint(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["train", "--device", "cpu", "--pretrained", "--attack-steps", "1", "--val-attack-steps", "1", "--output",
             "run", "--batch-size", "500"]
    assert main([*words, "--epochs", "1000", "--time-limit", "0.5s"]) == 0
    said = capsys.readouterr().err
    assert "stopped by the time limit; to go on: python -m timm_hpm train --resume run --time-limit 0.5s\n" in said
    assert list((tmp_path / "run" / "checkpoints").iterdir())
    assert main(["train", "--resume", "run", "--time-limit", "0.25s"]) == 0
    assert "--resume run --time-limit 0.25s" in capsys.readouterr().err
