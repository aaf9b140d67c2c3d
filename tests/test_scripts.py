"""evaluate.py and train.py as a user runs them: real processes, real files."""

import json
import math
import os
import re
import shutil
import string
import subprocess
import sys
from pathlib import Path

import protocols
import pytest
import timm
from PIL import Image
from processes import ENVIRON, ROOT, python
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import evaluate
import timm_hpm
from timm_hpm import AttackReport, report_markdown, report_page
from timm_hpm.console import run_command
from timm_hpm.files import default_folder
from timm_hpm.models.create import class_names, open_split_for

# Of the attacks, so that a process takes seconds.
QUICK = ["--num-images", "8", "--batch-size", "4", "--surrogates", "fc,ste", "--attacks", "apgd-ce"]


@pytest.fixture(scope="module")
def saved_run(tmp_path_factory) -> Path:
    """A run that saved its candidates, with what it printed beside it."""
    folder = tmp_path_factory.mktemp("saved")
    done = python(ROOT / "evaluate.py", *QUICK, "--budget", "apgd-ce=2", "--save-adversarial", folder=folder)
    assert "query" in done.stderr, "no progress bar"
    (folder / "printed.txt").write_text(done.stdout)
    run, = (folder / "output").iterdir()
    return run


def test_evaluate_writes_reports_that_rejudging_confirms(saved_run, tmp_path, capsys):
    assert saved_run.name.startswith("hpm_wrn10_2-")
    assert {path.name for path in saved_run.iterdir()} == {
        "report.json", "report.md", "report.html", "adversarial.safetensors", "options.json"}
    folder = shutil.copytree(saved_run, tmp_path / "run")
    report = AttackReport.load(folder / "report.json")
    assert report.num_images == 8 and report.protocol["weights"] == "pretrained, tag digits_linf"
    assert report.protocol["options"] == {}
    assert (folder / "report.md").read_text() == report_markdown(report)
    assert (folder / "report.html").read_text() == report_page(report)
    assert report_markdown(report) in (saved_run.parents[1] / "printed.txt").read_text()

    assert evaluate.main(["--rejudge", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "the images are the run's, every candidate is within Linf:0.1 of them, and every verdict as in" in said

    with pytest.raises(ValueError, match=r"the model's mix is 0.0, that of .* is 0.5"):
        evaluate.main(["--rejudge", str(folder), "--model-kwargs", "mix=0.0"])

    data = json.loads((folder / "report.json").read_text())
    data["correct"]["fc/apgd-ce"] = data["correct"]["fc/apgd-ce"].translate(str.maketrans("01", "10"))
    (folder / "report.json").write_text(json.dumps(data))
    assert evaluate.main(["--rejudge", str(folder)]) == 1
    assert "judged otherwise than in the report: fc/apgd-ce. Is it the same model" in capsys.readouterr().out

    data["protocol"]["seed"] = 7
    (folder / "report.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match="are of different runs"):
        evaluate.main(["--rejudge", str(folder)])
    candidates = folder / "adversarial.safetensors"
    candidates.write_bytes(candidates.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is damaged"):
        evaluate.main(["--rejudge", str(folder)])


@pytest.mark.parametrize(("changes", "message"), [
    ({"ste/apgd-ce": lambda x: x + 0.3 * (x < 0.5)},
     r"image 0 of ste/apgd-ce in .* is outside of the threat model Linf:0.1: its distance is 0\.[34]"),
    ({"fc/apgd-ce": lambda x: x * math.nan}, "image 0 of fc/apgd-ce in .* is outside of .* its distance is nan"),
    ({"fc/apgd-ce": lambda x: x - 0.01}, r"image 0 of fc/apgd-ce in .* is outside of .* its pixels go from -0.01 to"),
    ({"fc/apgd-ce": lambda x: x[:4]}, r"fc/apgd-ce in .* has the shape \(4, 1, 8, 8\) .*; expected those of the clean"),
    ({".*": lambda x: x.clamp(min=0.05)}, "images or labels that are not those of its run: their data_digest is "),
    ({".*|labels": lambda x: x.flip(0)}, "images or labels that are not those of its run: their data_digest is "),
    ({"fc/apgd-ce": lambda x: None}, None),
    *((protocol, r"the protocol in .* is damaged \(") for protocol in (
        "{", "[" * 100_000, '{"threat": "Linf:0.1", "batch_size": "4", "data_digest": 1, "mix": 0}')),
])
def test_rejudging_refuses_candidates_outside_of_the_run(saved_run, tmp_path, capsys, changes, message):
    shutil.copytree(saved_run, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "adversarial.safetensors"
    with safe_open(path, "pt") as file:
        metadata = {"protocol": changes} if isinstance(changes, str) else file.metadata()
    tensors = load_file(path)
    (pattern, change), = changes.items() if isinstance(changes, dict) else [("none", None)]
    for name in [name for name in tensors if re.fullmatch(pattern, name) and (name != "labels" or "labels" in pattern)]:
        tensors[name] = change(tensors[name])
    save_file({name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}, path, metadata)
    if message is None:
        assert evaluate.main(["--rejudge", str(tmp_path)]) == 1
        assert "1 of " in capsys.readouterr().out
    else:
        with pytest.raises(ValueError, match=message):
            evaluate.main(["--rejudge", str(tmp_path)])


@pytest.mark.parametrize(("arguments", "message"), [
    (["--output", "file/below"], "cannot write into the output folder file/below"),
    (["--threat", "Linf:2"], "eps is 2.0 for Linf; pixels are in [0, 1]"),
    (["--num-images", "361"], "asked for the first 361 images; the split test of digits has 360 (0 for all)"),
    (["--checkpoint", "missing.safetensors"], "cannot read the checkpoint missing.safetensors: there is no such file"),
    (["--rejudge", "missing", "--inference", "fc"], "leave out --inference"),
    (["--model", "resnet18", "--no-pretrained"], "1000 classes and digits 10. To train, give --num-classes 10"),
    (["--inference", "fc,batch", "--robustbench-json", "info.json"], "--robustbench-json is of one evaluation"),
    (["--neighbours", "10", "--inference", "fc,sample"], "it needs a fitted HPM head and --inference batch"),
    (["--protocol", "fast", "--budget", "fab-t=20x3"], "--budget is given for fab-t, which is not among the"),
    (["--surrogates", "nope", "--save-adversarial", "--eps-sweep", "0.1:0.2:0.1"], "unknown surrogate 'nope'"),
    (["--num-classes", "10", "--model-kwargs", "num_classes=5"],
     "--num-classes is 10 and --model-kwargs num_classes=5; give one of them"),
    (["--output", "earlier"], "earlier holds the adversarial.safetensors of an earlier run"),
])
def test_evaluate_refuses_bad_options_before_it_attacks(arguments, message, tmp_path, inside, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "earlier").mkdir()
    (tmp_path / "earlier" / "adversarial.safetensors").touch()
    with pytest.raises((ValueError, OSError)) as error:
        evaluate.main(arguments)
    assert message in str(error.value)
    assert capsys.readouterr().out == ""
    assert not list(tmp_path.rglob("report.json"))
    # The same command, mended, is to find no earlier run.
    assert not list(tmp_path.rglob("options.json"))


def test_evaluate_sweeps_over_modes_and_radii_and_a_stopped_sweep_goes_on(inside, capsys):
    options = [*QUICK, "--surrogates", "fc", "--budget", "apgd-ce=3", "--output", "out", "--inference", "sample,fc",
               "--eps-sweep", "0:0.2:0.1"]
    assert evaluate.main(options) == 0
    printed = capsys.readouterr().out
    assert "| eps | sample | fc |" in printed and "written: out/sweep.html" in printed
    folders = {f"{mode}-Linf-{eps}" for mode in ("sample", "fc") for eps in ("0.1", "0.2")}
    assert {path.name for path in Path("out").iterdir()} == {*folders, "sweep.html", "options.json"}
    assert {path.as_posix() for path in Path("out").glob("*/*")} == {
        f"out/{folder}/report.{kind}" for folder in folders for kind in ("json", "md", "html")}
    assert all(f"href='{folder}/report.html'" in Path("out/sweep.html").read_text() for folder in folders)
    with pytest.raises(ValueError, match=r"out holds the sweep\.html of an earlier run"):
        evaluate.main(options)
    with pytest.raises(ValueError, match=r"holds several reports, fc-Linf-0.1, .*; give the folder of one"):
        evaluate.main(["--compare", "out", "out"])
    # As it is if it was stopped in the last of its runs.
    first, last = (Path("out") / name / "report.json" for name in ("sample-Linf-0.1", "fc-Linf-0.2"))
    whole, written = AttackReport.load(last), first.stat().st_mtime_ns
    last.unlink()
    Path("out/sweep.html").unlink()
    assert evaluate.main(["--resume", "out"]) == 0
    assert first.stat().st_mtime_ns == written and AttackReport.load(last).same_results(whole)
    assert Path("out/sweep.html").exists()


@pytest.mark.parametrize("model", ["local-dir:/data/a b/run", "hf-hub:org/name@v1", "x" * 300, "é:" * 200, "../..", ""])
def test_a_default_output_folder_fits_every_file_system(model):
    for prefix in ("", "train-"):
        folder = default_folder(model, prefix)
        assert folder.parent == Path("output") and len(os.fsencode(folder.name)) <= 150
        assert set(folder.name) <= {*string.ascii_letters, *string.digits, *"-_.+="} and folder.name.startswith(prefix)


EVALUATION = ["evaluate.py", *protocols.QUICK, "--num-images", "4", "--save-adversarial", "--output", "é–run"]
TRAINING = ["train.py", "--device", "cpu", "--pretrained", "--epochs", "1", "--batch-size", "500",
            "--attack-steps", "1", "--val-attack-steps", "1", "--output", "é–run"]


@pytest.mark.parametrize(("command", "shell", "code", "message"), [
    (EVALUATION, "PYTHONIOENCODING=ascii exec \"$@\" 2>&-", 0, ""),
    (EVALUATION, "exec \"$@\" >/dev/full", 1, "evaluate.py: cannot write standard output: "),
    (EVALUATION, "ulimit -f 1; exec \"$@\"", 1, "evaluate.py: cannot write é–run/progress/batch00000-step"),
    (TRAINING, "exec \"$@\" >&- 2>&-", 0, ""),
    (TRAINING, "PYTHONIOENCODING=cp1252 exec \"$@\"", 0, ""),
    (TRAINING, "ulimit -f 100; exec \"$@\"", 1, "train.py: cannot write é–run/model.safetensors"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_closed_narrow_and_full_outputs_are_no_traceback(command, shell, code, message, tmp_path):
    done = subprocess.run(["bash", "-c", shell, "bash", sys.executable, str(ROOT / command[0]), *command[1:]],
                          cwd=tmp_path, capture_output=True, timeout=900, env=ENVIRON)
    errors = done.stderr.decode(errors="replace")
    assert done.returncode == code, errors
    assert message in errors and "Traceback" not in errors and "Exception ignored" not in errors
    if code == 0:
        assert (tmp_path / "é–run" / ("report.html" if command is EVALUATION else "model.safetensors")).exists()
    else:
        assert not list(tmp_path.rglob("*.tmp")) and not list(tmp_path.rglob(".lock"))


def test_a_command_whose_reader_has_gone_ends_without_a_word():
    line = 'exec > >(exec <&-); wait $!; exec "$0" -m timm_hpm --help'
    done = subprocess.run(["bash", "-c", line, sys.executable], cwd=ROOT, capture_output=True, timeout=900)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.slow
def test_the_readme_s_first_command(tmp_path):
    python(ROOT / "evaluate.py", "--output", "report", folder=tmp_path)
    report = AttackReport.load(tmp_path / "report" / "report.json")
    assert report.num_images >= 100 and report.protocol["protocol_digest"] == (
        timm_hpm.PROTOCOLS["standard"].for_classifier(plain=True).digest())
    assert report.robust_accuracy <= min(value for row in report.by_surrogate.values() for value in row.values())


def test_the_readme_s_example_runs(inside):
    example = (ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0]
    # The same calls on a smaller budget: the standard one is the slow tests'.
    assert "batch_size=16)" in example
    names: dict = {"quick": timm_hpm.PROTOCOLS["fast"].changed(["fc"], ["apgd-ce"])}
    exec(example.replace("batch_size=16)", "batch_size=16, protocol=quick)"), names)
    assert 0 <= names["report"].robust_accuracy <= names["report"].clean_accuracy <= 1
    assert type(names["model"]) is type(timm.create_model("convnext_tiny", num_classes=10))
    assert names["report"].by_surrogate["fc"]["apgd-ce"] == names["report"].robust_accuracy


NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def write_digits(folder: Path, split: str, each: int) -> None:
    """Writes the first digits of each class as PNGs."""
    images, labels = timm_hpm.load_split("digits", split).tensors
    for number, name in enumerate(NAMES):
        (folder / name).mkdir(parents=True)
        for i, image in enumerate(images[labels == number][:each]):
            Image.fromarray((255 * image[0]).round().byte().numpy()).save(folder / name / f"{i}.png")


def test_class_names_go_from_the_folder_through_the_checkpoint_into_the_report(tmp_path):
    write_digits(tmp_path / "images" / "train", "train", 8)
    write_digits(tmp_path / "images" / "test", "test", 2)
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    images = ["--dataset", "folder", "--data-dir", str(tmp_path / "images")]
    ordered = ["--class-map", str(tmp_path / "names.txt")]
    train = ["--device", "cpu", "--pretrained", "-b", "36", "--epochs", "1", "--lr", "1e-6", "--attack-steps", "1"]
    done = python(ROOT / "train.py", *train, *images, *ordered, "--output", "run", folder=tmp_path)
    model = timm.create_model(f"local-dir:{tmp_path / 'run'}", pretrained=True)
    assert list(model.pretrained_cfg["label_names"]) == NAMES
    assert f"--class-map {tmp_path / 'names.txt'}" in done.stdout  # in the command that measures it

    quick = [*protocols.QUICK, "--num-images", "0", "--model", f"local-dir:{tmp_path / 'run'}", *images]
    evaluate.main([*quick, *ordered, "--output", str(tmp_path / "ordered")])
    with pytest.warns(UserWarning, match="folder names 9 of the 10 classes otherwise than the model does: 'eight' is "
                                         "'zero' there"):
        evaluate.main([*quick, "--output", str(tmp_path / "sorted")])
    ordered, unordered = (AttackReport.load(tmp_path / name / "report.json") for name in ("ordered", "sorted"))
    assert ordered.protocol["class_names"] == NAMES and ordered.clean_accuracy > 0.9
    assert unordered.protocol["class_names"] == sorted(NAMES) and unordered.clean_accuracy < 0.4


@pytest.mark.parametrize("names", [None, NAMES, dict(enumerate(NAMES)), NAMES[:5]])
def test_a_model_is_compared_by_its_class_names_if_it_has_one_for_each(names, recwarn):
    model = timm.create_model("hpm_wrn10_2", pretrained=True)
    model.pretrained_cfg["label_names"] = names
    split = open_split_for(model, "digits", "val")
    assert split.class_names == tuple(string.digits)
    said = [str(warning.message) for warning in recwarn]
    if names is None or len(names) == 5:
        assert class_names(model) is None and said == []
    else:
        assert class_names(model) == tuple(NAMES)
        assert len(said) == 1 and "10 of the 10 classes" in said[0] and "'0' is 'zero' there" in said[0]


def test_an_interrupt_at_any_time_is_no_traceback(capsys):
    def main() -> int:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stopped:
        run_command("evaluate.py", main)
    assert stopped.value.code == 130 and capsys.readouterr().err == "evaluate.py: stopped\n"
