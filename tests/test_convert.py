"""Checkpoints of other projects: the same logits as their own networks, the tags, the command, and what is refused.

None of the public files can be had here: their formats are made with random weights, which the original architectures
(RobustBench's, torchvision's, timm's) compute the expected logits with.
"""

import csv
import gc
import os
import re
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import hub_server
import pytest
import timm
import torch
import torchvision
from nets import Trap, same_tensors
from safetensors.torch import save_file
from timm.models import get_pretrained_cfg
from torch import nn

from benchmarks._robustbench import randomised, zoo_module
from timm_hpm import (
    CheckpointError,
    DroppedClassifierWarning,
    PixelModel,
    ThreatModel,
    UnfittedHeadWarning,
    find_head,
    register_hpm,
)
from timm_hpm.__main__ import main
from timm_hpm.checkpoints import unwrap
from timm_hpm.models.create import convert, load_checkpoint
from timm_hpm.models.formats import FORMATS, plain_state_dict

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NONE = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
# Sorted: timm leaves names open that differ in leading zeros only.
PUBLIC = [name for name in sorted(timm.list_pretrained("hpm_*")) if not timm.get_pretrained_cfg(name).file]

for _base in ("test_resnet", "test_convnext"):
    register_hpm(_base)


def robustbench(name: str):
    """Returns a module of RobustBench's architectures, which give the expected logits."""
    try:
        return zoo_module(f"architectures.{name}")
    except ModuleNotFoundError as error:
        pytest.skip(str(error))


def prefixed(state_dict, prefix):
    return {prefix + key: value for key, value in state_dict.items()}


def load(name, path, overlay=None, **kwargs):
    """Returns what plain `timm.create_model` makes of a file, which has no prototypes."""
    with pytest.warns(UnfittedHeadWarning, match="predicts as its FC classifier until .*fit_prototypes") as record:
        model = timm.create_model(
            name, pretrained=True, pretrained_cfg_overlay={"file": str(path), **(overlay or {})}, **kwargs)
    assert sum(isinstance(warning.message, UnfittedHeadWarning) for warning in record) == 1
    return model.eval()


@torch.no_grad()
def assert_same_logits(model, original, size=32):
    """Asserts relative equality to 1e-4 on pixels; and that the logits depend on the image."""
    pixels = torch.rand(4, 3, size, size)
    ours, theirs = PixelModel(model)(pixels), original(pixels)
    assert theirs.std(dim=0).min() > 1e-4
    assert (ours - theirs).norm() < 1e-4 * theirs.norm()


def trades_wrn(depth=10, **kwargs):
    return randomised(robustbench("wide_resnet").WideResNet(depth, widen_factor=2, **kwargs))


def deepmind_wrn(depth=10, **kwargs):
    return randomised(robustbench("dm_wide_resnet").DMWideResNet(depth=depth, width=2, activation_fn=nn.SiLU, **kwargs))


def preact_resnet(**kwargs):
    resnet = robustbench("resnet")
    return randomised(resnet.PreActResNet(resnet.PreActBlock, [2, 2, 2, 2], **kwargs))


def averaged(prefix):
    """Returns what saves DeepMind's average of the weights beside the raw ones and the optimizer."""
    def wrap(weights):
        raw = {key: torch.zeros_like(value) for key, value in weights.items()}
        return {"model_state_dict": prefixed(weights, prefix), "unaveraged_model_state_dict": prefixed(raw, prefix),
                "optimizer_state_dict": {"state": {}, "param_groups": [{"lr": 0.1}]}, "epoch": 400}
    return wrap


def with_buffers(weights):
    buffers = {"mu": torch.tensor(CIFAR_MEAN).view(1, 3, 1, 1), "sigma": torch.tensor(CIFAR_STD).view(1, 3, 1, 1)}
    return {"last": {**weights, **buffers}}


def under(key, prefix=""):
    return lambda weights: {key: prefixed(weights, prefix), "epoch": 3}


