"""The suites by pytest-benchmark, for its `--benchmark-json` and `--benchmark-compare`:
`pytest benchmarks --size tiny -k layer`.

Each bench is a test. It measures as `python -m benchmarks` does, all of which stands in `extra_info`, and fails where
someone's results are wrong; pytest-benchmark then times what is measured here, by itself.
"""

import contextlib
import dataclasses
import importlib

import pytest
import torch

from benchmarks import measure, peers
from benchmarks.suite import SUITES, Options, name_of, rows_of


def options_of(config) -> Options:
    return Options(torch.device("cuda" if torch.cuda.is_available() else "cpu"), config.getoption("--size"))


def pytest_generate_tests(metafunc):
    options = options_of(metafunc.config)
    benches = [bench for suite in SUITES for bench in importlib.import_module(f"benchmarks.{suite}").benches(options)]
    names = [measure.file_name(f"{b.suite} {b.what} {b.where} {name_of(b.dtype)}") for b in benches]
    metafunc.parametrize("bench", benches, ids=names)


def test_bench(benchmark, bench, measured, pytestconfig):
    torch.manual_seed(0)
    made = bench.peers()
    rows = list(rows_of(dataclasses.replace(bench, peers=lambda: made), options_of(pytestconfig)))
    measured += rows
    assert not {row["who"]: row["note"] for row in rows if "red" in row}

    said = ("seconds", "low", "high", "wall_seconds", "ratio", "limit_seconds", "saved", "memory", "note")
    benchmark.group = f"{bench.suite}: {bench.what}, {bench.where}, {name_of(bench.dtype)}"
    benchmark.extra_info.update({row["who"]: {key: row[key] for key in said if key in row} for row in rows})
    timed = next((who for who, peer in made.items() if peer.calls and peers.is_here(who)), None)
    if timed is None:
        pytest.skip(f"nothing here to time: {'; '.join(peer.note for peer in made.values() if peer.note)}")
    peer = made[timed]
    benchmark.extra_info |= {"timed": timed, "calls": len(peer.calls)}  # a round of pytest-benchmark's is so many

    def once():
        for call in peer.calls:
            call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    seconds = next(row["seconds"] for row in rows if row["who"] == timed) * len(peer.calls)
    turn = contextlib.ExitStack()

    def enter():
        turn.enter_context((peer.around or contextlib.nullcontext)())

    benchmark.pedantic(once, setup=enter, teardown=turn.close, rounds=max(1, min(20, int(bench.budget / seconds))))
