"""pytest's side of the benchmarks: how much to measure, what a result says of its machine, and the tables at the end."""

import pytest

from benchmarks import measure, report
from benchmarks.suite import SIZES

ROWS = pytest.StashKey[list[dict]]()


def pytest_addoption(parser):
    parser.addoption("--size", choices=SIZES, default="small", help="of the benchmarks, as in python -m benchmarks")


def pytest_configure(config):
    config.stash[ROWS] = []


@pytest.fixture
def measured(pytestconfig) -> list[dict]:
    """The rows of all tests, which the terminal shows at the end."""
    return pytestconfig.stash[ROWS]


def pytest_benchmark_update_machine_info(config, machine_info):
    own = ("date", "commit")  # which pytest-benchmark tells elsewhere, and which differ on one and the same machine
    machine_info.update({name: value for name, value in measure.environment().items() if name not in own})


def pytest_terminal_summary(terminalreporter, config):
    if rows := config.stash[ROWS]:
        terminalreporter.write_line(f"\n{report.setting(measure.environment())}\n\n{report.table(rows)}")
