"""The parts of training: schedules, objectives, the trunk, options, checkpoints; and short runs in this process."""

import dataclasses
import hashlib
import importlib.util
import itertools
import math
import re
import shutil
import warnings
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest
import timm
import torch
import training_runs
import yaml
from nets import same_tensors
from pictures import write_pictures
from safetensors.torch import load_file
from timm.optim import create_optimizer_v2
from torch import nn
from torch.utils._pytree import tree_flatten
from torch.utils.data import DataLoader
from training_runs import forget_accelerator, rows, stopped, weights

import timm_hpm
from timm_hpm import ThreatModel, find_head
from timm_hpm.attacks import pgd
from timm_hpm.evaluation.judge import judge
from timm_hpm.evaluation.resume import sealed, unsealed
from timm_hpm.files import remove_unfinished
from timm_hpm.options import read_options
from timm_hpm.training import Run, TrainConfig, train
from timm_hpm.training.header import epoch_signs, kept_signs
from timm_hpm.training.objectives import away_from, cross_entropy, kl_divergence, trades
from timm_hpm.training.recovery import Checkpoint, DamagedCheckpointWarning, newest_checkpoint, write_checkpoint
from timm_hpm.training.run_folder import saved_options
from timm_hpm.training.trunk import PixelTrunk, inputs_only

# Two epochs of eight batches.
TINY = dataclasses.replace(training_runs.TINY, epochs=2, batch_size=128)


def run(folder, **changes):
    return training_runs.run(folder, **{"epochs": 2, "batch_size": 128} | changes)


def embedded() -> dict[str, torch.Tensor]:
    return timm.create_model("hpm_wrn10_2", pretrained=True).state_dict()


def test_the_objectives_in_closed_form():
    # Two classes with logits (0, a): the cross-entropy of class 1 is log(1 + e^-a).
    labels = torch.tensor([1, 1])

    def answers(hpm, fc):
        return torch.zeros(2, 3), torch.tensor([[0.0, hpm]] * 2), torch.tensor([[0.0, fc]] * 2)

    def softplus(a):
        return math.log(1 + math.exp(-a))

    p, q = (1 / (1 + math.exp(-a)) for a in (2.0, -1.0))
    divergence = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    clean, adversarial = answers(2.0, 0.0), answers(-1.0, 0.0)
    for found, expected in (
            (cross_entropy([answers(2.0, 1.0)], labels, TrainConfig(fc_loss_weight=0.5)),
             (softplus(2) + 0.5 * softplus(1)) / 1.5),
            (cross_entropy([answers(2.0, 1.0)], labels, TrainConfig(fc_loss_weight=0.0)), softplus(2)),
            (cross_entropy([answers(2.0, 1.0)], labels, TrainConfig(fc_loss_weight=0.0, smoothing=0.1)),
             0.95 * softplus(2) + 0.05 * softplus(-2)),
            # A head that answers as its FC classifier has that classifier's loss, whatever the weight.
            (cross_entropy([answers(2.0, 2.0)], labels, TrainConfig(fc_loss_weight=0.7)), softplus(2)),
            (kl_divergence(adversarial[1], clean[1]), 2 * divergence),
            (away_from(clean[1])(adversarial[1], labels), 2 * divergence),
            (trades([clean, adversarial], labels, TrainConfig(fc_loss_weight=0.0)), softplus(2) + 6 * divergence),
            # The FC classifier's two answers are alike: its divergence is 0.
            (trades([clean, adversarial], labels, TrainConfig(fc_loss_weight=0.5)),
             (softplus(2) + 6 * divergence + 0.5 * softplus(0)) / 1.5)):
        assert found.item() == pytest.approx(expected, rel=1e-5)


def test_pgd_climbs_the_loss_that_it_is_given():
    images, labels, threat = torch.full((3, 2), 0.5), torch.tensor([0, 1, 0]), ThreatModel("Linf", 0.25)
    x = pgd(lambda x: x @ torch.tensor([[1.0, 0.5], [-2.0, 1.0]]), images, labels, threat, steps=3,
            random_start=False, loss=lambda logits, labels: logits[:, 1].sum())
    assert torch.equal(x, torch.full((3, 2), 0.75))


