"""MART, weight perturbation and extra images: closed forms, invariants, whole runs; extended runs; learning rates."""

import dataclasses
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from nets import same_tensors
from pictures import write_pictures
from processes import python
from safetensors.torch import load_file
from timm.optim import create_optimizer_v2
from torch import nn
from training_runs import TINY, forget_accelerator, rows, run, stopped, weights

import timm_hpm
from timm_hpm.training import Run, TrainConfig
from timm_hpm.training.extra import ExtraImages
from timm_hpm.training.objectives import boosted_cross_entropy, mart, perturbed_weights
from timm_hpm.training.run_folder import saved_options
from timm_hpm.training.setup import create_schedule


def test_the_boosted_cross_entropy_punishes_the_rival_too():
    # Probabilities 1/2, 1/4, 1/4 with label 0; and with label 1, whose rival is class 0.
    logits = torch.tensor([[math.log(2), 0.0, 0.0]])
    for label, expected in ((0, math.log(2) - math.log(3 / 4)), (1, math.log(4) - math.log(1 / 2))):
        assert boosted_cross_entropy(logits, torch.tensor([label])).item() == pytest.approx(expected)
    # Far from every float's limit, where 1 − p is 0: the exact logarithm, with a gradient.
    wrong = torch.tensor([[100.0, 0.0]], requires_grad=True)
    loss = boosted_cross_entropy(wrong, torch.tensor([1]))
    assert loss.item() == pytest.approx(200) and torch.autograd.grad(loss, wrong)[0].tolist() == [[2, -2]]


def test_mart_in_closed_form():
    def answers(*probabilities):
        logits = torch.tensor([probabilities]).log()
        return torch.zeros(1, 3), logits, logits.flip(1)

    clean, adversarial, label = answers(0.8, 0.2), answers(0.4, 0.6), torch.tensor([0])

    def expected(p, q):  # clean and adversarial probability of the label, of two classes
        divergence = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
        return -2 * math.log(q) + 3 * divergence * (1 - p)

    options = TrainConfig(objective="mart", fc_loss_weight=0.0, mart_lambda=3.0)
    assert mart([clean, adversarial], label, options).item() == pytest.approx(expected(0.8, 0.4), rel=1e-5)
    both = mart([clean, adversarial], label, dataclasses.replace(options, fc_loss_weight=0.5)).item()
    assert both == pytest.approx((expected(0.8, 0.4) + 0.5 * expected(0.2, 0.6)) / 1.5, rel=1e-5)
    # Clean images that the model is sure of, or alike answers, leave the boosted cross-entropy.
    for first in (answers(1 - 1e-7, 1e-7), adversarial):
        assert mart([first, adversarial], label, options).item() == pytest.approx(-2 * math.log(0.4), rel=1e-4)


def net() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    return model, torch.rand(8, 1, 8, 8), torch.arange(8) % 5


def test_each_weight_moves_by_gamma_of_its_norm_up_the_loss_and_back_exactly():
    gamma, (model, images, labels) = 0.2, net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def loss():
        return F.cross_entropy(model(images), labels)

    gradients = dict(zip(before, torch.autograd.grad(loss(), [model[0].weight]), strict=False))
    model.load_state_dict(before)
    with perturbed_weights(model, loss, gamma):
        inside = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert same_tensors(model.state_dict(), before)
    for name, tensor in inside.items():
        moved = tensor.double() - before[name].double()
        if tensor.ndim < 2:  # biases, BatchNorm and its statistics
            assert not moved.any(), name
        else:
            assert moved.norm() / before[name].double().norm() == pytest.approx(gamma, rel=1e-4)
    moved = inside["0.weight"] - before["0.weight"]
    assert F.cosine_similarity(moved.flatten(), gradients["0.weight"].flatten(), dim=0) > 0.9999


def test_the_gradient_is_that_of_the_perturbed_weights_and_an_error_takes_them_back():
    weight = nn.Parameter(torch.tensor([[3.0, 4.0]]))  # of the norm 5
    module = nn.Module()
    module.weight = weight

    def loss():
        return weight.square().sum() / 2  # whose gradient is the weight itself

    with perturbed_weights(module, loss, 0.1):
        loss().backward()
    torch.testing.assert_close(weight.grad, torch.tensor([[3.3, 4.4]]))
    assert weight.tolist() == [[3, 4]]
    with pytest.raises(RuntimeError, match="broken"), perturbed_weights(module, loss, 0.1):
        raise RuntimeError("broken")
    assert weight.tolist() == [[3, 4]]
    for flat in (lambda: weight.sum() * 0, lambda: weight.sum() * torch.inf):  # no direction
        with perturbed_weights(module, flat, 0.1):
            assert weight.tolist() == [[3, 4]]


