"""All the ways a timm model is used, each with an answer equal to that of the model itself."""

import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import onnxruntime
import pytest
import timm
import torch
from torch import Tensor, nn

from timm_hpm import INFERENCE_MODES, HPMHead, find_head, register_hpm

# A native network in both layouts, and timm's smallest of four families: their classifier is a linear layer, that of a
# transformer, one behind a norm, and a 1x1 convolution.
SIZES = {"hpm_wrn10_2.untrained": 32, "hpm_wrn10_2.untrained_deepmind": 32, "hpm_test_resnet": 64, "hpm_test_vit": 160,
         "hpm_test_convnext": 64, "hpm_dla46_c": 64}
MODELS = tuple(SIZES)
for base in ("test_resnet", "test_vit", "test_convnext", "dla46_c"):
    register_hpm(base)

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning")


def build(name: str, **kwargs) -> nn.Module:
    """Returns a model in eval mode with prototypes and, where it has any, BatchNorm statistics that hide nothing."""
    model = timm.create_model(name, num_classes=10, **kwargs)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    model.eval()
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
    noise = torch.randn(batch, 3, SIZES[name], SIZES[name])
    return 2 * torch.rand(batch, 3, 1, 1) * noise + torch.randn(batch, 3, 1, 1)


def assert_same_answers(name: str, other, model: nn.Module, *batches: int) -> None:
    """Asserts that `other` maps images of each batch size to the logits of `model`, which is one of MODELS."""
    for batch in batches:
        x = images(name, batch)
        with torch.no_grad():
            torch.testing.assert_close(other(x), model(x), rtol=1e-4, atol=1e-4)


# Compilers and exports


@pytest.mark.parametrize("name", MODELS)
def test_compile_as_one_graph(name):
    model = build(name)
    assert_same_answers(name, torch.compile(model, fullgraph=True, backend="eager"), model, 4, 7)


@pytest.mark.slow  # inductor's C++ compiler
@pytest.mark.parametrize("name", MODELS)
def test_compile_by_inductor(name):
    model = build(name)
    assert_same_answers(name, torch.compile(model, fullgraph=True), model, 4, 7)


@pytest.mark.parametrize("name", MODELS)
def test_export_with_a_dynamic_batch(name):
    model = build(name)
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(model, (images(name, 4),), dynamic_shapes=({0: batch},)).module()
    assert_same_answers(name, exported, model, 2, 4, 9, 64)


def onnx_runner(model: nn.Module, example: Tensor, path: Path):
    """Returns `model` as onnxruntime runs it, exported with a dynamic batch."""
    torch.onnx.export(model, (example,), path, input_names=["x"], dynamo=True, verbose=False,
                      dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


@pytest.mark.parametrize("name", MODELS)
def test_onnx_with_another_batch_than_the_traced_one(name, tmp_path):
    model = build(name)
    assert_same_answers(name, onnx_runner(model, images(name, 4), tmp_path / "model.onnx"), model, 2, 4, 9)


@pytest.mark.parametrize("inference", INFERENCE_MODES)
def test_onnx_of_a_head_in_every_mode(inference, tmp_path):
    head = HPMHead(16, 10, inference=inference).eval()
    head.set_prototypes(torch.randn(10, 16))
    run = onnx_runner(head, torch.randn(4, 16), tmp_path / "head.onnx")
    for batch in (2, 4, 9):
        features = torch.randn(batch, 16)
        torch.testing.assert_close(run(features), head(features), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_trace_with_another_batch_than_the_traced_one(name):
    model = build(name)
    assert_same_answers(name, torch.jit.trace(model, images(name, 4)), model, 1, 4, 9)


# Memory formats, precision and devices


@pytest.mark.parametrize("name", MODELS)
def test_channels_last(name):
    model = build(name)
    other = deepcopy(model).to(memory_format=torch.channels_last)
    assert_same_answers(name, lambda x: other(x.contiguous(memory_format=torch.channels_last)), model, 1, 4)


@pytest.mark.parametrize("name", MODELS)
def test_autocast(name):
    model = build(name)
    x = images(name, 16)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            features = model.forward_head(model.forward_features(x), pre_logits=True)
            logits = model(x)
        # The backbone rounds; the head must add nothing to that.
        of_these_features = find_head(model)(features.float())
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, of_these_features, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in MODELS if "dla" not in name])  # timm's DLA cannot
def test_gradients_under_grad_checkpointing(name):
    model = build(name)
    other = deepcopy(model)
    other.set_grad_checkpointing()
    x = images(name, 4)
    for net in (model, other):
        net(x).square().mean().backward()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)


WORKER = """
import gc
import sys

import torch
import torch.distributed as dist

import timm_hpm

folder = sys.argv[1]
dist.init_process_group("gloo")
rank = dist.get_rank()
answers = []
for model, x, y in torch.load(f"{folder}/inputs.pt", weights_only=False):
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    rows = slice(rank * len(x) // 2, (rank + 1) * len(x) // 2)
    logits = parallel(x[rows])
    torch.nn.functional.cross_entropy(logits, y[rows]).backward()
    answers.append((logits.detach(), [p.grad for p in model.parameters()], model.state_dict()))
torch.save(answers, f"{folder}/rank{rank}.pt")
del parallel, model, logits  # they hold the process group, whose threads would outlive it
gc.collect()
dist.destroy_process_group()
"""


def test_ddp_on_two_processes(tmp_path):
    inputs = [(build(name), images(name, 8), torch.arange(8)) for name in MODELS]
    torch.save(inputs, tmp_path / "inputs.pt")
    (tmp_path / "worker.py").write_text(WORKER)
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
                           str(tmp_path / "worker.py"), str(tmp_path)], timeout=300, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False)
    assert done.returncode == 0, done.stderr
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    for (model, x, y), *answers in zip(inputs, *ranks, strict=True):
        state = {key: value.clone() for key, value in model.state_dict().items()}
        # Each process answers for its own half, and both have the mean of the two gradients.
        halves = [model(half) for half in x.split(4)]
        losses = [nn.functional.cross_entropy(logits, half) for logits, half in zip(halves, y.split(4), strict=True)]
        torch.stack(losses).mean().backward()
        for logits, (theirs, gradients, their_state) in zip(halves, answers, strict=True):
            torch.testing.assert_close(theirs, logits.detach(), rtol=1e-4, atol=1e-4)
            for gradient, parameter in zip(gradients, model.parameters(), strict=True):
                torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-5)
            assert all(torch.equal(their_state[key], value) for key, value in state.items())


# Parts of a model


@pytest.mark.parametrize("name", MODELS)
def test_the_head_on_pooled_features_answers_as_the_model(name):
    model, x = build(name), images(name, 4)
    features = model.forward_head(model.forward_features(x), pre_logits=True)
    assert features.shape == (4, model.head_hidden_size) == (4, find_head(model).in_features)
    assert torch.equal(find_head(model)(features), model(x))


@pytest.mark.parametrize("name", MODELS)
def test_intermediates_end_in_the_features(name):
    model, x = build(name), images(name, 4)
    final, maps = model.forward_intermediates(x)
    torch.testing.assert_close(model.forward_head(final), model(x))
    assert len(maps) >= 3 and all(len(level) == 4 for level in maps)


@pytest.mark.parametrize("name", MODELS)
def test_features_only(name):
    model = timm.create_model(name, features_only=True).eval()
    maps = model(images(name, 2))
    assert len(maps) >= 3
    assert [level.shape[1] for level in maps] == model.feature_info.channels()
    assert [SIZES[name] // level.shape[2] for level in maps] == model.feature_info.reduction()
