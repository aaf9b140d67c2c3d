"""Weights of other classes than the network's, and the config that weights files carry and their loaders heed."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import timm
import torch
from nets import same_tensors, with_prototypes
from safetensors.torch import load_file, save_file
from torch import nn
from training_runs import run

import evaluate
import timm_hpm
from timm_hpm import (
    CheckpointError,
    DroppedClassifierWarning,
    NormalisationWarning,
    add_hpm_head,
    find_head,
    hub,
)
from timm_hpm.__main__ import main
from timm_hpm.data import as_pixel_model
from timm_hpm.evaluation.config import EvaluateConfig
from timm_hpm.evaluation.folder import weights_of
from timm_hpm.models.create import create_model
from timm_hpm.models.saving import CONFIG, WEIGHTS, saved_config, write_model
from timm_hpm.training.config import TrainConfig
from timm_hpm.training.setup import create_trainable

# A native network, and one of timm's with a convolution as its stem.
NAMES = ["hpm_wrn10_2.untrained", f"{timm_hpm.register_hpm('test_resnet')}.untrained"]
SOURCES = ["file", "state_dict", "url"]


def fitted(name="hpm_wrn10_2.untrained", **kwargs):
    """Returns a model of random weights with prototypes, in eval mode."""
    return with_prototypes(timm.create_model(name, **kwargs).eval(), -3.0)


def overlay(source, state_dict, folder):
    """Returns the pretrained cfg overlay of weights that come by a source, of the normalisation of the network."""
    if source == "state_dict":
        return {"state_dict": state_dict}
    torch.save({"state_dict": state_dict}, folder / "weights.pt")
    place = str(folder / "weights.pt")
    return {"url": f"file://{place}"} if source == "url" else {"file": place}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", NAMES)
def test_the_classifier_of_the_classes_asked_for_is_kept(name, source, tmp_path):
    theirs = fitted(name, num_classes=7)
    options = {"pretrained": True, "pretrained_cfg_overlay": overlay(source, theirs.state_dict(), tmp_path)}
    model = timm.create_model(name, num_classes=7, **options)
    assert same_tensors(model.state_dict(), theirs.state_dict())
    assert find_head(model).is_fitted() and model.pretrained_cfg["num_classes"] == 7
    with pytest.warns(DroppedClassifierWarning, match="have 7 classes, and num_classes is 5: their classifier"):
        other = timm.create_model(name, num_classes=5, **options)
    assert not find_head(other).is_fitted() and other.num_classes == 5
    with pytest.raises(CheckpointError, match=r"(?s)Give num_classes=7 \(.*--num-classes 7\).*mismatch"):
        timm.create_model(name, **options)
    if source == "file":
        with pytest.raises(ValueError, match=r"(?s)Give num_classes=7 .*mismatch for fc\.weight"):
            create_model(name, pretrained=False, checkpoint=options["pretrained_cfg_overlay"]["file"])
    assert timm.create_model(name, num_classes=0, **options).num_classes == 0


@pytest.mark.parametrize("source", SOURCES)
def test_own_weights_go_before_the_repository_of_the_tag(source, tmp_path):
    shape = {"num_classes": 7, "depths": (1, 1, 1), "channels": (4, 4, 4)}
    theirs = fitted("hpm_wrn28_10.wang2023_cifar10_linf", **shape)
    model = timm.create_model("hpm_wrn28_10.wang2023_cifar10_linf", pretrained=True, **shape,
                              pretrained_cfg_overlay=overlay(source, theirs.state_dict(), tmp_path))
    assert same_tensors(model.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("place", ["root", "pretrained_cfg", "model_args"])
def test_a_config_of_other_classes_than_its_weights_is_refused(tmp_path, place):
    hub.save(fitted(num_classes=7), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for part in ((config,) if place == "root" else (config, config["pretrained_cfg"])
                 if place == "pretrained_cfg" else (config["model_args"],)):
        part["num_classes"] = 5
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="have 7 classes, and their config 5"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    with pytest.raises(hub.HubError, match="have 7 classes, and their config 5"):
        hub._load(tmp_path, "org/name")


@pytest.mark.parametrize("arguments", [["--num-classes", "5"], ["--model-kwargs", "num_classes=0"]])
def test_no_random_head_is_measured_or_published_as_pretrained(arguments, tmp_path, inside):
    for call in (lambda: evaluate.main(["--device", "cpu", *arguments]),
                 lambda: main(["push", "org/name", "--model", "hpm_wrn10_2", "--model-kwargs", "num_classes=5"])):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DroppedClassifierWarning)
            with pytest.raises(ValueError, match=r"have 10 classes, and num_classes is [50]: the classifier would be"):
                call()
    assert not list(tmp_path.iterdir())


def test_weights_of_checkpoint_path_are_not_measured_under_the_name_of_others():
    with pytest.raises(ValueError, match=r"checkpoint_path is 'own\.pt'; give such weights by --checkpoint"):
        create_model("hpm_wrn10_2", pretrained=True, checkpoint_path="own.pt")


def test_weights_of_ones_own_have_no_tag_but_its_arguments(tmp_path):
    torch.save(timm.create_model("resnet152", layers=(1, 1, 1, 1)).state_dict(), tmp_path / "own.pt")
    arguments = {"model": "hpm_resnet152.liu2023_imagenet_linf", "model_kwargs": {
        "layers": (1, 1, 1, 1), "pretrained_cfg_overlay": {"file": str(tmp_path / "own.pt")}}}
    with pytest.warns(timm_hpm.UnfittedHeadWarning):
        model = create_model(arguments["model"], pretrained=True, **arguments["model_kwargs"])
        hub.save(model, tmp_path / "saved")
        again = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True)
    assert "liu2023" not in (tmp_path / "saved" / "config.json").read_text()
    assert type(again.act1) is type(model.act1) is timm.layers.GELU
    assert weights_of(model, EvaluateConfig(**arguments)) == str(tmp_path / "own.pt")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a native model whose normalisation, layout and head are not the defaults; and the model."""
    folder = tmp_path_factory.mktemp("saved")
    overlay = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7), "label_names": list("abcdefg")}
    model = fitted("hpm_wrn10_2.untrained_deepmind", num_classes=7, mix=0.25, inference="sample",
                   pretrained_cfg_overlay=overlay)
    hub.save(model, folder)
    return folder, model


