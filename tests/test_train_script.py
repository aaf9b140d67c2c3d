"""train.py as a user runs it: real processes, several of them, signals and kills."""

import os
import random
import re
import shlex
import signal
import subprocess
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from pictures import write_pictures
from processes import LAUNCHER, ROOT, python, snapshot, start
from protocols import QUICK
from training_runs import forget_accelerator
from two_processes import first_step

import timm_hpm
from timm_hpm import AttackReport
from timm_hpm.__main__ import main
from timm_hpm.console import run_command
from timm_hpm.files import locked
from timm_hpm.training.recovery import newest_checkpoint

TINY = ["--device", "cpu", "--pretrained", "--epochs", "2", "--lr", "0.01", "--attack-steps", "1", "--val-attack-steps",
        "1"]


def train(*options: str, processes: int = 1) -> list[str]:
    return [*(LAUNCHER if processes > 1 else ()), str(ROOT / "train.py"), *options]


def newest(folder: Path) -> Path:
    return max((folder / "checkpoints").glob("epoch-*"))


def test_the_next_command_measures_the_model_under_the_threat_and_on_as_many_images_as_there_are(tmp_path, inside):
    write_pictures(tmp_path / "my images", {"train/dark": 12, "train/light": 12, "test/dark": 3, "test/light": 3},
                   (16, 16))
    (tmp_path / "run.yaml").write_text("epochs: 9\ndataset: folder\ndata_dir: my images\nimg_size: 16\n"
                                       "attack_steps: 1\n")
    done = python(*train("--config", "run.yaml", "--device", "cpu", "--epochs", "2", "--num-classes", "2", "--in-chans",
                         "3", "--threat", "L2:64/255", "--attack-step-size", "16/255", "--batch-size", "8",
                         "--val-attack-steps", "1", "--output", "run"), folder=tmp_path)
    assert "batch" in done.stderr, "no progress bar"
    assert re.search("kept: epoch [01] ", done.stdout)
    words = shlex.split(done.stdout.partition("measure it with: ")[2])
    assert words[:4] == ["python", "-m", "timm_hpm", "evaluate"]
    quick = [*QUICK, "--output"]
    assert main([*words[3:], *quick, "report"]) == 0
    place = words.index("--model")
    of_the_file = ["--checkpoint", "run/model.safetensors", "--num-classes", "2", "--in-chans", "3"]
    assert main(["evaluate", *words[4:place], *of_the_file, *words[place + 2:], *quick, "other"]) == 0
    report, other = (AttackReport.load(tmp_path / name / "report.json") for name in ("report", "other"))
    assert report.protocol["num_images"] == 6 and report.protocol["threat"] == "L2:64/255"
    assert report.correct == other.correct and report.protocol["prototypes_fitted"] is True


def test_mistakes_are_one_line(tmp_path, inside):
    (tmp_path / "run.yaml").write_text("epoch: 9\n")
    for arguments, message in ((["--config", "run.yaml"], "run.yaml: unknown option 'epoch'; did you mean epochs"),
                               (["--resume", "nothing"], "nothing holds no run to resume"),
                               (["--dataset", "folder", "--data-dir", "nowhere"], "nowhere")):
        with pytest.raises(SystemExit) as stopped:
            run_command("train.py", partial(main, ["train", *arguments]))
        said = stopped.value.code
        assert said.startswith("train.py: ") and message in said and "\n" not in said
    forget_accelerator()


@pytest.mark.parametrize(("number", "code", "workers"), [
    pytest.param(signal.SIGTERM, 0, 0, marks=pytest.mark.slow), (signal.SIGTERM, 0, 2), (signal.SIGINT, 130, 2)])
def test_a_signal_to_the_process_group_saves_and_the_run_goes_on(number, code, workers, tmp_path):
    process = start(*train(*TINY, "--epochs", "500", "--workers", str(workers), "--output", "run"), folder=tmp_path,
                    stderr=subprocess.PIPE, start_new_session=True)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while process.poll() is None and not (
            (tmp_path / "run" / "checkpoints").exists() and len(children.read_text().split()) == workers):
        time.sleep(0.01)
    time.sleep(0.1)  # into the epoch
    for _ in range(2):  # a launcher passes on what its processes have got already
        os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == code, errors
    assert f"stopped by {signal.Signals(number).name}; to go on: python -m timm_hpm train --resume run" in errors
    assert newest_checkpoint(tmp_path / "run" / "checkpoints") is not None
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