def test_attacks_gather_no_parameter_gradients():
    model = timm_hpm.add_hpm_head(timm.create_model("test_vit", num_classes=10)).eval()
    trunk = PixelTrunk(model)
    find_head(model).bias.requires_grad_(False)
    with inputs_only(trunk):
        assert not any(parameter.requires_grad for parameter in trunk.parameters())
        pgd(lambda x: trunk.surrogate_logits("mixed", x), torch.rand(4, 3, 160, 160), torch.arange(4),
            ThreatModel("Linf", 0.1), steps=1)
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == ["head.bias"]
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(("objective", "gamma", "passes"), [
    ("pgd-at", 0, 4), ("trades", 0, 5), ("mart", 0, 5), ("clean", 0, 1), ("pgd-at", 0.01, 5), ("mart", 0.01, 7)])
def test_each_objective_makes_its_number_of_passes(objective, gamma, passes, tmp_path):
    counts, model = Counter(), timm.create_model("hpm_wrn10_2", pretrained=True)

    def count(module, inputs, output):
        counts["forward"] += torch.is_grad_enabled()
        if output.requires_grad:
            output.register_hook(lambda gradient: counts.update(["backward"]))

    model.conv1.register_forward_hook(count)
    run(tmp_path, network=model, pretrained=False, epochs=1, attack_steps=3, objective=objective, awp_gamma=gamma,
        batch_size=1000)
    # One batch, and PGD-1 through fc and mixed on the validation batch.
    assert counts == {"forward": passes + 2, "backward": passes + 2}


def test_a_run_leaves_a_model_its_options_its_numbers_and_their_curve(tmp_path):
    kept = run(tmp_path / "run", hflip=0.1)
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {
        "model.safetensors", "config.json", "args.yaml", "metrics.csv", "checkpoints"}
    epochs = rows(tmp_path / "run")
    assert [row["epoch"] for row in epochs] == ["0", "1"]
    assert max(float(row["val_robust"]) for row in epochs) == kept["val_robust"]
    options = yaml.safe_load((tmp_path / "run" / "args.yaml").read_text())
    assert TrainConfig(**options) == dataclasses.replace(
        TINY, hflip=0.1, num_classes=10, in_chans=1, img_size=8, mean=(0.3053,), std=(0.376,), threat="Linf:0.1",
        attack_step_size=0.125, prototype_epoch=0, warmup_epochs=0.5, threads=torch.get_num_threads())
    model = timm.create_model(f"local-dir:{tmp_path / 'run'}", pretrained=True)
    assert find_head(model).is_fitted() and model.pretrained_cfg["mean"] == [0.3053]
    assert model.pretrained_cfg.get("tag") is None
    state, before = weights(tmp_path / "run"), embedded()
    assert not torch.equal(state["conv1.weight"], before["conv1.weight"])
    # Each of the eight batches of an epoch had every class, or nearly so.
    made = state["fc.num_updates"] - before["fc.num_updates"]
    assert (made > 4 * (kept["epoch"] + 1)).all() and (made <= 8 * (kept["epoch"] + 1)).all()
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 2
    picture = ElementTree.parse(tmp_path / "run" / "curve.svg").getroot()
    titles = [title.text for title in picture.iter("{http://www.w3.org/2000/svg}title")]
    for row in epochs:
        for name, value in (("clean", row["val_clean"]), ("robust (PGD)", row["val_robust"])):
            assert any(title.startswith(f"{name}, validation at {row['epoch']}: {100 * float(value):.1f} %")
                       for title in titles)


