"""Evaluation and training on a GPU; `pytest -m gpu`, which skips them on a machine without CUDA."""

import warnings

import pytest
import timm
import torch
from protocols import SMALL, run_attack, unfinished
from torch import nn
from training_runs import rows, run, stopped

import evaluate
from timm_hpm import AttackReport, PixelModel, ThreatModel, find_head, fit_prototypes
from timm_hpm.attacks import fab
from timm_hpm.evaluation import ATTACKS, Budget
from timm_hpm.evaluation.attacked import AttackedModel
from timm_hpm.evaluation.batch import AttackBatch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

NUM_DIGITS = 24
DEVICE = "cuda"
THREAT = ThreatModel("Linf", 0.15)


@pytest.fixture
def on_device(model, digits) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    find_head(model).inference = "batch"
    return model.to(DEVICE), *(part.to(DEVICE) for part in digits)


def synchronisations(attack: str, batch: AttackBatch, budget: Budget) -> int:
    """Returns how often an attack waits for the device."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ATTACKS[attack].run(batch, THREAT, budget)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


@pytest.mark.parametrize(("attack", "most"), [("apgd-ce", 0), ("apgd-t", 0), ("fab-t", 3), ("square", 1), ("joint", 0),
                                              ("joint-subset", 0)])
def test_a_step_waits_for_the_device_no_more_than_it_must(on_device, attack, most):
    model, images, labels = on_device
    surrogates, counts = ["soft", "ste"] if "joint" in attack else ["fc", "ste"], []
    for iterations in (10, 10, 30):  # the first one warms up
        batch = AttackBatch(AttackedModel(PixelModel(model), images), surrogates, images, labels)
        torch.manual_seed(0)
        counts.append(synchronisations(attack, batch, Budget(iterations, targets=1)))
    assert counts[2] - counts[1] <= 20 * most, counts


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_fab_finds_the_points_of_the_cpu(norm):
    """It looks less often whether its projections have converged, which changes no point."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 5)).double()
    images, targets = torch.rand(40, 1, 8, 8, dtype=torch.float64), torch.randint(5, (40,))
    labels = model(images).argmax(dim=1)
    arguments = images, labels, (targets + (targets == labels)) % 5
    here = fab(model, *arguments, ThreatModel(norm, 0.1), 10)
    there = fab(model.to(DEVICE), *(part.to(DEVICE) for part in arguments), ThreatModel(norm, 0.1), 10)
    torch.testing.assert_close(there.cpu(), here, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("inference", ["batch", "dataset"])
def test_a_whole_evaluation_agrees_with_the_cpu_and_its_candidates_with_the_judge(inference, tmp_path):
    options = ["--num-images", "24", "--batch-size", "12", "--threat", "Linf:0.15", "--inference", inference,
               "--neighbours", "4" if inference == "batch" else "none", "--save-adversarial"]
    budgets = {name: budget for name, budget in SMALL.items() if inference == "batch" or "joint" not in name}
    options += ["--attacks", ",".join(budgets), "--budget", *(f"{name}={budget}" for name, budget in budgets.items())]
    for name, device in (("here", "cpu"), ("there", DEVICE)):
        assert evaluate.main([*options, "--device", device, "--output", str(tmp_path / name)]) == 0
    here, there = (AttackReport.load(tmp_path / name / "report.json") for name in ("here", "there"))
    assert there.protocol["device"].startswith(DEVICE) and here.correct["clean"] == there.correct["clean"]
    assert abs(here.robust_accuracy - there.robust_accuracy) <= 3 / 24 and there.robust_accuracy < 1
    assert evaluate.main(["--rejudge", str(tmp_path / "there"), "--device", DEVICE]) == 0


def test_a_stopped_evaluation_goes_on_to_the_same_report(on_device, tmp_path):
    options = {"budgets": SMALL, "batch_size": 12, "folder": tmp_path}
    state = torch.cuda.get_rng_state()
    first = unfinished(*on_device, THREAT, **options)
    assert run_attack(*on_device, THREAT, **options).same_results(first)
    assert torch.equal(torch.cuda.get_rng_state(), state), "the caller's random state"


def test_prototypes_are_those_of_the_cpu(on_device, digits):
    model, images, labels = on_device
    other = timm.create_model("hpm_wrn10_2", pretrained=True).eval()
    for net, batch in ((model, (images, labels)), (other, digits)):
        fit_prototypes(net, [batch])
    torch.testing.assert_close(model.fc.prototypes.cpu(), other.fc.prototypes, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("changes", [
    {}, {"amp": True, "channels_last": True}, {"amp": True, "amp_dtype": "float16", "clip_grad": 1.0},
    {"objective": "trades", "amp": True, "channels_last": True, "model_ema": True, "model_ema_decay": 0.5},
], ids=lambda changes: " ".join(changes))
def test_training_is_resumed_and_ends_as_well(changes, tmp_path):
    changes |= {"device": DEVICE, "epochs": 2, "checkpoint_hist": 9}
    whole = run(tmp_path / "whole", **changes)
    resumed = run(stopped(tmp_path / "whole", tmp_path / "part"), resume=True, **changes)
    assert whole["val_clean"] > 0.5 and abs(whole["val_robust"] - resumed["val_robust"]) < 0.02
    epochs = [rows(tmp_path / name) for name in ("whole", "part")]
    assert [row["epoch"] for row in epochs[0]] == [row["epoch"] for row in epochs[1]] == ["0", "1"]
    assert epochs[0][0]["loss"] == epochs[1][0]["loss"]
