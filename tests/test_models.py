"""The `hpm_*` networks: what timm asks of a model, the two layouts, tags, and loading of weights."""

import pickle
import warnings
from copy import deepcopy

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import DropPath
from timm.models import get_notrace_functions, get_notrace_modules, save_for_hf
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from timm_hpm import DroppedClassifierWarning, HPMHead, UnfittedHeadWarning, find_head
from timm_hpm.models._builder import checkpoint_filter_fn
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
ALL = (*NAMES, *CIFAR)
BODY = "hpm_wrn10_2.untrained"
HPM_ENTRIES = {"fc.prototypes", "fc.num_updates", "fc.log_scale"}

scripts = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def create(name: str, **kwargs):
    return timm.create_model(name, **CIFAR.get(name, {}), **kwargs)


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
    if cfg["pool_size"] is None:
        assert features.shape == (1, 1 + model.patch_embed.num_patches, model.num_features) == (1, 1 + 8 * 8, 64)
    else:
        assert features.shape == (1, model.num_features, *cfg["pool_size"])
    assert pre_logits.shape == (1, model.head_hidden_size)
    assert torch.equal(find_head(model)(pre_logits), model(x)) and model.get_classifier() is find_head(model)

    model.reset_classifier(0)
    assert model.num_classes == 0
    assert torch.equal(model(x), pre_logits)
    model.reset_classifier(0, "")
    assert torch.equal(model(x), features)
    bare = create(name, num_classes=0, global_pool="", in_chans=1, mix=0.2).eval()
    assert bare(x[:, :1]).shape == features.shape
    bare.reset_classifier(3, "avg" if name in CIFAR else "catavgmax")
    assert bare.head_hidden_size == bare.num_features * (1 if name in CIFAR else 2)
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
    assert isinstance(timm.create_model("hpm_wrn10_2.untrained").act, nn.ReLU)
    assert isinstance(timm.create_model("hpm_wrn10_2.untrained_deepmind").act, nn.SiLU)
    assert isinstance(timm.create_model("hpm_wrn10_2", pretrained_cfg="untrained_deepmind").act, nn.SiLU)
    overlay = {"tag": "untrained_deepmind"}
    assert isinstance(timm.create_model("hpm_wrn10_2", pretrained_cfg_overlay=overlay).act, nn.SiLU)
    cfg = timm.create_model("hpm_wrn10_2.untrained_deepmind").pretrained_cfg
    assert isinstance(timm.create_model("hpm_wrn10_2", pretrained_cfg=cfg).act, nn.SiLU)


def test_explicit_arguments_win_over_a_tag():
    assert timm.create_model("hpm_wrn10_2", stem_stride=1).conv1.stride == (1, 1)
    model = timm.create_model("hpm_wrn10_2.untrained_deepmind", layout="trades", depths=(2, 1, 1), inference="sample")
    assert isinstance(model.act, nn.ReLU)
    assert len(model.stages[0]) == 2
    assert find_head(model).inference == "sample"


def test_a_saved_folder_keeps_the_arguments_of_its_tag(tmp_path):
    model = fit(timm.create_model("hpm_wrn10_2.untrained_deepmind")).eval()
    save_for_hf(model, tmp_path, safe_serialization=True)
    back = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = images(model)
    assert torch.equal(back(x), model(x))


# The network


@pytest.mark.parametrize("name", NAMES)
def test_forward_changes_nothing_and_answers_the_same_twice(name):
    model = fit(timm.create_model(name)).eval()
    x, before = images(model, 3), deepcopy(model.state_dict())
    with torch.inference_mode():
        logits = model(x)
        assert logits.shape == (3, 10) and logits.isfinite().all()
        assert torch.equal(model(x), logits)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("fitted", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_has_a_gradient(name, fitted):
    model = timm.create_model(name, num_classes=42, drop_rate=0.1, drop_path_rate=0.1)
    model = fit(model) if fitted else model
    model.train()
    logits = model(images(model))
    logits.square().mean().backward()
    assert logits.shape == (2, 42)
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), parameter_name


def test_initial_weights():
    model = timm.create_model("hpm_wrn16_4")
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 1000:
            std = (2 / (module.weight[0, 0].numel() * module.out_channels)) ** 0.5
            assert module.bias is None
            assert module.weight.std().item() == pytest.approx(std, rel=0.1)
            assert abs(module.weight.mean()) < 0.2 * std
    assert not model.fc.bias.any()


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


