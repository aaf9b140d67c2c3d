"""`python -m timm_hpm <command>`: one door to every command, its help, its errors, its options and what it says."""

import argparse
import json
import re
import time
from dataclasses import dataclass
from typing import Any

import pytest
import timm
import torch
import yaml
from protocols import QUICK
from torch import nn

import timm_hpm
import timm_hpm.commands.evaluate
import timm_hpm.commands.train
from timm_hpm.__main__ import COMMANDS, main
from timm_hpm.console import images_bar, rendered
from timm_hpm.evaluation.attacked import AttackedModel
from timm_hpm.evaluation.header import estimate, evaluation_header
from timm_hpm.evaluation.plan import make_plan
from timm_hpm.evaluation.protocols import PROTOCOLS
from timm_hpm.options import add_arguments, as_dict, check, option, read_options
from timm_hpm.report.shell import evaluate_command
from timm_hpm.training import TrainConfig
from timm_hpm.training.header import num_passes


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
        for name in re.findall(r"--[\w-]+", example):
            assert re.search(rf"^  (-\w( \w+)?, )?{name}\b", options, re.MULTILINE), name


@pytest.mark.parametrize(("words", "message"), [
    (["evaluate", "--batchsize", "3"], r"unrecognized arguments: --batchsize 3; did you mean --batch-size"),
    (["evaluate", "--num-image", "5"], "unrecognized arguments: --num-image 5; did you mean --num-images"),  # no prefix
    (["evaluate", "--protocol", "fsat"], r"--protocol: 'fsat'; expected one of standard, fast, .*did you mean fast\?"),
    (["train", "--objective", "trade"], r"--objective: 'trade'; expected one of .*did you mean trades\?"),
    (["compare", "one"], "the following arguments are required: B"),
])
def test_a_mistyped_option_is_one_line_with_the_nearest_names(words, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(words)
    usage, error = capsys.readouterr().err.splitlines()
    assert usage.startswith(f"usage: python -m timm_hpm {words[0]}") and re.search(message, error)


def test_timm_s_options_change_the_judge_and_are_in_the_report_s_command(inside, capsys):
    words = ["evaluate", *QUICK, "--num-images", "4", "--amp", "--channels-last", "--in-chans", "1"]
    assert main([*words, "--save-adversarial", "--output", "one"]) == 0
    assert "judged in autocast to bfloat16" in capsys.readouterr().err
    one = timm_hpm.AttackReport.load("one/report.json")
    assert one.protocol["precision"] == "autocast to bfloat16"
    assert main([*evaluate_command(one.protocol)[3:], "--output", "two"]) == 0
    two = timm_hpm.AttackReport.load("two/report.json")
    assert two.protocol["options"] == one.protocol["options"] == {"in_chans": 1, "channels_last": True}
    assert (two.correct, two.protocol["clean_margin"]) == (one.correct, one.protocol["clean_margin"])
    assert main(["rejudge", "one"]) == 0
    with pytest.raises(ValueError, match=r"in two has kept no candidates .* with --save-adversarial"):
        main(["rejudge", "two"])
    with pytest.raises(ValueError, match=r"precision is autocast to float16, that of .* is autocast to bfloat16; give"):
        main(["rejudge", "one", "--amp-dtype", "float16"])


def test_an_evaluation_is_swept_compared_and_judged_again(tmp_path, inside, capsys):
    assert main(["sweep", "0:0.2:0.1", *QUICK, "--num-images", "4", "--save-adversarial", "--output", "run"]) == 0
    assert "| eps | dataset |" in capsys.readouterr().out
    first, second = sorted(path.name for path in (tmp_path / "run").iterdir() if path.is_dir())
    assert main(["compare", f"run/{first}", f"run/{second}/report.json"]) == 0
    assert "McNemar" in capsys.readouterr().out
    own = ["--inference", "sample", "--model-kwargs", "mix=0.25"]
    assert main(["evaluate", *QUICK, "--num-images", "4", *own, "--save-adversarial", "--output", "one"]) == 0
    assert main(["rejudge", "one"]) == 0, "by the model of the run"
    # Rows of the true model are second names of candidates through its exact surrogate.
    assert main(["evaluate", *QUICK[:4], "--num-images", "4", "--surrogates", "dataset", "--attacks", "square",
                 "square-on", "--budget", "square=2r2", "square-on=2", "--save-adversarial", "--output", "true"]) == 0
    assert main(["rejudge", "true"]) == 0
    assert "every verdict as in the report" in capsys.readouterr().out


TABLE = r"""# A *title*

| attack | % | a\|b |
|---|---:|---|
| **apgd-ce** | 7.1 | `x` |
| square | 165.2 | &lt;i&gt; [flags](flags.md) |

```sh
python -m x \
    | y
```
"""


def test_a_terminal_shows_tables_in_columns_and_no_marks():
    assert rendered(TABLE) == r"""A *title*

attack       %  a|b
-------  -----  --------------------
apgd-ce    7.1  x
square   165.2  <i> flags (flags.md)

    python -m x \
        | y"""
    assert rendered("&amp;#27; &#27;[0m \u202e") == "&#27; [0m ?", "nothing reaches the terminal's controls"


def test_the_header_of_an_evaluation_names_model_data_attack_and_device():
    model = timm.create_model("hpm_wrn10_2", pretrained=True).eval()
    images, state = torch.rand(20, 1, 8, 8), torch.get_rng_state()
    arguments = ({"model": "hpm_wrn10_2", "weights": "pretrained", "dataset": "digits", "split": "test"}, model,
                 images, timm_hpm.ThreatModel("Linf", 0.1), PROTOCOLS["fast"])
    text = evaluation_header(*arguments, batch_size=10)
    assert torch.equal(torch.get_rng_state(), state)
    for part in ("303,419 parameters, HPM head, inference mode dataset", "Linf:0.1",
                 "digits, split test, 20 images of 8x8 pixels and 1 channel", "mean (0.3053)", "of 10 images",
                 "fast, on fc, dataset, mixed: apgd-ce 10; search 250; square 100", "about "):
        assert part in text
    assert "joint" not in text and model.fc.inference == "dataset"
    batch = evaluation_header(*arguments, modes=("dataset", "batch"), batch_size=10)
    assert "on fc, dataset, soft, ste, mixed: apgd-ce 100; " in batch and "joint 100; joint-subset 25r30" in batch


def test_the_estimate_counts_the_passes_of_all_steps():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
    images = torch.rand(8, 1, 8, 8)
    attacked = AttackedModel(model, images)
    protocol = PROTOCOLS["autoattack"].changed(budgets={"square": 400})
    plan = make_plan(protocol, attacked, 10, ())
    assert f"{101 + 2 * 9 * 101 + 401 + 4:,} passes an image" in estimate(plan, attacked, images, 8)["time"]


def test_the_estimate_knows_that_a_pass_of_a_part_of_a_batch_may_take_as_long_as_one_of_the_batch():
    class Slow(nn.Module):
        def forward(self, pixels):
            time.sleep(0.002)
            return pixels.flatten(1)[:, :3]

    images = torch.rand(32, 1, 2, 2)
    attacked = AttackedModel(Slow().eval(), images)
    protocol = PROTOCOLS["standard"].changed(attacks=["square-on"], budgets={"square-on": 1_000})
    plan = make_plan(protocol, attacked, 3, ())
    assert float(re.search(r"most about ([\d.]+) s", estimate(plan, attacked, images, 32)["time"])[1]) >= 2


@pytest.mark.parametrize(("options", "passes"), [
    ({}, 100 * 11), ({"objective": "clean"}, 100), ({"objective": "trades", "awp_gamma": 0.005}, 100 * 14),
    ({"extra_data": "x.npz", "extra_fraction": 0.75, "batch_size": 100}, 400 * 11)])
def test_the_estimate_of_a_training_run_counts_the_passes_of_its_objective(options, passes):
    assert num_passes(TrainConfig(epochs=3, **options), 100, 7) == 3 * (passes + 7 * 20)


def test_a_bar_of_images_changes_no_answer_and_leaves_no_hook():
    model = nn.Linear(2, 2)
    for shown in (False, True):
        with images_bar(model, "checks", shown):
            output = model(torch.zeros(7, 2))
            assert len(model._forward_pre_hooks) == shown
        assert torch.equal(output, model.bias.expand(7, 2)) and not model._forward_pre_hooks


@dataclass(frozen=True)
class Cake:
    name: str = option("plain", "taste", "name of the cake", "-n")
    layers: int = option(2, "shape", "number of layers", least=1, below=9)
    sugar: float = option(0.5, "taste", "mass fraction of sugar", above=0, most=1, free=True)
    tops: tuple[str, ...] | None = option(None, "taste", "toppings", choices=("nuts", "plums", "none of it"))
    cuts: tuple[int, ...] = option((), "shape", "slices of each layer", least=0)
    warm: bool = option(False, "taste", "served at 30 % above the room's temperature")
    extra: dict[str, Any] | None = option(None, "shape", "further properties")

    def __post_init__(self) -> None:
        check(self)


def parsed(*words: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_arguments(parser, Cake)
    return vars(parser.parse_args(words))


@pytest.mark.parametrize(("words", "expected"), [
    ([], {}),
    (["-n", "rum", "--no-warm"], {"name": "rum", "warm": False}),
    (["--sugar", "1/4", "--warm"], {"sugar": 0.25, "warm": True}),
    (["--tops", "nuts,plums"], {"tops": ("nuts", "plums")}),
    (["--tops", "nuts", "plums"], {"tops": ("nuts", "plums")}),
    (["--tops", "none", "--cuts", "3,4", "5"], {"tops": (), "cuts": (3, 4, 5)}),
    (["--extra", "a=1", "b=x"], {"extra": {"a": 1, "b": "x"}}),
    (["--extra", "a=1", "--extra", "b=x"], {"extra": {"a": 1, "b": "x"}}),
])
def test_the_command_line_and_both_kinds_of_files_give_the_same_options(words, expected, tmp_path):
    given = parsed(*words)
    assert given == expected  # nothing but the options that are given
    cake = Cake(**given)
    for name, text in (("cake.yaml", yaml.safe_dump(as_dict(cake))), ("cake.json", json.dumps(as_dict(cake)))):
        (tmp_path / name).write_text(text)
        assert Cake(**read_options(tmp_path / name, Cake)) == cake


@pytest.mark.parametrize(("changes", "message"), [
    ({"layers": 0}, "layers is 0; expected at least 1"), ({"layers": 9}, "layers is 9; expected below 9"),
    ({"sugar": 0}, "sugar is 0.0; expected above 0"), ({"sugar": 1.5}, "sugar is 1.5; expected at most 1"),
    ({"sugar": float("nan")}, "sugar is nan; expected a finite number"),
    ({"sugar": "1e-3"}, "sugar is '1e-3', a str; expected float. YAML reads 1e-3 as a text"),
    ({"cuts": [3, -1]}, "cuts is -1; expected at least 0"), ({"cuts": [True]}, "cuts is True, a bool; expected int"),
    ({"tops": "nuts"}, "tops is 'nuts', a str; expected tuple or null"),
    ({"tops": ["figs"]}, "tops is 'figs'; expected one of nuts, plums"), ({"warm": None}, "warm is None, a NoneType"),
    ({"extra": {1: 2}}, "extra is {1: 2}, a dict; expected dict or null"), ({"name": 3}, "name is 3, a int"),
])
def test_a_value_of_another_type_or_range_is_named(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Cake(**changes)


@pytest.mark.parametrize("words", [["--cuts", "3,x"], ["--sugar", "sweet"], ["--layers", "1.5"]])
def test_a_word_that_is_no_value_is_a_mistake_of_the_command_line(words):
    with pytest.raises(argparse.ArgumentError, match=words[0]):
        parsed(*words)


@pytest.mark.parametrize(("name", "text", "message"), [
    ("cake.yaml", "layers: 3\nlayers: 4\n", "'layers' is there twice; give it once"),
    ("cake.json", '{"layers": 3, "layers": 4}', "'layers' is there twice; give it once"),
    ("cake.yaml", "layer: 3\n", "unknown option 'layer'; did you mean layers?"),
    ("cake.json", '{"layer": 3}', "unknown option 'layer'; did you mean layers?"),
    ("cake.json", "name: rum", "cannot read the configuration"), ("cake.json", "[" * 100_000, "cannot read"),
    ("cake.yaml", "[1]", "holds a list; expected lines such as"), ("none.yaml", None, "cannot read"),
])
def test_a_file_of_something_else_is_named(name, text, message, tmp_path):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_options(tmp_path / name, Cake)