@pytest.mark.parametrize("objective", ["mart", "clean"])
def test_without_perturbation_a_run_is_the_plain_one_and_with_it_another(objective, tmp_path):
    plain = run(tmp_path / "plain", objective=objective)
    run(tmp_path / "zero", objective=objective, awp_gamma=0.0)
    run(tmp_path / "late", objective=objective, awp_gamma=0.01, awp_warmup=1)
    kept = run(tmp_path / "awp", objective=objective, awp_gamma=0.01)
    state = weights(tmp_path / "plain")
    for name in ("zero", "late"):
        assert same_tensors(weights(tmp_path / name), state)
    found = weights(tmp_path / "awp")
    assert not torch.equal(found["conv1.weight"], state["conv1.weight"])
    assert kept["loss"] > plain["loss"] and kept["val_clean"] > 0.9


def test_a_finished_run_is_extended_by_more_epochs(tmp_path):
    run(tmp_path / "run", epochs=1, sched="constant", checkpoint_hist=9)
    run(tmp_path / "whole", epochs=3, sched="constant", checkpoint_hist=9)
    kept = run(tmp_path / "run", resume=True, epochs=3, sched="constant", checkpoint_hist=9)
    assert [row["epoch"] for row in rows(tmp_path / "run")] == ["0", "1", "2"] and kept["epoch"] in (0, 1, 2)
    # A constant rate is the same in both; only the options in the files' metadata tell them apart.
    found, whole = (load_file(tmp_path / name / "checkpoints" / "epoch-00003-batch-00000000" / "model.safetensors")
                    for name in ("run", "whole"))
    assert same_tensors(found, whole)
    assert saved_options(tmp_path / "run").epochs == 3
    with pytest.raises(ValueError, match=r"epochs \(3 there, 2 given\)"):
        run(tmp_path / "run", resume=True, epochs=2, sched="constant")


def test_an_extended_run_keeps_the_defaults_that_depend_on_its_epochs(tmp_path):
    run(tmp_path, pretrained=False, epochs=1)
    before = saved_options(tmp_path)
    run(tmp_path, resume=True, pretrained=False, epochs=2)
    after = saved_options(tmp_path)
    assert (after.prototype_epoch, after.warmup_epochs) == (before.prototype_epoch, before.warmup_epochs) == (1.0, 0.25)


def test_an_extended_run_forgets_that_it_ended_at_chance(tmp_path):
    options = {"pretrained": False, "lr": 0.1, "batch_size": 1000, "warmup_epochs": 0.5, "objective": "clean",
               "model_kwargs": {"inference": "fc"}}
    run(tmp_path, epochs=1, **options)
    assert "at chance" in (tmp_path / "warnings.txt").read_text()
    kept = run(tmp_path, resume=True, epochs=30, **options)
    assert kept["val_clean"] > 0.5
    assert not (tmp_path / "warnings.txt").exists() or "at chance" not in (tmp_path / "warnings.txt").read_text()


def test_the_validation_fraction_is_held_out(tmp_path):
    write_pictures(tmp_path / "images", {"train/0": 10, "train/1": 10, "test/0": 1, "test/1": 1}, mode="L")
    config = dataclasses.replace(
        TINY, dataset="folder", data_dir=str(tmp_path / "images"), img_size=8, batch_size=4, num_classes=2,
        threat="Linf:0.1", pretrained=False, mean=(0.5,), std=(0.5,))
    for fraction, held_out in ((None, 2), (0.4, 8)):
        forget_accelerator()
        found = Run(dataclasses.replace(config, val_fraction=fraction), tmp_path / str(fraction))
        assert (len(found.data.train), len(found.data.val)) == (20 - held_out, held_out)
    forget_accelerator()


