"""The number of CPU threads: measured once, unless the user or the environment gives it."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from timm_hpm import AttackReport, PixelModel
from timm_hpm.evaluation.threads import fastest_threads, use_threads

ROOT = Path(__file__).parent.parent
NUM_DIGITS = 8


@pytest.fixture(autouse=True)
def threads():
    """Puts the number of threads back, and lets the tests measure as if no launcher had set it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def free(monkeypatch):
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(("seconds", "fastest"), [
    ({1: 4, 2: 2, 4: 1, 6: 0.5}, 6),  # each thread helps
    ({1: 1, 2: 3, 4: 9, 6: 9}, 1),  # each waits
    ({1: 2, 2: 1, 4: 0.95, 6: 0.1}, 2),  # a small gain is left to other processes
])
def test_the_fastest_number_is_found_and_no_number_above_the_most_is_tried(seconds, fastest, monkeypatch):
    tried, clock = [], 0.0

    def work():
        nonlocal clock
        tried.append(torch.get_num_threads())
        clock += 0.01 * seconds[tried[-1]]

    with monkeypatch.context() as patch:
        patch.setattr(time, "perf_counter", lambda: clock)
        assert [fastest_threads(work, most) for most in (6, 1)] == [fastest, 1]
    assert set(tried) <= {1, 2, 4, 6}


def test_a_given_number_and_that_of_the_environment_win(model, digits, monkeypatch, free, capsys):
    pixel_model = PixelModel(model)
    assert use_threads(3, pixel_model, digits[0]) == torch.get_num_threads() == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert use_threads(None, pixel_model, digits[0]) == 3 and capsys.readouterr().err == ""


class Odd(nn.Module):
    """Draws random numbers, counts its calls and writes into its input; or fails."""

    def __init__(self, fails: bool):
        super().__init__()
        self.layer = nn.Linear(64, 10)
        self.register_buffer("calls", torch.zeros(()))
        self.fails = fails

    def forward(self, x):
        if self.fails:
            raise RuntimeError("no")
        self.calls += 1
        return self.layer(x.mul_(torch.rand_like(x)).flatten(1))


@pytest.mark.parametrize("fails", [False, True])
def test_a_measurement_leaves_the_model_the_images_and_the_random_state_alone(digits, free, capsys, fails):
    torch.set_num_threads(8)  # above the processors of most machines that test this
    model, images, state = Odd(fails).eval(), digits[0].clone(), torch.get_rng_state()
    found = use_threads(None, model, images)
    cores = len(os.sched_getaffinity(0))
    assert found == torch.get_num_threads() and (fails or found <= cores)
    assert ("the fastest in a short measurement; --threads" in capsys.readouterr().err) == (cores > 1 and not fails)
    assert model.calls == 0 and torch.equal(images, digits[0]) and torch.equal(torch.get_rng_state(), state)
    assert model.layer.weight.grad is None


@pytest.mark.parametrize(("name", "options"), [
    ("evaluate.py", ["--num-images", "4", "--attacks", "apgd-ce", "--surrogates", "fc", "--budget", "apgd-ce=1"]),
    ("train.py", ["--pretrained", "--epochs", "1", "--batch-size", "500", "--attack-steps", "1", "--val-attack-steps",
                  "1"])])
def test_a_run_says_and_keeps_its_number_of_threads(name, options, tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    done = subprocess.run([sys.executable, str(ROOT / name), *options, "--device", "cpu", "--output", str(tmp_path)],
                          capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr
    kept = yaml.safe_load((tmp_path / ("args.yaml" if name == "train.py" else "options.json")).read_text())["threads"]
    assert kept >= 1 and (f"CPU threads: {kept} of " in done.stderr) == (len(os.sched_getaffinity(0)) > 1)
    if name == "evaluate.py":
        assert AttackReport.load(tmp_path / "report.json").protocol["threads"] == kept