def madrylab(weights, mean=IMAGENET_MEAN, std=IMAGENET_STD):
    """Returns a checkpoint of MadryLab's robustness library: DataParallel of AttackerModel."""
    normaliser = {"new_mean": torch.tensor(mean).view(3, 1, 1), "new_std": torch.tensor(std).view(3, 1, 1)}
    return {
        "model": {
            **prefixed(normaliser, "module.normalizer."), **prefixed(weights, "module.model."),
            **prefixed(normaliser, "module.attacker.normalize."), **prefixed(weights, "module.attacker.model."),
        },
        "optimizer": {"state": {}}, "schedule": None, "epoch": 90, "nat_prec1": torch.tensor(52.5),
    }


def xcit(data, num_classes):
    return randomised(getattr(robustbench("xcit"), f"debenedetti2022light_xcit_s12_{data}")(num_classes=num_classes))


def swin_of_2023(weights):
    """Returns a Swin's state dict by the names of timm 0.6: downsampling at the end of a stage, no `head.fc`."""
    old = {}
    for key, value in weights.items():
        key = re.sub(r"layers\.(\d)\.downsample", lambda match: f"layers.{int(match[1]) - 1}.downsample", key)
        old[key.replace("head.fc.", "head.")] = value
    return {**old, "layers.0.blocks.0.attn.relative_position_index": torch.zeros(49, 49, dtype=torch.long)}


class ResNetGELU(nn.GELU):
    """torch's GELU takes no `inplace`."""

    def __init__(self, inplace):
        super().__init__()


DEPTHS = {"depths": (2, 2, 2)}
# Networks of the ARES tags' architectures, made small.
RESNET, VIT = {"layers": (1, 1, 1, 1)}, {"depth": 2, "embed_dim": 48, "num_heads": 3}
SWIN = {"depths": (1, 1, 2, 1), "embed_dim": 24, "num_heads": (1, 2, 3, 4)}
WANG = get_pretrained_cfg("hpm_wrn28_10.wang2023_cifar100_linf")
CIFAR, IMAGENET = (CIFAR_MEAN, CIFAR_STD), (IMAGENET_MEAN, IMAGENET_STD)
# The network, our arguments, the cfg's overlay, a normalisation outside of theirs, theirs, and how its file wraps it.
PARITY = [
    ("hpm_wrn10_2.untrained", DEPTHS, NONE, None, lambda: trades_wrn(16, sub_block1=False), dict),
    ("hpm_wrn10_2.untrained", DEPTHS, NONE, None, lambda: trades_wrn(16, sub_block1=True),
     under("last", "module.model.")),
    ("hpm_wrn10_2.untrained_deepmind", DEPTHS, None, None, lambda: deepmind_wrn(16), averaged("module.0.")),
    # A tag's own classes and layout, in a network of a size for tests.
    ("hpm_wrn28_10.wang2023_cifar100_linf", {"depths": (1, 1, 1), "channels": (32, 64, 128)}, None, None,
     lambda: deepmind_wrn(num_classes=100, mean=WANG.mean, std=WANG.std), averaged("module.0.")),
    ("hpm_preact_resnet18.untrained_deepmind", {}, None, None, lambda: randomised(
        robustbench("dm_wide_resnet").DMPreActResNet(depth=18, activation_fn=nn.SiLU)), under("state_dict", "module.")),
    # Shortcuts behind the activation, and a final BatchNorm.
    ("hpm_preact_resnet18", {}, None, CIFAR, lambda: preact_resnet(bn_before_fc=True, out_shortcut=True),
     lambda weights: {"epoch": 105, "model_state_dict": weights, "optimizer_state_dict": {"state": {}}}),
    # Shortcuts of the raw input, no final BatchNorm, and the normalisation's buffers in the file.
    ("hpm_preact_resnet18.untrained", {"final_norm": False, "shortcut": "raw"}, None, CIFAR, lambda: preact_resnet(),
     with_buffers),
    *(("hpm_cifar_resnet18", {}, NONE, None, lambda: randomised(robustbench("resnet").ResNet18()), wrap) for wrap in (
        under("state_dict", "module."),
        lambda weights: {"last": {**weights, "mu": torch.zeros(1, 3, 1, 1), "sigma": torch.ones(1, 3, 1, 1)}})),
    # `normalize.*` and `model.*`, as of RobustBench's ImageNet models.
    ("hpm_test_convnext", {}, None, None, lambda: robustbench("utils_architectures").normalize_timm_model(
        randomised(timm.create_model("test_convnext"))), dict),
    ("hpm_resnet18.salman2020_imagenet_l2_eps3", {}, None, IMAGENET,
     lambda: randomised(torchvision.models.resnet18()), madrylab),
    ("hpm_resnet152.liu2023_imagenet_linf", RESNET, None, IMAGENET,
     lambda: randomised(timm.create_model("resnet152", **RESNET, act_layer=ResNetGELU)), dict),
    ("hpm_vit_small_patch16_224.liu2023_imagenet_linf", VIT, None, IMAGENET,
     lambda: randomised(timm.create_model("vit_small_patch16_224", **VIT)), dict),
    ("hpm_swin_small_patch4_window7_224.liu2023_imagenet_linf", SWIN, None, IMAGENET,
     lambda: randomised(timm.create_model("swin_small_patch4_window7_224", **SWIN)), swin_of_2023),
    # The file holds the weights alone, or those of the network with its normalisation.
    *(("hpm_cifar_xcit_small_12_p4_32.debenedetti2022_cifar100_linf", {}, None, None,
       lambda: xcit("cifar100_linf", 100), wrap) for wrap in (dict, lambda weights: {"state_dict": {
           key.removeprefix("model."): value for key, value in weights.items() if key.startswith("model.")}})),
    ("hpm_xcit_small_12_p16_224.debenedetti2022_imagenet_linf", {}, None, None, lambda: xcit("imagenet_linf", 1000),
     under("state_dict")),
]


