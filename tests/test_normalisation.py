"""How pixels are normalised, where that comes from, and the flags of clean accuracies that say it was wrong."""

import html
import warnings

import protocols
import pytest
import torch
import torchvision
from protocols import run_attack
from safetensors.torch import save_file
from torch import nn

import evaluate
import timm_hpm
from timm_hpm import (
    AttackReport,
    NormalisationWarning,
    PixelModel,
    ThreatModel,
    report_markdown,
)
from timm_hpm.evaluation.checks import clean_flags
from timm_hpm.models.create import create_model

NUM_DIGITS = 16

THREAT = ThreatModel("Linf", 0.1)
QUICK = {"attacks": ["apgd-ce"], "surrogates": ["fc"], "budgets": {"apgd-ce": 2}, "batch_size": 16}
FEW = [*protocols.QUICK, "--num-images", "16"]


def test_given_mean_and_std_are_the_ones_that_count_and_the_report_says_whose_they_are(model, digits):
    right = run_attack(model, *digits, THREAT, **QUICK)
    mean, std = (right.protocol["normalisation"][name] for name in ("mean", "std"))
    assert right.protocol["normalisation"]["source"] == "the pretrained_cfg of hpm_wrn10_2, tag digits_linf"
    model.pretrained_cfg |= {"mean": (-3.0,), "std": (0.05,)}
    wrong = run_attack(model, *digits, THREAT, **QUICK)
    assert wrong.clean_accuracy < 0.3 and wrong.unreliable
    assert wrong.flags[0].name == "clean-near-chance"
    given = run_attack(PixelModel(model, mean, std), *digits, THREAT, **QUICK)
    assert given.correct == right.correct and not given.unreliable
    assert given.protocol["normalisation"] == {"mean": mean, "std": std, "source": "given as mean and std"}
    model.pretrained_cfg["std"] = std
    half = run_attack(PixelModel(model, mean), *digits, THREAT, **QUICK)
    assert half.correct == right.correct and half.protocol["normalisation"]["source"] == (
        "mean: given as mean and std; std: the pretrained_cfg of hpm_wrn10_2, tag digits_linf")


def test_mean_and_std_of_a_module_of_its_own(model, digits):
    mean, std = model.pretrained_cfg["mean"], model.pretrained_cfg["std"]
    module = nn.Sequential(model).eval()
    plain = run_attack(module, *digits, THREAT, **QUICK)
    assert plain.protocol["normalisation"] is None
    assert "Pixels go to the model as they are, in [0, 1]" in html.unescape(report_markdown(plain))
    given = run_attack(PixelModel(module, mean, std), *digits, THREAT, **QUICK)
    assert given.correct == run_attack(model, *digits, THREAT, **QUICK).correct
    with pytest.raises(ValueError, match="no pretrained_cfg that says its std"):
        PixelModel(module, mean)
    with pytest.raises(ValueError, match="would do so twice; leave out mean and std"):
        PixelModel(PixelModel(module, mean, std), mean, std)
    with pytest.raises(ValueError, match="images have 1 channels, the model's mean and std 3"):
        run_attack(PixelModel(model, [0.5] * 3, [0.5] * 3), *digits, THREAT, **QUICK)


def test_evaluate_takes_mean_and_std_and_rejudges_by_them(model, tmp_path, capsys):
    run = tmp_path / "run"
    options = [*FEW, "--mean", "-3", "--std", "0.05", "--save-adversarial", "--output", str(run)]
    assert evaluate.main(options) == 0
    printed = capsys.readouterr()
    said = "by mean (-3) and std (0.05); source: given as mean and std."
    assert said in printed.err and said in "\n".join(printed.out.splitlines()[:12])
    report = AttackReport.load(run / "report.json")
    assert report.clean_accuracy < 0.3 and "--mean=-3.0 --std 0.05" in " ".join(report_markdown(report).split())
    assert evaluate.main(["--rejudge", str(run)]) == 0 and evaluate.main(["--resume", str(run)]) == 0
    with pytest.raises(ValueError, match=r"the model.s mean and std is \(\[0.5\], "):
        evaluate.main(["--rejudge", str(run), "--mean", "0.5"])
    with pytest.raises(ValueError, match="mean and std is"):
        timm_hpm.rejudge(model, run / "adversarial.safetensors")
    with pytest.raises(ValueError, match=r"options: --mean \[0.5\] \(there: \[-3.0\]\)"):
        evaluate.main(["--resume", str(run), "--mean", "0.5"])


