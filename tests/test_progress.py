"""Evaluations that are killed and go on, that several processes share, or out of time: real processes and files."""

import copy
import json
import random
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import processes
import pytest
import yaml
from nets import Wrapped, same_tensors
from protocols import QUICK, run_attack, unfinished
from safetensors.torch import load_file, save_file
from torch import nn

import evaluate
import timm_hpm
from timm_hpm import AttackReport, ThreatModel
from timm_hpm.__main__ import main
from timm_hpm.deadline import OutOfTime, is_over, parse_time, time_limit
from timm_hpm.evaluation import PROTOCOLS, Budget, Protocol
from timm_hpm.evaluation.config import EvaluateConfig, resumed
from timm_hpm.evaluation.resume import ProgressFolder, sealed, unsealed
from timm_hpm.report.metrics import attack_of, right_in_all

NUM_DIGITS, INFERENCE = 8, "batch"

SMALL = ["--num-images", "6", "--batch-size", "3", "--threat", "Linf:0.15", "--surrogates-at-once", "3",
         "--budget", "apgd-ce=4", "apgd-t=3x1", "fab-t=1x1", "square=60", "apgd-chain=1", "joint=2",
         "joint-subset=6r3", "--inference", "batch", "--neighbours", "5"]
# A batch has two groups of surrogates, each attacked by four components, then the chain, the joint attack, rounds, and
# what is assembled of all of them.
STEPS = 2 * (2 * 4 + 2 + 3 + 1)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "whole"
    finish(start(*SMALL, "--save-adversarial", "--output", str(folder)))
    return folder


