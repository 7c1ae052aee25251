"""Every test starts from a fixed seed, and finds NaN wherever memory is used before it was written."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton's kernels are defined


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a GPU: torch.cuda.is_available() is False here")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def seeded_and_poisoned():
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills torch.empty with NaN
    assert torch.empty(3).isnan().all()
    torch._dynamo.reset()
    yield
    torch.use_deterministic_algorithms(False)


def pytest_terminal_summary(terminalreporter):
    """Tables that tests have made, whichever process ran them."""
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        for name, value in report.user_properties:
            if name == "table":
                terminalreporter.section(report.nodeid.partition("::")[2])
                terminalreporter.write_line(value)