def rates(updates, **options) -> list[float]:
    """Returns the learning rates before each update of a run of 10 epochs of 10 updates, at a peak of 1."""
    optimizer = create_optimizer_v2(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "sgd", lr=1.0)
    schedule = create_schedule(TrainConfig(epochs=10, lr=1.0, **options), optimizer, 10)
    found = []
    for update in updates:
        if update:  # as a run that is resumed there
            schedule.step(update)
        found.append(optimizer.param_groups[0]["lr"])
    return found


@pytest.mark.parametrize(("options", "expected"), [
    ({"sched": "onecycle", "warmup_epochs": 5}, [0.04, 0.52, 1, 0.5, 0]),
    ({"sched": "onecycle"}, [1, 0.853553, 0.5, 0.146447, 0]),
    ({"sched": "onecycle", "warmup_epochs": 5, "warmup_lr": 0.1, "min_lr": 0.5}, [0.1, 0.55, 1, 0.75, 0.5]),
    ({"sched": "cosine", "warmup_epochs": 5, "warmup_prefix": True, "warmup_lr": 0.5}, [0.5, 0.75, 1, 0.5, 0]),
    ({"sched": "cosine", "min_lr": 0.5}, [1, 0.926777, 0.75, 0.573223, 0.5]),
    ({"sched": "constant", "warmup_epochs": 5, "warmup_lr": 0.2}, [0.2, 0.6, 1, 1, 1]),
    ({"sched": "step", "decay_epochs": 2.5, "decay_rate": 0.5}, [1, 0.5, 0.25, 0.125, 0.0625]),
    ({"sched": "multistep", "decay_milestones": (5, 7.5), "decay_rate": 0.1}, [1, 1, 0.1, 0.01, 0.01]),
    ({"sched": "poly", "decay_rate": 1.0}, [1, 0.75, 0.5, 0.25, 0]),
], ids=str)
def test_a_schedule_has_its_rates_at_the_quarters_of_a_run(options, expected):
    assert rates((0, 25, 50, 75, 100), **options) == pytest.approx(expected, abs=2e-6)


def test_a_layer_s_rate_keeps_its_ratio():
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1, requires_grad=True)], "lr_scale": 0.5},
                                 {"params": [torch.zeros(1, requires_grad=True)]}], lr=1.0)
    schedule = create_schedule(TrainConfig(epochs=2, lr=1.0), optimizer, 10)
    for update in (0, 5, 10, 15):
        schedule.step(update)
        low, high = (group["lr"] for group in optimizer.param_groups)
        assert low == high / 2 > 0


@pytest.mark.parametrize(("options", "message"), [
    ({"min_lr": 0.2}, "min_lr is 0.2, above the peak 0.1"), ({"warmup_lr": 1}, "warmup_lr is 1.0, above the peak 0.1"),
])
def test_rates_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options)


def digits(number: int = 400) -> dict[str, np.ndarray]:
    """Returns the first training digits in the layout of generated images."""
    images, labels = timm_hpm.load_split("digits", "train").tensors
    return {"image": (images[:number] * 255).round().byte().permute(0, 2, 3, 1).numpy(),
            "label": labels[:number].numpy()}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_images_are_drawn_as_they_were_saved(save, tmp_path):
    arrays = digits()
    save(tmp_path / "more.npz", **arrays, origin=np.zeros(3))
    extra = ExtraImages(tmp_path / "more.npz", (1, 8, 8), 10, tmp_path / "unpacked.npy")
    assert (tmp_path / "unpacked.npy").exists() == (save is np.savez_compressed)
    torch.manual_seed(1)
    rows = torch.randint(400, (50,))
    torch.manual_seed(1)
    images, labels = extra.draw(50)
    assert images.shape == (50, 1, 8, 8) and images.dtype == torch.float32 and labels.dtype == torch.int64
    assert torch.equal((images * 255).round().byte().permute(0, 2, 3, 1), torch.from_numpy(arrays["image"])[rows])
    assert torch.equal(labels, torch.from_numpy(arrays["label"])[rows])


MEMORY = '''
import re, sys
from pathlib import Path
import numpy as np, torch
from timm_hpm.training.extra import ExtraImages

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

torch.rand(10), np.load
before = anonymous()
extra = ExtraImages(sys.argv[1], (3, 32, 32), 10, Path(sys.argv[2]))
for _ in range(20):
    extra.draw(100)
print(anonymous() - before)
'''


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_file_of_180_mib_takes_few_of_them_in_memory(save, tmp_path):
    save(tmp_path / "more.npz", image=np.zeros((60_000, 32, 32, 3), np.uint8), label=np.zeros(60_000, np.int64))
    assert float(python("-c", MEMORY, "more.npz", "unpacked.npy", folder=tmp_path).stdout) < 40  # MiB