def by_file(path, kind="file", **kwargs):
    return timm.create_model("hpm_wrn10_2.untrained", pretrained=True, num_classes=7,
                             pretrained_cfg_overlay={kind: str(path)}, **kwargs).eval()


def by_url(path, **kwargs):
    return by_file(f"file://{path}", "url", **kwargs)


def by_checkpoint(path, **kwargs):
    return create_model("hpm_wrn10_2.untrained", pretrained=False, checkpoint=str(path), num_classes=7, **kwargs).eval()


@pytest.mark.parametrize("load", [by_file, by_url, by_checkpoint])
def test_a_renamed_file_is_used_as_it_was_saved(saved, load, tmp_path):
    folder, source = saved
    path = shutil.copy(folder / "model.safetensors", tmp_path / "renamed.safetensors")
    model = load(path)
    assert model.pretrained_cfg["mean"] == (0.1, 0.2, 0.3) and model.pretrained_cfg["std"] == (0.5, 0.6, 0.7)
    assert list(model.pretrained_cfg["label_names"]) == list("abcdefg")
    pixels = torch.rand(3, 3, 32, 32)
    assert torch.equal(timm_hpm.PixelModel(model)(pixels), timm_hpm.PixelModel(source)(pixels))
    assert find_head(model).config() == find_head(source).config() and model.layout == "deepmind"
    # The caller goes first.
    assert find_head(load(path, mix=0.75)).mix == 0.75


@pytest.mark.parametrize("load", [by_file, by_checkpoint])
def test_a_file_that_says_nothing_warns(saved, load, tmp_path):
    folder, _ = saved
    save_file(fitted(num_classes=7).state_dict(), tmp_path / "bare.safetensors")
    with pytest.warns(NormalisationWarning, match=r"bare\.safetensors do not say .* mean \(0\.4914, "):
        load(tmp_path / "bare.safetensors")
    given = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "file": str(tmp_path / "bare.safetensors")}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(folder / "model.safetensors")
        timm.create_model("hpm_wrn10_2.untrained", pretrained=True, num_classes=7, pretrained_cfg_overlay=given)