@pytest.mark.parametrize(("name", "kwargs", "overlay", "normalisation", "make", "wrap"), PARITY)
def test_checkpoints_of_others_networks_answer_as_they_do(tmp_path, name, kwargs, overlay, normalisation, make, wrap):
    original = make()
    torch.save(wrap(original.state_dict()), tmp_path / "theirs.pt")
    model = load(name, tmp_path / "theirs.pt", overlay, **kwargs)
    assert_same_logits(model, PixelModel(original, *normalisation) if normalisation else original,
                       32 if model.pretrained_cfg["input_size"][-1] == 32 else 224 if "224" in name else 64)
    if name == "hpm_preact_resnet18":
        assert not model.pretrained_cfg.get("tag")  # nobody can tell that they are the tag's
    if name == "hpm_cifar_resnet18":
        # A new classifier and none, for which timm loads loosely, and features: nobody asks for prototypes.
        for other in ({"num_classes": 5}, {"num_classes": 0}, {"features_only": True}):
            with pytest.warns(DroppedClassifierWarning) if other.get("num_classes") else nullcontext():
                other = timm.create_model(name, pretrained=True, **other,
                                          pretrained_cfg_overlay={"file": str(tmp_path / "theirs.pt"), **overlay})
            found = other.state_dict()
            assert torch.equal(found["layer4.1.conv2.weight"], original.layer4[1].conv2.weight)


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_tag_has_threat_model_licence_and_paper(name):
    cfg = get_pretrained_cfg(name)
    assert cfg.notes[0].startswith("threat model: ") and ThreatModel.of(cfg.notes[0].removeprefix("threat model: "))
    assert cfg.license in ("mit", "apache-2.0") and cfg.origin_url.startswith("https://github.com/")
    assert cfg.paper_name and any(re.fullmatch(r"arXiv:\d{4}\.\d{5}", paper) for paper in cfg.paper_ids)
    # One image size for training, testing and the network.
    assert cfg.test_input_size is None and len(cfg.mean) == len(cfg.std) == cfg.input_size[0] == 3
    model = timm.create_model(name, device="meta")
    assert model.num_classes == cfg.num_classes
    assert f"{cfg.first_conv}.weight" in model.state_dict() and f"{cfg.classifier}.weight" in model.state_dict()
    assert model.pretrained_cfg["tag"] == name.partition(".")[2]


