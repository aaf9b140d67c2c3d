"""The `hpm_*` networks, native and of timm's architectures: what timm asks of a model, tags, and loading of weights."""

import warnings
from contextlib import nullcontext
from copy import deepcopy
from itertools import accumulate

import pytest
import timm
import torch
from nets import with_prototypes, with_statistics
from safetensors.torch import save_file
from timm.models import get_notrace_functions, get_notrace_modules
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import timm_hpm
from timm_hpm import (
    CheckpointError,
    DroppedClassifierWarning,
    HPMHead,
    UnfittedHeadWarning,
    find_head,
    register_hpm,
)
from timm_hpm.head import head_name
from timm_hpm.models import hpm_timm
from timm_hpm.models._builder import _HEAD_ENTRIES
from timm_hpm.models.create import load_checkpoint

# WideResNets and PreActResNet, both layouts, and the default tag of hpm_wrn10_2 with its small images of one channel.
NAMES = (
    "hpm_wrn10_2", "hpm_wrn10_2.untrained_deepmind", "hpm_wrn16_4", "hpm_preact_resnet18",
    "hpm_preact_resnet18.untrained_deepmind",
)
# timm's own networks for small images, made smaller.
CIFAR = {
    "hpm_cifar_resnet18": {"layers": (1, 1, 1, 1)},
    "hpm_cifar_xcit_small_12_p4_32": {"depth": 3, "embed_dim": 64, "num_heads": 4},
}
_THIN = {"depths": (1, 1, 1, 1), "channels": (16, 32, 64, 128), "stem_chs": 16}
SMALL = CIFAR | {"hpm_wrn16_4": {"channels": (16, 32, 64)}, "hpm_preact_resnet18": _THIN,
                 "hpm_preact_resnet18.untrained_deepmind": _THIN}
ALL = (*NAMES, *CIFAR)
BODY = "hpm_wrn10_2.untrained"

scripts = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def create(name: str, **kwargs):
    return timm.create_model(name, **SMALL.get(name, {}), **kwargs)


def images(model, batch: int = 2) -> Tensor:
    return torch.randn(batch, *model.pretrained_cfg["input_size"])


def fit(model):
    return with_prototypes(with_statistics(model))


def fx_model(model):
    options = {"leaf_modules": get_notrace_modules(), "autowrap_functions": get_notrace_functions()}
    train_nodes, eval_nodes = get_graph_node_names(model, tracer_kwargs=options)
    return create_feature_extractor(
        model, train_return_nodes=train_nodes[-1:], eval_return_nodes=eval_nodes[-1:], tracer_kwargs=options)


@pytest.mark.parametrize("name", ALL)
def test_cfg_describes_the_model(name):
    model = create(name).eval()
    cfg, x = model.default_cfg, images(model, 1)
    assert cfg["license"] in ("apache-2.0", "mit") and cfg["origin_url"] and cfg["paper_ids"]
    assert {f"{cfg['first_conv']}.weight", f"{cfg['classifier']}.weight"} <= model.state_dict().keys()
    assert cfg["num_classes"] == model.num_classes == 10
    assert len(cfg["mean"]) == len(cfg["std"]) == cfg["input_size"][0] == x.shape[1]
    features = model.forward_features(x)
    pre_logits = model.forward_head(features, pre_logits=True)
    expected = (1 + 8 * 8, 64) if cfg["pool_size"] is None else (model.num_features, *cfg["pool_size"])
    assert features.shape == (1, *expected) and pre_logits.shape == (1, model.head_hidden_size)
    assert torch.equal(find_head(model)(pre_logits), model(x)) and model.get_classifier() is find_head(model)
    model.reset_classifier(0)
    assert model.num_classes == 0 and torch.equal(model(x), pre_logits)
    model.reset_classifier(0, "")
    assert torch.equal(model(x), features)
    bare = create(name, num_classes=0, global_pool="", in_chans=1, mix=0.2).eval()
    assert bare(x[:, :1]).shape == features.shape
    bare.reset_classifier(3, "avg" if name in CIFAR else "catavgmax")
    assert bare(x[:, :1]).shape == (1, 3) and find_head(bare).mix == 0.2


