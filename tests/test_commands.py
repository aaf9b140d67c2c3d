"""`python -m timm_hpm <command>`: one door to every command, its help and its errors."""

import re
from dataclasses import fields

import pytest

import evaluate
import timm_hpm.commands.evaluate
import timm_hpm.commands.train
import train
from timm_hpm.__main__ import COMMANDS, main
from timm_hpm.evaluation import Budget
from timm_hpm.evaluation.config import EvaluateConfig
from timm_hpm.report.command import evaluate_command
from timm_hpm.training import TrainConfig

QUICK = ["--num-images", "4", "-b", "4", "--device", "cpu", "--surrogates", "fc", "--attacks", "apgd-ce", "--budget",
         "apgd-ce=2"]


def said(words: list[str], capsys) -> str:
    """Returns the help that a command prints."""
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 0
    return capsys.readouterr().out


def test_the_help_lists_every_command_and_no_command_is_an_error(capsys):
    assert main(["--help"]) == 0
    listed = capsys.readouterr().out
    assert re.findall(r"^    (\w+) +\w", listed.partition("usage:")[2], re.MULTILINE) == list(COMMANDS)
    assert main([]) == 2 and listed == capsys.readouterr().err
    with pytest.raises(ValueError, match=r"unknown command 'evalute'; expected one of .*did you mean evaluate\?"):
        main(["evalute"])


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_starts_with_three_examples_of_options_that_it_has(command, capsys):
    text = said([command, "--help"], capsys)
    head, usage, options = text.partition("\nusage: ")
    examples = re.findall(rf"^    python -m timm_hpm {command}(.*)$", head, re.MULTILINE)
    assert head.startswith("examples:\n") and len(examples) == 3 and usage
    assert max(map(len, text.splitlines())) <= 120
    for example in examples:
        for option in re.findall(r"--[\w-]+", example):
            assert re.search(rf"^  (-\w( \w+)?, )?{option}\b", options, re.MULTILINE), option


@pytest.mark.parametrize(("command", "config", "script"), [
    ("evaluate", EvaluateConfig, evaluate), ("train", TrainConfig, train)])
def test_the_scripts_parse_the_same_options_in_groups_with_defaults(command, config, script, capsys):
    module = getattr(timm_hpm.commands, command)
    assert script.main is module.main and script.parse_args is module.parse_args
    text = " ".join(said([command, "--help"], capsys).split())
    for one in fields(config):
        assert re.search(f"--{one.name.replace('_', '-')}[ ,]", text) and f" {one.metadata['group']}: " in text
        if isinstance(one.default, int | float) and not isinstance(one.default, bool):
            assert f"({one.default})" in text


@pytest.mark.parametrize(("words", "message"), [
    (["evaluate", "--batchsize", "3"], r"unrecognized arguments: --batchsize 3; did you mean --batch-size"),
    (["evaluate", "--protocol", "fsat"], r"--protocol: 'fsat'; expected one of standard, fast, .*did you mean fast\?"),
    (["train", "--objective", "trade"], r"--objective: 'trade'; expected one of .*did you mean trades\?"),
    (["train", "--cutmix-minmax", "0.2", "1"], "--cutmix-minmax is an option of timm's scripts and not of this one: a "
                                               "mixture of images belongs to no class"),
    (["evaluate", "--gp=avg"], "--gp is an option of timm's scripts and .*: give it in --model-kwargs, such as global"),
    (["evaluate", "--drop-path", "0.1"], "--drop-path is an option of train, and not of this command$"),
    (["train", "--inference", "batch"], "--inference is an option of evaluate, and not of this command$"),
    (["train", "--checkpoint", "a.pt"], "--checkpoint is an option of timm's .*: give --initial-checkpoint FILE"),
    (["compare", "one"], "the following arguments are required: B"),
])
def test_a_mistyped_option_is_one_line_with_the_nearest_names(words, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(words)
    usage, error = capsys.readouterr().err.splitlines()
    assert usage.startswith(f"usage: python -m timm_hpm {words[0]}") and re.search(message, error)


@pytest.mark.parametrize(("options", "message"), [
    ({"surrogates": ("sofd",)}, "unknown surrogate 'sofd'; .*did you mean soft"),
    ({"attacks": ("apgd_ce",)}, "unknown attack 'apgd_ce'; .*did you mean apgd-ce"),
    ({"inference": ("bacth",)}, "unknown inference mode 'bacth'; .*did you mean batch"),
])
def test_a_mistyped_value_is_answered_with_the_nearest_names(options, message):
    with pytest.raises(ValueError, match=message):
        config = EvaluateConfig(**options)
        timm_hpm.PROTOCOLS["standard"].changed(config.surrogates, config.attacks, {"apgd-ce": Budget(1)})


def test_timm_s_options_change_the_judge_and_are_in_the_report_s_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["evaluate", *QUICK, "--amp", "--channels-last", "--in-chans", "1", "--save-adversarial", "--output", "one"]
    assert main(words) == 0
    assert "judged in autocast to bfloat16" in capsys.readouterr().err
    one = timm_hpm.AttackReport.load("one/report.json")
    assert one.protocol["precision"] == "autocast to bfloat16"
    assert main([*evaluate_command(one.protocol)[3:], "--output", "two"]) == 0
    two = timm_hpm.AttackReport.load("two/report.json")
    assert two.protocol["options"] == one.protocol["options"] == {"in_chans": 1, "channels_last": True}
    assert (two.correct, two.protocol["clean_margin"]) == (one.correct, one.protocol["clean_margin"])
    assert main(["rejudge", "one"]) == 0
    with pytest.raises(ValueError, match=r"judged in autocast to float16, that of .* in autocast to bfloat16; give"):
        main(["rejudge", "one", "--amp-dtype", "float16"])


def test_an_evaluation_is_swept_compared_and_judged_again(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", "0:0.2:0.1", *QUICK, "--save-adversarial", "--output", "run"]) == 0
    assert "| eps | dataset |" in capsys.readouterr().out
    first, second = sorted(path.name for path in (tmp_path / "run").iterdir() if path.is_dir())
    assert main(["compare", f"run/{first}", f"run/{second}/report.json"]) == 0
    assert "McNemar" in capsys.readouterr().out
    own = ["--inference", "sample", "--model-kwargs", "mix=0.25"]
    assert main(["evaluate", *QUICK, *own, "--save-adversarial", "--output", "one"]) == 0
    assert main(["rejudge", "one"]) == 0, "by the model of the run"
    assert "every verdict as in the report" in capsys.readouterr().out