@pytest.mark.parametrize("changes", [
    {"objective": "trades", "trades_beta": 3.0, "smoothing": 0.1, "hflip": 0.5,
     "model_kwargs": {"inference": "sample", "mix": 0.2}, "fc_loss_weight": 0.0},
    {"objective": "clean", "prototype_features": "both", "workers": 1, "random_resized_crop": True,
     "aa": "rand-m5"},
    {"model_kwargs": {"inference": "batch"}, "threat": "L2:0.5", "attack_steps": 2, "attack_through": "soft",
     "prototype_features": "both"},
    {"amp": True, "channels_last": True, "clip_grad": 1.0, "log_with": "tensorboard",
     "grad_checkpointing": True, "grad_accum_steps": 3, "recovery_interval": 1},
    {"opt": "adamw", "opt_betas": (0.8, 0.99), "opt_eps": 1e-7,
     "lr": 1e-3, "sched": "cosine", "warmup_epochs": 0.5, "layer_decay": 0.7},
    {"model_kwargs": {"inference": "fc"}},
], ids=lambda changes: " ".join(changes))
def test_options_train(changes, tmp_path):
    if "log_with" in changes:
        pytest.importorskip("tensorboard", reason="TensorBoard is of the extra train")
    kept = run(tmp_path, epochs=1, batch_size=350, **changes)
    assert kept["val_clean"] > 0.5 and math.isfinite(kept["loss"])
    state = weights(tmp_path)
    assert all(tensor.isfinite().all() for tensor in state.values() if tensor.is_floating_point())
    assert not torch.equal(state["conv1.weight"], embedded()["conv1.weight"])
    if changes == {"model_kwargs": {"inference": "fc"}}:  # it trains the FC classifier alone
        assert not state["fc.num_updates"].any() and not state["fc.prototypes"].any()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # of torch.compile's own
def test_a_compiled_backbone_trains_alike(tmp_path):
    # Not bit by bit: the compiler fuses, and rounds otherwise.
    plain = run(tmp_path / "plain", epochs=1, batch_size=350)
    compiled = run(tmp_path / "compiled", epochs=1, batch_size=350, torchcompile=True)
    assert compiled["loss"] == pytest.approx(plain["loss"], rel=1e-3)
    assert weights(tmp_path / "plain").keys() == weights(tmp_path / "compiled").keys()


@pytest.mark.parametrize("changes", [
    {"pretrained": False, "epochs": 8, "lr": 0.1},
    {"epochs": 1, "batch_size": 32, "threat": "L2:0.5", "model_ema_decay": 0.9},
], ids=lambda changes: " ".join(changes))
def test_the_average_learns_and_has_prototypes_of_its_own_features(changes, tmp_path):
    """By default too, where a decay of 0.9998 would keep the initial weights of so short a run."""
    kept = run(tmp_path, **{"prototype_features": "both", "model_ema": True, **changes})
    checkpoint = newest_checkpoint(tmp_path / "checkpoints")
    for name in ("conv1.weight", "fc.prototypes"):
        assert not torch.equal(checkpoint.average[name], checkpoint.model[name])
    live = timm.create_model("hpm_wrn10_2", pretrained=True).eval()
    live.load_state_dict(checkpoint.model)
    images, labels = timm_hpm.load_split("digits", "val").tensors
    assert kept["val_clean"] > judge(live, images, labels, 128).float().mean() - 0.03
    # The average is what is kept.
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, inference="dataset").eval()
    own = judge(model, images, labels, 360).float().mean()
    timm_hpm.fit_prototypes(model, DataLoader(timm_hpm.load_split("digits", "train"), 256),
                            ThreatModel.of(saved_options(tmp_path).threat), attack_steps=1)
    assert own > judge(model, images, labels, 360).float().mean() - 0.03


def test_accumulated_batches_move_prototypes_as_one(tmp_path):
    """With a constant backbone, three batches of 64 are one of 192."""
    prototypes, updates = {}, {}
    for name, options in (("one", {"batch_size": 192}), ("three", {"batch_size": 64, "grad_accum_steps": 3})):
        run(tmp_path / name, freeze_backbone=True, objective="clean", shift=0, epochs=1, recovery_interval=1,
            checkpoint_hist=9, **options)
        folders = sorted((tmp_path / name / "checkpoints").iterdir())
        prototypes[name] = load_file(folders[4] / "model.safetensors")["fc.prototypes"]
        updates[name] = (weights(tmp_path / name)["fc.num_updates"] - embedded()["fc.num_updates"]).max()
    # 1,077 images: one more batch of 64 fills an incomplete sixth update.
    assert updates == {"one": 5, "three": 6}
    torch.testing.assert_close(prototypes["one"], prototypes["three"], rtol=0, atol=1e-6)


