"""csrc's CPU kernels beside their limits, torch's loop and PEFT: a tenth of SDXL's attention layers, rank 16, in one run.

The limit of a merge is the larger of two times, both measured here: a copy of the same bytes, and 4r flops per weight at the
rate of torch's sgemm. Every round times every peer once, in turn. No time is shown unless the numbers are right first.
"""

import statistics
import time

import pytest
import torch
from conftest import TABLES
from peft import DeftConfig as PeftDeftConfig
from peft import get_peft_model
from torch import nn

import deft_kernels as dk
from benchmarks import shapes
from benchmarks.cases import wrong
from deft_kernels import reference

deft = torch.ops.deft_kernels
LAYERS = [shape for shape, count in shapes.SDXL.items() for _ in range(count // 10)]
RANK = shapes.RANK
pytestmark = pytest.mark.skipif(dk.backends()["merge"]["cpp"] != "serves", reason="csrc's CPU kernels do not serve here")


def in_turn(peers: dict, rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in peers}
    for i in range(rounds + 2):
        for name, call in peers.items():
            start = time.perf_counter()
            call()
            if i >= 2:
                times[name].append(time.perf_counter() - start)
    return times


def table(title: str, times: dict[str, list[float]], floor: list[float], benchmark) -> None:
    rows = {}
    for name, seconds in times.items():
        low, *_, high = statistics.quantiles(seconds, n=5)
        rows[name] = (statistics.median(seconds), low, high, statistics.median(s / f for s, f in zip(seconds, floor)))
    TABLES.append((title, rows))
    benchmark.extra_info.update({name: ratio for name, (*_, ratio) in rows.items()})


def model(dtype: torch.dtype) -> nn.Module:
    holder = nn.Module()
    holder.layers = nn.ModuleList([nn.Linear(n, m, bias=False, dtype=dtype) for m, n in LAYERS])
    holder.forward = lambda x: x
    return holder.requires_grad_(False)


NAMES = [f"layers.{i}" for i in range(len(LAYERS))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_merge(benchmark, dtype, rounds=12):
    ours, theirs = model(dtype), model(dtype)
    theirs.load_state_dict(ours.state_dict())
    dk.inject_adapter(ours, dk.DeftConfig(r=RANK, target_modules=NAMES, init_weights=False))
    theirs = get_peft_model(theirs, PeftDeftConfig(r=RANK, target_modules=NAMES, decomposition_method="qr"))
    with torch.no_grad():  # the same adapter in both
        for name in NAMES:
            mine, other = ours.get_submodule(name), theirs.base_model.model.get_submodule(name)
            other.deft_P["default"].copy_(mine.deft_P["default"])
            other.deft_R["default"].copy_(mine.deft_R["default"])
    P = [ours.get_submodule(name).deft_P["default"].detach() for name in NAMES]
    R = [ours.get_submodule(name).deft_R["default"].detach() for name in NAMES]
    W = [ours.get_submodule(name).weight.detach().clone() for name in NAMES]
    Q, out = deft.orthonormalize(P), [torch.empty_like(w) for w in W]

    deft.merge_into(out, W, Q, Q, R)
    some = [LAYERS.index(shape) for shape in dict.fromkeys(LAYERS)]
    plain = reference.merge(*([t[i] for i in some] for t in (W, Q, Q, R)))
    truth = reference.merge(*([t[i].double() for i in some] for t in (W, Q, Q, R)))
    assert not (reason := wrong([out[i] for i in some], plain, truth, times=2)), reason

    flat = torch.cat([w.flatten() for w in W])
    copied, square = torch.empty_like(flat), torch.randn(2048, 2048)
    times = in_turn(
        {
            "a copy of the bytes": lambda: copied.copy_(flat),
            "sgemm": lambda: square @ square,
            "merge": lambda: deft.merge_into(out, W, Q, Q, R),
            "merge, in place": lambda: deft.merge_into(out, out, Q, Q, R),
            "dk.hotswap": lambda: dk.hotswap(ours, "default"),
            "dk.unmerge": lambda: dk.unmerge(ours),
            "dk.merge, with its snapshot": lambda: dk.merge(ours),
            "PEFT merge_adapter": theirs.merge_adapter,
            "PEFT unmerge_adapter": theirs.unmerge_adapter,
        },
        rounds,
    )
    flops = [s / (2 * 2048**3) * 4 * RANK * flat.numel() for s in times.pop("sgemm")]
    times = {"a copy of the bytes": times.pop("a copy of the bytes"), "4r flops per weight, sgemm": flops} | times
    limit = [max(pair) for pair in zip(*list(times.values())[:2])]
    title = f"merge of {flat.numel() / 1e6:.1f} M weights, {len(LAYERS)} layers, r {RANK}, {dtype}; ratio to the limit:"
    table(title, times, limit, benchmark)
    benchmark.pedantic(deft.merge_into, [out, W, Q, Q, R], rounds=10)


def test_orthonormalize(benchmark, rounds=60):
    P = [torch.randn(m, RANK) for m, _ in LAYERS]
    Q, dQ = deft.orthonormalize(P), [torch.randn(m, RANK) for m, _ in LAYERS]
    truth = reference.orthonormalize([p.double() for p in P])
    assert not (reason := wrong(Q, reference.orthonormalize(P), truth, times=2)), reason
    exact = reference.orthonormalize_backward([d.double() for d in dQ], truth, [p.double() for p in P])
    plain = reference.orthonormalize_backward(dQ, reference.orthonormalize(P), P)
    assert not (reason := wrong(deft.orthonormalize_backward(dQ, Q, P), plain, exact, times=2)), reason
    for title, ours, loop in (
        ("orthonormalize", lambda: deft.orthonormalize(P), lambda: [torch.linalg.qr(p) for p in P]),
        (
            "orthonormalize_backward",
            lambda: deft.orthonormalize_backward(dQ, Q, P),
            lambda: reference.orthonormalize_backward(dQ, Q, P),
        ),
    ):
        times = in_turn({"deft_kernels": ours, "a loop over torch": loop}, rounds)
        table(f"{title} of {len(LAYERS)} layers, r {RANK}, fp32:", times, times["deft_kernels"], benchmark)
    benchmark.pedantic(deft.orthonormalize, [P], rounds=20)
