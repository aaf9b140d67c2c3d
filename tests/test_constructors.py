"""Networks of a caller's own constructor, and public ones by their tags."""

import json
import sys
from pathlib import Path

import pytest
import timm
import torch
from processes import python
from protocols import QUICK
from safetensors.torch import save_file
from training_runs import run as training_run

import timm_hpm
from timm_hpm import find_head, head_mode
from timm_hpm.commands import evaluate as evaluate_command
from timm_hpm.commands import train as train_command
from timm_hpm.head import head_name
from timm_hpm.models.create import create_model, load_checkpoint
from timm_hpm.models.saving import saved_config, write_model

NET = """
import torch
from torch import nn
from parts import width  # a module beside this one

class Net(nn.Module):
    def __init__(self, num_classes, in_chans):
        super().__init__()
        self.conv = nn.Conv2d(in_chans, width, 3)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x):
        return self.fc(self.conv(x).relu().mean((2, 3)))

def small(num_classes=10, in_chans=1):
    return Net(num_classes, in_chans)

def robust():
    import timm_hpm
    return timm_hpm.add_hpm_head(small(), mix=0.25)

def trained():
    import timm, timm_hpm
    return nn.Sequential(timm_hpm.PixelModel(timm.create_model("hpm_wrn10_2", pretrained=True)))

def fixed():
    return small()

class Noisy(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model, self.num_classes = model, 10

    def forward(self, x):
        return self.model(x + 0.3 * torch.randn_like(x))

def noisy(head):
    import timm, timm_hpm
    model = timm.create_model("hpm_wrn10_2", pretrained=True)
    return Noisy(timm_hpm.PixelModel(model if head else timm_hpm.remove_hpm_head(model)))

def linear(in_chans):
    return nn.Sequential(nn.Flatten(), nn.Linear(64 * in_chans, 10), NaN())

class NaN(nn.Module):
    def forward(self, x):
        return x * torch.nan

def unknown():
    return nn.Flatten()

def broken():
    return [][0]
"""