TABLE = Path(__file__).parents[1] / "docs" / "robustbench_ids.csv"
IDS = list(csv.DictReader(TABLE.read_text(encoding="utf-8").splitlines()))


@pytest.mark.parametrize("options", sorted({row["convert"] for row in IDS if row["convert"]}))
def test_the_options_of_a_robustbench_id_make_a_network_and_its_tag_exists(options, monkeypatch):
    def on_meta(checkpoint, name, output, cfg, **arguments):
        assert len(cfg["mean"]) == len(cfg["std"]) == 3
        return timm.create_model(name, device="meta", num_classes=cfg.get("num_classes"), **arguments)

    monkeypatch.setattr("timm_hpm.commands.hub.convert_checkpoint", on_meta)
    assert main(["convert", "theirs.pt", "--output", "ours", *options.split()]) == 0
    assert {row["tag"] for row in IDS if not row["convert"]} <= {*timm.list_pretrained("hpm_*")}


# What is refused. The formats are written by hand: these tests need no RobustBench.
# What only our own state dicts hold.
OURS = ("function", "fc.prototypes", "fc.num_updates", "fc.log_scale")


def deepmind_state_dict(depths=(1, 1, 1)):
    """Returns the state dict of a native network by DeepMind's names."""
    names = {"conv1": "init_conv", "norm": "batchnorm", "fc": "logits"}
    inner = {"bn1": "batchnorm_0", "conv1": "conv_0", "bn2": "batchnorm_1", "conv2": "conv_1", "shortcut": "shortcut"}
    theirs = {}
    for key, value in timm.create_model("hpm_wrn10_2.untrained_deepmind", depths=depths).state_dict().items():
        if match := re.fullmatch(r"stages\.(\d)\.(\d)\.(\w+)\.(.*)", key):
            theirs[f"layer.{match[1]}.block.{match[2]}.{inner[match[3]]}.{match[4]}"] = value
        elif key not in OURS:
            module, _, leaf = key.partition(".")
            theirs[f"{names[module]}.{leaf}"] = value
    return theirs


def trades_state_dict():
    theirs = {}
    for key, value in timm.create_model("hpm_wrn10_2.untrained").state_dict().items():
        if match := re.fullmatch(r"stages\.(\d)\.(\d)\.(\w+)\.(.*)", key):
            name = "convShortcut" if match[3] == "shortcut" else match[3]
            theirs[f"block{int(match[1]) + 1}.layer.{match[2]}.{name}.{match[4]}"] = value
        elif key not in OURS:
            theirs[key.replace("norm.", "bn1.")] = value
    return theirs


def state_of(name, **kwargs):
    return timm.create_model(name, **kwargs).state_dict()


def without(weights, *parts):
    return {key: value for key, value in weights.items() if not any(part in key for part in parts)}


def normalised(weights, mean, std):
    return {**prefixed(weights, "model."), "normalize.mean": torch.tensor(mean), "normalize.std": torch.tensor(std)}


def two_networks():
    checkpoint = madrylab(state_of("test_resnet"))
    checkpoint["model"] |= {"module.attacker.model.bn1.weight": torch.zeros(32),
                            "module.attacker.model.other": torch.zeros(1)}
    return checkpoint