def test_an_incomplete_update_at_the_end_of_an_epoch_is_the_mean_of_its_batches(tmp_path):
    for name, steps in (("one", 1), ("three", 3)):
        run(tmp_path / name, epochs=1, batch_size=1000, objective="clean", sched="constant", lr=1.0,
            freeze_backbone=True, grad_accum_steps=steps)
    one, three = weights(tmp_path / "one"), weights(tmp_path / "three")
    torch.testing.assert_close(three["fc.weight"], one["fc.weight"], rtol=1e-6, atol=1e-6)
    assert (one["fc.weight"] - embedded()["fc.weight"]).abs().max() > 1e-4


FROM_SCRATCH = {"pretrained": False, "lr": 0.1, "attack_steps": 2}


@pytest.mark.parametrize("changes", [
    {"epochs": 2, "batch_size": 1000},
    *(pytest.param(changes, marks=pytest.mark.slow) for changes in (
        {"epochs": 10}, {"epochs": 20, "objective": "trades"},
        {"epochs": 20, "model": "hpm_resnet18", "num_classes": 10, "in_chans": 1},
        {"epochs": 10, "batch_size": 32, "model_kwargs": {"inference": "sample"}})),
], ids=lambda changes: " ".join(f"{name}={value}" for name, value in changes.items()))
def test_from_scratch_the_defaults_learn_as_the_fc_classifier_does(changes, tmp_path):
    kept = run(tmp_path / "hpm", **FROM_SCRATCH | changes)
    plain = run(tmp_path / "fc", **FROM_SCRATCH | changes | {"model_kwargs": {"inference": "fc"}})
    # Two standard errors of the difference of two accuracies of 80 % of 360 images.
    for name in ("val_clean", "val_robust"):
        assert kept[name] >= plain[name] - 0.06, (kept, plain)
    assert find_head(timm.create_model(f"local-dir:{tmp_path / 'hpm'}", pretrained=True)).is_fitted()


def test_the_epoch_of_the_prototypes_is_a_part_of_the_run(tmp_path):
    plain = {name: tensor for name, tensor in embedded().items()
             if name not in ("fc.prototypes", "fc.num_updates", "fc.log_scale")}
    torch.save(plain, tmp_path / "plain.pt")
    torch.save({name: tensor.roll(5, 0) if name.startswith("fc.") else tensor for name, tensor in plain.items()},
               tmp_path / "other.pt")
    files = {name: {"initial_checkpoint": str(tmp_path / f"{name}.pt")} for name in ("plain", "other")}
    for changes, expected in (({"epochs": 60}, 36.0), ({"epochs": 1}, 1.0), ({"epochs": 3}, 3.0),
                              ({"epochs": 6}, 40 / 8), ({"epochs": 5, "batch_size": 1}, 3.0),
                              ({"epochs": 60, "prototype_epoch": 0}, 0.0), ({"epochs": 60, "pretrained": True}, 0.0),
                              ({"epochs": 60, **files["plain"]}, 0.0), ({"epochs": 60, **files["other"]}, 36.0)):
        config = dataclasses.replace(TINY, **{"pretrained": False, "freeze_backbone": True} | changes)
        forget_accelerator()
        found = Run(config, tmp_path / str(changes).replace("/", ""), log=lambda line: None)
        assert found.config.prototype_epoch == expected, changes
    forget_accelerator()


def test_a_run_that_does_not_learn_says_so_in_its_log_and_its_folder(tmp_path, finished_run):
    lines = []
    run(tmp_path, log=lines.append, pretrained=False, lr=0.1, prototype_epoch=0, model_kwargs={"inference": "batch"})
    found = (tmp_path / "warnings.txt").read_text().splitlines()
    assert [f"warning: {line}" for line in found] == [line for line in lines if line.startswith("warning")]
    assert any("above ln 10 = 2.303" in line for line in found) and any("is at chance" in line for line in found)
    assert not (finished_run / "warnings.txt").exists()


