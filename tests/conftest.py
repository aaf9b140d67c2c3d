"""What every test runs under."""

import signal
from pathlib import Path

import pytest
import timm
import torch
from torch.torch_version import TorchVersion

import timm_hpm

# Tiny nets: a second thread costs more than it brings, and half of that again where the machine has other work.
torch.set_num_threads(1)

# A shell that starts pytest in the background has SIGINT ignored, and the scripts that tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def one_seed():
    torch.manual_seed(0)


def embedded(request) -> torch.nn.Module:
    """The embedded network, a small real model, in the mode INFERENCE of the test's module if it has one."""
    mode = getattr(request.module, "INFERENCE", "dataset")
    return timm.create_model("hpm_wrn10_2", pretrained=True, inference=mode).eval()


model = pytest.fixture(embedded, name="model")
shared_model = pytest.fixture(embedded, name="shared_model", scope="module")  # of tests that do not change it


@pytest.fixture
def inside(tmp_path, monkeypatch) -> Path:
    """An empty folder that is the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def digits(request) -> tuple[torch.Tensor, torch.Tensor]:
    """The first images and labels of the digits, NUM_DIGITS of the test's module, of its SPLIT or of val."""
    images, labels = timm_hpm.load_split("digits", getattr(request.module, "SPLIT", "val")).tensors
    return images[:request.module.NUM_DIGITS], labels[:request.module.NUM_DIGITS]


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call():
    """Skips a test that needs a pickled file's weights where this version of torch refuses them."""
    try:
        return (yield)
    except BaseException as error:
        # pytest.warns replaces the error by its own.
        texts = [f"{each} {getattr(each, 'stderr', '')}" for each in (error, error.__context__)]
        if TorchVersion(torch.__version__) < "2.6" and "CVE-2025-32434" in " ".join(texts):
            pytest.skip("a pickled file is read from torch 2.6 on")
        raise