def test_layouts_share_state_dicts_and_answer_differently():
    trades = fit(timm.create_model("hpm_wrn16_4.untrained")).eval()
    deepmind = timm.create_model("hpm_wrn16_4.untrained_deepmind").eval()
    # As a checkpoint of others, which does not say of which network it is.
    deepmind.load_state_dict({key: value for key, value in trades.state_dict().items() if key != "function"})
    x = images(trades)
    assert not torch.allclose(trades(x), deepmind(x), rtol=0.01)
    # Not by the activation alone: the padding of the same weights counts too.
    for module in deepmind.modules():
        if hasattr(module, "act"):
            module.act = nn.ReLU()
    assert not torch.allclose(trades(x), deepmind(x), rtol=0.01)


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


def test_without_final_norm_the_sum_of_the_last_block_is_pooled():
    model = fit(timm.create_model(BODY, final_norm=False)).eval()
    x = images(model)
    assert not any(key.startswith("norm.") for key in model.state_dict())
    assert torch.equal(model.forward_features(x), model.stages(model.conv1(x)))


def test_drop_path_grows_from_nothing_to_its_rate():
    model = timm.create_model("hpm_wrn16_4", drop_path_rate=0.5)
    rates = [block.drop_path for stage in model.stages for block in stage]
    assert isinstance(rates[0], nn.Identity)
    assert all(isinstance(rate, DropPath) for rate in rates[1:])
    assert [rate.drop_prob for rate in rates[1:]] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])


def test_deepmind_stem_of_stride_2_pads_as_its_other_convolutions():
    model = timm.create_model("hpm_wrn10_2.untrained_deepmind", stem_stride=2)
    assert model.conv1.padding == (0, 0)
    assert model.conv1(torch.zeros(1, 3, 8, 8)).shape == (1, 16, 4, 4)
    assert [level["reduction"] for level in model.feature_info] == [2, 2, 4, 8]


@pytest.mark.parametrize(("wrong", "message"), [
    ({"layout": "keras"}, "unknown layout 'keras'; expected one of trades, deepmind"),
    ({"shortcut": "long"}, "unknown shortcut 'long'; expected one of activated, raw, raw3x3"),
    ({"depths": (1, 1)}, r"depths \(1, 1\) and channels \(32, 64, 128\) differ in length"),
    ({"global_pool": ""}, "Pass a global_pool such as 'avg', or num_classes=0"),
    ({"inference": "oracle"}, "unknown inference mode 'oracle'"),
])
def test_wrong_arguments_are_refused(wrong, message):
    arguments = {"depths": (1, 1, 1), "channels": (32, 64, 128), "stem_chs": 16}
    with pytest.raises(ValueError, match=message):
        PreActNet(**{**arguments, **wrong})


# timm's interfaces


@pytest.mark.parametrize("feature_cls", ["list", "getter", "fx"])
@pytest.mark.parametrize("name", ALL)
def test_features_only(name, feature_cls):
    if "xcit" in name and feature_cls != "getter":
        pytest.skip("timm offers the features of XCiT by getter only")
    model = create(name, features_only=True, feature_cls=feature_cls).eval()
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

    with pytest.raises(ValueError, match="'NLC'; expected 'NCHW'"):
        model.forward_intermediates(x, output_fmt="NLC")
    with pytest.raises(AssertionError, match="out of range"):
        model.forward_intermediates(x, indices=[levels])


def test_prune_intermediate_layers():
    model = fit(timm.create_model("hpm_wrn16_4.untrained")).eval()
    x = images(model)
    _, maps = model.forward_intermediates(x)
    whole, logits = deepcopy(model), model(x)
    assert whole.prune_intermediate_layers([1, -1], prune_head=False) == [1, 3]
    assert torch.equal(whole(x), logits)
    assert whole.prune_intermediate_layers(1, prune_norm=True) == [3]
    assert torch.equal(whole(x), maps[-1])
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


