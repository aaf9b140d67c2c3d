"""The registered variants of timm's architectures: the table, what their entrypoints pass on, loading of weights."""

import pickle
from contextlib import nullcontext

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import nn

import timm_hpm
from timm_hpm import (
    DroppedClassifierWarning,
    HPMHead,
    UnfittedHeadWarning,
    UnsupportedHeadError,
    find_head,
    register_hpm,
)
from timm_hpm.head import head_name
from timm_hpm.models import hpm_timm
from timm_hpm.models._builder import _HEAD_ENTRIES

VARIANTS = [f"hpm_{base}" for base in hpm_timm.BASES]
# timm's own small networks: one with a plain classifier, one with a norm in front, one with positions that are
# resized while loading, and one with a 1x1 convolution.
for _base in ("test_resnet", "test_convnext", "test_vit", "dla46x_c"):
    register_hpm(_base)
SIZE = {"test_resnet": 64, "test_convnext": 64, "test_vit": 160, "dla46x_c": 64}


def fit(model: nn.Module) -> nn.Module:
    head = find_head(model)
    head.set_prototypes(torch.randn_like(head.prototypes))
    nn.init.constant_(head.log_scale, -3.0)
    return model.eval()


# The table


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


def test_an_entrypoint_is_importable_and_says_what_it_is():
    entrypoint = timm.models.model_entrypoint("hpm_resnet18")
    assert entrypoint is hpm_timm.hpm_resnet18 and "hpm_resnet18" in hpm_timm.__all__
    assert "`resnet18`" in entrypoint.__doc__ and pickle.loads(pickle.dumps(entrypoint)) is entrypoint


# register_hpm


def test_register_hpm_registers_any_other_once():
    assert not timm.is_model("hpm_test_byobnet")
    assert register_hpm("test_byobnet") == register_hpm("test_byobnet") == "hpm_test_byobnet"
    assert timm.list_models("hpm_test_byobnet") == ["hpm_test_byobnet"]
    model = timm.create_model("hpm_test_byobnet", num_classes=3, mix=0.1)
    assert find_head(model).config() == {"mix": 0.1, "ema_decay": 0.99, "inference": "dataset"}


def test_a_base_without_classes_takes_them():
    name = register_hpm("vit_small_patch14_dinov2")
    headless = timm.create_model(name, device="meta", mix=0.2)
    assert headless.num_classes == 0 and head_name(headless) is None
    headless.reset_classifier(4)
    model = timm.create_model(name, num_classes=4, device="meta", mix=0.2)
    assert find_head(headless).mix == 0.2 and headless.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize(("base", "advice"), [
    ("resnet500", r"; did you mean .*\bresnet50\b"), ("hpm_resnet18", r"; did you mean .*\bresnet18\b"),
    ("resnet50.a1_in1k", r"; did you mean .*\bresnet50\b"), ("zzzzzzzz", "expected one of timm.list_models.*a tag$")])
def test_an_unknown_base_is_refused_with_the_nearest(base, advice):
    with pytest.raises(ValueError, match=rf"unknown base '{base}'.*{advice}"):
        register_hpm(base)
    assert not timm.list_models(f"hpm_{base}")


# What the entrypoints pass on


def test_model_arguments_pass_through():
    model = timm.create_model("hpm_test_vit", img_size=32, in_chans=1, num_classes=3, global_pool="token",
                              drop_rate=0.1, inference="sample", ema_decay=0.5)
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 3)
    assert (model.global_pool, model.head_drop.p) == ("token", 0.1)
    assert find_head(model).config() == {"mix": 0.5, "ema_decay": 0.5, "inference": "sample"}
    with pytest.raises(ValueError, match="mix is 3"):
        timm.create_model("hpm_test_vit", mix=3)
    with pytest.raises(UnsupportedHeadError, match="without pooling"):
        timm.create_model("hpm_test_vit", global_pool="")


# Loading


# A native network of one channel beside timm's of three.
INPUT = {"wrn10_2": (1, 8), **{base: (3, size) for base, size in SIZE.items()}}


@pytest.fixture(params=INPUT)
def base(request) -> str:
    return request.param


@pytest.fixture
def source(base):
    """A fitted model of 10 classes."""
    return fit(timm.create_model(f"hpm_{base}", num_classes=10))


