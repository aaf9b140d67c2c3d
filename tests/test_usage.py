"""All the ways a timm model is used, each with an answer equal to that of the model itself."""

from pathlib import Path

import onnxruntime
import pytest
import timm
import torch
from nets import with_statistics
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from timm_hpm import find_head, register_hpm

# A native network in both layouts, and timm's smallest of four families: their classifier is a linear layer, that of a
# transformer, one behind a norm, and a 1x1 convolution. Each with the size of its images and an inference mode.
MODELS = {"hpm_wrn10_2.untrained": (32, "batch"), "hpm_wrn10_2.untrained_deepmind": (32, "sample"),
          "hpm_test_resnet": (64, "dataset"), "hpm_test_vit": (160, "fc"), "hpm_test_convnext": (64, "batch"),
          "hpm_dla46_c": (64, "batch")}
for base in ("test_resnet", "test_vit", "test_convnext", "dla46_c"):
    register_hpm(base)

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning")


def build(name: str) -> nn.Module:
    """Returns a model in eval mode with prototypes and, where it has any, BatchNorm statistics that hide nothing."""
    model = timm.create_model(name, num_classes=10, inference=MODELS[name][1])
    with_statistics(model).eval()
    head = find_head(model)
    features = model.forward_head(model.forward_features(images(name, 64)), pre_logits=True).detach()
    # Weights of the features' size, so that the classifier predicts all sorts of classes, and none by a hair.
    nn.init.normal_(head.weight, std=3 / features.std(dim=0).norm().item())
    nn.init.constant_(head.bias, 0.0)
    head.bias.data.sub_(head.fc_logits(features).mean(dim=0))
    head.set_prototypes(features[:10])
    head.log_scale.data.fill_(-(features - features[0]).square().sum(dim=1).mean().log().item())
    assert len(head.fc_logits(features).argmax(dim=1).unique()) > 3
    return model


def images(name: str, batch: int) -> Tensor:
    """Returns normalised images (batch, 3, size, size) for a model, each of another brightness and contrast."""
    noise = torch.randn(batch, 3, MODELS[name][0], MODELS[name][0])
    return 2 * torch.rand(batch, 3, 1, 1) * noise + torch.randn(batch, 3, 1, 1)


def assert_same_answers(name: str, other, model: nn.Module, *batches: int) -> None:
    """Asserts that `other` maps images of each batch size to the logits of `model`, which is one of MODELS."""
    for batch in batches:
        x = images(name, batch)
        with torch.no_grad():
            torch.testing.assert_close(other(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", MODELS)
def test_compile_as_one_graph(name, backend):
    model = build(name)
    assert_same_answers(name, torch.compile(model, fullgraph=True, backend=backend), model, 4, 7)


@pytest.mark.parametrize(("name", "fitted"), [*((name, True) for name in MODELS), ("hpm_wrn10_2.untrained", False)])
def test_export_with_a_dynamic_batch(name, fitted):
    model = build(name)
    if not fitted:
        find_head(model).reset_prototypes()
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(model, (images(name, 4),), dynamic_shapes=({0: batch},)).module()
    assert_same_answers(name, exported, model, 2, 4, 9, 64)


def onnx_runner(model: nn.Module, example: Tensor, path: Path):
    """Returns `model` as onnxruntime runs it, exported with a dynamic batch."""
    torch.onnx.export(model, (example,), path, input_names=["x"], dynamo=True, verbose=False,
                      dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


@pytest.mark.skipif(TorchVersion(torch.__version__) < "2.6", reason="torch.onnx.export has no dynamic_shapes")
@pytest.mark.parametrize("name", MODELS)
def test_onnx_with_another_batch_than_the_traced_one(name, tmp_path):
    model = build(name)
    assert_same_answers(name, onnx_runner(model, images(name, 4), tmp_path / "model.onnx"), model, 2, 4, 9)
