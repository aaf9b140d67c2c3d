"""`add_hpm_head` and `remove_hpm_head` on one representative of each kind of head, with real numbers."""

import pickle
from copy import deepcopy
from functools import partial

import pytest
import timm
import torch
import torchvision
from nets import with_prototypes, with_statistics
from processes import python
from torch import Tensor, nn

import timm_hpm
from timm_hpm import HPMHead, PixelModel, UnsupportedHeadError, add_hpm_head, find_head, head_mode, remove_hpm_head
from timm_hpm.head import HPMConvHead, head_name
from timm_hpm.training.trunk import PixelTrunk

# Kind of head: architecture, arguments, image size.
KINDS = {
    "linear": ("test_resnet", {}, 64),
    "linear behind a token": ("test_vit", {"img_size": 32}, 32),
    "linear behind a norm": ("test_convnext", {}, 64),
    "linear behind an MLP": ("test_convnext2", {"head_hidden_size": 24}, 64),
    "linear behind a convolution": ("mobilenetv3_small_050", {}, 32),
    "linear behind a BatchNorm": ("efficientvit_m0", {"img_size": 64}, 64),
    "1x1 convolution": ("dla46x_c", {}, 64),
    "1x1 convolution in a wrapper": ("resnetv2_18", {}, 32),
    "MLP": ("caformer_s18", {}, 32),
    "wrapper around a linear": ("cpubone_nano", {}, 32),
    "one head of a distillation wrapper": ("iformer_t", {}, 64),
    "wrapper with pooling": ("sequencer2d_s", {"img_size": 64}, 64),
    "attention pooling": ("resnet50_clip", {}, 64),
}
kinds = pytest.mark.parametrize("kind", KINDS)
few_kinds = pytest.mark.parametrize("kind", ["linear", "linear behind a norm", "linear behind an MLP",
                                             "1x1 convolution in a wrapper", "attention pooling"])
ENTRIES = ("log_scale", "num_updates", "prototypes")


def create(kind: str, num_classes: int = 7) -> tuple[nn.Module, Tensor]:
    """Returns a plain timm model with that kind of head, and images for it."""
    name, arguments, size = KINDS[kind]
    model = timm.create_model(name, num_classes=num_classes, **arguments).eval()
    return with_statistics(model), torch.randn(3, 3, size, size)


def fit(model: nn.Module) -> nn.Module:
    return with_prototypes(model, -3.0)


@kinds
def test_an_unfitted_head_answers_as_the_model_did_and_the_fc_mode_goes_on_to(kind):
    model, x = create(kind)
    base, before = type(model), {key: value.clone() for key, value in model.state_dict().items()}
    with torch.inference_mode():
        expected = model(x)
        assert add_hpm_head(model) is model
        assert isinstance(model, base)
        assert torch.equal(model(x), expected)
        name = head_name(model)
        assert find_head(model).inference == "dataset", "by default no image depends on another"
        after = model.state_dict()
        assert after.keys() - before.keys() == {f"{name}.{entry}" for entry in ENTRIES}
        assert all(torch.equal(after[key], value) for key, value in before.items())

        fit(model)
        assert not torch.allclose(model(x), expected, rtol=0.01)
        find_head(model).inference = "fc"
        assert torch.equal(model(x), expected)
        assert remove_hpm_head(model) is model
        assert type(model) is base and head_name(model) is None
        assert torch.equal(model(x), expected)
    assert list(model.state_dict()) == list(before)


@few_kinds
def test_reset_classifier_makes_a_head_of_the_same_kind_and_features_in_between(kind):
    model, x = create(kind)
    plain = deepcopy(model)
    fit(add_hpm_head(model, mix=0.25, ema_decay=0.9, inference="sample"))
    find_head(model).mix = 0.75
    for net in (model, plain):
        net.reset_classifier(0)
    with torch.inference_mode():
        assert head_name(model) is None and model.num_classes == 0
        features = model(x)
        assert torch.equal(features, plain(x))
        for num_classes in (5, 1):
            model.reset_classifier(num_classes)
            head = find_head(model)
            assert type(head) is (HPMConvHead if "convolution" in kind and "1x1" in kind else HPMHead)
            assert head.config() == {"mix": 0.75, "ema_decay": 0.9, "inference": "sample"}
            assert not head.is_fitted() and (model.num_classes, head.out_features) == (num_classes, num_classes)
            assert model(x).shape == (3, num_classes)
            assert fit(model)(x).isfinite().all()
        remove_hpm_head(model).reset_classifier(4)
        assert head_name(model) is None and model(x).shape == (3, 4)