def start(*arguments: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen:
    return processes.start(*launcher, processes.ROOT / "evaluate.py", *arguments, folder=Path.cwd(),
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE)


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
    assert same_tensors(*candidates)
    assert len(candidates[0]) == 2 + 5 * 5 + 2 * (1 + 3) + 1
    assert [row["kind"] for row in reports[0].neighbours] == ["reshuffled", "chosen", "adversarial"]
    assert {path.name for path in folder.iterdir()} == {"report.json", "report.md", "report.html",
                                                        "adversarial.safetensors", "options.json"}


def kill_and_resume(folder: Path, signals: list[signal.Signals], choose: random.Random, first: int = 1,
                    pause: float = 0.05) -> int:
    """Starts a run and stops it by signals at random moments, from step `first` on; returns how many it took."""
    process, stopped = start(*SMALL, "--save-adversarial", "--resume", str(folder)), 0
    for stop in signals:
        # On a busy machine this process may look away while the rest is done: the first one early, none at the end.
        before, latest = steps_in(folder), STEPS * 3 // 4
        if before >= latest:
            break
        target = choose.randint(before + 1, min(before + STEPS // 2, latest)) if stopped else first
        while steps_in(folder) < target and process.poll() is None:
            time.sleep(0.002)
        time.sleep(choose.uniform(0, pause))
        process.send_signal(stop)
        err = process.communicate()[1]
        if process.returncode == 0:
            return stopped
        assert process.returncode == (-stop if stop == signal.SIGKILL else 130), err
        assert stop == signal.SIGKILL or f"to go on: python -m timm_hpm evaluate --resume {folder}" in err
        stopped += 1
        process = start("--resume", str(folder))
    finish(process)
    return stopped


def test_a_killed_evaluation_goes_on_to_the_same_report(uninterrupted, tmp_path, capsys):
    # On a busy machine a run may end before this process gets to kill it.
    run = next(folder for folder in (tmp_path / f"run{number}" for number in range(5))
               if kill_and_resume(folder, [signal.SIGINT, signal.SIGKILL], random.Random(0)) == 2)
    check_same(run, uninterrupted)
    assert evaluate.main(["--resume", str(run)]) == 0
    assert "a finished run" in capsys.readouterr().out


@pytest.mark.slow
def test_ten_kills(uninterrupted, tmp_path):
    killed, runs = 0, 0
    while killed < 10:
        runs += 1
        killed += kill_and_resume(tmp_path / f"run{runs}", [signal.SIGKILL] * (10 - killed), random.Random(runs))
        check_same(tmp_path / f"run{runs}", uninterrupted)
    # From the last step on it judges, saves the candidates and the report in about half a second.
    for number in range(3):
        kill_and_resume(tmp_path / f"late{number}", [signal.SIGKILL], random.Random(number), STEPS, 0.6)
        check_same(tmp_path / f"late{number}", uninterrupted)


def test_the_report_does_not_depend_on_the_number_of_processes(uninterrupted, tmp_path):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "3")
    out = finish(start(*SMALL, "--save-adversarial", "--device", "cpu", "--output", str(tmp_path / "run"),
                       launcher=launcher))
    assert out.count("# Mixed Surrogate Attack") == 1
    check_same(tmp_path / "run", uninterrupted)


def test_a_second_evaluation_in_a_folder_touches_nothing(tmp_path):
    run = tmp_path / "run"
    first = start(*SMALL, "--output", str(run))
    try:
        while not steps_in(run):
            assert first.poll() is None
            time.sleep(0.002)
        first.send_signal(signal.SIGSTOP)
        time.sleep(0.2)  # a call to the system is finished first
        (run / ".report.json.99.tmp").touch()  # as if it were being written
        before = processes.snapshot(run)
        for arguments in (["--resume", str(run)], [*SMALL, "--output", str(run)],
                          ["--resume", str(run), "--robustbench-json", str(run / "info" / "info.json")]):
            with pytest.raises(ValueError, match=r"another process works on the run in .*run; wait for it, stop it"):
                evaluate.main(arguments)
        assert processes.snapshot(run) == before
        first.send_signal(signal.SIGCONT)
        finish(first)
        assert not list(run.glob(".*"))
    finally:
        first.kill()


FEW = ["--num-images", "6", "--batch-size", "3", "--attacks", "apgd-ce", "--surrogates", "fc", "--budget", "apgd-ce=2",
       "--threat", "Linf:0.1"]


def test_a_finished_run_is_gone_on_with_by_its_own_options_only(tmp_path, capsys):
    run = tmp_path / "run"
    assert evaluate.main([*FEW, "--output", str(run)]) == 0
    files = {path: path.read_bytes() for path in run.iterdir()}
    with pytest.raises(ValueError, match=r"options: --model resnet50 \(there: hpm_wrn10_2\), "
                                         r"--threat Linf:0.3 \(there: Linf:0.1\), "
                                         r"--protocol fast \(there: standard\)\. Leave"):
        evaluate.main(["--resume", str(run), "--threat", "Linf:0.3", "--model", "resnet50", "--protocol", "fast"])
    assert evaluate.main([*FEW, "--resume", str(run), "--output", str(run)]) == 0
    assert f"{run} holds a finished run" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in run.iterdir()} == files
    info = tmp_path / "info.json"
    assert evaluate.main(["--resume", str(run), "--robustbench-json", str(info)]) == 0
    assert json.loads(info.read_text())["dataset"] == "digits"
    (run / "options.json").unlink()
    with pytest.raises(ValueError, match=r"holds the report\.json of an earlier run without its options\.json"):
        evaluate.main([*FEW, "--resume", str(run)])


def test_reports_of_other_weights_are_refused_before_anything_is_attacked(tmp_path, shared_model):
    weights = shared_model.state_dict()
    save_file(weights, tmp_path / "w.safetensors")
    options = [*FEW, "--checkpoint", str(tmp_path / "w.safetensors"), "--inference", "dataset,fc"]
    run = tmp_path / "run"
    assert evaluate.main([*options, "--output", str(run)]) == 0
    (run / "sweep.html").unlink()
    (run / "dataset-Linf-0.1" / "report.json").unlink()
    save_file(weights | {"fc.bias": weights["fc.bias"] + 1}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"fc-Linf-0.1/report.json is the report of another run \(weights_digest: "):
        evaluate.main([*options, "--resume", str(run)])
    assert not (run / "sweep.html").exists() and not (run / "dataset-Linf-0.1" / "report.json").exists()
    assert not (run / "dataset-Linf-0.1" / "progress").exists()


def test_only_the_run_s_own_progress_is_removed_and_no_link_is_followed(tmp_path):
    run, elsewhere, scratch = tmp_path / "run", tmp_path / "elsewhere", tmp_path / "scratch"
    elsewhere.mkdir()
    scratch.mkdir()
    (elsewhere / "thesis.tex").touch()

    def resumed_to(*names: str) -> None:
        assert evaluate.main(["--resume", str(run)]) == 0
        assert AttackReport.load(run / "report.json").same_results(report)
        assert {path.name for path in run.iterdir()} == {"report.json", "report.md", "report.html", "options.json",
                                                         *names}

    assert evaluate.main([*FEW, "--output", str(run)]) == 0
    report = AttackReport.load(run / "report.json")
    shutil.copytree(elsewhere, run / "progress")
    (run / "progress" / "run.json").write_text('{"seed": 0, "save_adversarial": true, "author": "me"}')
    resumed_to("progress")
    assert {path.name for path in (run / "progress").iterdir()} == {"thesis.tex", "run.json"}
    # A finished run that was stopped before it removed its own progress.
    shutil.rmtree(run / "progress")
    own = {name: report.protocol[name] for name in report.protocol if name not in ("model", "weights", "dataset",
                                                                                   "split")}
    (run / "progress").mkdir()
    (run / "progress" / "run.json").write_text(sealed(own | {"save_adversarial": False}))
    (run / "progress" / "batch00000-step00.safetensors").touch()
    (run / ".progress.99.tmp").mkdir()
    resumed_to()
    # One that was killed between the report and the removal, on a disk of the user's choice.
    (run / "report.json").unlink()
    (run / "progress").symlink_to(scratch)
    for name in (".report.html.99.tmp", ".progress.99.tmp"):
        (run / name).symlink_to(elsewhere)
    (run / ".dangling.99.tmp").symlink_to(tmp_path / "nowhere")
    resumed_to()
    assert [path.name for path in elsewhere.iterdir()] == ["thesis.tex"] and scratch.exists()


@pytest.mark.parametrize(("change", "message"), [
    *((text, "is not what this evaluate.py was called with") for text in ("{", "[1]", '{"colour": "red"}')),
    *(({name: "else"}, f"is not what this evaluate.py was called with.* unknown option '{name}'") for name in (
        "robustbench_json", "output")),
    *(({name: value}, rf"options\.json says that {name} is ") for name, value in (
        ("num_images", "10"), ("num_images", 1e400), ("model_kwargs", {"a=b": "c=d"}), ("attacks", {"apgd-ce": 1}))),
])
def test_options_that_no_run_saved_are_refused_and_stay(tmp_path, inside, change, message):
    good = EvaluateConfig(**evaluate.parse_args(SMALL)[1]).to_saved()
    text = change if isinstance(change, str) else json.dumps(good | change)
    (tmp_path / "options.json").write_text(text)
    for words, said in ((["--resume"], message), (["--rejudge"], message),
                        ([*FEW, "--output"], r"holds the options\.json of an earlier run")):
        with pytest.raises(ValueError, match=said):
            evaluate.main([*words, str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["options.json"]
    assert (tmp_path / "options.json").read_text() == text


def test_the_options_of_a_run_are_read_back_as_they_were(tmp_path):
    words = ["--model", "local-dir:a b", "--no-pretrained", "--model-kwargs", "mix=0.25", "name=x", "flag=True", "n=1",
             "--inference", "fc,batch", "--surrogates", "fc,ste", "--attacks", "square,apgd-t", "--budget", "square=5",
             "apgd-t=3x2", "--full-grid", "--neighbours", "none",
             "--eps-sweep", "0:1:0.5", "--threat", "L2:0.5", "--seed", "3", "--device", "cpu", "--save-adversarial"]
    config = EvaluateConfig(**evaluate.parse_args(words)[1])
    (tmp_path / "options.json").write_text(json.dumps(config.to_saved()))
    (tmp_path / "words.yaml").write_text(yaml.safe_dump(config.to_saved()))
    for same in ([], words, ["--config", str(tmp_path / "words.yaml")]):
        assert resumed(tmp_path, evaluate.parse_args(same)[1]) == config
    (tmp_path / "options.json").write_text(json.dumps(config.to_saved() | {"dataset_download": True}))
    assert not resumed(tmp_path, {}).dataset_download and resumed(tmp_path, {"dataset_download": True}).dataset_download


THREAT = ThreatModel("Linf", 0.15)
FAST = {"attacks": ["apgd-ce"], "surrogates": ["fc"], "budgets": {"apgd-ce": Budget(3)}, "batch_size": 4}


def biased(model: nn.Module) -> nn.Module:
    model.fc.bias.data[0] += 1e-3
    return model


def of_samples(model: nn.Module) -> nn.Module:
    model.fc.inference = "sample"
    return model


def coarser(model: nn.Module) -> nn.Module:
    """By nothing that a state dict holds."""
    model.register_forward_pre_hook(lambda _, inputs: (inputs[0] + (inputs[0].round() - inputs[0]).detach(),))
    return model


@pytest.mark.parametrize(("change", "message"), [
    ({"seed": 1}, r"\(seed: 0 there, 1 now\). Give what that run had, or another folder"),
    ({"threat": ThreatModel("L2", 0.5)}, r"threat: Linf:0.15 there, L2:0.5 now"),
    ({"batch_size": 8}, r"batch_size: 4 there, 8 now"),
    ({"budgets": {"apgd-ce": Budget(4)}}, r"attacks: \{'apgd-ce': \{'iterations': 3\}\} there, "),
    ({"images": lambda images: 1 - images}, r"\(data_digest: "),
    ({"labels": lambda labels: (labels + 1) % 10}, r"\(data_digest: "),
    ({"model": biased}, r"\(weights_digest: "),
    ({"model": of_samples}, r"\(inference: batch there, sample now; clean_margin: "),
    ({"model": lambda model: timm_hpm.PixelModel(model, mean=[0.6], std=[1.0])}, r"\(normalisation: "),
    ({"model": coarser}, r"of another run \(clean_margin: -\d+\.\d+ there, -\d+\.\d+ now; "),
])
def test_another_run_s_folder_is_refused(shared_model, digits, change, message, tmp_path):
    images, labels = digits
    unfinished(shared_model, images, labels, THREAT, **FAST, folder=tmp_path)
    given = {"model": copy.deepcopy(shared_model), "images": images, "labels": labels, "threat": THREAT} | FAST
    given |= {name: value(given[name]) if callable(value) else value for name, value in change.items()}
    with pytest.raises(ValueError, match=message):
        run_attack(**given, folder=tmp_path)


def test_a_folder_of_something_else_and_a_damaged_step_are_named(shared_model, digits, tmp_path):
    (tmp_path / "progress").mkdir()
    (tmp_path / "progress" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="holds no progress of an evaluation, but other files"):
        run_attack(shared_model, *digits, THREAT, **FAST, folder=tmp_path)
    run = tmp_path / "run"
    folder = run / "progress"
    folder.mkdir(parents=True)
    # As of a run that was killed when it had written nothing yet.
    (folder / ".run.json.99.tmp").touch()
    report = unfinished(shared_model, *digits, THREAT, **FAST, folder=run)
    step = folder / "batch00001-step00.safetensors"
    step.write_bytes(step.read_bytes()[:-1])
    (folder / ".batch00000-step07.safetensors.99.tmp").touch()
    with pytest.raises(ValueError, match=r"batch00001-step00.safetensors is damaged .*remove it, and it is made again"):
        run_attack(shared_model, *digits, THREAT, **FAST, folder=run)
    step.unlink()
    for _ in range(2):
        assert run_attack(shared_model, *digits, THREAT, **FAST, folder=run).same_results(report)
    assert {path.name for path in run.iterdir()} == {"report.json"}


@pytest.fixture(scope="module")
def kept_run(shared_model, digits, tmp_path_factory) -> Path:
    """A folder of progress with candidates: two batches, two steps and the assembled batches."""
    folder = tmp_path_factory.mktemp("kept")
    options = FAST | {"surrogates": ["fc", "ste"], "surrogates_at_once": 1}
    unfinished(shared_model, *digits, THREAT, **options, folder=folder, save_adversarial=True)
    return folder / "progress"


def read_all(folder: Path, run: dict) -> None:
    progress = ProgressFolder(folder, run)
    for batch in range(2):
        for step, names in enumerate((["fc/apgd-ce"], ["ste/apgd-ce"], ["assembled"])):
            progress.load(batch, step, names)
            progress.candidates(names[0], names, step, batch)


def test_every_flipped_bit_of_a_kept_file_is_named(kept_run, tmp_path):
    run, choose = unsealed((kept_run / "run.json").read_text()), random.Random(0)
    read_all(kept_run, run)
    names = [path.name for path in kept_run.iterdir() if path.name != "lock"]
    assert len(names) == 7
    for name in names:
        original = (kept_run / name).read_bytes()
        damaged = tmp_path / name
        for path in kept_run.iterdir():
            shutil.copy(path, tmp_path)
        for place in choose.sample(range(len(original)), 60):
            bit = 1 << choose.randrange(8)
            damaged.write_bytes(original[:place] + bytes([original[place] ^ bit]) + original[place + 1:])
            with pytest.raises(ValueError, match=name.replace(".", r"\.")):
                read_all(tmp_path, run)
        for rest in (b"", original[:choose.randrange(1, len(original))], original + b"\0", b"[" * 100_000):
            damaged.write_bytes(rest)
            with pytest.raises(ValueError, match=name.replace(".", r"\.")):
                read_all(tmp_path, run)


@pytest.mark.parametrize(("source", "target", "what"), [
    ("batch00000-step00", "batch00001-step00", "batch 0 instead of 1"),
    ("batch00000-step01", "batch00000-step00", r"step 1 instead of 0, names \['ste/apgd-ce'\] instead of "),
    ("batch00001-step00", "batch00001-step02", "step 0 instead of 2, names "),
    ("seed/batch00000-step00", "batch00000-step00", "run [0-9a-f]+ instead of [0-9a-f]+"),
    ("eps/batch00001-step00", "batch00001-step00", "run [0-9a-f]+ instead of "),
])
def test_a_kept_file_of_another_place_is_named(shared_model, digits, kept_run, tmp_path, source, target, what):
    options = FAST | {"batch_size": 4}
    if "/" in source:
        threat = ThreatModel("Linf", 0.05) if source.startswith("eps/") else THREAT
        unfinished(shared_model, *digits, threat, **options, seed=1, folder=tmp_path / source.partition("/")[0])
        source = source.replace("/", "/progress/")
    (tmp_path / "kept").mkdir()
    for path in kept_run.iterdir():
        shutil.copy(path, tmp_path / "kept")
    file = tmp_path / "kept" / (target + ".safetensors")
    shutil.copy((tmp_path if "/" in source else kept_run) / (source + ".safetensors"), file)
    with pytest.raises(ValueError, match=rf"{file.name} is damaged .*it is of another place: {what}"):
        read_all(tmp_path / "kept", unsealed((kept_run / "run.json").read_text()))


def test_a_resumed_run_measures_only_the_neighbours_that_it_lacks(shared_model, digits, tmp_path):
    options = FAST | {"neighbours": [4, 5], "folder": tmp_path}
    report = run_attack(shared_model, *digits, THREAT, **options)
    assert [row["batch_size"] for row in report.neighbours] == [4] * 3 + [5] * 3
    # As if the process had been killed between the two sizes.
    rows = [row | {"flipped": 0.25} for row in report.neighbours[:3]]
    replace(report, neighbours=rows).save(tmp_path / "report.json")
    assert run_attack(shared_model, *digits, THREAT, **options).neighbours == [*rows, *report.neighbours[3:]]
    assert AttackReport.load(tmp_path / "report.json").neighbours == [*rows, *report.neighbours[3:]]


def test_a_changed_protocol_is_called_custom_and_has_another_digest():
    standard = PROTOCOLS["standard"]
    autoattack = PROTOCOLS["autoattack"]
    assert autoattack.changed(budgets={"apgd-ce": Budget(100)}, attacks=list(autoattack.attacks)) == autoattack
    custom = standard.changed(["fc"], ["square", "apgd-t"], {"square": Budget(7)})
    assert custom == Protocol("custom", {"square": Budget(7), "apgd-t": Budget(100, 9)}, ("fc",))
    restarts = replace(standard, attacks={**standard.attacks, "joint-subset": Budget(25, restarts=31)})
    protocols = [*PROTOCOLS.values(), custom, restarts, standard.changed(budgets={"square": Budget(5001)})]
    assert len({protocol.digest() for protocol in protocols}) == len(protocols)
    assert standard.digest() == Protocol(**vars(standard)).digest()
    for budget in (3, "3", np.int64(3), Budget(3)):
        chosen = standard.changed(budgets={"apgd-ce": budget, "apgd-t": "3x2", "joint-subset": "3r2"}).attacks
        assert [chosen[name] for name in ("apgd-ce", "apgd-t", "joint-subset")] == [
            Budget(3), Budget(3, targets=2), Budget(3, restarts=2)]


@pytest.mark.parametrize("budget", [None, True, 2.5, [3], "", "5x2x1", "0", "5r0"])
def test_a_budget_that_cannot_be_read_is_named(budget):
    with pytest.raises(ValueError, match=r"budget of apgd-ce is .*; expected iterations|cannot read the budget '.*' "):
        PROTOCOLS["standard"].changed(budgets={"apgd-ce": budget})
    with pytest.raises(ValueError, match=r"budgets is .*; expected a budget by attack"):
        PROTOCOLS["standard"].changed(budgets=[budget])
    for arguments in ((0,), (-1, 2), (5, -1), (5, 0, 0), (budget,)):
        with pytest.raises(ValueError, match=r"at least 1 iteration and 1 restart, and 0 or more targets"):
            Budget(*arguments)


@pytest.mark.parametrize("mode", ["plain", "sample", "dataset", "fc"])
def test_a_cascade_comes_to_the_worst_case_of_the_full_grid_with_fewer_passes(shared_model, digits, mode, tmp_path):
    """Where a prediction depends on no other image; the FC classifier's worst case is that of the full grid, too."""
    model = copy.deepcopy(shared_model)
    if mode == "plain":
        head, model.fc = model.fc, nn.Linear(model.fc.in_features, 10)
        model.fc.eval().load_state_dict({"weight": head.weight, "bias": head.bias})
    else:
        model.fc.inference = mode
    budgets = {"apgd-t": Budget(10, 2), "apgd-ce": Budget(10), "square": Budget(40), "apgd-chain": Budget(5)}
    cascade, full = (run_attack(model, *digits, ThreatModel("Linf", 0.12), batch_size=4, full_grid=full_grid,
                                attacks=list(budgets), budgets=budgets, folder=tmp_path / str(full_grid),
                                save_adversarial=True) for full_grid in (False, True))
    assert [report.protocol["full_grid"] for report in (cascade, full)] == [False, True]
    assert 0 < cascade.robust_accuracy < cascade.clean_accuracy
    for report in (cascade, full):
        assert [name == "" for name in report.fell_to] == right_in_all(report.correct.values())
        assert timm_hpm.rejudge(model, tmp_path / str(report is full) / "adversarial.safetensors").items() <= (
            report.verdicts.items())
    # Another restart of the random numbers decides an image at most.
    assert abs(cascade.robust_accuracy - full.robust_accuracy) <= 1 / 8
    assert abs(cascade.baseline.get("worst", 0) - full.baseline.get("worst", 0)) <= 1 / 8
    assert cascade.baseline.keys() == full.baseline.keys()
    assert cascade.cost["square"]["forward_passes"] < full.cost["square"]["forward_passes"]
    # Once it is broken an image stays so, and its attack is the first one that broke it.
    order = [name for name in cascade.correct if not name.startswith("true/")]
    attacks = [attack_of(name) for name in order]
    assert list(dict.fromkeys(attacks))[-1] == "square" and attacks.index("apgd-ce") < attacks.index("apgd-t")
    for i, name in enumerate(cascade.fell_to):
        later = [row for row in order if name and attacks.index(attack_of(row)) > attacks.index(attack_of(name))]
        assert all(cascade.correct[row][i] == "0" for row in later)


def test_a_prediction_that_depends_on_the_batch_gets_the_full_grid(shared_model, digits):
    linear = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    for some in (shared_model, Wrapped(linear, lambda net, x: net(x - x.mean(dim=0))).eval()):
        report = run_attack(some, *digits, THREAT, attacks=["apgd-ce", "square"],
                            budgets={"apgd-ce": Budget(2), "square": Budget(2)})
        assert report.protocol["full_grid"]


def test_a_cascade_resumes_to_the_same_report_from_any_step(model, digits, tmp_path):
    model.fc.inference = "sample"
    options = {"attacks": ["apgd-ce", "apgd-t", "square"], "surrogates": ["fc", "ste"], "batch_size": 4,
               "budgets": {"apgd-ce": "2r2", "apgd-t": "2x2", "square": 9}, "surrogates_at_once": 2}
    whole = unfinished(model, *digits, ThreatModel("Linf", 0.12), folder=tmp_path, **options)
    for path in sorted((tmp_path / "progress").glob("batch*"))[::2]:
        path.unlink()
    again = run_attack(model, *digits, ThreatModel("Linf", 0.12), folder=tmp_path, **options)
    assert again.same_results(whole) and 0 < whole.robust_accuracy < 1
    assert whole.baseline.keys() == {"clean", "apgd-ce", "apgd-t", "square", "worst"}


ATTACK = {"attacks": ["apgd-ce", "joint"], "budgets": {"apgd-ce": Budget(3), "joint": Budget(2)}, "batch_size": 4}


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
    whole = run_attack(model, *digits, threat, **ATTACK)
    cut = cut_run(model, *digits, threat, folder=tmp_path, **ATTACK)
    with time_limit(1e-9):
        assert run_attack(model, *digits, threat, **ATTACK).same_results(cut), "without a folder"
    few = run_attack(model, *(part[:4] for part in digits), threat, **ATTACK)
    assert cut.protocol.pop("stopped") == "by a time limit, after 4 of 8 images"
    for name in ("protocol", "correct", "baseline_correct", "assembled", "examples"):
        assert getattr(cut, name) == getattr(few, name)
    assert not (tmp_path / "report.json").exists()
    assert AttackReport.load(tmp_path / "partial" / "report.json").num_images == 4
    assert run_attack(model, *digits, threat, folder=tmp_path, **ATTACK).same_results(whole)
    assert {path.name for path in tmp_path.iterdir() if path.name[0] != "."} == {"report.json"}


def test_each_call_without_time_goes_on_and_the_studies_of_neighbours_are_cut(model, digits, tmp_path):
    options = {"attacks": ["apgd-ce"], "budgets": {"apgd-ce": Budget(1)}, "surrogates": ["fc"], "batch_size": 5,
               "neighbours": (2, 3), "folder": tmp_path}
    with time_limit(1e-9):
        for done in ("5 of 8 images", "0 of 2 studies of neighbours", "1 of 2 studies of neighbours"):
            cut = run_attack(model, *digits, "Linf:0.1", **options)
            assert cut.protocol["stopped"] == f"by a time limit, after {done}"
            assert (tmp_path / "partial" / "report.html").exists() and not (tmp_path / "report.html").exists()
        whole = run_attack(model, *digits, "Linf:0.1", **options)
    assert {row["batch_size"] for row in whole.neighbours} == {2, 3} and "stopped" not in whole.protocol
    assert (tmp_path / "report.html").exists() and not (tmp_path / "partial").exists()


def test_the_command_says_what_is_done_and_how_to_go_on(tmp_path, inside, capsys):
    assert main(["evaluate", *QUICK, "--num-images", "10", "--output", "run", "--time-limit", "0.001s"]) == 0
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
    assert main(["evaluate", *QUICK, "--num-images", "10", "--attacks", "apgd-ce,apgd-t", "--output", "b",
                 "--time-limit", "0.001s"]) == 0
    assert capsys.readouterr().out.startswith("stopped by a time limit, before the first 4 of 10 images were attacked")


def test_a_training_run_stops_with_a_checkpoint(tmp_path, inside, capsys):
    words = ["train", "--device", "cpu", "--pretrained", "--attack-steps", "1", "--val-attack-steps", "1", "--output",
             "run", "--batch-size", "500"]
    assert main([*words, "--epochs", "1000", "--time-limit", "0.5s"]) == 0
    said = capsys.readouterr().err
    assert "stopped by the time limit; to go on: python -m timm_hpm train --resume run --time-limit 0.5s\n" in said
    assert list((tmp_path / "run" / "checkpoints").iterdir())
    assert main(["train", "--resume", "run", "--time-limit", "0.25s"]) == 0
    assert "--resume run --time-limit 0.25s" in capsys.readouterr().err
