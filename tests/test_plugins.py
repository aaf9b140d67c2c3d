"""A surrogate and an attack of a user's own, from outside the package, run by the entry point like ours."""

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import timm_hpm
from timm_hpm.evaluation import ATTACKS, Attack, Budget
from timm_hpm.functional import l2_logits
from timm_hpm.surrogates import SURROGATES, Surrogate, soft_logits

NUM_DIGITS = 16

THREAT = timm_hpm.ThreatModel("Linf", 0.05)


@pytest.fixture
def plugins(monkeypatch):
    """Adds a surrogate that depends on the batch, one that does not, and an attack."""
    def shrunken(head: timm_hpm.HPMHead, features: Tensor) -> Tensor:
        return l2_logits(features.float(), 0.5 * head.prototypes.float(), head.scale())

    def lukewarm(head: timm_hpm.HPMHead, features: Tensor) -> Tensor:
        return soft_logits(head, features, 0.5)

    def corner(batch, threat, budget, notes) -> Tensor:
        """The corner of the ball of largest pixels."""
        return threat.project(batch.clean + threat.eps, batch.clean)

    monkeypatch.setitem(SURROGATES, "shrunken", Surrogate("shrunken", shrunken))
    monkeypatch.setitem(SURROGATES, "lukewarm", Surrogate("lukewarm", lukewarm, batch_dependent=True))
    monkeypatch.setitem(ATTACKS, "corner", Attack("corner", corner, Budget(1), needs_gradient=False))


@pytest.mark.parametrize("at_once", [1, 3])
def test_a_registered_surrogate_is_attacked_alone_and_side_by_side_and_in_joint_if_it_depends_on_the_batch(
        model, digits, plugins, at_once):
    report = timm_hpm.mixed_surrogate_attack(
        model, *digits, THREAT, batch_size=16, surrogates=["ste", "shrunken", "lukewarm"],
        attacks=["apgd-ce", "joint"], budgets={"apgd-ce": Budget(3), "joint": Budget(2)}, surrogates_at_once=at_once)
    assert set(report.correct) == {"clean", "ste/apgd-ce", "shrunken/apgd-ce", "lukewarm/apgd-ce", "ste/joint",
                                   "lukewarm/joint"}


def test_a_registered_attack_finds_the_points_that_it_says(model, digits, plugins, tmp_path):
    images, labels = digits
    report = timm_hpm.mixed_surrogate_attack(model, images, labels, THREAT, batch_size=16, surrogates=["fc"],
                                             attacks=["corner"], save_adversarial=tmp_path / "candidates.safetensors")
    expected = (images + 0.05).clamp(max=1)
    found = load_file(tmp_path / "candidates.safetensors")
    torch.testing.assert_close(found["fc/corner"], expected)
    right = timm_hpm.judge(model, found["fc/corner"], labels, 16)
    assert report.correct["fc/corner"] == "".join("1" if one else "0" for one in right)
    assert set(report.correct) == {"clean", "fc/corner", "true/corner"}