@few_kinds
def test_the_trunk_of_training_answers_as_the_model(kind):
    model, x = create(kind)
    fit(add_hpm_head(model))
    pixels = x.sigmoid()
    expected = [PixelModel(model)(pixels)]
    with head_mode(model, "fc"):
        expected.append(PixelModel(model)(pixels))
    trunk = PixelTrunk(model)
    calls = []
    with find_head(model).register_forward_hook(lambda *_: calls.append(1)):
        (features, *answers), = trunk(pixels)
    # One pass for both answers; the HPM logits are computed once.
    assert len(calls) == 1 and features.shape == (len(x), find_head(model).in_features)
    assert all(map(torch.equal, answers, expected))
    assert torch.equal(trunk.surrogate_logits("ste", pixels), expected[0])
    # The model is still whole, and the trunk's parameters are its own.
    assert {id(parameter) for parameter in trunk.parameters()} == {id(parameter) for parameter in model.parameters()}
    assert torch.equal(PixelModel(model)(pixels), expected[0])


def test_a_fresh_process_unpickles_the_models(tmp_path):
    cases = []
    for kind in ("linear", "1x1 convolution"):
        model, x = create(kind)
        fit(add_hpm_head(model, mix=0.3, inference="sample"))
        cases.append((model, x, model(x).detach()))
    torch.save(cases, tmp_path / "cases.pt")
    # It imports neither timm_hpm nor the models' classes by itself; one thread, as here, for the same rounding.
    code = """
import sys, torch
torch.set_num_threads(1)
for model, x, logits in torch.load(sys.argv[1], weights_only=False):
    assert torch.equal(model(x), logits)
    model.reset_classifier(3)
    assert model(x).shape == (3, 3) and model.head_config["mix"] == 0.3
"""
    python("-c", code, tmp_path / "cases.pt", folder=tmp_path)


def test_a_network_without_a_reset_classifier_keeps_its_head_and_says_how_to_change_its_classes():
    model = add_hpm_head(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)))
    with pytest.raises(AttributeError, match=r"Sequential has no reset_classifier .*remove_hpm_head"):
        model.reset_classifier(5)
    assert model(torch.rand(2, 4)).shape == (2, 3) and find_head(model).out_features == 3


@pytest.mark.parametrize("training", [True, False])
def test_device_dtype_and_training_mode_stay(training):
    model = add_hpm_head(timm.create_model("test_convnext").to(torch.bfloat16).train(training))
    for _ in range(2):
        head = find_head(model)
        assert {tensor.dtype for tensor in head.parameters()} == {torch.bfloat16}
        assert head.prototypes.dtype == torch.float32
        assert {module.training for module in model.modules()} == {training}
        model.reset_classifier(5)
    model = add_hpm_head(timm.create_model("test_resnet", device="meta"))
    model.reset_classifier(5)
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}


@pytest.mark.parametrize(("name", "positional", "keyword"), [
    ("test_convnext", (), {"reset_other": True}), ("caformer_s18", ("avg", True), {}),
    ("repvit_m0_9", (), {"distillation": False})])
def test_reset_classifier_takes_the_arguments_of_the_model_s_own(name, positional, keyword):
    model, plain = (timm.create_model(name, device="meta", num_classes=0) for _ in range(2))
    add_hpm_head(model)
    for net in (model, plain):
        net.reset_classifier(5, *positional, **keyword)
    name = head_name(model)
    found, expected = (net.get_submodule(name).weight for net in (model, plain))
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert model.state_dict().keys() - plain.state_dict().keys() == {f"{name}.{entry}" for entry in ENTRIES}


@pytest.mark.parametrize(("name", "size"), [("test_vit", 160), ("efficientvit_m0", 224)])
def test_a_model_without_classes_gets_its_head_by_reset_classifier(name, size):
    """Also if its `get_classifier` fails without classes."""
    equipped = add_hpm_head(timm.create_model(name))
    bare = add_hpm_head(timm.create_model(name, num_classes=0), mix=0.2)
    equipped.reset_classifier(0)
    for model, mix in ((equipped, 0.5), (bare, 0.2)):
        assert head_name(model) is None
        model.eval().reset_classifier(6)
        assert find_head(model).mix == mix and model(torch.randn(1, 3, size, size)).shape == (1, 6)