@pytest.mark.parametrize(("name", "parameters"), [
    ("hpm_wrn28_10.untrained", 36_479_194),
    ("hpm_wrn34_20.untrained_deepmind", 184_531_674),
    ("hpm_preact_resnet18.untrained", 11_172_170),
    ("hpm_cifar_resnet18.untrained", 11_173_962),
])
def test_parameter_count_is_the_known_one_and_the_scale(name, parameters):
    model = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == parameters + 1


def test_a_tag_sets_model_arguments():
    assert timm.create_model("hpm_wrn10_2").conv1.stride == (2, 2)
    assert timm.create_model("hpm_wrn10_2.untrained").conv1.stride == (1, 1)
    deepmind = timm.create_model("hpm_wrn10_2.untrained_deepmind")
    assert isinstance(timm.create_model("hpm_wrn10_2.untrained").act, nn.ReLU) and isinstance(deepmind.act, nn.SiLU)
    for given in ({"pretrained_cfg": "untrained_deepmind"}, {"pretrained_cfg": deepmind.pretrained_cfg},
                  {"pretrained_cfg_overlay": {"tag": "untrained_deepmind"}}):
        assert isinstance(timm.create_model("hpm_wrn10_2", **given).act, nn.SiLU)
    model = timm.create_model("hpm_wrn10_2.untrained_deepmind", layout="trades", depths=(2, 1, 1))  # these win
    assert isinstance(model.act, nn.ReLU) and len(model.stages[0]) == 2


@pytest.mark.parametrize("arguments", [{"layout": "deepmind"}, {"shortcut": "raw", "stem_stride": 2}])
def test_own_weights_that_fit_another_function_are_refused_on_every_way(arguments, tmp_path):
    source, path = timm.create_model(BODY, **arguments), tmp_path / "model.safetensors"
    save_file(source.state_dict(), path)
    message = rf"layout='{source.layout}', shortcut='{source.shortcut}', stem_stride={source.stem_stride}; this one has"
    for load in (lambda **own: timm.create_model(BODY, **own).load_state_dict(source.state_dict()),
                 lambda **own: timm.create_model(BODY, checkpoint_path=str(path), **own),
                 lambda **own: timm.create_model(
                     BODY, pretrained=True, pretrained_cfg_overlay={"file": str(path)}, **own),
                 lambda **own: load_checkpoint(timm.create_model(BODY, **own), str(path))):
        with pytest.raises((RuntimeError, ValueError), match=message):
            load()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UnfittedHeadWarning)
            load(**arguments)


