"""A surrogate, an attack and a training objective of a user's own, from outside the package, run like ours."""

import argparse

import pytest
import timm
import torch
import torch.nn.functional as F
from protocols import run_attack
from safetensors.torch import load_file
from torch import Tensor
from training_runs import run, weights

import timm_hpm
from timm_hpm.evaluation import ATTACKS, Attack, Budget
from timm_hpm.functional import l2_logits
from timm_hpm.options import add_arguments
from timm_hpm.surrogates import SURROGATES, Surrogate, soft_logits
from timm_hpm.training import OBJECTIVES, Objective, TrainConfig

NUM_DIGITS = 16

THREAT = timm_hpm.ThreatModel("Linf", 0.05)


@pytest.fixture
def plugins(monkeypatch):
    """Adds a surrogate that depends on the batch, one that does not, and an attack."""
    def shrunken(head: timm_hpm.HPMHead, features: Tensor) -> Tensor:
        return l2_logits(features.float(), 0.5 * head.prototypes.float(), head.scale())

    def lukewarm(head: timm_hpm.HPMHead, features: Tensor) -> Tensor:
        return soft_logits(head, features, 0.5)

    def corner(batch, threat, budget) -> Tensor:
        """The corner of the ball of largest pixels."""
        return threat.project(batch.clean + threat.eps, batch.clean)

    monkeypatch.setitem(SURROGATES, "shrunken", Surrogate("shrunken", shrunken))
    monkeypatch.setitem(SURROGATES, "lukewarm", Surrogate("lukewarm", lukewarm, batch_dependent=True))
    monkeypatch.setitem(ATTACKS, "corner", Attack("corner", corner, Budget(1), needs_gradient=False))


@pytest.mark.parametrize("at_once", [1, 3])
def test_a_registered_surrogate_is_attacked_alone_and_side_by_side_and_in_joint_if_it_depends_on_the_batch(
        model, digits, plugins, at_once):
    timm_hpm.find_head(model).inference = "batch"
    report = run_attack(
        model, *digits, THREAT, batch_size=16, surrogates=["ste", "shrunken", "lukewarm"],
        attacks=["apgd-ce", "joint"], budgets={"apgd-ce": Budget(3), "joint": Budget(2)}, surrogates_at_once=at_once)
    assert set(report.correct) == {"clean", "ste/apgd-ce", "shrunken/apgd-ce", "lukewarm/apgd-ce", "ste/joint",
                                   "lukewarm/joint"}


def test_a_registered_attack_finds_the_points_that_it_says(model, digits, plugins, tmp_path):
    images, labels = digits
    report = run_attack(model, images, labels, THREAT, batch_size=16, surrogates=["fc"],
                                             attacks=["corner"], folder=tmp_path, save_adversarial=True)
    expected = (images + 0.05).clamp(max=1)
    found = load_file(tmp_path / "adversarial.safetensors")
    torch.testing.assert_close(found["fc/corner"], expected)
    right = timm_hpm.judge(model, found["fc/corner"], labels, 16)
    assert report.correct["fc/corner"] == "".join("1" if one else "0" for one in right)
    assert set(report.correct) == {"clean", "fc/corner", "true/corner"}


@pytest.mark.parametrize("prototype_features", ["adversarial", "both"])
def test_a_registered_objective_trains_by_its_own_attack_and_loss(prototype_features, tmp_path, monkeypatch):
    crafted, answered = [], []

    def corner(attack, images, labels):
        """The corner of the ball of largest pixels, and the step size as the options give it."""
        crafted.append((images, attack.threat.project(images + attack.threat.eps, images), attack.step_size))
        return crafted[-1][1]

    def squared_error(answers, labels, options):
        answered.append(len(answers))
        return sum(F.mse_loss(hpm.softmax(dim=1), F.one_hot(labels, hpm.shape[1]).float()) for _, hpm, _ in answers)

    monkeypatch.setitem(OBJECTIVES, "corner", Objective(
        "corner", squared_error, corner, uses_clean=True, options=("trades_beta",)))
    parser = argparse.ArgumentParser()
    add_arguments(parser, TrainConfig)
    words = ["--objective", "corner", "--trades-beta", "2", "--prototype-features", prototype_features]
    kept = run(tmp_path / "run", attack_steps=10, **vars(parser.parse_args(words)))
    assert answered == [2] * len(crafted) == [2] * 3 and 0 < kept["loss"] < 0.2
    for clean, adversarial, step_size in crafted:
        assert step_size == 2.5 * 0.1 / 10 and torch.equal(adversarial, (clean + 0.1).clamp(max=1))
    trained = weights(tmp_path / "run")["conv1.weight"]
    assert not torch.equal(trained, timm.create_model("hpm_wrn10_2", pretrained=True).conv1.weight)


def test_a_registered_objective_without_an_attack_trains_and_fits_on_clean_images(tmp_path, monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "error", Objective(
        "error", lambda answers, labels, options: F.multi_margin_loss(answers[0][2], labels), craft=None))
    for name in ("error", "clean"):
        run(tmp_path / name, objective=name, lr=1e-9, pretrained=False, prototype_epoch=0)
    heads = [weights(tmp_path / name)["fc.prototypes"] for name in ("error", "clean")]
    torch.testing.assert_close(*heads, rtol=1e-3, atol=1e-3)