def test_optimizer_groups():
    model = timm.create_model("hpm_wrn16_4")
    decayed = {id(p) for p in param_groups_weight_decay(model, 0.1, model.no_weight_decay())[1]["params"]}
    assert id(model.fc.weight) in decayed and id(model.fc.log_scale) not in decayed
    groups = param_groups_layer_decay(model, weight_decay=0.1, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert len(scale) == len(list(model.parameters()))
    blocks = [scale[id(block.conv1.weight)] for stage in model.stages for block in stage]
    order = [scale[id(model.conv1.weight)], *blocks, scale[id(model.fc.weight)]]
    assert order == sorted(set(order))
    assert scale[id(model.fc.log_scale)] == 1.0
    assert set(model.group_matcher(coarse=True).values()) == {r"^conv1", r"^stages\.(\d+)"}


@scripts
@pytest.mark.parametrize("name", ALL)
def test_script(name):
    model = fit(create(name)).eval()
    x = images(model)
    assert torch.allclose(torch.jit.script(model)(x), model(x), rtol=1e-4, atol=1e-5)


@scripts
@pytest.mark.parametrize("name", ALL)
def test_fx(name):
    model = fit(create(name)).eval()
    x = images(model)
    traced = fx_model(model)
    with torch.inference_mode():
        assert torch.equal(*traced(x).values(), model(x))
    scripted = torch.jit.script(traced)
    assert torch.allclose(*scripted(x).values(), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_fx_backward(name):
    model = fx_model(create(name, num_classes=42).train())
    size = timm.get_pretrained_cfg(name).input_size
    next(iter(model(torch.randn(2, *size)).values())).mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert any(key.endswith("log_scale") for key, _ in model.named_parameters())


@pytest.mark.parametrize("name", ALL)
def test_compile_as_one_graph(name):
    model = fit(create(name)).eval()
    x = images(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_deepcopy_and_state_dict_round_trip(name):
    model = fit(timm.create_model(name)).eval()
    copy, fresh = deepcopy(model), timm.create_model(name).eval()
    fresh.load_state_dict(model.state_dict())
    x = images(model)
    expected = model(x)
    with torch.no_grad():
        model.conv1.weight.zero_()
        model.fc.prototypes.zero_()
    assert torch.equal(copy(x), expected)
    assert torch.equal(fresh(x), expected)
    copy.reset_classifier(3)
    assert model.num_classes == 10 and copy(x).shape == (2, 3)


# timm's networks for small images


@pytest.mark.parametrize("name", CIFAR)
def test_a_cifar_network_s_folder_makes_it_again(name, tmp_path):
    model = fit(create(name, num_classes=7, mix=0.25)).eval()
    save_for_hf(model, tmp_path, safe_serialization=True,
                model_config={"model_args": {**CIFAR[name], "num_classes": 7, "mix": 0.25}})
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = images(model)
    assert torch.equal(again(x), model(x)) and find_head(again).mix == 0.25
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))
    with pytest.warns(DroppedClassifierWarning):
        other = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=4, in_chans=1).eval()
    assert other(x[:, :1]).shape == (2, 4) and not find_head(other).is_fitted()


# reset_classifier


def test_reset_classifier_makes_a_head_of_the_same_kind():
    config = {"mix": 0.25, "ema_decay": 0.9, "inference": "dataset"}
    for classes in (10, 0):
        model = timm.create_model(BODY, num_classes=classes, **config)
        model.reset_classifier(5)
        assert (model.num_classes, find_head(model).out_features, model.fc.config()) == (5, 5, config)
        assert not model.fc.is_fitted() and not model.fc.bias.any()
        model.fc.mix = 0.75
        model.reset_classifier(0)
        assert isinstance(model.get_classifier(), nn.Identity)
        model.reset_classifier(7)
        assert model.fc.config() == {**config, "mix": 0.75}


def test_reset_classifier_keeps_device_dtype_and_training_mode():
    for training in (True, False):
        model = timm.create_model(BODY).double().train(training)
        model.reset_classifier(5, "max")
        assert model.fc.weight.dtype == model.fc.log_scale.dtype == torch.float64
        assert model.fc.prototypes.dtype == torch.float32
        assert {module.training for module in model.modules()} == {training}
    model = timm.create_model(BODY, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
    model.reset_classifier(5)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}


def test_reset_classifier_refuses_classes_without_pooling():
    model = timm.create_model(BODY)
    with pytest.raises(ValueError, match="Pass a global_pool such as 'avg'"):
        model.reset_classifier(5, "")
    assert model.num_classes == 10 and model(images(model)).shape == (2, 10)
    model.reset_classifier(0, "")
    with pytest.raises(ValueError, match="Pass a global_pool such as 'avg'"):
        model.reset_classifier(5)
    model.reset_classifier(5, "avg")
    assert model(images(model)).shape == (2, 5)


# Pretrained weights


def test_filter_leaves_the_checkpoint_alone():
    checkpoint = dict(fit(timm.create_model("hpm_wrn10_2")).state_dict())
    keys = set(checkpoint)
    for classes in (10, 5, 0):
        model = timm.create_model("hpm_wrn10_2", num_classes=classes)
        filtered = checkpoint_filter_fn(checkpoint, model)
        assert keys - filtered.keys() == (set() if classes else {*HPM_ENTRIES, "fc.weight", "fc.bias"})
        assert all(filtered[key] is checkpoint[key] for key in filtered.keys() - HPM_ENTRIES)
        if classes:
            own = checkpoint if classes == 10 else model.state_dict()
            assert all(torch.equal(filtered[key], own[key]) for key in HPM_ENTRIES)
    assert set(checkpoint) == keys