@pytest.mark.parametrize("feature_cls", [None, "fx"])
@pytest.mark.parametrize("name", ALL)
def test_features_only(name, feature_cls):
    if "xcit" in name and feature_cls:
        pytest.skip("timm offers the features of XCiT by getter only")
    given = {} if feature_cls is None else {"feature_cls": feature_cls}
    model = create(name, features_only=True, **given).eval()
    x = images(create(name) if name in CIFAR else model)
    maps = model(x)
    assert len(maps) == (3 if "xcit" in name else 5 if "resnet" in name else 4)
    for channels, reduction, features in zip(
            model.feature_info.channels(), model.feature_info.reduction(), maps, strict=True):
        assert features.shape == (2, channels, *(size // reduction for size in x.shape[-2:]))
    if name in CIFAR:
        whole = create(name).eval()
        final, maps = whole.forward_intermediates(x)
        assert torch.equal(final, whole.forward_features(x)) and len(maps) == len(whole.feature_info)


@pytest.mark.parametrize("name", ALL)
def test_grad_checkpointing_changes_neither_outputs_nor_gradients(name):
    model = fit(create(name)).train()
    other = deepcopy(model)
    other.set_grad_checkpointing()
    x = images(model)
    for net in (model, other):
        net(x).square().mean().backward()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-4, atol=1e-6)
    # In training mode: the running statistics have moved once in one model and twice in the other.
    assert torch.allclose(model.forward_features(x), other.forward_features(x), rtol=1e-4, atol=1e-5)
    other.set_grad_checkpointing(False)
    assert not other.grad_checkpointing


@scripts
@pytest.mark.parametrize("name", ALL)
def test_script_and_fx(name):
    model = fit(create(name)).eval()
    x = images(model)
    traced = fx_model(model)
    with torch.inference_mode():
        expected = model(x)
        assert torch.equal(*traced(x).values(), expected)
    assert torch.allclose(torch.jit.script(model)(x), expected, rtol=1e-4, atol=1e-5)
    assert torch.allclose(*torch.jit.script(traced)(x).values(), expected, rtol=1e-4, atol=1e-5)


VARIANTS = [f"hpm_{base}" for base in hpm_timm.BASES]
# timm's own small networks: one with a plain classifier, one with a norm in front, one with positions that are
# resized while loading, and one with a 1x1 convolution.
for _base in ("test_resnet", "test_convnext", "test_vit", "dla46x_c"):
    register_hpm(_base)
SIZE = {"test_resnet": 64, "test_convnext": 64, "test_vit": 160, "dla46x_c": 64}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_is_its_base_with_an_hpm_head(name):
    base = name.removeprefix("hpm_")
    model, plain = timm.create_model(f"{name}.untrained", device="meta"), timm.create_model(base, device="meta")
    assert isinstance(model, type(plain)) and isinstance(model.get_classifier(), HPMHead)

    cfg, theirs = model.default_cfg, plain.default_cfg
    assert (cfg["architecture"], cfg["tag"], cfg["num_classes"]) == (name, "untrained", model.num_classes)
    for key in ("input_size", "fixed_input_size", "pool_size", "crop_pct", "interpolation", "mean", "std", "first_conv",
                "classifier", "num_classes"):
        assert cfg[key] == theirs[key]
    assert not cfg.keys() & {"url", "hf_hub_id", "file"} and cfg["license"] and cfg["origin_url"] and cfg["paper_ids"]
    assert cfg["classifier"] == head_name(model)
    assert f"{cfg['first_conv']}.weight" in model.state_dict()
    assert model.state_dict().keys() - plain.state_dict().keys() == {
        f"{cfg['classifier']}.{entry}" for entry in _HEAD_ENTRIES}


def test_register_hpm_registers_any_other_once():
    assert not timm.is_model("hpm_test_byobnet")
    assert register_hpm("test_byobnet") == register_hpm("test_byobnet") == "hpm_test_byobnet"
    assert timm.list_models("hpm_test_byobnet") == ["hpm_test_byobnet"]
    model = timm.create_model("hpm_test_byobnet", num_classes=3, mix=0.1, in_chans=1, drop_rate=0.2)
    assert find_head(model).config() == {"mix": 0.1, "ema_decay": 0.99, "inference": "dataset"}
    assert model(torch.randn(2, 1, 64, 64)).shape == (2, 3) and model.head.drop.p == 0.2


def test_a_base_without_classes_takes_them():
    name = register_hpm("vit_small_patch14_dinov2")
    headless = timm.create_model(name, device="meta", mix=0.2)
    assert headless.num_classes == 0 and head_name(headless) is None
    headless.reset_classifier(4)
    model = timm.create_model(name, num_classes=4, device="meta", mix=0.2)
    assert find_head(headless).mix == 0.2 and headless.state_dict().keys() == model.state_dict().keys()


# A native network of one channel beside timm's of three.
INPUT = {"wrn10_2": (1, 8), **{base: (3, size) for base, size in SIZE.items()}}


@pytest.fixture(params=INPUT)
def base(request) -> str:
    return request.param


@pytest.fixture
def source(base):
    """A fitted model of 10 classes."""
    return fit(timm.create_model(f"hpm_{base}", num_classes=10)).eval()


@pytest.fixture
def load(base, source, tmp_path):
    """Returns a function that creates a pretrained model from the weights of `source`."""
    save_file(source.state_dict(), tmp_path / "weights.safetensors")

    def create(overlay=None, **kwargs):
        overlay = {"file": str(tmp_path / "weights.safetensors"), "num_classes": 10, **(overlay or {})}
        return timm.create_model(f"hpm_{base}", pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()

    return create


def images_for(base, in_chans=None):
    channels, size = INPUT[base]
    return torch.randn(3, in_chans or channels, size, size)


@pytest.mark.parametrize("num_classes", [10, 5, 0])
def test_other_channels_keep_the_head_and_other_classes_have_a_fresh_one(base, source, load, num_classes):
    dropped = "have 10 classes, and num_classes is 5: their classifier"
    channels = 4 - INPUT[base][0]
    with pytest.warns(DroppedClassifierWarning, match=dropped) if num_classes == 5 else nullcontext():
        model = load(num_classes=num_classes, in_chans=channels)
    theirs, cfg = source.state_dict(), source.default_cfg
    changed = (cfg["first_conv"],) if num_classes == 10 else (cfg["first_conv"], f"{cfg['classifier']}.")
    assert all(torch.equal(value, theirs[key]) for key, value in model.state_dict().items()
               if not key.startswith(changed))
    assert model.pretrained_cfg is model.default_cfg and "state_dict" not in model.pretrained_cfg
    assert model(images_for(base, channels)).shape == (3, num_classes or source.head_hidden_size)
    if num_classes == 0:
        model.reset_classifier(10)
    if num_classes < 10:
        head = find_head(model)
        assert not head.is_fitted() and not head.prototypes.any() and not head.log_scale.any()
    elif base == "wrn10_2":  # timm spreads the one channel over three, so that a grey image looks the same
        x = images_for(base)
        assert torch.allclose(model(x.repeat(1, 3, 1, 1)), source(x), rtol=1e-3, atol=1e-4)


def test_pretrained_features_only(base, source, load):
    x = images_for(base)
    native = base == "wrn10_2"
    options = {} if native else {"feature_cls": "getter", "out_indices": (-1,)}
    if native:
        expected = list(accumulate(source.stages, lambda maps, stage: stage(maps), initial=source.conv1(x)))
    else:
        expected = source.forward_intermediates(x, intermediates_only=True, indices=1)
    for features, theirs in zip(load(features_only=True, **options)(x), expected, strict=True):
        assert torch.equal(features, theirs)


def test_plain_weights_of_the_base_load_with_the_head_s_entries_new(base, source, load, tmp_path):
    own = {f"{head_name(source)}.{entry}" for entry in _HEAD_ENTRIES}
    plain = {key: value for key, value in source.state_dict().items() if key not in own}
    save_file(plain, tmp_path / "plain.safetensors")
    with pytest.warns(UnfittedHeadWarning, match=rf"of hpm_{base}(\.untrained)? hold no prototypes.*fit_prototypes"):
        model, x = load({"file": str(tmp_path / "plain.safetensors")}), images_for(base)
    assert not find_head(model).is_fitted()
    with timm_hpm.head_mode(source, "fc"):
        assert torch.equal(model(x), source(x))
    keys = model.load_state_dict(plain, strict=False)
    assert set(keys.missing_keys) == own and not keys.unexpected_keys
    # A missing entry, classifier or layer is no silent random one, even in DLA, which timm loads loosely.
    headless = [key for key in plain if not key.startswith(source.default_cfg["classifier"])]
    *_, last = (key for key in headless if plain[key].dim() > 1)
    for kept, options in (([key for key in source.state_dict() if not key.endswith("num_updates")], {}), (headless, {}),
                          (plain.keys() - {last}, {}), (plain.keys() - {last}, {"num_classes": 3})):
        save_file({key: source.state_dict()[key] for key in kept}, tmp_path / "damaged.safetensors")
        with pytest.raises((RuntimeError, CheckpointError), match=r"Missing key\(s\)|lacks: "):
            load({"file": str(tmp_path / "damaged.safetensors")}, **options)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: timm.create_model("hpm_resnet34", pretrained=True), "No pretrained weights exist"),
    (lambda: timm.create_model("hpm_wrn10_2.l7"), "Invalid pretrained"),
    (lambda: register_hpm("hpm_resnet18"), r"unknown base 'hpm_resnet18'.*; did you mean .*\bresnet18\b"),
    (lambda: register_hpm("resnet50.a1_in1k"), r"unknown base 'resnet50\.a1_in1k'.*; did you mean .*\bresnet50\b"),
    (lambda: timm.create_model(BODY, layout="keras"), "unknown layout 'keras'; expected one of trades, deepmind"),
    (lambda: timm.create_model(BODY, depths=(1, 1)), r"depths \(1, 1\) and channels \(32, 64, 128\) differ in length"),
])
def test_a_name_or_an_argument_of_no_network_is_refused(make, message):
    with pytest.raises((RuntimeError, ValueError), match=message):
        make()
    assert not timm.list_models("hpm_hpm_*") and not timm.list_models("hpm_resnet50.a1_in1k")