def test_the_signs_of_a_run_that_does_not_learn():
    row = {"epoch": 5, "loss": 0.69, "val_clean": 0.5, "val_fc_clean": 0.75}
    assert not epoch_signs(row, 60, 2, 900.0) and not epoch_signs(row | {"epoch": 0, "loss": 9.0}, 1, 2, 1.0)
    assert list(epoch_signs(row | {"loss": 0.7}, 17, 2, 1.0)) == ["loss"]
    for change in (1e-4, 1e4, 0.0, math.inf, math.nan):
        assert list(epoch_signs(row, 60, 2, change)) == ["scale"]
    # 64 of 100 images are of one class: with a standard error of 4.8 %, chance ends at 73.6 %.
    labels = torch.tensor([0] * 64 + [1] * 36)
    assert not kept_signs(row | {"val_clean": 0.74}, labels)
    assert "one class for all has 64.0 %" in kept_signs(row | {"val_clean": 0.73}, labels)["chance"]
    behind = kept_signs(row | {"val_clean": 0.74, "val_fc_clean": 0.78}, labels)["behind"]
    assert "its own FC classifier 78.0 %" in behind


def test_of_epochs_that_are_as_good_the_last_is_kept(tmp_path):
    kept = run(tmp_path, batch_size=1000, freeze_backbone=True, model_kwargs={"inference": "fc"}, lr=1e-12)
    assert len({row["val_robust"] for row in rows(tmp_path)}) == 1 and kept["epoch"] == 1


