"""Strangers' folders, files and servers: what they may not do, and the one error that says so."""

import copy
import json
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import product

import pytest
import timm
import torch
from nets import Trap, same_tensors
from safetensors.torch import load_file, save_file

import timm_hpm
from timm_hpm.guards import OldTorchError, TooLargeError, refuse_pickles, weights_only
from timm_hpm.models.create import create_model, load_checkpoint
from timm_hpm.options import read_options
from timm_hpm.training.config import TrainConfig

FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


@pytest.mark.parametrize("before", [None, "0"])
def test_the_guard_lasts_as_long_as_any_block_and_leaves_the_environment_as_it_was(monkeypatch, before):
    monkeypatch.delenv(FORCE, raising=False)
    if before is not None:
        monkeypatch.setenv(FORCE, before)
    first, second = weights_only(), weights_only()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert os.environ[FORCE] == "1"
    second.__exit__(None, None, None)
    assert os.environ.get(FORCE) == before

    def value_inside(_):
        with weights_only():
            return os.environ.get(FORCE)

    with ThreadPoolExecutor(4) as threads:
        assert set(threads.map(value_inside, range(8000))) == {"1"}
    assert os.environ.get(FORCE) == before


def test_versions_of_torch_that_run_pickled_code():
    with pytest.raises(OldTorchError, match=r"(?s)^torch 2\.5.*CVE-2025-32434.*2\.6 or newer.*timm-hpm convert"):
        refuse_pickles("2.5.1+cu121")
    for version in ("2.6.0", "2.10.0+cpu"):
        refuse_pickles(version)