@pytest.fixture
def load(base, source, tmp_path):
    """Returns a function that creates a pretrained model from the weights of `source`."""
    save_file(source.state_dict(), tmp_path / "weights.safetensors")

    def create(overlay=None, **kwargs):
        overlay = {"file": str(tmp_path / "weights.safetensors"), "num_classes": 10, **(overlay or {})}
        return timm.create_model(f"hpm_{base}", pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()

    return create


def images(base, in_chans=None):
    channels, size = INPUT[base]
    return torch.randn(3, in_chans or channels, size, size)


def assert_same_body(model, source, except_for=()):
    theirs = source.state_dict()
    head = source.default_cfg["classifier"]
    for key, value in model.state_dict().items():
        if not key.startswith((f"{head}.", *except_for)):
            assert torch.equal(value, theirs[key]), key


def test_pretrained_is_bit_equal(base, source, load):
    model, x = load(), images(base)
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in model.state_dict().items())
    assert torch.equal(model(x), source(x)) and find_head(model).is_fitted()
    assert model.state_dict().keys() == source.state_dict().keys()
    assert model.pretrained_cfg is model.default_cfg and "state_dict" not in model.pretrained_cfg


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("num_classes", [5, 0])
def test_other_classes_have_a_fresh_head(base, source, load, num_classes, in_chans):
    dropped = "have 10 classes, and num_classes is 5: their classifier"
    with pytest.warns(DroppedClassifierWarning, match=dropped) if num_classes else nullcontext():
        model = load(num_classes=num_classes, in_chans=in_chans)
    assert_same_body(model, source, (source.default_cfg["first_conv"],))
    assert model(images(base, in_chans)).shape == (3, num_classes or source.head_hidden_size)
    if num_classes:
        head = find_head(model)
        assert not head.is_fitted() and not head.prototypes.any() and not head.log_scale.any()
    else:
        model.reset_classifier(10)
        assert not find_head(model).is_fitted()


def test_other_channels_keep_the_head(base, source, load):
    model = load(in_chans=4 - INPUT[base][0])
    assert_same_body(model, source, (source.default_cfg["first_conv"],))
    ours, theirs = find_head(model).state_dict(), find_head(source).state_dict()
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())
    if base == "wrn10_2":  # timm spreads the one channel over three, so that a grey image looks the same
        x = images(base)
        assert torch.allclose(model(x.repeat(1, 3, 1, 1)), source(x), rtol=1e-3, atol=1e-4)


def test_pretrained_features_only(base, source, load):
    x = images(base)
    native = base == "wrn10_2"
    options = {} if native else {"feature_cls": "getter", "out_indices": (-1,)}
    expected = source.forward_intermediates(x, intermediates_only=True, **({} if native else {"indices": 1}))
    for features, theirs in zip(load(features_only=True, **options)(x), expected, strict=True):
        assert torch.equal(features, theirs)


def test_plain_weights_of_the_base_load_with_the_head_s_entries_new(base, source, load, tmp_path):
    own = {f"{head_name(source)}.{entry}" for entry in _HEAD_ENTRIES}
    plain = {key: value for key, value in source.state_dict().items() if key not in own}
    save_file(plain, tmp_path / "plain.safetensors")
    with pytest.warns(UnfittedHeadWarning, match=rf"of hpm_{base}(\.untrained)? hold no prototypes.*fit_prototypes"):
        model, x = load({"file": str(tmp_path / "plain.safetensors")}), images(base)
    assert not find_head(model).is_fitted()
    with timm_hpm.head_mode(source, "fc"):
        assert torch.equal(model(x), source(x))
    keys = model.load_state_dict(plain, strict=False)
    assert set(keys.missing_keys) == own and not keys.unexpected_keys
    damaged = {key: value for key, value in source.state_dict().items() if not key.endswith("num_updates")}
    save_file(damaged, tmp_path / "damaged.safetensors")
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"(fc\.)?num_updates\""):
        load({"file": str(tmp_path / "damaged.safetensors")})


def test_checkpoint_path_and_a_folder(base, source, tmp_path):
    x = images(base)
    torch.save({"state_dict": source.state_dict()}, tmp_path / "checkpoint.pth")
    model = timm.create_model(f"hpm_{base}", num_classes=10, checkpoint_path=tmp_path / "checkpoint.pth").eval()
    assert torch.equal(model(x), source(x))
    find_head(source).mix = 0.25
    save_for_hf(source, tmp_path / "hub", safe_serialization=True,
                model_config={"model_args": {"mix": 0.25, "num_classes": 10}})
    model = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
    assert find_head(model).mix == 0.25 and torch.equal(model(x), source(x))


@pytest.mark.parametrize(("name", "pretrained", "message"), [
    ("hpm_resnet34", True, "No pretrained weights exist"), ("hpm_resnet18.a1_in1k", True, "Invalid pretrained tag"),
    ("hpm_wrn10_2.untrained", True, "No pretrained weights exist"), ("hpm_wrn10_2.l7", False, "Invalid pretrained")])
def test_a_tag_without_weights_and_an_unknown_one_are_refused(name, pretrained, message):
    with pytest.raises(RuntimeError, match=message):
        timm.create_model(name, pretrained=pretrained)