ONE = torch.ones(1)
TRADES, DEEPMIND = "hpm_wrn10_2.untrained", "hpm_wrn10_2.untrained_deepmind"
SMALL_WRN = {"depths": (1, 1, 1), "channels": (32, 64, 128)}
LAYERS, TEN = {"layers": (1, 1, 1, 1)}, {"num_classes": 10}
XCIT = {"depth": 1, "embed_dim": 64, "num_heads": 4}
PREACT = {"layer1.0.conv1.weight": ONE, "bn.weight": ONE, "linear.weight": ONE}
SMALL_PATCHES, LARGE_PATCHES = "hpm_cifar_xcit_small_12_p4_32", "hpm_xcit_small_12_p16_224"
NORMALISED = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
#: Weights, the network that does not take them, its arguments, its cfg's overlay, and the words that say so.
REFUSED = [
    # The layouts of WideResNets. The tag's own is what counts, unless the caller has another.
    (deepmind_state_dict, TRADES, {}, {}, r"needs layout='deepmind'; the network has 'trades'.*\.untrained_deepmind"),
    (trades_state_dict, DEEPMIND, {}, {}, r"needs layout='trades'; the network has 'deepmind'.*as \.untrained with"),
    (lambda: {"model_state_dict": prefixed({**deepmind_state_dict(), "layer.0.block.0.gate.weight": ONE, "aux.bias": ONE
                                            }, "module.0.")}, DEEPMIND, {}, {},
     r"no place for: layer\.0\.block\.0\.gate\.weight, aux\.bias\. .*lacks: none"),
    (lambda: without(deepmind_state_dict(), "batchnorm_1.running"), DEEPMIND, {}, {},
     r"no place for: none\. .*lacks: stages\.0\.0\.bn2\.running_mean"),
    (lambda: {"state_dict": without(state_of("test_resnet", **TEN), "layer4.0.conv2.weight")}, "hpm_test_resnet", {},
     {}, r"Missing key\(s\).*layer4\.0\.conv2\.weight"),
    (lambda: state_of("test_resnet"), DEEPMIND, {}, {}, "unknown format: .*conv1.0.weight.*Known: timm_hpm, Deep"),
    (deepmind_state_dict, "hpm_test_resnet", {}, {}, r"into hpm_test_resnet: .*Unexpected.*init_conv\.weight"),
    (lambda: {"conv1.weight": torch.ones(64, 3, 3, 3), "bn1.weight": ONE, "layer1.0.conv1.weight": ONE,
              "linear.weight": ONE}, DEEPMIND, {}, {}, "with activations behind the blocks.*Take hpm_cifar_resnet18"),
    (lambda: PREACT, TRADES, {"shortcut": "raw3x3"}, {}, "needs shortcut='activated'; the network has 'raw3x3'"),
    (lambda: without(PREACT, "bn."), "hpm_preact_resnet18.untrained", {"final_norm": False}, {}, "shortcut='raw'; "),
    (lambda: state_of("resnet18", **LAYERS, **TEN), "hpm_cifar_resnet18", LAYERS, {}, r"size mismatch for conv1\.wei"),
    (lambda: state_of("hpm_cifar_resnet18", **LAYERS), "hpm_resnet18", LAYERS, TEN, r"size mismatch for conv1\.weight"),
    (lambda: state_of(SMALL_PATCHES, **XCIT), LARGE_PATCHES, XCIT, TEN | {"mean": CIFAR_MEAN, "std": CIFAR_STD},
     "has the entry function.*smaller patches"),
    (lambda: normalised(state_of("xcit_small_12_p16_224", **TEN, **XCIT), CIFAR_MEAN, CIFAR_STD), LARGE_PATCHES, XCIT,
     TEN, r"normalises by normalize\.mean = \(0\.4914, .*smaller patches .*Load it into hpm_cifar_xcit_\*"),
    (lambda: {"model": prefixed(state_of("xcit_small_12_p16_224", **XCIT), "module.")}, SMALL_PATCHES, XCIT,
     {"num_classes": 1000}, "has 1000 classes, as ImageNet.*: it is of .*larger patches .*Load it into hpm_xcit_"),
    (lambda: state_of(LARGE_PATCHES, **TEN, **XCIT), SMALL_PATCHES, XCIT, {}, "an HPM head and no entry function, as"),
    (lambda: normalised(state_of("xcit_small_12_p16_224", **XCIT), IMAGENET_MEAN, IMAGENET_STD), SMALL_PATCHES, XCIT,
     NORMALISED, r"normalises by normalize\.mean = \(0\.485, .*larger patches"),
    (lambda: {**deepmind_state_dict(), "mean": torch.full((3, 1, 1), 0.5), "std": torch.tensor(CIFAR_STD)},
     DEEPMIND, {}, {}, r"by mean = \(0\.5, 0\.5, 0\.5\), the network by mean = \(0\.4914, .*overlay=dict\(mean="),
    (lambda: madrylab(state_of("test_resnet"), std=(1.0, 1.0, 1.0)), "hpm_test_resnet", {}, NORMALISED,
     r"normalises by normalizer\.new_std = \(1\.0, 1\.0, 1\.0\)"),
    (two_networks, "hpm_test_resnet", {}, NORMALISED, r"two networks, model\.\* and attacker\.model\.\*, that differ"),
    *((lambda checkpoint=checkpoint: checkpoint, name, {}, {}, message) for name in (TRADES, "hpm_test_resnet")
      for checkpoint, message in (({}, "it is empty"), ({"epoch": 3, "lr": 0.1}, "holds no state dict: epoch, lr"))),
]