@pytest.mark.parametrize(("changes", "names", "indices"), [
    ({"model_ema_decay": 0.9, "recovery_interval": 4, "checkpoint_hist": 20}, "0-4 0-8 1-0 1-4 1-8 2-0", (0, 4)),
    ({"random_resized_crop": True, "prototype_epoch": 1, "pretrained": False, "batch_size": 350, "checkpoint_hist": 9,
      "recovery_interval": 2, "model_ema_decay": 0.5}, "0-2 1-0 1-1 1-3 2-0", (0,)),
], ids=["plain", "crops and a late fit"])
def test_a_run_resumed_from_any_checkpoint_ends_with_the_same_bits(changes, names, indices, tmp_path):
    changes = {"model_ema": True, **changes}
    run(tmp_path / "whole", **changes)
    folders = sorted((tmp_path / "whole" / "checkpoints").iterdir())
    assert [f"{folder.name[10]}-{folder.name[-1]}" for folder in folders] == names.split()
    for index in indices:
        part = stopped(tmp_path / "whole", tmp_path / f"part{index}", index)
        (part / "checkpoints" / ".epoch-00099-batch-00000000.99.tmp").mkdir()  # what a killed process leaves
        (part / ".best.99.tmp").mkdir()
        lines: list[str] = []
        run(part, resume=True, log=lines.append, **changes)
        epochs = [line for line in lines if line.startswith("epoch ")]
        assert sum("images/s" in line for line in epochs) == len(epochs) - (index == 4), "no image was left to train on"
        whole, resumed = (newest_checkpoint(tmp_path / name / "checkpoints") for name in ("whole", part.name))
        assert same_tensors(whole.model, resumed.model) and same_tensors(whole.average, resumed.average)
        assert whole.progress == resumed.progress
        for name in ("metrics.csv", "model.safetensors"):
            assert (part / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
        assert not [*(part / "checkpoints").glob(".*"), *part.glob(".*")]
    if "prototype_epoch" in changes:  # the average keeps its own FC classifier when the prototypes are fitted
        assert not torch.equal(whole.average["fc.weight"], whole.model["fc.weight"])


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    run(folder, epochs=1, batch_size=500)
    return folder


@pytest.mark.parametrize(("name", "damage"), [
    ("model.safetensors", None), ("model.safetensors", lambda data: data[:-1] + bytes([data[-1] ^ 1])),
    ("config.json", lambda data: data[:-9]), ("config.json", lambda data: b"{}")])
def test_damaged_files_of_the_best_epoch_are_restored_on_resume(name, damage, finished_run, tmp_path):
    shutil.copytree(finished_run, tmp_path / "run")
    file = tmp_path / "run" / name
    data = file.read_bytes()
    file.unlink()
    if damage:
        file.write_bytes(damage(data))
    run(tmp_path / "run", resume=True, epochs=1, batch_size=500)
    assert file.read_bytes() == data


def change_state(path: Path, change) -> None:
    """Changes the record in a state.json and seals it again, as a stranger could."""
    record = unsealed(path.read_text())
    path.write_text(sealed(change(record) or record))


def test_a_user_s_files_among_the_checkpoints_stay(tmp_path):
    names = ["epoch-00000-batch-00000001-backup", "epoch-best", "epoch-00009-batch-00000000.old", "epoch-1-batch-2",
             "epoch-backup.tar", "epoch-00009-batch-00000009.tar", ".notes.tmp", ".epoch-backup.tmp"]
    for name in names[:4]:
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    for name in names[4:]:
        (tmp_path / "checkpoints" / name).touch()
    (tmp_path / "away").mkdir()
    (tmp_path / "away" / "kept").touch()
    (tmp_path / "checkpoints" / ".link.9.tmp").symlink_to(tmp_path / "away")
    for number in range(3):
        write_checkpoint(tmp_path / "checkpoints", checkpoint(number), keep=1)
    remove_unfinished(tmp_path / "checkpoints")
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {*names, "epoch-00000-batch-00000002"}
    assert (tmp_path / "away" / "kept").exists()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert newest_checkpoint(tmp_path / "checkpoints").progress["updates"] == 2


def checkpoint(updates: int) -> Checkpoint:
    return Checkpoint({"w": torch.full((2,), float(updates))}, None, {"optimizer": {"lr": 0.1}, "t": torch.ones(1)},
                      {"updates": updates, "epoch": 0, "batches": updates, "processes": 1, "loss": 0.5, "rows": [],
                       "best": {}}, TINY.to_dict())


def bytes_of(name, change):
    """Returns a function that changes the bytes of a file of a checkpoint."""
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def trap(folder):
    """Makes the optimizer's file one that writes another when it is unpickled."""
    code = f"c__builtin__\neval\n(S'open(\"{folder.parent}/ran\", \"w\")'\ntR.".encode()
    (folder / "optimizer.safetensors").write_bytes(code)
    change_state(folder / "state.json",
                 lambda state: state["digests"].update({"optimizer.safetensors": hashlib.sha256(code).hexdigest()}))


@pytest.mark.parametrize("damage", [
    *(bytes_of("state.json", lambda _, text=text: text) for text in (b"", b'{"record": 1}', b"[" * 100_000)),
    bytes_of("state.json", lambda text: text.replace(b'"updates": 2', b'"updates": 7')),
    bytes_of("optimizer.safetensors", lambda data: data[:-5]),
    bytes_of("optimizer.safetensors", lambda data: data[:-1] + bytes([data[-1] ^ 1])),
    lambda folder: (folder / "optimizer.safetensors").unlink(), trap,
])
def test_a_damaged_checkpoint_is_named_and_skipped(damage, tmp_path):
    for updates in (1, 2):
        write_checkpoint(tmp_path, checkpoint(updates), keep=2)
    newest = tmp_path / "epoch-00000-batch-00000002"
    damage(newest)
    with pytest.warns(DamagedCheckpointWarning, match="batch-00000002 is damaged"):
        found = newest_checkpoint(tmp_path)
    assert found.progress["updates"] == 1 and torch.equal(found.model["w"], torch.ones(2))
    # The run goes on from there, and what it writes stays, though the damaged one is of a later state.
    newest.rename(tmp_path / "epoch-00001-batch-00000000")
    write_checkpoint(tmp_path, checkpoint(3), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["epoch-00000-batch-00000003"], "and no code was run"


@pytest.mark.parametrize("opt", ["adamw", "adafactorbv"])  # the latter keeps a dtype
def test_a_checkpoint_returns_an_optimizer_s_state(opt, tmp_path):
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 4)).to(memory_format=torch.channels_last)
    optimizer = create_optimizer_v2(layers, opt=opt, lr=1e-3, weight_decay=0.1)
    for _ in range(2):
        layers(torch.randn(2, 3, 4, 4)).square().sum().backward()
        optimizer.step()
    state = optimizer.state_dict()
    write_checkpoint(tmp_path, dataclasses.replace(checkpoint(1), optimizer=state), keep=1)
    found = newest_checkpoint(tmp_path).optimizer
    leaves, structure = tree_flatten(state)
    others, same = tree_flatten(found)
    assert structure == same and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(leaves, others, strict=True))
    optimizer.load_state_dict(found)