@pytest.mark.parametrize("name", ["test_resnet", "hpm_test_resnet"])
@pytest.mark.filterwarnings("ignore:.*local directory", "ignore:.*hold no prototypes")
def test_old_torch_reads_no_pickled_file_and_any_safetensors(monkeypatch, tmp_path, name):
    timm_hpm.register_hpm("test_resnet")
    model = timm.create_model("test_resnet")
    monkeypatch.setattr(torch, "__version__", "2.5.1")
    for save, file in ((torch.save, "pytorch_model.bin"), (save_file, "model.safetensors")):
        folder = tmp_path / file.partition(".")[0]
        folder.mkdir()
        save(model.state_dict(), folder / file)
        (folder / "config.json").write_text(json.dumps({"architecture": name, "pretrained_cfg": {
            "num_classes": 1000, "first_conv": "conv1.0", "classifier": "fc", "input_size": [3, 160, 160],
            "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}}))
        for place, options in ((f"local-dir:{folder}", {}), (name, {"pretrained_cfg_overlay": {
                "file": str(folder / file), "hf_hub_id": None}})):
            refused = pytest.raises(ValueError, match=r"torch 2\.5\.1 can run the code in a pickled file")
            with refused if file == "pytorch_model.bin" else nullcontext():
                assert torch.equal(create_model(place, pretrained=True, **options).fc.weight, model.fc.weight)


@pytest.mark.parametrize("architecture", ["test_resnet", "hpm_test_resnet", "hpm_wrn10_2"])
@pytest.mark.filterwarnings("ignore:.*local directory")
def test_a_stranger_s_folder_runs_no_code(tmp_path, architecture):
    timm_hpm.register_hpm("test_resnet")
    files = ("pytorch_model.bin", "pytorch_model.pth", "weights.pth.tar")
    for custom_load, file in product((False, True, "hf"), files):
        folder = tmp_path / f"{custom_load} {file}"
        folder.mkdir()
        torch.save({"state_dict": Trap(tmp_path / "ran")}, folder / file)
        cfg = {"num_classes": 10, "custom_load": custom_load, "classifier": "fc", "first_conv": "conv1",
               "hf_hub_filename": file}
        (folder / "config.json").write_text(json.dumps({"architecture": architecture, "pretrained_cfg": cfg}))
        with pytest.raises(ValueError, match="cannot create the model 'local-dir:"):
            create_model(f"local-dir:{folder}", pretrained=True)
        assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["run#1", "a#b?c", "run%20x"])
def test_a_folder_s_name_is_taken_as_it_is(tmp_path, name):
    """Also beside another model, in the folder that the part in front of the character names."""
    right, wrong = timm.create_model("hpm_wrn10_2.untrained"), timm.create_model("hpm_wrn10_2.untrained")
    timm_hpm.hub.save(wrong, tmp_path / name[:name.index(min(set(name) & set("#?% ")))])
    timm_hpm.hub.save(right, tmp_path / name)
    for make in (timm.create_model, create_model):
        with pytest.warns(timm_hpm.UnfittedHeadWarning):
            assert torch.equal(make(f"local-dir:{tmp_path / name}", pretrained=True).conv1.weight, right.conv1.weight)


@pytest.mark.parametrize(("name", "arguments"), [
    ("hpm_wrn10_2", {"depths": [1_000_000, 1, 1]}),
    ("hpm_wrn10_2", {"num_classes": 10**12}),
    ("hpm_resnet18.untrained", {"num_classes": 9_999_999, "layers": [1, 1, 1, 1], "channels": [64, 64, 64, 2048]}),
    ("hpm_resnet50", {"layers": [1, 1_000_000, 1, 1]}),
    ("resnet18", {"layers": [1, 1, 1, 1_000_000]}),
    ("resnet18", {"in_chans": 10**9}),
    ("hpm_vit_small_patch16_224", {"img_size": 100_000}),
])
def test_a_network_beyond_the_machine_is_refused_by_name(tmp_path, name, arguments):
    if name.startswith("hpm_"):
        with pytest.raises(TooLargeError, match=r"the network has more than|a number of"):
            timm.create_model(name, **arguments)
    config = {"architecture": name.partition(".")[0], "pretrained_cfg": {"num_classes": 10}, "model_args": arguments}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for asked, given in ((name, arguments), (f"local-dir:{tmp_path}", {})):
        with pytest.raises(ValueError, match=f"cannot create the model '{asked}'.*(more than|a number of)") as caught:
            create_model(asked, pretrained=False, **given)
        assert len(str(caught.value)) < 2000


@pytest.fixture
def saved(tmp_path):
    """Returns a function that writes a model's folder with a changed config, by its object or its bytes."""
    timm_hpm.hub.save(timm.create_model("hpm_wrn10_2.untrained"), tmp_path)
    weights = tmp_path / "model.safetensors"
    save_file(load_file(weights), weights)  # without its own config

    def write(change):
        file = tmp_path / "config.json"
        if isinstance(change, bytes):
            file.write_bytes(change)
        else:
            config = json.loads(file.read_text())
            cfg = {"pretrained_cfg": config["pretrained_cfg"] | change.get("cfg", {})}
            file.write_text(json.dumps(config | cfg | change))
        return tmp_path

    return write


NESTED = {"x": None}
for _ in range(200):
    NESTED = {"x": NESTED}


@pytest.mark.parametrize("change", [
    b"", b"null", b"[" * 100_000, b"{}", {"architecture": ["hpm_wrn10_2"]}, {"pretrained_cfg": []}, {"model_args": [1]},
    {"num_classes": 1.5}, {"cfg": {"std": [0.0] * 3}}, {"cfg": {"std": [float("nan")] * 3}},
    {"cfg": {"input_size": [3, -1, 32]}}, {"cfg": {"first_conv": 3}}, {"cfg": {"label_names": [1, 2]}},
    {"extra": NESTED},
])
def test_a_damaged_config_is_one_named_error(saved, change):
    folder = saved(change)
    with pytest.raises(ValueError, match=r"config\.json is damaged or not timm's \(") as caught:
        create_model(f"local-dir:{folder}", pretrained=True)
    assert len(str(caught.value)) < 2000
    with pytest.raises(ValueError, match=r"config\.json"):
        load_checkpoint(timm.create_model("hpm_wrn10_2.untrained"), str(folder / "model.safetensors"))
    with pytest.raises(timm_hpm.hub.HubError, match=r"config\.json is damaged or not timm's"):
        timm_hpm.hub._load(folder, "org/name")


@pytest.mark.parametrize("entry", [
    torch.tensor([0, 0]), torch.tensor([[0, 0, 1]]), torch.tensor([0.0, 0.0, 1.0]), torch.tensor([7, 0, 1]),
    torch.tensor([-1, -3, 1]),
])
def test_an_entry_function_of_another_form_is_one_named_error(tmp_path, entry):
    model = timm.create_model("hpm_wrn10_2.untrained")
    before = copy.deepcopy(model.state_dict())
    state_dict = {**model.state_dict(), "function": entry}
    save_file(state_dict, tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match=r"function.*expected|the weights are of a network"):
        model.load_state_dict(state_dict)
    with pytest.raises(ValueError, match=r"(?s)model\.safetensors.*function.*expected|the weights are of a network"):
        load_checkpoint(model, str(tmp_path / "model.safetensors"))
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        create_model("hpm_wrn10_2.untrained", pretrained=True,
                     pretrained_cfg_overlay={"file": str(tmp_path / "model.safetensors")})
    assert same_tensors(model.state_dict(), before)


EXPANDED = torch.zeros(1)


@pytest.mark.parametrize("content", [
    lambda weights: {**weights, "fc.weight": EXPANDED.expand(10**9, 128)},
    lambda weights: {"state_dict": {**weights, "conv1.weight": EXPANDED.expand(16, 3, 10**5, 10**6)}},
    lambda weights: {**weights, "module.n": torch.zeros(4).as_strided((10**5, 10**6, 4), (0, 0, 1))},
    lambda weights: {**weights, "fc.bias": torch.empty(10**12, device="meta")},
])
@pytest.mark.parametrize("name", ["hpm_wrn10_2.untrained", "test_resnet"])
def test_tensors_larger_than_their_file_are_refused_by_name(tmp_path, name, content):
    timm_hpm.register_hpm("test_resnet")
    weights = timm.create_model("hpm_wrn10_2.untrained").state_dict()
    torch.save(content(weights), tmp_path / "bomb.pt")
    assert (tmp_path / "bomb.pt").stat().st_size < 3e6
    with pytest.raises(ValueError, match=r"bomb\.pt.*(far larger than|plain, contiguous)"):
        load_checkpoint(create_model(name, pretrained=False), str(tmp_path / "bomb.pt"))
    if name.startswith("hpm_"):
        for classes in (10, 3):
            with pytest.raises(ValueError, match=r"bomb\.pt.*plain, contiguous"):
                create_model(name, pretrained=True, num_classes=classes,
                             pretrained_cfg_overlay={"file": str(tmp_path / "bomb.pt")})


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True))


@pytest.mark.parametrize("text", [
    BOMB, "model: &m [*m]\n", "model: " + "[" * 5000, "lr: 2001-99-99", "epochs: " + "x" * 2**21,
    "".join(f"o{i}: 1\n" for i in range(5_000)), "? [a, b]\n: 1\n",
])
def test_a_yaml_bomb_is_one_short_error(tmp_path, text):
    (tmp_path / "bomb.yaml").write_text(text)
    with pytest.raises(ValueError) as caught:
        TrainConfig(**read_options(tmp_path / "bomb.yaml", TrainConfig))
    assert len(str(caught.value)) < 4000