def test_a_model_learns_from_them(tmp_path):
    """All the extra labels are 3, so a model that learns from many of them predicts it too often."""
    three = digits()
    three["label"][:] = 3
    np.savez_compressed(tmp_path / "more.npz", **three)
    options = {"objective": "trades", "extra_data": str(tmp_path / "more.npz"), "batch_size": 128, "lr": 0.1,
               "model_kwargs": {"inference": "fc"}}
    accuracy = {}
    for fraction in (0.0, 0.9):
        accuracy[fraction] = run(tmp_path / str(fraction), extra_fraction=fraction, **options)["val_clean"]
        assert not (tmp_path / str(fraction) / "extra-data.npy").exists()
    assert accuracy[0.0] > 0.8 and accuracy[0.9] < 0.5


def test_a_fraction_of_0_is_the_plain_run_and_a_resumed_one_ends_with_the_same_bits(tmp_path):
    """Other images of the same labels are refused."""
    np.savez(tmp_path / "more.npz", **digits())
    given = {"extra_data": str(tmp_path / "more.npz"), "recovery_interval": 2, "checkpoint_hist": 9}
    run(tmp_path / "plain")
    run(tmp_path / "zero", **given | {"extra_fraction": 0.0})
    assert same_tensors(weights(tmp_path / "plain"), weights(tmp_path / "zero"))
    run(tmp_path / "whole", **given, extra_fraction=0.5)
    part = stopped(tmp_path / "whole", tmp_path / "part")
    # 6 batches of 175 digits, and the end of the epoch.
    assert len(list((tmp_path / "whole" / "checkpoints").iterdir())) == 4
    np.savez(tmp_path / "more.npz", image=255 - digits()["image"], label=digits()["label"])
    with pytest.raises(ValueError, match="begun with other extra data"):
        run(part, resume=True, **given, extra_fraction=0.5)
    np.savez(tmp_path / "more.npz", **digits())
    run(part, resume=True, **given, extra_fraction=0.5)
    for name in ("metrics.csv", "model.safetensors"):
        assert (part / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(("change", "message"), [
    ({"image": np.zeros((4, 1, 8, 8), np.uint8)}, "`image` is uint8 (4, 1, 8, 8); expected uint8 (N, 8, 8, 1)"),
    ({"image": np.zeros((4, 8, 8, 1), np.uint8, order="F") + np.zeros((4, 8, 8, 1), np.uint8, order="F")}, "Fortran"),
    ({"label": np.zeros(3, np.int64)}, "`label` is int64 (3,), of 4 images"),
    ({"label": np.array([0, 1, 2, 10])}, "`label` has values from 0 to 10, and the model has the classes 0 to 9"),
    ({"label": np.array([0, "a", None, 2], dtype=object)}, "allow_pickle=False"),
    ({"label": None}, "label.npz: it holds image; expected"), (b"PK\\x03\\x04 cut", "not a zip file"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_another_layout_is_refused_before_anything_is_written(change, message, tmp_path, inside):
    if isinstance(change, bytes):
        Path("label.npz").write_bytes(change)
    else:
        arrays = {name: array for name, array in ({"image": np.zeros((4, 8, 8, 1), np.uint8), "label": np.arange(4)}
                                                  | change).items() if array is not None}
        np.savez_compressed("label.npz", **arrays)
    with pytest.raises(ValueError, match=re.escape(message)) as found:
        run("run", extra_data="label.npz")
    assert "label.npz" in str(found.value) and "expected `image`, uint8 (N, H, W, channels)" in str(found.value)
    assert [path.name for path in tmp_path.iterdir()] == ["label.npz"]


def test_a_missing_file_and_a_batch_without_images_of_the_data_set_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"the extra data nosuch.npz: there is no such file"):
        run(tmp_path / "run", extra_data="nosuch.npz")
    with pytest.raises(ValueError, match="which leaves no image of the data set"):
        TrainConfig(extra_data="x.npz", extra_fraction=0.99, batch_size=10)
    assert not list(tmp_path.iterdir())
