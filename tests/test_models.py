"""The `hpm_*` networks: what timm asks of a model, the two layouts, tags, and loading of weights."""

import warnings
from copy import deepcopy

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import get_notrace_functions, get_notrace_modules
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from timm_hpm import HPMHead, UnfittedHeadWarning, find_head
from timm_hpm.models.create import load_checkpoint
from timm_hpm.models.preact import PreActBlock, PreActNet, conv3x3

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
HPM_ENTRIES = {"fc.prototypes", "fc.num_updates", "fc.log_scale"}

scripts = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def create(name: str, **kwargs):
    return timm.create_model(name, **SMALL.get(name, {}), **kwargs)


def images(model, batch: int = 2) -> Tensor:
    return torch.randn(batch, *model.pretrained_cfg["input_size"])


def fit(model):
    """Gives the model random prototypes and BatchNorm statistics: at their first values they hide mistakes."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
        if isinstance(module, HPMHead):
            module.set_prototypes(torch.randn_like(module.prototypes))
            nn.init.constant_(module.log_scale, -0.5)
    return model


def fx_model(model):
    options = {"leaf_modules": get_notrace_modules(), "autowrap_functions": get_notrace_functions()}
    train_nodes, eval_nodes = get_graph_node_names(model, tracer_kwargs=options)
    return create_feature_extractor(
        model, train_return_nodes=train_nodes[-1:], eval_return_nodes=eval_nodes[-1:], tracer_kwargs=options)


# Registration and cfgs


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
    ("hpm_wrn34_10.untrained", 46_160_474),
    ("hpm_wrn34_20.untrained_deepmind", 184_531_674),
    ("hpm_wrn70_16.untrained_deepmind", 266_796_506),
    ("hpm_preact_resnet18.untrained", 11_172_170),
    ("hpm_cifar_resnet18.untrained", 11_173_962),
])
def test_parameter_count_is_the_known_one_and_the_scale(name, parameters):
    model = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == parameters + 1


# Tags


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


# The network


def test_padding_of_the_layouts():
    x = torch.randn(1, 1, 6, 6)
    # A kernel whose only tap is its top left picks the even pixels where nothing is padded above and to the left.
    deepmind = conv3x3(1, 1, 2, "deepmind")
    nn.init.dirac_(deepmind.weight)
    with torch.no_grad():
        deepmind.weight.copy_(deepmind.weight.roll((-1, -1), dims=(2, 3)))
    assert torch.equal(deepmind(x), x[..., ::2, ::2])
    # With padding 1 it is the central tap that does.
    trades = conv3x3(1, 1, 2, "trades")
    nn.init.dirac_(trades.weight)
    assert torch.equal(trades(x), x[..., ::2, ::2])


@pytest.mark.parametrize("shortcut", ["activated", "raw", "raw3x3"])
@pytest.mark.parametrize(("in_chs", "out_chs", "stride"), [(4, 4, 1), (4, 8, 1), (4, 4, 2), (4, 8, 2)])
def test_a_shortcut_projects_where_the_shape_changes(in_chs, out_chs, stride, shortcut):
    block = fit(PreActBlock(in_chs, out_chs, stride, "trades", shortcut=shortcut)).eval()
    nn.init.zeros_(block.conv2.weight)
    x = torch.randn(2, in_chs, 6, 6)
    if (in_chs, stride) == (out_chs, 1):
        assert isinstance(block.shortcut, nn.Identity)
        assert torch.equal(block(x), x)
    else:
        assert block.shortcut.kernel_size == ((3, 3) if shortcut == "raw3x3" else (1, 1))
        assert block.shortcut.bias is None
        assert torch.equal(block(x), block.shortcut(block.bn1(x).relu() if shortcut == "activated" else x))


@pytest.mark.parametrize("arguments", [{"layout": "deepmind"}, {"shortcut": "raw"}, {"stem_stride": 2}])
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


@pytest.mark.parametrize(("wrong", "message"), [
    ({"layout": "keras"}, "unknown layout 'keras'; expected one of trades, deepmind"),
    ({"shortcut": "long"}, "unknown shortcut 'long'; expected one of activated, raw, raw3x3"),
    ({"depths": (1, 1)}, r"depths \(1, 1\) and channels \(32, 64, 128\) differ in length"),
])
def test_wrong_arguments_are_refused(wrong, message):
    arguments = {"depths": (1, 1, 1), "channels": (32, 64, 128), "stem_chs": 16}
    with pytest.raises(ValueError, match=message):
        PreActNet(**{**arguments, **wrong})


# timm's interfaces


@pytest.mark.parametrize("feature_cls", [None, "list", "getter", "fx"])
@pytest.mark.parametrize("name", ALL)
def test_features_only(name, feature_cls):
    if "xcit" in name and feature_cls in ("list", "fx"):
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


@pytest.mark.parametrize("name", NAMES)
def test_forward_intermediates(name):
    model = fit(timm.create_model(name)).eval()
    x, levels = images(model), len(model.feature_info)
    final, maps = model.forward_intermediates(x)
    assert torch.equal(final, model.forward_features(x))
    assert [features.shape[1] for features in maps] == [level["num_chs"] for level in model.feature_info]
    assert torch.equal(maps[0], model.conv1(x))
    assert torch.equal(model.act(model.norm(maps[-1])), final)

    only = model.forward_intermediates(x, indices=[0, -2], intermediates_only=True)
    assert [torch.equal(a, b) for a, b in zip(only, (maps[0], maps[-2]), strict=True)] == [True, True]
    last_two = model.forward_intermediates(x, indices=2, norm=True, intermediates_only=True)
    assert torch.equal(last_two[0], maps[-2]) and torch.equal(last_two[1], final)
    stopped, early = model.forward_intermediates(x, indices=[1], stop_early=True)
    assert torch.equal(stopped, maps[1]) and torch.equal(early[0], maps[1])

    with pytest.raises(AssertionError, match="'NLC'; expected 'NCHW'"):
        model.forward_intermediates(x, output_fmt="NLC")
    with pytest.raises(AssertionError, match="out of range"):
        model.forward_intermediates(x, indices=[levels])


def test_prune_intermediate_layers():
    model = fit(timm.create_model("hpm_wrn16_4.untrained")).eval()
    x = images(model)
    _, maps = model.forward_intermediates(x)
    whole = deepcopy(model)
    assert whole.prune_intermediate_layers([1, -1], prune_head=False) == [1, 3] and torch.equal(whole(x), model(x))
    assert whole.prune_intermediate_layers(1, prune_norm=True) == [3] and torch.equal(whole(x), maps[-1])
    for level in (2, 0):
        pruned = deepcopy(model)
        assert pruned.prune_intermediate_layers([level]) == [level]
        assert len(pruned.stages) == level and pruned.num_classes == 0
        assert pruned.num_features == pruned.head_hidden_size == maps[level].shape[1]
        assert torch.equal(pruned(x), maps[level])


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
    for a, b in zip(model.forward_intermediates(x)[1], other.forward_intermediates(x)[1], strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)
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