@pytest.mark.parametrize(("weights", "name", "kwargs", "overlay", "message"), REFUSED)
def test_weights_that_are_not_of_the_network_are_refused_whatever_its_classes(tmp_path, weights, name, kwargs, overlay,
                                                                              message):
    """Also without classes, for which timm loads loosely."""
    path = tmp_path / "theirs.pt"
    torch.save(weights(), path)
    features = {LARGE_PATCHES: {"features_only": True, "out_indices": (0,)}, "hpm_test_resnet": {"features_only": True}}
    for options in (TEN, {"num_classes": 3}, {"num_classes": 0}, features.get(name, {})):
        with pytest.raises(CheckpointError, match=f"(?s){message}") as error:
            timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": str(path), **overlay}, **kwargs,
                              **options)
        assert str(path) in str(error.value)


class TypeErrorUnlessUnpickled:
    """A tensor with a state that pickle sets, and that loading weights only cannot."""

    def __reduce__(self):
        return *torch.ones(1).__reduce_ex__(2)[:2], (False, None, None)


@pytest.mark.parametrize("name", ["hpm_wrn10_2.untrained", "hpm_test_resnet.untrained"])
@pytest.mark.parametrize(("first", "message"), [
    (ONE, r"refused _?io\.open\. .*nothing was loaded.*torch\.save"),
    # timm loads a checkpoint from a URL once more, unsafely, where the safe attempt ends in a TypeError.
    (TypeErrorUnlessUnpickled(), "cannot read the (weights|checkpoint) "),
], ids=["zip", "second attempt"])
def test_code_in_a_checkpoint_does_not_run(tmp_path, name, first, message, monkeypatch):
    file = tmp_path / "theirs.ckpt"
    torch.save({"a": first, "b": Trap(tmp_path / "ran")}, file)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    for call in (
            *(lambda overlay=overlay: timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay,
                                                        cache_dir=tmp_path / "cache")
              for overlay in ({"file": str(file)}, {"url": file.as_uri(), "file": None, "hf_hub_id": None})),
            lambda: load_checkpoint(timm.create_model(name), str(file)),
            lambda: main(["convert", str(file), "--model", name, "--output", str(tmp_path / "out")])):
        with pytest.raises((CheckpointError, ValueError), match=message) as error:
            call()
        assert file.name in str(error.value) and {*os.listdir(tmp_path)} <= {"theirs.ckpt", "cache"}
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1" and "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
@pytest.mark.parametrize("damage", [lambda whole: whole[:len(whole) // 2], lambda whole: b"", None])
def test_a_damaged_file_is_named(tmp_path, suffix, damage):
    path, name = tmp_path / f"theirs.{suffix}", "hpm_wrn10_2.untrained"
    (save_file if suffix == "safetensors" else torch.save)(timm.create_model(name).state_dict(), path)
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes()))
    message = "cut short, damaged, or no checkpoint; remove it" if damage else "there is no such file"
    with pytest.raises(CheckpointError, match=message) as error:
        timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": str(path)})
    assert str(error.value).startswith(f"cannot read the weights in {path}: ")
    with pytest.raises(ValueError, match=r"cannot read the checkpoint .*: "):
        load_checkpoint(timm.create_model(name), str(path))


# urllib's error keeps its socket until it is collected.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
def test_a_server_that_refuses_is_answered_by_its_status_and_never_in_a_traceback(tmp_path):
    with hub_server.running() as server:
        server.faults.answer = {"/.*": (403, "hf_secret")}
        overlay = {"url": f"{server.url}/x.pth", "hf_hub_id": None}
        message = rf"cannot read the weights at {overlay['url']}: .*\(HTTP 403\)\. It needs a login with access"
        with pytest.raises(CheckpointError, match=message) as error:
            timm.create_model("hpm_test_resnet", pretrained=True, pretrained_cfg_overlay=overlay, cache_dir=tmp_path)
    # Whatever the server says stays out of what Python prints of the causes.
    assert error.value.__suppress_context__
    error.value.__context__ = None
    gc.collect()


def test_random_weights_and_own_files_carry_no_licence_of_the_tag(tmp_path):
    tag = "hpm_wrn28_10.wang2023_cifar10_linf"
    scratch = timm.create_model(tag, **SMALL_WRN)
    torch.save(scratch.state_dict(), tmp_path / "mine.pt")
    for model in (scratch, load(tag, tmp_path / "mine.pt", **SMALL_WRN)):
        cfg = model.pretrained_cfg
        assert cfg["license"] == "apache-2.0" and "wzekai99" not in cfg["origin_url"] and not cfg.get("notes")
        assert "arXiv:2302.04638" not in cfg["paper_ids"] and not cfg.get("paper_name")
        assert model.layout == "deepmind" and cfg["mean"] == CIFAR_MEAN
    # The tag's own weights are their authors'.
    theirs = get_pretrained_cfg(tag)
    assert theirs.license == "mit" and theirs.origin_url.endswith("wzekai99/DM-Improves-AT") and theirs.notes


def test_the_average_of_the_weights_is_taken():
    average, raw = {"w": torch.ones(1)}, {"w": torch.zeros(1)}
    assert unwrap({"unaveraged_model_state_dict": raw, "model_state_dict": average})["w"] is average["w"]
    for kind, of_it in (("model", "ema"), ("state_dict", "ema_state_dict"), ("state_dict", "state_dict_ema"),
                        ("net", "model_ema")):
        assert unwrap({kind: raw, of_it: average})["w"] is average["w"]
    assert unwrap({"net": raw, "acc": 0.9})["w"] is raw["w"]
    assert unwrap({"state_dict": raw, "state_dict_ema": None})["w"] is raw["w"]
    assert unwrap({"checkpoint": torch.ones(1)}).keys() == {"checkpoint"}
    with pytest.raises(CheckpointError, match="the checkpoint is a list; expected a state"):
        unwrap([torch.ones(1)])


SMALL = [("hpm_wrn10_2.untrained", {}), ("hpm_cifar_resnet18", {"layers": (1, 1, 1, 1)})]


@pytest.mark.parametrize("wrap", [
    # The average of the weights is no state dict.
    lambda good: {"state_dict": good, "ema_state_dict": {}}, lambda good: {"state_dict": good, "model_ema": None},
    lambda good: {"state_dict": good, "ema": {"decay": 0.999, "num_updates": 3, "shadow_params": [*good.values()]}},
    lambda good: {"state_dict": good, "ema_state_dict": {key: value + 1 for key, value in good.items()
                                                         if "running" not in key}},
    # Without the counts of batches, of PyTorch before 0.4.1, and with that of torch's AveragedModel.
    lambda good: {"model": {}, "ema_state_dict": without(good, "num_batches_tracked")},
    lambda good: {"n_averaged": torch.tensor(5), **prefixed(without(good, "num_batches_tracked"), "module.")},
    *(partial(prefixed, prefix=prefix) for prefix in ("_orig_mod.module.", "module.1.", "0.")),
])
@pytest.mark.parametrize(("name", "kwargs"), SMALL)
def test_weights_are_found_however_they_are_wrapped(tmp_path, wrap, name, kwargs):
    good = without(timm.create_model(name, **kwargs).state_dict(), *OURS)
    torch.save(wrap(good), tmp_path / "theirs.pt")
    state = load(name, tmp_path / "theirs.pt", NONE, **kwargs).state_dict()
    assert all(torch.equal(state[key], value) for key, value in good.items())


@pytest.mark.parametrize(("name", "kwargs"), SMALL)
def test_an_averaged_model_of_ours_needs_no_counts_of_batches(tmp_path, name, kwargs):
    own, model = (timm.create_model(name, **kwargs) for _ in range(2))
    torch.save({"n_averaged": torch.tensor(5), **prefixed(without(own.state_dict(), "num_batches_tracked"), "module.")},
               tmp_path / "own.pt")
    load_checkpoint(model, str(tmp_path / "own.pt"))
    assert same_tensors(model.state_dict(), own.state_dict())


def test_formats_exclude_each_other_and_a_prefix_of_some_keys_is_a_name():
    for known in FORMATS:
        assert [other for other in FORMATS if other.fits(set(known.marks))] == [known]
    mixed = {"model.weight": torch.ones(1), "fc.weight": torch.ones(1)}
    assert plain_state_dict(mixed, CIFAR_MEAN, CIFAR_STD).keys() == mixed.keys()


@pytest.fixture
def deepmind_file(tmp_path):
    torch.save({"model_state_dict": prefixed(deepmind_state_dict(), "module.0.")}, tmp_path / "theirs.pt")
    return tmp_path / "theirs.pt"


def test_the_command_writes_a_folder_that_timm_loads_as_its_options_say(tmp_path, capsys):
    weights, output = trades_state_dict(), tmp_path / "new" / "folder"
    torch.save({**weights, "fc.weight": torch.randn(7, 128), "fc.bias": torch.randn(7)}, tmp_path / "a.pt")
    with pytest.warns(UnfittedHeadWarning):
        main(["convert", str(tmp_path / "a.pt"), "--model", "hpm_wrn10_2.untrained_deepmind", "--output", str(output),
              "--num-classes", "7", "--mean", "0", "0", "0", "--std", "1", "1", "1",
              "--model-kwargs", "layout=trades", "mix=0.25"])
        model = timm.create_model(f"local-dir:{output}", pretrained=True).eval()
    assert capsys.readouterr().out.startswith(f"written: {output / 'model.safetensors'}, {output / 'config.json'}: ")
    assert sorted(os.listdir(output)) == ["config.json", "model.safetensors"]
    assert (model.layout, model.num_classes, find_head(model).mix) == ("trades", 7, 0.25)
    expected = load("hpm_wrn10_2.untrained", tmp_path / "a.pt", NONE, num_classes=7)
    pixels = torch.rand(2, 3, 32, 32)
    assert torch.equal(PixelModel(model)(pixels), expected(pixels))


def test_the_command_replaces_nothing_and_leaves_nothing_half_written(tmp_path, deepmind_file, monkeypatch):
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "model.safetensors").write_text("mine")
    with pytest.raises(OSError, match=r"kept holds a model; choose another --output"):
        convert(deepmind_file, "hpm_wrn10_2.untrained_deepmind", kept)
    assert (kept / "model.safetensors").read_text() == "mine"
    for name, options, message in ((TRADES, {}, "needs layout='deepmind'"),
                                   (DEEPMIND, {"num_classes": 0}, "num_classes is 0; expected that of the")):
        with pytest.raises(ValueError, match=message):
            convert(deepmind_file, name, tmp_path / "out", **options)

    def fill_the_disk(model, path, **kwargs):
        Path(path).write_text("{")
        raise OSError(28, "No space left on device")

    (tmp_path / "empty").mkdir()
    monkeypatch.setattr("timm_hpm.models.saving.save_config_for_hf", fill_the_disk)
    for output in ("out", "empty"):
        with pytest.warns(UnfittedHeadWarning), pytest.raises(OSError, match="No space left"):
            convert(deepmind_file, "hpm_wrn10_2.untrained_deepmind", tmp_path / output)
    assert sorted(os.listdir(tmp_path)) == ["empty", "kept", "theirs.pt"] and not os.listdir(tmp_path / "empty")


def test_an_empty_current_folder_is_filled_and_stays_the_current_one(tmp_path, deepmind_file, monkeypatch):
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    with pytest.warns(UnfittedHeadWarning):
        convert(deepmind_file, "hpm_wrn10_2.untrained_deepmind", ".")
        assert sorted(os.listdir()) == sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]
        timm.create_model("local-dir:.", pretrained=True)
