"""What every test runs under."""

import signal

import pytest
import torch

# Tiny nets: a second thread costs more than it brings, and half of that again where the machine has other work.
torch.set_num_threads(1)

# A shell that starts pytest in the background has SIGINT ignored, and the scripts that tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def one_seed():
    torch.manual_seed(0)