@pytest.mark.parametrize("metadata", ["{", "null", '{"architecture": "x"}', "[" * 100_000])
def test_damaged_metadata_are_named(metadata, tmp_path):
    save_file(fitted(num_classes=7).state_dict(), tmp_path / "w.safetensors", {"timm_hpm": metadata})
    for load in (by_file, by_checkpoint):
        with pytest.raises((CheckpointError, ValueError), match=r"w\.safetensors (does not say how|is damaged)"):
            load(tmp_path / "w.safetensors")


def test_metadata_name_no_other_weights(tmp_path):
    hub.save(fitted(num_classes=7), tmp_path)
    config = saved_config(tmp_path / "model.safetensors")
    config["model_args"] |= {"pretrained_cfg": {"file": "/etc/passwd"}, "pretrained_strict": False,
                             "checkpoint_path": "/etc/passwd", "cache_dir": "/nowhere"}
    save_file(load_file(tmp_path / "model.safetensors"), tmp_path / "w.safetensors", {"timm_hpm": json.dumps(config)})
    for load in (by_file, by_checkpoint):
        assert find_head(load(tmp_path / "w.safetensors")).is_fitted()


def test_weights_and_config_of_two_saves_give_the_model_of_the_weights(saved, tmp_path):
    """As after a kill between the two."""
    folder, source = saved
    hub.save(fitted(num_classes=7, mix=0.75), tmp_path)
    shutil.copy(folder / "model.safetensors", tmp_path)
    with pytest.warns(UserWarning, match=r"config\.json beside them is of other weights \(it differs in mean, std, "):
        model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    pixels = torch.rand(3, 3, 32, 32)
    assert torch.equal(timm_hpm.PixelModel(model)(pixels), timm_hpm.PixelModel(source)(pixels))