@pytest.mark.parametrize(("changes", "message"), [
    ({"epochs": 2, "prototype_epoch": 2.5}, "prototype_epoch is 2.5, of 2 epochs"),
    ({"drop": 0.1, "model_kwargs": {"drop_rate": 0.2}}, "drop_rate is in the options and in model_kwargs"),
    *(({name: value}, f"{name} is {value}, and has no effect without {needs}; give that, too, or leave {name} out")
      for name, value, needs in (
          ("model_ema_decay", 0.9, "--model-ema"), ("extra_fraction", 0.5, "--extra-data"),
          ("awp_warmup", 0.5, "--awp-gamma"), ("trades_beta", 3.0, "--objective trades"),
          ("decay_milestones", (5.0,), "--sched multistep"),
          ("decay_rate", 0.5, "--sched step or multistep or poly"))),
    ({"amp_dtype": "float16"}, "amp_dtype is float16, and has no effect without amp"),
    ({"sched": "cosine", "warmup_lr": 0.01}, "warmup_lr is 0.01, and has no effect without --warmup-epochs"),
    ({"warmup_epochs": 0.0, "warmup_lr": 0.01}, "warmup_lr is 0.01, and has no effect without --warmup-epochs"),
    ({"sched": "cosine", "warmup_prefix": True}, "warmup_prefix is True, and has no effect without --warmup-epochs"),
    ({"warmup_prefix": True}, "warmup_prefix has no effect on onecycle"),
    ({"opt": "adamw", "momentum": 0.8, "opt_eps": 1e-6}, "it has no momentum; leave --momentum out"),
    ({"drop": 0.1, "model_kwargs": {"drop_path_rate": 0.2}, "freeze_backbone": True},
     "drop and drop_path_rate would have no effect in the backbone, which is in eval mode if it is frozen"),
    ({"initial_checkpoint": "nosuch.pt", "pretrained": False}, "nosuch.pt: there is no such file"),
    ({"initial_checkpoint": "nosuch.pt"}, "both say where the weights come from"),
    ({"batch_size": 2000}, "batch_size is 2000 on 1 processes; expected no more than the 1077 training images"),
    ({"mean": (0.5, 0.5)}, "mean is (0.5, 0.5), and digits has images of 1 channels"),
    ({"attack_step_size": 2}, "the ball of Linf:0.1 is 0.2 wide; expected no more than that. Did you mean 2/255?"),
    ({"amp": True, "amp_dtype": "float16"}, "float16"),
    ({"opt_betas": (0.9, 0.99)}, "it has no betas; leave --opt-betas out"),
    ({"opt": "adamw", "opt_betas": (0.9,)}, "(layer_decay=None): --opt-betas gives 1; expected 2, such as 0.9 0.999"),
    ({"model": "resnet10t", "num_classes": 10, "in_chans": 1, "pretrained": False, "amp": True},
     "of resnet10t meets maps narrower than its stride. Of its weight's gradient in bfloat16, torch leaves a part"),
    *(({"log_with": name}, f"{name} is not installed; run: pip install {name}") for name in ("wandb",)
      if importlib.util.find_spec(name) is None),
    # What a launcher says otherwise.
    ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "launcher asks for mixed precision bf16, the options for no; give --amp"),
], ids=lambda value: " ".join(value) if isinstance(value, dict) else None)
def test_options_that_do_not_fit_are_refused_before_anything_is_written(changes, message, inside, monkeypatch):
    for name in [name for name in changes if name.isupper()]:
        monkeypatch.setenv(name, changes[name])
    with pytest.raises((ValueError, OSError, ModuleNotFoundError), match=re.escape(message)):
        run(inside / "run", **{name: value for name, value in changes.items() if name.islower()})
    assert not list(inside.iterdir())


def test_the_committed_configurations_are_valid():
    files = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
    assert files
    for file in files:
        assert TrainConfig(**read_options(file, TrainConfig)).dataset == file.stem


