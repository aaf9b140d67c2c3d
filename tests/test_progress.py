"""Evaluations that are killed and go on, or that several processes share: real processes, real files."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

import timm_hpm
from timm_hpm import AttackReport, ThreatModel, mixed_surrogate_attack
from timm_hpm.attacks import Budget, Protocol

ROOT = Path(__file__).parent.parent
SMALL = ["--num-images", "10", "--batch-size", "3", "--threat", "Linf:0.15", "--surrogates-at-once", "3",
         "--budget", "apgd-ce=4", "apgd-t=3x1", "fab-t=1x1", "square=9", "apgd-chain=1", "joint=2"]
# A batch has two groups of surrogates, each attacked by four components, then the chain and the joint attack.
STEPS = 4 * (2 * 4 + 2)


@pytest.fixture
def evaluate(monkeypatch):
    """evaluate.py, in this process."""
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    import evaluate

    return evaluate


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "whole"
    finish(start(*SMALL, "--save-adversarial", "--output", str(folder)))
    return folder


def start(*arguments: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, *launcher, str(ROOT / "evaluate.py"), *arguments],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})


def finish(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    return out


def steps_in(folder: Path) -> int:
    return len(list((folder / "progress").glob("batch*.safetensors")))


def check_same(folder: Path, other: Path) -> None:
    """Both runs found the same, image by image and pixel by pixel, and left nothing but their results."""
    reports = [AttackReport.load(path / "report.json") for path in (folder, other)]
    assert reports[0].same_results(reports[1])
    assert 0 < reports[0].robust_accuracy < reports[0].clean_accuracy
    candidates = [load_file(path / "adversarial.safetensors") for path in (folder, other)]
    assert candidates[0].keys() == candidates[1].keys() and len(candidates[0]) == 2 + 5 * 5 + 2
    assert all(torch.equal(points, candidates[1][name]) for name, points in candidates[0].items())
    assert {path.name for path in folder.iterdir()} == {"report.json", "report.md", "report.html",
                                                        "adversarial.safetensors"}


def kill_and_resume(folder: Path, kills: int, choose: random.Random) -> int:
    """Starts a run and kills it at random moments, each time going on; returns how often it was killed."""
    killed = 0
    process = start(*SMALL, "--save-adversarial", "--resume", str(folder))
    while killed < kills:
        before = steps_in(folder)
        if before >= STEPS - 1:
            break
        # The first one early: on a busy machine this process may look away while the rest is done.
        target = choose.randint(before + 1, min(before + STEPS // 2, STEPS - 1)) if killed else 1
        while steps_in(folder) < target and process.poll() is None:
            time.sleep(0.002)
        time.sleep(choose.uniform(0, 0.05))
        if process.poll() is not None:
            break
        # The first stop is a user's Ctrl-C, the others leave no time for a last word.
        process.send_signal(signal.SIGKILL if killed else signal.SIGINT)
        err = process.communicate()[1]
        if process.returncode == 0:
            break
        if not killed:
            assert process.returncode == 130 and f"to go on: python evaluate.py --resume {folder}" in err
        killed += 1
        process = start("--resume", str(folder))
        if (folder / "report.json").exists():
            break
    if process.returncode is None:
        finish(process)
    return killed


def test_a_killed_evaluation_goes_on_to_the_same_report(uninterrupted, tmp_path, evaluate, capsys):
    # On a busy machine a run may end before this process gets to kill it.
    run = next(folder for folder in (tmp_path / f"run{number}" for number in range(5))
               if kill_and_resume(folder, 2, random.Random(0)))
    check_same(run, uninterrupted)
    assert evaluate.main(["--resume", str(run)]) == 0
    assert "a finished run" in capsys.readouterr().out


@pytest.mark.slow
def test_twenty_kills(uninterrupted, tmp_path):
    killed, runs = 0, 0
    while killed < 20:
        runs += 1
        killed += kill_and_resume(tmp_path / f"run{runs}", 20 - killed, random.Random(runs))
        check_same(tmp_path / f"run{runs}", uninterrupted)


@pytest.mark.parametrize("processes", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_the_report_does_not_depend_on_the_number_of_processes(uninterrupted, tmp_path, processes):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes))
    out = finish(start(*SMALL, "--save-adversarial", "--device", "cpu", "--output", str(tmp_path / "run"),
                       launcher=launcher))
    assert out.count("# Mixed Surrogate Attack") == 1
    check_same(tmp_path / "run", uninterrupted)


def test_options_of_another_run_are_refused(evaluate, tmp_path):
    evaluate.output_folder(evaluate.parse_args([*SMALL, "--output", str(tmp_path / "run")]), None)
    with pytest.raises(ValueError, match=r"options: --threat Linf:0.2 \(there: Linf:0.15\). Leave them out"):
        evaluate.main(["--resume", str(tmp_path / "run"), "--threat", "Linf:0.2"])
    with pytest.raises(ValueError, match=r"holds the options.json of an earlier run; .*go on with it by --resume"):
        evaluate.main([*SMALL, "--output", str(tmp_path / "run")])


# The folder, from Python


THREAT = ThreatModel("Linf", 0.15)
QUICK = {"attacks": ["apgd-ce"], "surrogates": ["fc"], "budgets": {"apgd-ce": Budget(3)}, "batch_size": 4}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return timm.create_model("hpm_wrn10_2.digits_linf", pretrained=True).eval()


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = timm_hpm.load_split("digits", "val").tensors
    return images[:8], labels[:8]


@pytest.mark.parametrize(("change", "message"), [
    ({"seed": 1}, r"\(seed: 0 there, 1 now\). Give what that run had, or another folder"),
    ({"threat": ThreatModel("L2", 0.5)}, r"threat: Linf:0.15 there, L2:0.5 now"),
    ({"batch_size": 8}, r"batch_size: 4 there, 8 now"),
    ({"budgets": {"apgd-ce": Budget(4)}}, r"attacks: \{'apgd-ce': \{'iterations': 3\}\} there, "),
    ({"survivors_only": True}, r"survivors_only: False there, True now"),
    ({"images": "other"}, r"\(data_digest: "),
    ({"labels": "other"}, r"\(data_digest: "),
    ({"model": "other"}, r"\(weights_digest: "),
    ({"model": "sample"}, r"\(inference: batch there, sample now\)"),
    ({"model": "darker"}, r"\(normalisation: "),
])
def test_another_run_s_folder_is_refused(model, digits, change, message, tmp_path):
    images, labels = digits
    mixed_surrogate_attack(model, images, labels, THREAT, **QUICK, resume=tmp_path / "progress")
    other = timm.create_model("hpm_wrn10_2.digits_linf", pretrained=True).eval()
    if change.get("model") == "other":
        with torch.no_grad():
            other.fc.bias[0] += 1e-3
    elif change.get("model") == "sample":
        other.fc.inference = "sample"
    elif change.get("model") == "darker":
        other = timm_hpm.PixelModel(other, mean=[0.6], std=[1.0])
    values = {"images": 1 - images, "labels": (labels + 1) % 10, "model": other}
    arguments = {"model": model, "images": images, "labels": labels, "threat": THREAT} | QUICK
    arguments |= {name: values.get(name, value) if isinstance(value, str) else value for name, value in change.items()}
    with pytest.raises(ValueError, match=message):
        mixed_surrogate_attack(**arguments, resume=tmp_path / "progress")


def test_a_folder_of_something_else_and_a_damaged_step_are_named(model, digits, tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match="holds no progress of an evaluation, but other files"):
        mixed_surrogate_attack(model, *digits, THREAT, **QUICK, resume=tmp_path)
    folder = tmp_path / "progress"
    report = mixed_surrogate_attack(model, *digits, THREAT, **QUICK, resume=folder)
    step = folder / "batch00001-step00.safetensors"
    step.write_bytes(step.read_bytes()[:-1])
    (folder / ".batch00000-step07.safetensors.99.tmp").touch()
    with pytest.raises(ValueError, match=r"batch00001-step00.safetensors is damaged .*remove it, and it is made again"):
        mixed_surrogate_attack(model, *digits, THREAT, **QUICK, resume=folder)
    step.unlink()
    assert mixed_surrogate_attack(model, *digits, THREAT, **QUICK, resume=folder).same_results(report)
    assert not list(folder.glob(".*.tmp"))
    (folder / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run.json is damaged"):
        mixed_surrogate_attack(model, *digits, THREAT, **QUICK, resume=folder)


def test_a_finished_step_is_not_made_again(model, digits, tmp_path):
    first = mixed_surrogate_attack(model, *digits, THREAT, **QUICK, resume=tmp_path / "progress")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "progress").iterdir()}
    again = mixed_surrogate_attack(model, *digits, THREAT, **QUICK, resume=tmp_path / "progress")
    assert again.same_results(first) and again.cost["apgd-ce"] == first.cost["apgd-ce"]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "progress").iterdir()} == times


# Protocols


def test_what_changes_a_protocol_makes_it_a_custom_one():
    standard = timm_hpm.attacks.PROTOCOLS["standard"]
    assert standard.changed() is standard
    assert standard.changed(budgets={"apgd-ce": Budget(100)}, attacks=list(standard.attacks)) is standard
    custom = standard.changed(["fc"], ["square", "apgd-t"], {"square": Budget(7)})
    assert custom == Protocol("custom", {"square": Budget(7), "apgd-t": Budget(100, 9)}, ("fc",))
    digests = {protocol.digest() for protocol in (*timm_hpm.attacks.PROTOCOLS.values(), custom,
                                                  standard.changed(budgets={"square": Budget(5001)}),
                                                  standard.changed(surrogates=["fc"]))}
    assert len(digests) == len(timm_hpm.attacks.PROTOCOLS) + 3
    assert standard.digest() == Protocol(**vars(standard)).digest()


@pytest.mark.parametrize(("text", "budget"), [("100", Budget(100)), ("50x4", Budget(50, 4))])
def test_a_budget_is_read(text, budget):
    assert Budget.parse(text) == budget


@pytest.mark.parametrize("text", ["", "x", "5x", "many", "5x2x1", "0", "5.5"])
def test_a_budget_that_cannot_be_read_is_named(text):
    with pytest.raises(ValueError, match=rf"cannot read the budget '{text}' .*iterations x targets, such as 100x9"):
        Budget.parse(text)


def test_an_unknown_protocol_is_named(model, digits):
    with pytest.raises(ValueError, match="unknown protocol 'quick'; expected some of standard, fast"):
        mixed_surrogate_attack(model, *digits, THREAT, protocol="quick")


def test_a_broken_image_is_attacked_no_more_where_the_protocol_says_so(model, digits):
    budgets = {"apgd-ce": Budget(10), "apgd-t": Budget(10, 2), "square": Budget(20)}
    full = Protocol("full", budgets, ("fc", "ste"))
    survivors = Protocol("survivors", budgets, ("fc", "ste"), survivors_only=True)
    reports = [mixed_surrogate_attack(model, *digits, ThreatModel("Linf", 0.2), protocol=protocol, surrogates_at_once=2)
               for protocol in (full, survivors)]
    broken = [{i for i in range(8) if "0" in {row[i] for row in report.correct.values()}} for report in reports]
    assert 1 <= len(broken[1]) < 8 and abs(len(broken[0]) - len(broken[1])) <= 1
    assert reports[1].cost["apgd-ce"] | {"seconds": 0} == reports[0].cost["apgd-ce"] | {"seconds": 0}
    assert reports[1].cost["square"]["forward_passes"] < reports[0].cost["square"]["forward_passes"]
    assert reports[1].protocol["survivors_only"] and not reports[1].baseline_correct
