"""What every test runs under."""

import pytest
import torch

# Tiny nets: a second thread costs more than it brings, and half of that again where the machine has other work.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def one_seed():
    torch.manual_seed(0)