def test_an_output_of_another_run_is_left_alone(finished_run, tmp_path):
    shutil.copytree(finished_run, tmp_path, dirs_exist_ok=True)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="holds another run; go on with it by --resume"):
        run(tmp_path, epochs=1, batch_size=500)
    with pytest.raises(ValueError, match=re.escape("smoothing (0.0 there, 0.1 given)")):
        train(None, dataclasses.replace(saved_options(tmp_path), smoothing=0.1), tmp_path, resume=True)
    with pytest.raises(ValueError, match="holds no run to resume"):
        train(None, TINY, tmp_path / "other", resume=True)
    # What changes no weight may be another: data that moved, say.
    kept = run(tmp_path, resume=True, epochs=1, batch_size=500, data_dir="elsewhere")
    assert kept["epoch"] == 0
    options = before.pop(tmp_path / "args.yaml")
    (tmp_path / "args.yaml").write_text("{")
    with pytest.raises(ValueError, match=r"cannot read the configuration .*args.yaml"):
        saved_options(tmp_path)
    (tmp_path / "args.yaml").write_bytes(options)
    before[tmp_path / "args.yaml"] = options
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    change_state(max((tmp_path / "checkpoints").iterdir()) / "state.json",
                 lambda state: state["progress"].update(processes=2))
    with pytest.raises(ValueError, match="was trained by 2 processes and is to be resumed by 1; launch 2"):
        run(tmp_path, resume=True, epochs=1, batch_size=500)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(tmp_path):
    with pytest.raises(FloatingPointError, match=r"the loss is (nan|inf) at batch \d+ of epoch 0; lower the"):
        run(tmp_path, lr=1e30, recovery_interval=1, sched="constant", pretrained=False)
    kept = newest_checkpoint(tmp_path / "checkpoints")
    assert kept.progress["updates"] >= 1 and not (tmp_path / "model.safetensors").exists()


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    """A finite loss may have a gradient that is not."""
    model, backward = timm.create_model("hpm_wrn10_2", pretrained=True), itertools.count(1)
    model.fc.weight.register_hook(lambda gradient: gradient * (math.nan if next(backward) == 3 else 1))
    with pytest.raises(FloatingPointError, match=r"update 3 \(batch 2 of epoch 0\) left weights that are not finite"):
        run(tmp_path, network=model, pretrained=False, recovery_interval=1, checkpoint_hist=1)
    kept = newest_checkpoint(tmp_path / "checkpoints")
    assert kept.progress["updates"] == 2 and all(tensor.isfinite().all() for tensor in kept.model.values())


def small_network(activation, mix) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), activation, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)
    return timm_hpm.add_hpm_head(nn.Sequential(*layers), mix=mix)


def test_a_run_of_another_network_or_other_images_is_not_resumed(tmp_path):
    data, output = tmp_path / "data", tmp_path / "run"
    write_pictures(data, {f"{split}/{label}": 4 for split in ("train", "val", "test") for label in "ab"})
    first = (data / "val/b/0.png").read_bytes()
    options = {"dataset": "folder", "data_dir": str(data), "img_size": 8, "batch_size": 4, "attack_steps": 1,
               "val_attack_steps": 1, "sched": "constant", "prototype_epoch": 1.0, "device": "cpu",
               "log": lambda line: None, "output": output}
    train(small_network(nn.ReLU(), 0.5), epochs=1, **options)
    before = {file: file.read_bytes() for file in output.rglob("*") if file.is_file()}

    def go_on(network):
        train(network, epochs=2, resume=True, **options)

    for network, message in ((small_network(nn.Tanh(), 0.5), "code.*logits of the first images differ"),
                             (small_network(nn.ReLU(), 0.25), "'mix': 0.5.*'mix': 0.25")):
        with pytest.raises(ValueError, match=message):
            go_on(network)
    shutil.copy(data / "val/b/1.png", data / "val/b/0.png")
    with pytest.raises(ValueError, match="the images have changed"):
        go_on(small_network(nn.ReLU(), 0.5))
    (data / "val/b/0.png").write_bytes(first)
    (data / "train/a/more.png").write_bytes(first)
    with pytest.raises(ValueError, match="their labels"):
        go_on(small_network(nn.ReLU(), 0.5))
    assert before == {file: file.read_bytes() for file in output.rglob("*") if file.is_file()}
    (data / "train/a/more.png").unlink()
    (data / "test/b/0.png").write_bytes(first)  # no image that the run learns from or is chosen by
    go_on(small_network(nn.ReLU(), 0.5))
