"""What every test runs under."""

import json
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


def pytest_terminal_summary(terminalreporter):
    """Prints how many inputs of each fuzz test came to which outcome."""
    found = [(report.nodeid, json.loads(value)) for reports in terminalreporter.stats.values() for report in reports
             for name, value in getattr(report, "user_properties", ()) if name == "fuzz" and report.when == "call"]
    if found:
        total = sum(sum(counts.values()) for _, counts in found)
        terminalreporter.write_sep("=", f"{total} hostile inputs")
        for test, counts in sorted(found):
            terminalreporter.write_line(f"{test}: " + ", ".join(f"{n} {name}" for name, n in sorted(counts.items())))
