"""Strangers' folders, files and servers: what they may not do, and the one error that says so."""

import json
import os
import subprocess
import sys
import threading
from itertools import product
from pathlib import Path

import hub_server
import pytest
import timm
import torch
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
    opened = []

    def enter_and_leave():
        for _ in range(2000):
            with weights_only():
                opened.append(os.environ.get(FORCE) != "1")

    threads = [threading.Thread(target=enter_and_leave) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not any(opened) and os.environ.get(FORCE) == before


@pytest.mark.parametrize("version", ["2.4.0", "2.5.1+cu121", "2.6.0", "2.10.0+cpu"])
def test_versions_of_torch_that_run_pickled_code(version):
    if version < "2.6" and "2.10" not in version:
        with pytest.raises(OldTorchError, match=r"(?s)^torch 2\.[45].*CVE-2025-32434.*2\.6 or newer.*timm-hpm convert"):
            refuse_pickles(version)
    else:
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
            def make(place=place, options=options):
                return create_model(place, pretrained=True, **options)
            if file == "model.safetensors":
                assert torch.equal(make().fc.weight, model.fc.weight)
            else:
                with pytest.raises(ValueError, match=r"torch 2\.5\.1 can run the code in a pickled file"):
                    make()


class Trap:
    """Writes a file if its pickle is run."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


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


@pytest.mark.parametrize("name", ["run#1", "run?a=b", "a#b?c", "run%20x", "ru n"])
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
    ("hpm_wrn28_10.untrained", {"channels": [200_000, 16, 16]}),
    ("hpm_wrn10_2", {"stem_chs": 9_000_000}),
    ("hpm_wrn10_2", {"num_classes": 10**12}),
    ("hpm_resnet18.untrained", {"num_classes": 9_999_999, "layers": [1, 1, 1, 1], "channels": [64, 64, 64, 2048]}),
    ("hpm_resnet50", {"layers": [1, 1_000_000, 1, 1]}),
    ("hpm_cifar_resnet18", {"layers": [1, 1_000_000, 1, 1]}),
    ("resnet18", {"layers": [1, 1, 1, 1_000_000]}),
    ("resnet18", {"in_chans": 10**9}),
    ("vit_tiny_patch16_224", {"depth": 10**9}),
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
            cfg = config["pretrained_cfg"]
            file.write_text(json.dumps({**config, **change, "pretrained_cfg": {**cfg, **change.get("cfg", {})}}
                                       if "pretrained_cfg" not in change else {**config, **change}))
        return tmp_path

    return write


NESTED = {"x": None}
for _ in range(200):
    NESTED = {"x": NESTED}


@pytest.mark.parametrize("change", [
    b"", b"{", b"[]", b"null", b"3", b'"text"', b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000, b"9" * 10_000,
    b'{"architecture": 3}', b"{}",
    {"architecture": None}, {"architecture": ["hpm_wrn10_2"]}, {"pretrained_cfg": []}, {"pretrained_cfg": "text"},
    {"model_args": [1]}, {"model_args": "mix"}, {"num_classes": "10"}, {"num_classes": 1.5}, {"num_classes": True},
    {"cfg": {"mean": "0.5"}}, {"cfg": {"mean": [None]}}, {"cfg": {"std": [0.0, 0.0, 0.0]}},
    {"cfg": {"std": [float("nan")] * 3}}, {"cfg": {"input_size": 32}}, {"cfg": {"input_size": [3, -1, 32]}},
    {"cfg": {"interpolation": 3}}, {"cfg": {"first_conv": 3}}, {"cfg": {"crop_pct": "all"}},
    {"cfg": {"label_names": [1, 2]}}, {"cfg": {"classifier": {"a": 1}}}, {"cfg": {"tag": NESTED}}, {"extra": NESTED},
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
    torch.tensor([0, 0]), torch.tensor([0, 0, 1, 0]), torch.tensor(0), torch.tensor([[0, 0, 1]]),
    torch.tensor([0.0, 0.0, 1.0]), torch.tensor([0, 0, 1], dtype=torch.int32), torch.tensor([False, False, True]),
    torch.tensor([7, 0, 1]), torch.tensor([-1, -3, 1]), torch.tensor([0, 0, 2**62]), torch.tensor([]),
])
def test_an_entry_function_of_another_form_is_one_named_error(tmp_path, entry):
    model = timm.create_model("hpm_wrn10_2.untrained")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state_dict = {**model.state_dict(), "function": entry}
    save_file(state_dict, tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match=r"function.*expected|the weights are of a network"):
        model.load_state_dict(state_dict)
    with pytest.raises(ValueError, match=r"(?s)model\.safetensors.*function.*expected|the weights are of a network"):
        load_checkpoint(model, str(tmp_path / "model.safetensors"))
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        create_model("hpm_wrn10_2.untrained", pretrained=True,
                     pretrained_cfg_overlay={"file": str(tmp_path / "model.safetensors")})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


EXPANDED = torch.zeros(1)


@pytest.mark.parametrize("content", [
    lambda weights: {**weights, "fc.weight": EXPANDED.expand(10**9, 128)},
    lambda weights: {"state_dict": {**weights, "conv1.weight": EXPANDED.expand(16, 3, 10**5, 10**6)}},
    lambda weights: {**weights, "mean": EXPANDED.expand(10**12)},
    lambda weights: {**weights, "module.n": torch.zeros(4).as_strided((10**5, 10**6, 4), (0, 0, 1))},
    lambda weights: {**weights, "fc.bias": torch.empty(10**12, device="meta")},
])
@pytest.mark.parametrize("name", ["hpm_wrn10_2.untrained", "hpm_test_resnet", "test_resnet"])
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
    BOMB, BOMB.replace("\na", "\nmodel"), "model: &m [*m]\n", "x: &x {lr: 1}\n<<: *x\n", "model: " + "[" * 5000,
    "lr: " + "9" * 10_000, "lr: 2001-99-99", "epochs: " + "x" * 2**21, "model: [" + "x, " * 10_000 + "x]",
    "".join(f"o{i}: 1\n" for i in range(5_000)), "? [a, b]\n: 1\n", "lr: 1:99:99:99:" + "59:" * 2000 + "1",
])
def test_a_yaml_bomb_is_one_short_error(tmp_path, text):
    (tmp_path / "bomb.yaml").write_text(text)
    with pytest.raises(ValueError) as caught:
        TrainConfig(**read_options(tmp_path / "bomb.yaml", TrainConfig))
    assert len(str(caught.value)) < 4000


COMMANDS = """
import traceback

import evaluate
import timm_hpm.__main__
import timm_hpm.models.create

for main, words in ((evaluate.main, ["--model", "hf-hub:org/x"]),
                    (timm_hpm.__main__.main, ["push", "org/y", "--model", "hf-hub:org/x"])):
    try:
        main(words)
    except (SystemExit, Exception) as error:
        traceback.print_exception(error)
timm_hpm.models.create.create_model("hf-hub:org/x", pretrained=True)
"""


def test_no_command_prints_a_token_that_a_server_repeats(tmp_path):
    token = "hf_Secret0123456789abcdefghijklmnopqr"
    with hub_server.running() as server:
        server.tokens[token] = "someone"
        server.faults.echo_token, server.faults.answer = True, {"/.*": (401, "a teapot")}
        environ = {**os.environ, "HF_ENDPOINT": server.url, "HF_TOKEN": token, "HF_HOME": str(tmp_path),
                   "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
                   "PYTHONPATH": str(Path(timm_hpm.__file__).parents[1])}
        run = subprocess.run([sys.executable, "-c", COMMANDS], env=environ, cwd=tmp_path, capture_output=True,
                             text=True)
    assert run.returncode == 1 and run.stderr.count("teapot") >= 3 and token not in run.stdout + run.stderr