@pytest.fixture
def net(tmp_path, monkeypatch):
    """Returns the text of a constructor's file, without the function."""
    (tmp_path / "parts.py").write_text("width = 6\n")
    (tmp_path / "net.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    sys.modules.pop("parts", None)
    return "net.py"


@pytest.mark.parametrize("place", ["net.py", "folder.net"])
def test_a_constructor_makes_a_network_with_the_attributes_of_timm_s(net, place, tmp_path):
    if place == "folder.net":
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder/net.py").write_text(NET)
    model = create_model(f"{place}:small", pretrained=False, num_classes=4)
    assert model(torch.rand(2, 1, 8, 8)).shape == (2, 4) and model.num_classes == 4 and head_name(model) is None
    cfg = model.pretrained_cfg
    assert cfg["mean"] == (0.0,) and cfg["std"] == (1.0,) and (cfg["first_conv"], cfg["classifier"]) == ("conv", "fc")
    assert "takes pixels in [0, 1]" in timm_hpm.PixelModel(model).source
    model = create_model(f"{place}:small", pretrained=False, pretrained_cfg_overlay={"mean": (0.5,), "std": (0.5,)})
    assert timm_hpm.PixelModel(model).mean.item() == 0.5


def test_a_constructor_s_head_and_one_by_arguments_and_channels_without_convolutions(net):
    assert find_head(create_model("net.py:robust", pretrained=False)).mix == 0.25
    assert find_head(create_model("net.py:robust", pretrained=False, mix=0.75)).mix == 0.75
    assert find_head(create_model("net.py:small", pretrained=False, inference="sample")).inference == "sample"
    # An early error leaves no run.
    with pytest.raises(ValueError, match=r"the logits of image 0 are not finite"):
        evaluate_command.main(["--model", "net.py:linear", "--in-chans", "1", "--num-images", "4", "--output", "out"])
    assert not Path("out").exists()


@pytest.mark.parametrize(("name", "arguments", "message"), [
    ("nut.py:small", {}, r"there is no file nut\.py; expected path/to/file\.py:function"),
    ("net.py:Net", {"size": 3}, r"argument 'size'; --model-kwargs NAME=VALUE gives the constructor's"),
    ("net.py:smal", {}, r"net\.py has no function 'smal'; it has Net, small, robust, trained"),
    ("net.py:unknown", {}, "does not say its number of classes: set the attribute num_classes"),
    ("net.py:fixed", {"num_classes": 3}, "made a network of 10 classes, and num_classes is 3; let the constr"),
    ("net.py:broken", {}, r"IndexError: list index out of range \(.*net\.py, line \d+\)"),
    ("net.py:small", {"widht": 3}, "TypeError: .*unexpected keyword argument 'widht'"),
    ("resnt18", {}, r"timm_hpm\.register_hpm.*did you mean resnet18"),
    ("hpm_wrn10_2", {"foo": 1}, "foo=1.*unexpected keyword argument 'foo'"),
])
def test_a_constructor_that_makes_no_network_is_explained(net, name, arguments, message):
    with pytest.raises(ValueError, match=rf"(?s)cannot create the model {name!r}.*{message}"):
        create_model(name, pretrained=False, **arguments)


@pytest.mark.parametrize("function", ["small", "robust"])
def test_a_saved_network_is_made_again_by_its_named_constructor_only(net, function, tmp_path, monkeypatch):
    model = create_model(f"net.py:{function}", pretrained=False).eval()
    images = torch.rand(10, 1, 8, 8)
    if function == "robust":
        timm_hpm.fit_prototypes(model, [(images, torch.arange(10))])
    folder = tmp_path / "saved"
    folder.mkdir()
    write_model(model, folder)
    config = saved_config(folder / "model.safetensors")
    assert config["constructor"] == config["architecture"] == f"net.py:{function}" and config["num_classes"] == 10
    weights = str(folder / "model.safetensors")
    again = create_model(f"net.py:{function}", pretrained=False, checkpoint=weights).eval()
    assert torch.equal(again(images), model(images)) and type(again) is not torch.nn.Module
    if function == "robust":  # the file says that its network has a head, and which
        other = create_model("net.py:small", pretrained=False, checkpoint=weights).eval()
        assert torch.equal(other(images), model(images)) and find_head(other).mix == 0.25
    # Whatever a file says, its code is not run.
    (tmp_path / "net.py").write_text("raise SystemExit('it ran')")
    for name, message in ((f"local-dir:{folder}", "code is not run because a file names it"),
                          ("hpm_wrn10_2", rf"the weights are of net\.py:{function}, and the network is hpm_wrn10_2")):
        with pytest.raises(ValueError, match=message):
            create_model(name, pretrained=True, checkpoint=None if ":" in name else weights)


def test_weights_of_one_s_own_load_with_their_own_names(net, tmp_path):
    plain, images = create_model("net.py:small", pretrained=False), torch.rand(10, 1, 8, 8)
    save_file({f"module.{key}": value for key, value in plain.state_dict().items()}, tmp_path / "plain.safetensors")
    again = create_model("net.py:small", pretrained=False, checkpoint=str(tmp_path / "plain.safetensors"))
    assert torch.equal(again(images), plain(images))
    # For training, weights without prototypes make a head without them.
    robust = create_model("net.py:robust", pretrained=False,
                          pretrained_cfg_overlay={"file": str(tmp_path / "plain.safetensors")})
    with head_mode(robust, "fc"):
        assert torch.equal(robust(images), plain(images))
    model, wrapped = torch.nn.Sequential(plain), torch.nn.Sequential(create_model("net.py:small", pretrained=False))
    save_file(model.state_dict(), tmp_path / "wrapped.safetensors")  # all its keys begin with "0."
    wrapped.pretrained_cfg = plain.pretrained_cfg
    wrapped.num_classes = 10
    load_checkpoint(wrapped, str(tmp_path / "wrapped.safetensors"))
    assert torch.equal(wrapped(images), plain(images))


def test_the_commands_take_a_constructor(net, tmp_path):
    words = ("train", "--model", "net.py:robust", "--dataset", "digits", "--epochs", "1", "--output", "run",
             "--device", "cpu")
    done = python("-m", "timm_hpm", *words, folder=tmp_path)
    assert "--model net.py:robust" in done.stdout and "--checkpoint run/model.safetensors" in done.stdout
    with pytest.raises(ValueError, match="code is not run because a file names it"):
        train_command.main(["--resume", "run"])
    assert evaluate_command.main([*QUICK, "--model", "net.py:robust", "--checkpoint", "run/model.safetensors",
                                  "--num-images", "8", "--output", "report"]) == 0
    assert json.loads(Path("report/report.json").read_text())["protocol"]["architecture"] == "net.py:robust"
    with pytest.raises(ValueError, match="code is not run because a file names it"):
        evaluate_command.main(["--resume", "report"])
    assert evaluate_command.main(["--resume", "report", "--model", "net.py:robust"]) == 0


def test_a_constructor_s_weights_and_normalisation_are_those_that_a_training_starts_from(net):
    """Its network takes pixels in [0, 1] in training, as in an evaluation."""
    kept = training_run(Path("run"), model="net.py:trained", pretrained=False, freeze_backbone=True, lr=1e-9)
    assert kept["val_clean"] > 0.98 and saved_config("run/model.safetensors")["pretrained_cfg"]["mean"] == [0]


def test_a_public_network_by_its_tag_or_its_data_set_and_threat():
    for arguments, tag in (({"name": "digits_linf"}, "digits_linf"),
                           ({"name": "hpm_wrn10_2.digits_linf"}, "digits_linf"),
                           ({"dataset": "digits", "threat": "Linf:0.1"}, "digits_linf"),
                           ({"name": "hpm_wrn10_2", "dataset": "torch/fashion_mnist"}, "fashion_mnist_linf")):
        model = timm_hpm.load_model(**arguments, inference="sample")
        assert not model.training and find_head(model).is_fitted() and find_head(model).inference == "sample"
        assert model.pretrained_cfg["tag"] == tag


@pytest.mark.parametrize(("arguments", "message"), [
    ({"name": "wang2023_cifar10_linf"}, r"2 networks fit name='wang2023_cifar10_linf'; expected one. They are:\n"
                                        r" +hpm_wrn28_10\.wang2023_cifar10_linf: threat model: Linf:8/255; .*\n"
                                        r" +hpm_wrn70_16\.wang2023_cifar10_linf: .*70\.69 % under AutoAttack"),
    ({"name": "wang2023_cifar10_lnf"}, r"no network fits name='wang2023_cifar10_lnf'; did you mean wang2023_cifar10_l"),
    ({"dataset": "torch/mnist"}, "no network fits dataset='torch/mnist'"),
])
def test_a_public_network_that_is_not_the_only_one_is_not_guessed(arguments, message):
    with pytest.raises(ValueError, match=message):
        timm_hpm.load_model(**arguments)


def test_any_network_is_saved_with_a_card(net, tmp_path):
    robust = create_model("net.py:robust").eval()
    report = timm_hpm.mixed_surrogate_attack(
        robust, torch.rand(4, 1, 8, 8), torch.arange(4), "Linf:0.1",
        protocol=timm_hpm.PROTOCOLS["fast"].changed(attacks=["apgd-ce"], budgets={"apgd-ce": 2}))
    timm_hpm.hub.save(robust, tmp_path / "robust", report=report)
    card = (tmp_path / "robust/README.md").read_text()
    assert "net.py:robust" in card and "timm.create_model(" not in card and "Inference modes" in card
    timm_hpm.hub.save(create_model("net.py:small"), tmp_path / "plain")
    assert "HPM head" not in (tmp_path / "plain/README.md").read_text()
    # A plain timm model is made again by timm alone, any other module by its class.
    model = timm.create_model("test_resnet", num_classes=3).eval()
    timm_hpm.hub.save(model, tmp_path / "timm")
    images = torch.rand(1, 3, 64, 64)
    again = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    assert torch.equal(again(images), model(images)) and head_name(again) is None
    module = torch.nn.Sequential(torch.nn.Conv2d(2, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),
                                 torch.nn.Linear(4, 3))
    timm_hpm.hub.save(timm_hpm.add_hpm_head(module, mix=0.25), tmp_path / "module")
    assert "torch.nn.modules.container:Sequential" in (tmp_path / "module/README.md").read_text()
    config = saved_config(tmp_path / "module/model.safetensors")
    assert config["constructor"] == "torch.nn.modules.container:Sequential" and config["num_classes"] == 3
    assert config["model_args"] == find_head(module).config() and config["pretrained_cfg"]["classifier"] == "3"
    assert config["pretrained_cfg"]["mean"] == [0, 0]


@pytest.mark.parametrize("head", [False, True])
def test_a_randomised_model_is_judged_again_with_the_same_draws(net, head, tmp_path, capsys):
    own = ["--model", f"{net}:noisy", "--device", "cpu"]
    assert evaluate_command.main([*own, "--model-kwargs", f"head={head}", "--num-images", "10", "-b", "4", "--budget",
                                  "apgd-ce=2", "apgd-t=1x2", "--attacks", "apgd-ce,apgd-t", "--save-adversarial",
                                  "--output", "run"]) == 0
    capsys.readouterr()
    for seed in range(3):
        torch.manual_seed(seed)
        assert evaluate_command.rejudge(["run", *own]) == 0, capsys.readouterr().out