class Stateful(nn.Module):
    """Extra state of every kind."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def get_extra_state(self):
        return self.value

    def set_extra_state(self, state):
        self.value = state


@pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions")
@pytest.mark.parametrize("make", [
    lambda: None, lambda: {"a": torch.ones(2), "b": [1, (2.0, None)]}, lambda: torch.ones(2).to_sparse(),
    lambda: torch.quantize_per_channel(torch.ones(2, 3), torch.ones(2), torch.zeros(2), 0, torch.qint8)])
def test_extra_state_has_a_digest_and_is_not_saved(make, tmp_path):
    value = make()
    model = add_hpm_head(timm.create_model("test_resnet", num_classes=3))
    before = timm_hpm.report.weights_digest(model)
    model.extra = Stateful(value)
    digest = timm_hpm.report.weights_digest(model)
    assert digest != before and digest == timm_hpm.report.weights_digest(model)
    model.extra = Stateful("another")
    assert timm_hpm.report.weights_digest(model) != digest
    model.extra = Stateful(value)
    with pytest.raises(ValueError, match=r"cannot be saved: .*state dict has extra\._extra_state \("):
        hub.save(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_training_starts_with_the_normalisation_of_its_checkpoint(saved, tmp_path):
    path = shutil.copy(saved[0] / "model.safetensors", tmp_path / "renamed.safetensors")
    options = {"model": "hpm_wrn10_2.untrained", "initial_checkpoint": str(path), "num_classes": 7}
    cfg = create_trainable(TrainConfig(**options)).pretrained_cfg
    assert cfg["mean"] == (0.1, 0.2, 0.3) and cfg["std"] == (0.5, 0.6, 0.7)
    assert create_trainable(TrainConfig(**options, mean=(0.5,) * 3)).pretrained_cfg["mean"] == (0.5,) * 3
    save_file(load_file(path), tmp_path / "bare.safetensors")
    options["initial_checkpoint"] = str(tmp_path / "bare.safetensors")
    options["model"] += "_deepmind"
    with pytest.warns(NormalisationWarning):
        model = create_trainable(TrainConfig(**options))
    assert find_head(model).is_fitted() and torch.equal(model.fc.weight, saved[1].fc.weight)


def test_a_file_of_timm_s_own_network_keeps_its_classifier_and_normalisation(tmp_path):
    model = timm.create_model("test_resnet", num_classes=7)
    model.pretrained_cfg.update(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    write_model(model, tmp_path)
    torch.save(model.state_dict(), tmp_path / "bare.pt")

    def trainable(file, **options):
        return create_trainable(TrainConfig(model="test_resnet", initial_checkpoint=str(tmp_path / file), **options))

    own = trainable(WEIGHTS, num_classes=7)
    assert torch.equal(own.fc.weight, model.fc.weight) and own.pretrained_cfg["mean"] == (0.1, 0.2, 0.3)
    with pytest.warns(NormalisationWarning):
        assert torch.equal(trainable("bare.pt", num_classes=7).fc.weight, model.fc.weight)
    with pytest.warns(DroppedClassifierWarning, match="their classifier is left out, and the model has a random one$"):
        other = trainable(WEIGHTS, num_classes=5)
    assert len(other.fc.weight) == 5 and torch.equal(other.conv1[0].weight, model.conv1[0].weight)
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"(?s)cannot load .* into test_resnet: .*key"):
        trainable("other.pt", num_classes=5)


def test_weights_that_state_another_of_timm_s_own_networks_are_refused(tmp_path):
    model = timm.create_model("test_resnet")
    model.pretrained_cfg["architecture"] = "test_vit"  # as if both had the same entries
    write_model(model, tmp_path)
    file = str(tmp_path / WEIGHTS)
    for options in ({"checkpoint": file}, {"pretrained": True, "pretrained_cfg_overlay": {"file": file}}):
        with pytest.raises(ValueError, match="the weights are of test_vit, and the network is test_resnet"):
            create_model("test_resnet", **options)


NUM_DIGITS = 24


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> str:
    """The name of a model that train.py makes from scratch."""
    folder = tmp_path_factory.mktemp("trained")
    run(folder, pretrained=False)
    return f"local-dir:{folder}"


@torch.no_grad()
def neighbours_matter(model: nn.Module, images: torch.Tensor) -> bool:
    """Returns whether the logits of single images differ from those in a batch by more than rounding."""
    model = as_pixel_model(model.eval())
    return not torch.allclose(torch.cat([model(image) for image in images.split(1)]), model(images), 1e-3, 1e-3)


@pytest.mark.parametrize("name", ["hpm_wrn10_2", "trained"])
def test_by_default_no_answer_depends_on_the_other_images_and_in_the_paper_s_mode_they_do(name, request, digits):
    name = name if name.startswith("hpm_") else request.getfixturevalue(name)
    default, paper = (timm.create_model(name, pretrained=True, **args) for args in ({}, {"inference": "batch"}))
    assert find_head(default).is_fitted()
    assert not neighbours_matter(default, digits[0]) and neighbours_matter(paper, digits[0])


def test_a_saved_model_keeps_its_mode_and_weights_that_state_none_get_the_default(tmp_path):
    write_model(timm.create_model("hpm_wrn10_2", pretrained=True, inference="batch"), tmp_path)
    folder, file, plain = f"local-dir:{tmp_path}", tmp_path / WEIGHTS, tmp_path / "plain.safetensors"

    def mode(name: str, checkpoint: Path | None = None) -> str:
        model = create_model(name, pretrained=not checkpoint, checkpoint=checkpoint and str(checkpoint))
        return find_head(model).inference

    assert mode(folder) == mode("hpm_wrn10_2", file) == "batch"
    save_file(load_file(file), plain)
    assert mode("hpm_wrn10_2", plain) == "dataset"
    # A folder whose config.json alone states it, and one that does not.
    plain.rename(file)
    assert mode(folder) == "batch"
    config = json.loads((tmp_path / CONFIG).read_text(encoding="utf-8"))
    del config["model_args"]["inference"]
    (tmp_path / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    assert mode(folder) == "dataset"