def names(answers, labels, num_classes):
    return [flag.name for flag in clean_flags(torch.as_tensor(answers), torch.as_tensor(labels), num_classes)]


@pytest.mark.parametrize(("num_classes", "right", "flagged"), [
    (10, 0, True), (10, 19, True), (10, 20, False), (2, 55, True), (2, 56, False), (1000, 0, True), (1000, 1, False)])
def test_a_clean_accuracy_near_chance_is_flagged(num_classes, right, flagged):
    labels = torch.arange(100) % num_classes
    # Wrong answers are spread over the classes.
    wrong = (labels + 1 + torch.randint(num_classes - 1, (100,))) % num_classes
    answers = torch.where(torch.arange(100) < right, labels, wrong)
    assert ("clean-near-chance" in names(answers, labels, num_classes)) == flagged
    assert not names(answers[:7], labels[:7], num_classes)


@pytest.mark.parametrize("step", [1, -1])
@pytest.mark.parametrize(("num_classes", "accuracy"), [(10, 0.6), (1000, 0.45), (2, 1.0)])
def test_labels_that_are_off_by_one_are_flagged(num_classes, accuracy, step):
    labels = torch.randint(num_classes, (200,))
    guess = torch.randint(num_classes, (200,))
    answers = torch.where(torch.rand(200) < accuracy, (labels + step) % num_classes, guess)
    assert "labels-off-by-one" in names(answers, labels, num_classes)


@pytest.mark.parametrize("num_classes", [2, 3, 10])
@pytest.mark.parametrize("num_images", [8, 100])
def test_honest_answers_are_not_off_by_one(num_classes, num_images):
    raised = 0
    for _ in range(100):
        labels, guess = torch.randint(num_classes, (2, num_images))
        trained = torch.where(torch.rand(num_images) < 0.3 + 0.7 * torch.rand(()), labels, guess)
        for answers in (guess, torch.full_like(labels, int(labels[0])), trained):
            raised += "labels-off-by-one" in names(answers, labels, num_classes)
    assert raised <= 3 and names(labels, labels, num_classes) == []


def test_a_checkpoint_that_does_not_say_it_is_said_to_be_assumed(model, tmp_path, capsys):
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    mean, std = ([str(x) for x in model.pretrained_cfg[name]] for name in ("mean", "std"))
    words = [*FEW, "--checkpoint", str(tmp_path / "w.safetensors"), "--output"]
    with pytest.warns(NormalisationWarning, match="or --mean and --std to evaluate.py"):
        assert evaluate.main([*words, str(tmp_path / "a")]) == 0
    assert "w.safetensors does not say it" in capsys.readouterr().err
    with warnings.catch_warnings():
        warnings.simplefilter("error", NormalisationWarning)
        assert evaluate.main([*words, str(tmp_path / "b"), "--mean", *mean, "--std", *std]) == 0
    reports = [AttackReport.load(tmp_path / name / "report.json") for name in "ab"]
    assert reports[0].correct == reports[1].correct
    assert [report.protocol["normalisation"]["source"].partition(",")[0] for report in reports] == [
        "assumed", "given as mean and std"]


@pytest.mark.parametrize("has_head", [False, True])
def test_a_network_of_torchvision_without_normalisation_is_named(has_head):
    network = torchvision.models.squeezenet1_1(num_classes=4) if not has_head else timm_hpm.add_hpm_head(
        torchvision.models.shufflenet_v2_x0_5(num_classes=4))
    images, labels = torch.rand(2, 3, 32, 32), torch.zeros(2, dtype=torch.long)
    def attack(model):
        return timm_hpm.attack(model, images, labels, "Linf:0.1", "square", budget=1)
    with pytest.warns(timm_hpm.NormalisationWarning, match=r"is torchvision's.*PixelModel\(model, mean, std\)"):
        attack(network.eval())
    attack(timm_hpm.PixelModel(network, (0.5,) * 3, (0.5,) * 3))
    # As the network of a constructor, for the commands.
    name = f"torchvision.models:{'shufflenet_v2_x0_5' if has_head else 'squeezenet1_1'}"
    made = create_model(name, num_classes=4, **({"mix": 0.5} if has_head else {})).eval()
    with pytest.warns(timm_hpm.NormalisationWarning, match="Give mean and std: --mean and --std"):
        attack(made)
    attack(timm_hpm.PixelModel(made, (0,) * 3, (1,) * 3))