def test_a_run_that_fails_ends_its_workers(tmp_path):
    """They ignore the signals of others, but not of their own process, which ends them as it exits."""
    process = start(*train("--device", "cpu", "--lr", "1e30", "--sched", "constant", "--attack-steps", "1", "--workers",
                           "2"), folder=tmp_path, stderr=subprocess.PIPE, start_new_session=True)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1 and "train.py: the loss is" in errors and "Traceback" not in errors
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_a_second_run_in_a_folder_touches_nothing(tmp_path):
    first = start(*train(*TINY, "--epochs", "500", "--output", "run"), folder=tmp_path)
    try:
        while not list(tmp_path.glob("run/checkpoints/epoch-*")):
            assert first.poll() is None
            time.sleep(0.01)
        first.send_signal(signal.SIGSTOP)
        time.sleep(0.2)  # a call to the system is finished first
        (tmp_path / "run" / ".model.safetensors.99.tmp").touch()  # as if it were being written

        before = snapshot(tmp_path / "run")
        done = python(*train(*TINY, "--output", "run", processes=2), folder=tmp_path, code=1)
        assert "train.py: another process works on the run in run; wait for it, stop it, or" in done.stderr
        with pytest.raises(ValueError, match="another process works on the run in "):
            main(["train", "--resume", str(tmp_path / "run")])
        assert snapshot(tmp_path / "run") == before
    finally:
        first.kill()
        first.wait()
    with locked(tmp_path / "run"):  # the lock did not outlive its process
        pass


def test_prototypes_gradients_and_learned_state_are_those_of_one_process(tmp_path):
    # Compressed, so that one process unpacks the images for both.
    np.savez_compressed(tmp_path / "more.npz", image=np.zeros((9, 8, 8, 1), np.uint8), label=np.arange(9))
    python(*LAUNCHER, Path(__file__).parent / "two_processes.py", tmp_path, folder=tmp_path)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]

    images, labels = (part[:64] for part in timm_hpm.load_split("digits", "train").tensors)
    halves = [first_step(images[rows], labels[rows], lambda trunk: trunk) for rows in (slice(0, 32), slice(32, 64))]
    for name in ("found", "logits"):
        for rank, half in zip(ranks, halves, strict=True):
            torch.testing.assert_close(rank[name], half[name], rtol=1e-4, atol=1e-4)
    mean = [(a + b) / 2 for a, b in zip(*(half["gradients"] for half in halves), strict=True)]
    for rank in ranks:
        for gradient, one in zip(rank["gradients"], mean, strict=True):
            torch.testing.assert_close(gradient, one, rtol=1e-3, atol=1e-4)

    model = timm.create_model("hpm_wrn10_2", pretrained=True)
    timm_hpm.fit_prototypes(timm_hpm.PixelModel(model), [(images, labels)])
    assert torch.equal(ranks[0]["prototypes"], ranks[1]["prototypes"])
    torch.testing.assert_close(ranks[0]["prototypes"], timm_hpm.find_head(model).prototypes, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_two_processes_are_stopped_and_go_on_to_the_same_weights(tmp_path):
    options = [*TINY, "--batch-size", "64", "--model-kwargs", "inference=batch", "--model-ema",
               "--model-ema-decay", "0.9", "--recovery-interval", "2"]
    python(*train(*options, "--output", "whole", processes=2), folder=tmp_path)
    process = start(*train(*options, "--output", "part", processes=2), folder=tmp_path, stderr=subprocess.PIPE)
    while not (tmp_path / "part" / "checkpoints").exists() and process.poll() is None:
        time.sleep(0.05)
    process.terminate()
    process.communicate(timeout=300)
    assert not (tmp_path / "part" / "checkpoints" / "epoch-00002-batch-00000000").exists(), "it was not stopped"
    python(*train("--resume", "part", processes=2), folder=tmp_path)
    for name in ("model.safetensors", "average.safetensors"):
        assert (newest(tmp_path / "whole") / name).read_bytes() == (newest(tmp_path / "part") / name).read_bytes()
    assert (tmp_path / "whole" / "metrics.csv").read_bytes() == (tmp_path / "part" / "metrics.csv").read_bytes()


@pytest.mark.slow
def test_twenty_kills_change_no_bit(tmp_path):
    options = [*TINY, "--epochs", "5", "--model-ema", "--model-ema-decay", "0.9", "--recovery-interval", "2"]

    def arguments(folder: Path) -> list[str]:
        resumed = (folder / "args.yaml").exists()
        return train(*(["--resume", folder.name] if resumed else [*options, "--output", folder.name]))

    begin = time.monotonic()
    python(*arguments(tmp_path / "whole"), folder=tmp_path)
    whole_run, chance = time.monotonic() - begin, random.Random(0)
    kills, parts = 0, [tmp_path / "part0"]
    while kills < 20:
        process = start(*arguments(parts[-1]), folder=tmp_path)
        try:
            # From before the first import to behind the last update; sooner in a run that was killed already.
            process.wait(chance.uniform(0.2, 1.0) * whole_run)
            assert process.returncode == 0
            parts.append(tmp_path / f"part{len(parts)}")  # a complete run has nothing left to be killed in
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
    for part in parts:
        python(*arguments(part), folder=tmp_path)
        for name in ("model.safetensors", "average.safetensors"):
            assert (newest(tmp_path / "whole") / name).read_bytes() == (newest(part) / name).read_bytes()
        for name in ("model.safetensors", "metrics.csv"):
            assert (tmp_path / "whole" / name).read_bytes() == (part / name).read_bytes()
