"""What a command says in a terminal: facts, times, and Markdown without its marks."""

import io
import re
import sys

import pytest
import timm
import torch
from torch import nn

import timm_hpm
from timm_hpm.__main__ import main
from timm_hpm.console import duration, facts, images_bar, rendered, show
from timm_hpm.evaluation.attacked import AttackedModel
from timm_hpm.evaluation.header import estimate, evaluation_header
from timm_hpm.evaluation.plan import make_plan
from timm_hpm.evaluation.protocols import PROTOCOLS
from timm_hpm.training import TrainConfig
from timm_hpm.training.header import num_passes

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


@pytest.mark.parametrize("terminal", [True, False])
def test_markdown_is_rendered_for_a_terminal_and_kept_in_a_file(terminal, monkeypatch):
    out = io.StringIO()
    out.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stdout", out)
    show(TABLE)
    assert out.getvalue() == (rendered(TABLE) if terminal else TABLE) + "\n"


def test_times_and_facts_are_readable():
    seconds = (0.2, 40, 89, 90, 3600, 5400, 86_400, 1e6)
    assert [duration(s) for s in seconds] == ["1 s", "40 s", "89 s", "2 min", "60 min", "1.5 h", "24.0 h", "11.6 days"]
    assert facts({"model": "a", "data set": "b"}) == "model     a\ndata set  b"


def test_the_header_of_an_evaluation_names_model_data_attack_and_device():
    model = timm.create_model("hpm_wrn10_2", pretrained=True).eval()
    images, state = torch.rand(20, 1, 8, 8), torch.get_rng_state()
    arguments = ({"model": "hpm_wrn10_2", "weights": "pretrained", "dataset": "digits", "split": "test"}, model,
                 images, timm_hpm.ThreatModel("Linf", 0.1), PROTOCOLS["fast"])
    text = evaluation_header(*arguments, batch_size=10)
    assert torch.equal(torch.get_rng_state(), state)
    found = dict(line.split("  ", 1) for line in text.splitlines())
    assert list(found) == ["model", "weights", "data", "normalisation", "threat model", "protocol", "batches", "device",
                           "time"]
    for name, part in (("model", "303,419 parameters, HPM head, inference mode dataset"), ("threat model", "Linf:0.1"),
                       ("data", "digits, split test, 20 images of 8x8 pixels and 1 channel"),
                       ("normalisation", "mean (0.3053)"), ("batches", "of 10 images"), ("device", "cpu, 1 thread"),
                       ("protocol", "fast, on fc, dataset, mixed: apgd-ce 100; apgd-t 100x3; square 1000"),
                       ("time", "about ")):
        assert part in found[name]
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


@pytest.mark.parametrize(("options", "passes"), [
    ({}, 100 * 11), ({"objective": "clean"}, 100), ({"objective": "trades", "awp_gamma": 0.005}, 100 * 14),
    ({"extra_data": "x.npz", "extra_fraction": 0.75, "batch_size": 100}, 400 * 11)])
def test_the_estimate_of_a_training_run_counts_the_passes_of_its_objective(options, passes):
    assert num_passes(TrainConfig(epochs=3, **options), 100, 7) == 3 * (passes + 7 * 20)


def test_a_training_run_says_its_facts_and_a_line_for_each_epoch(tmp_path, capsys):
    assert main(["train", "--device", "cpu", "--pretrained", "--epochs", "1", "--attack-steps", "1",
                 "--val-attack-steps", "1", "--batch-size", "500", "--output", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    names = [line.split("  ")[0] for line in err.splitlines() if "  " in line]
    assert names[:9] == ["model", "weights", "data", "normalisation", "threat model", "objective", "optimisation",
                         "device", "time"]
    assert "digits, 1,077 images for training and 360 for validation, of 8x8 pixels and 1 channel" in err
    line = r"epoch 0  lr \S+  loss \d\.\d{3}  clean \d+\.\d %  robust \d+\.\d %  fc clean \d+\.\d %"
    assert re.search(rf"^{line}  [\d,]+ images/s$", out, re.MULTILINE)
    assert re.search(f"^kept: {line}$", out, re.MULTILINE)


def test_a_bar_of_images_changes_no_answer_and_leaves_no_hook():
    model = nn.Linear(2, 2)
    for shown in (False, True):
        with images_bar(model, "checks", shown):
            output = model(torch.zeros(7, 2))
            assert len(model._forward_pre_hooks) == shown
        assert torch.equal(output, model.bias.expand(7, 2)) and not model._forward_pre_hooks