def test_a_reset_without_pooling_is_refused():
    model = add_hpm_head(create("linear")[0])
    with pytest.raises(UnsupportedHeadError, match="without pooling"):
        model.reset_classifier(5, "")
    model.reset_classifier(0, "")
    with pytest.raises(UnsupportedHeadError, match="pass a global_pool such as 'avg'"):
        model.reset_classifier(5)


class Net(nn.Module):
    """A network whose layers stand in the order of the calls, and images of 2x2 pixels."""

    def __init__(self, *layers: nn.Module, **named: nn.Module):
        super().__init__()
        for name, layer in {**{f"layer{i}": layer for i, layer in enumerate(layers)}, **named}.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = layer(x)
        return x


def body(width: int = 6) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(12, width), nn.ReLU())


OTHERS = {
    "a Sequential": (lambda: nn.Sequential(*body(), nn.Linear(6, 5, bias=False)), None, "3"),
    "nested": (lambda: nn.Sequential(nn.Sequential(body(5), nn.Linear(5, 5)), nn.Dropout()), None, "0.1"),
    "layers with names": (lambda: Net(body(), fc=nn.Linear(6, 5)), None, "fc"),
    "behind a normalisation": (lambda: nn.Sequential(nn.BatchNorm2d(3), Net(body(), fc=nn.Linear(6, 5))), None, "1.fc"),
    "a timm model inside": (lambda: PixelModel(timm.create_model("test_resnet", num_classes=5)), None, "model.fc"),
    "a convolution": (lambda: nn.Sequential(
        nn.Conv2d(3, 6, 1), nn.AdaptiveAvgPool2d(1), nn.Conv2d(6, 5, 1), nn.Flatten()), None, "2"),
    "by name": (lambda: Net(body(), fc=nn.Linear(6, 5), head=nn.Linear(5, 5)), "head", "head"),
    "a timm model by name": (lambda: timm.create_model("test_resnet", num_classes=5), "fc", "fc"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_any_network_takes_a_head_and_gives_it_back(kind):
    make, classifier, path = OTHERS[kind]
    model = make().eval()
    images, labels = torch.rand(10, 3, 2, 2) if "timm" not in kind else torch.rand(10, 3, 32, 32), torch.arange(10) % 5
    base, keys, before = type(model), list(model.state_dict()), model(images)
    add_hpm_head(model, classifier, inference="batch")
    assert head_name(model) == path and isinstance(model, base) and torch.equal(model(images), before)
    assert set(model.state_dict()) - set(keys) == {f"{path}.{entry}" for entry in ENTRIES}
    timm_hpm.fit_prototypes(model, [(images, labels)])
    answers = model(images)
    assert find_head(model).is_fitted() and not torch.equal(answers, before)
    assert torch.equal(pickle.loads(pickle.dumps(model))(images), answers)
    assert torch.equal(add_hpm_head(deepcopy(remove_hpm_head(deepcopy(model))), classifier)(images), before)
    report = timm_hpm.mixed_surrogate_attack(
        model, images, labels, "Linf:0.1", protocol=timm_hpm.PROTOCOLS["fast"].changed(
            attacks=["apgd-ce", "joint"], budgets={"apgd-ce": 2, "joint": 2}))
    assert 0 <= report.robust_accuracy <= report.clean_accuracy
    remove_hpm_head(model)
    assert type(model) is base and list(model.state_dict()) == keys and torch.equal(model(images), before)


def of_torchvision(name: str) -> nn.Module:
    with torch.device("meta"):
        return torchvision.models.get_model(name, weights=None).eval()


@pytest.mark.parametrize(("name", "path"), [("alexnet", "classifier.6"), ("vit_b_16", "heads.head")])
def test_torchvision_s_networks_take_a_head(name, path):
    model = of_torchvision(name)
    keys = list(model.state_dict())
    assert head_name(add_hpm_head(model, inference="fc")) == path
    assert model(torch.empty(2, 3, 224, 224, device="meta")).shape == (2, 1000)
    assert list(remove_hpm_head(model).state_dict()) == keys


def of_timm(name: str, **arguments) -> nn.Module:
    return timm.create_model(name, device="meta", **arguments)


def resnet_with(classifier: nn.Module) -> nn.Module:
    model = timm.create_model("test_resnet")
    # timm's pooling flattens here, so that a convolution would not even run.
    model.global_pool, model.fc = nn.AdaptiveAvgPool2d(1), classifier
    return model


@pytest.mark.parametrize(("make", "classifier", "message"), [
    (lambda: of_timm("deit_tiny_distilled_patch16_224"), None, r"2 classifiers: head \(Linear\), head_dist \(Linear\)"),
    (lambda: of_timm("test_vit", global_pool=""), None,
     r"sees features without pooling \(global_pool is ''\).*such as 'avg'"),
    (lambda: of_timm("resnetv2_18", global_pool=""), None, "without pooling"),
    (lambda: of_timm("resnet18", features_only=True), None,
     "the classifier layer4.1.conv2 of FeatureListNet is a Conv2d; expected"),
    (lambda: resnet_with(nn.Linear(100, 1000)), None,
     r"takes 100 features and has 1000 classes; expected the model's 96 \(head_hidden_size\)"),
    (lambda: resnet_with(nn.utils.parametrizations.weight_norm(nn.Linear(96, 1000))), None, "is a ParametrizedLinear"),
    (lambda: resnet_with(nn.utils.spectral_norm(nn.Linear(96, 1000))), None,
     "the classifier fc of ResNet has hooks, which a head would not have"),
    (lambda: nn.DataParallel(timm.create_model("test_resnet")), None, "is compiled, or wrapped for several"),
    (lambda: of_torchvision("squeezenet1_0"), None, r"features without pooling \(classifier.3 comes after it\)"),
    (lambda: Net(body(), fc=nn.Linear(6, 5)), "head", "Net has no layer 'head'; expected .* one of layer0.1, fc"),
    (lambda: nn.Flatten(), None, r"Flatten has 0 classifiers: none\. .*By hand: put timm_hpm\.HPMHead"),
    (lambda: nn.Linear(3, 2), None, "classifier itself of Linear is a Linear; expected .* inside the model"),
    (lambda: Net(a=nn.Linear(6, 5), b=nn.Linear(6, 5)), None, r"2 classifiers: a \(Linear\), b .*classifier='fc'"),
    (lambda: Net(body(), fc=nn.Linear(6, 5), relu=nn.ReLU()), "relu", "relu of Net is a ReLU; expected a linear layer"),
    (lambda: nn.Sequential(nn.Conv2d(3, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()), None,
     r"classifier 0 of Sequential sees features without pooling \(1 comes after it\)"),
])
def test_a_network_without_an_obvious_classifier_is_refused_and_left_alone(make, classifier, message):
    model = make()
    before = state_of(model)
    with pytest.raises(UnsupportedHeadError, match=message):
        add_hpm_head(model, classifier)
    assert state_of(model) == before and not hasattr(model, "head_config")


def state_of(model: nn.Module) -> list:
    return [(name, type(module), id(module)) for name, module in model.named_modules()]


EQUIPPED = r"has an HPM head already.*remove_hpm_head first"


@pytest.mark.parametrize(("make", "call", "message"), [
    *((lambda classes=classes: add_hpm_head(timm.create_model("test_resnet", num_classes=classes)), add_hpm_head,
       EQUIPPED) for classes in (10, 0)),
    *((lambda: timm.create_model("test_resnet"), partial(add_hpm_head, **{name: value}), f"{value}")
      for name, value in (("mix", 2), ("ema_decay", -1), ("inference", "oracle"))),
    (lambda: nn.Sequential(nn.Linear(4, 3)), remove_hpm_head, "Sequential has no HPM head to remove: it has none"),
    (lambda: nn.Sequential(nn.Flatten(), HPMHead(4, 3)), remove_hpm_head, "to remove: it is built around one"),
    (lambda: add_hpm_head(nn.Sequential(nn.Conv2d(3, 6, 1), nn.Flatten(2), nn.Linear(4, 5))),
     lambda model: model(torch.rand(2, 3, 2, 2)), r"have the shape \(2, 6, 4\); expected \(B, 4\), the pooled input"),
])
def test_a_head_is_neither_added_twice_nor_removed_where_none_was_added(make, call, message):
    model = make()
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        call(model)
    assert state_of(model) == before
