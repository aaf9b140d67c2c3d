"""Memory and CPU threads: files written part by part, the peaks of real processes, the number of threads."""

import os
import time
from pathlib import Path

import pytest
import torch
import yaml
from processes import ENVIRON, ROOT, python
from protocols import QUICK
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from timm_hpm import AttackReport, PixelModel
from timm_hpm.evaluation.threads import fastest_threads, use_threads
from timm_hpm.files import Parts, save_parts

TENSORS = {
    "images": torch.rand(5, 3, 4, 4),
    "labels": torch.arange(7) - 3,
    "nothing": torch.empty(0, 3, 4, 4),
    "no pixels": torch.empty(3, 0),
    "ste/apgd-ce": torch.rand(5, 3, 4, 4).transpose(1, 2),
    "one": torch.tensor([2 ** 40]),
}


@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_a_file_that_was_written_part_by_part_is_read_equal(tmp_path, size):
    path = tmp_path / "tensors.safetensors"
    metadata = {"protocol": '{"name": "été ∞"}', "other": ""}
    save_parts({name: Parts(tensor, iter(tensor.split(size))) for name, tensor in TENSORS.items()}, path, metadata)
    found = load_file(path)
    assert found.keys() == TENSORS.keys() and list(tmp_path.iterdir()) == [path]
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    with safe_open(path, "pt") as file:
        assert file.metadata() == metadata


# Prints the most memory in MiB that this process had, after each evaluation of so many images.
SCRIPT = """
import re, sys
import torch
import timm_hpm
from pathlib import Path
from protocols import run_attack
from torch import nn

def evaluate(number, folder=None, save=False, **changes):
    images = torch.rand(number, 3, SIDE, SIDE)
    with torch.no_grad():
        labels = torch.cat([model(part).argmax(dim=1) for part in images.split(100)])
    report = run_attack(model, images, labels, "Linf:0.3", budgets=BUDGETS, surrogates_at_once=5, batch_size=100,
                        folder=folder, save_adversarial=save, **changes)
    if save:
        verdicts = timm_hpm.rejudge(model, folder + "/adversarial.safetensors")
        assert verdicts.items() <= report.verdicts.items()
    peak = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024
    print(peak, len(report.correct) - 1, report.robust_accuracy, flush=True)

BUDGETS = {"apgd-t": "1x1", "fab-t": "1x1", "joint-subset": "1r2"} | dict.fromkeys(
    ["apgd-ce", "square", "apgd-chain", "joint"], 1)
torch.manual_seed(0)
torch.set_num_threads(1)
layers = nn.Conv2d(3, 8, SIDE // 4, SIDE // 4), nn.ReLU(), nn.Flatten(), timm_hpm.HPMHead(128, 10, inference="batch")
model = nn.Sequential(*layers).eval()
model[-1].set_prototypes(torch.randn(10, 128))
"""


def peaks(side: int, *calls: str) -> list[tuple[int, int, float]]:
    """Returns peak in MiB, number of candidate sets and robust accuracy after each call of the script's `evaluate`."""
    code = "\n".join([f"SIDE = {side}", SCRIPT, *calls])
    # The threshold above which glibc gives memory back moves, and the peak with it, unless it is set.
    done = python("-c", code, folder=ROOT, MALLOC_MMAP_THRESHOLD_="65536")
    return [(int(peak), int(sets), float(robust)) for peak, sets, robust in map(str.split, done.stdout.splitlines())]


linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux for a process's peak memory")


@linux
def test_images_that_are_broken_do_not_stay_in_memory(tmp_path):
    few, many = peaks(64, *(f"evaluate({number}, {str(tmp_path / str(number))!r}, attacks=['apgd-ce'], "
                            "surrogates=['fc', 'ste'])" for number in (200, 1200)))
    assert few[1] == many[1] == 2 and many[2] < 0.5
    # The images themselves, and what an allocator does not give back. What broke an image in an attack, what did in
    # the assembled batch, and each set of candidates, would be as much again.
    images = 1000 * 3 * 64 ** 2 * 4 / 2 ** 20
    assert many[0] - few[0] <= 1.4 * images


@linux
@pytest.mark.slow
def test_ten_thousand_images_under_every_attack_fit_in_4_gib(tmp_path):
    few, saved = peaks(32, "evaluate(2000)", f"evaluate(10_000, {str(tmp_path)!r}, True)")
    assert few[1] == saved[1] == 5 * 5 + 2 * (1 + 2) + 1
    images = 8000 * 3 * 32 ** 2 * 4 / 2 ** 20
    # Judging again has one set of candidates in memory at a time.
    assert saved[0] - few[0] <= 3 * images and saved[0] < 4096


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
    ("evaluate.py", [*QUICK, "--num-images", "4"]),
    ("train.py", ["--pretrained", "--epochs", "1", "--batch-size", "500", "--attack-steps", "1", "--val-attack-steps",
                  "1"])])
def test_a_run_says_and_keeps_its_number_of_threads(name, options, tmp_path, monkeypatch):
    monkeypatch.delitem(ENVIRON, "OMP_NUM_THREADS")
    done = python(ROOT / name, *options, "--device", "cpu", "--output", tmp_path, folder=tmp_path)
    kept = yaml.safe_load((tmp_path / ("args.yaml" if name == "train.py" else "options.json")).read_text())["threads"]
    assert kept >= 1 and (f"CPU threads: {kept} of " in done.stderr) == (len(os.sched_getaffinity(0)) > 1)
    if name == "evaluate.py":
        assert AttackReport.load(tmp_path / "report.json").protocol["threads"] == kept
