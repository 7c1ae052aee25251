"""What is Triton's alone: launches, promises to the compiler, pointers, compilation. Its numbers are in test_backends.py."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_backends import TRITON, Draw, cases, seeds, types

import deft_kernels as dk
from deft_kernels import reference
from deft_kernels.ops import lowrank_linear as op

pytest.importorskip("triton")
launch = pytest.importorskip("deft_kernels.triton.launch")
from deft_kernels.triton import lowrank_linear as kernels  # noqa: E402
from deft_kernels.triton import merge as merging  # noqa: E402
from deft_kernels.triton import orthonormalize as orthonormalizing  # noqa: E402
from deft_kernels.triton import project as projecting  # noqa: E402

DEVICE = TRITON[0].device
deft = torch.ops.deft_kernels


@pytest.fixture(autouse=True)
def forced(monkeypatch):
    monkeypatch.setenv("DEFT_KERNELS_BACKEND", "triton")


def test_tall_layers_are_those_whose_strips_the_cache_does_not_hold(monkeypatch):
    monkeypatch.setattr(merging, "chip", lambda device: (132, 50 << 20))
    assert not merging.is_tall(torch.empty(1280, 2048, dtype=torch.bfloat16, device=DEVICE), 16)  # SDXL
    assert merging.is_tall(torch.empty(15360, 3072, dtype=torch.bfloat16, device=DEVICE), 16)  # FLUX


def force(monkeypatch, form: str):
    monkeypatch.setattr(kernels, "choice", lambda what, *_: form if what == "product" or form == "chain" else "kernel")
    monkeypatch.setattr(op, "merged_is_cheaper", lambda *shape: form == "merged")


# All of it together ---------------------------------------------------------------------------------------------------


def test_launches_of_a_whole_model(monkeypatch):
    """Preparing and merging 560 layers of SDXL's proportions, an eightieth of their size: a launch or two each."""
    counted = []
    for module in (launch, kernels):
        monkeypatch.setattr(module, "launch", lambda kernel, *_, **__: counted.append(kernel.__name__))
    shapes = [(16, 16)] * 360 + [(16, 32)] * 120 + [(16, 16)] * 60 + [(16, 32)] * 20
    W = [torch.randn(*s, device=DEVICE) for s in shapes]
    P = [torch.randn(m, 4, device=DEVICE) for m, _ in shapes]
    R = [torch.randn(4, n, device=DEVICE) for _, n in shapes]
    ones = torch.ones(560, device=DEVICE)

    def launches(function):
        counted.clear()
        function()
        return list(counted)

    assert launches(lambda: deft.orthonormalize(P)) == ["orthonormalize_kernel"]
    assert launches(lambda: deft.project(P, W, R, ones, ones)) == ["project_kernel"]
    assert launches(lambda: deft.project_backward(R, W, ones, ones)) == ["project_backward_kernel"]
    assert launches(lambda: deft.orthonormalize_backward(P, P, P)) == ["orthonormalize_backward_kernel"]
    assert launches(lambda: deft.merge_into(W, W, P, P, R)) == ["merge_kernel"]
    monkeypatch.setattr(merging, "is_tall", lambda w, rank: w.shape[1] == 32)
    assert launches(lambda: deft.merge_into(W, W, P, P, R)) == ["project_kernel", "merge_kernel"]
    # sizes of no whole vectors have a launch of their own
    W[5], R[5] = W[5][:, :15], R[5][:, :15].contiguous()
    monkeypatch.setattr(merging, "is_tall", lambda w, rank: False)
    assert launches(lambda: deft.merge_into(W, W, P, P, R)) == ["merge_kernel"] * 2


# sizes and places at which promises hold, mostly
lucky = st.sampled_from([16, 32, 48, 64, 144, 20])
places = st.tuples(st.sampled_from([0, 0, 0, 8, 1, 4]), st.sampled_from([0, 0, 16, 8]))
laid_out = st.tuples(lucky, lucky, st.sampled_from([4, 8, 16, 3]), st.sampled_from([False] * 4 + [True]), places,
                     st.sampled_from([0, 0, 0, 4, 1]))  # fmt: skip


@cases(200)
@given(st.lists(laid_out, min_size=1, max_size=2), types, seeds)
def test_what_the_compiler_is_promised_is_true(monkeypatch, layers, dtype, seed):
    """ALIGNED lets the compiler read vectors and drop masks: the interpreter would not notice a promise that is broken."""
    seen = []

    def launched(kernel, rows, tiles, *arguments, ALIGNED, **meta):
        for row in rows if ALIGNED else ():
            if kernel.__name__.startswith("orthonormalize"):
                P, Q, _, r, *others = row
                assert all(p % 16 == 0 for p in (P, Q, *others)) and r % 4 == 0
                continue
            first = 5 if kernel is merging.merge_kernel else 4  # of the fields that are no pointers
            pointers, (_, n, r, *strides) = row[:first], row[first:]
            strides = [strides[:2], strides[2:4]] if kernel is merging.merge_kernel else [strides[:2]]
            assert all(p % 16 == 0 for p in pointers) and n % 16 == 0 and r % 4 == 0
            assert all(down % 16 == 0 and across == 1 for down, across in strides)
        seen.append((ALIGNED, len(rows)))

    for module in (projecting, merging, orthonormalizing):
        monkeypatch.setattr(module, "launch_layers", launched)
    draw = Draw(TRITON[0], seed, dtype)

    def placed(rows, columns, offset, wider, transposed=False, dtype=None):
        """A matrix that begins `offset` elements into memory, in rows `wider` than its own."""
        memory = draw(rows * (columns + wider) + offset, dtype=dtype)[offset:].view(rows, columns + wider)[:, :columns]
        return memory.t().contiguous().t() if transposed else memory

    W = [placed(m, n, *moved, transposed) for m, n, _, transposed, moved, _ in layers]
    K = [placed(m, r, off, 0, dtype=torch.float32) for m, _, r, _, _, off in layers]
    R = [placed(r, n, off, 0, dtype=torch.float32) for _, n, r, _, _, off in layers]
    ones = torch.ones(len(W), device=DEVICE)
    P = [k for k in K if k.shape[0] >= k.shape[1]]
    deft.orthonormalize_backward(deft.orthonormalize(P), P, P)
    deft.project(K, W, R, ones, ones)
    deft.project_backward(R, W, ones, ones)
    deft.merge_into(W, W, K, K, R)
    assert sum(count for _, count in seen) >= 3 * len(W)


@pytest.mark.parametrize("asked,expected", [("highest", ("tf32x3", 3, 3)), ("high", ("tf32", 2, 1))])
def test_float32_follows_torch_setting(monkeypatch, asked, expected):
    monkeypatch.setattr(launch, "INTERPRETED", False)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(asked)
        assert (launch.precision(), launch.pieces(torch.bfloat16), launch.pieces(torch.float16)) == expected
        assert launch.precision(exact=True) == "tf32x3"
        asked_of = []
        monkeypatch.setattr(orthonormalizing, "launch_layers", lambda *_, PRECISION, **meta: asked_of.append(PRECISION))
        P = [torch.randn(8, 2, device=DEVICE)]
        orthonormalizing.orthonormalize_backward(P, orthonormalizing.orthonormalize(P), P)
        assert asked_of == ["tf32x3"] * 2  # a basis of TF32's accuracy is none
    finally:
        torch.set_float32_matmul_precision(before)


def test_no_pointer_is_ever_stale():
    """Tensors that move, shrink, die and come back at another's address between calls with the same shapes."""
    draw, kept = Draw(TRITON[0], 0), []
    for i in range(30):
        m, n = (48, 32) if i % 3 else (32, 48)
        W, K, R = [draw(m, n) for _ in range(3)], [draw(m, 4) for _ in range(3)], [draw(4, n) for _ in range(3)]
        if i % 2:
            kept.append(W[1])  # so that what comes next lies elsewhere
        for _ in range(2):
            for ours, truth in zip(deft.project(K, W, R, torch.ones(3, device=DEVICE), torch.ones(3, device=DEVICE)),
                                   reference.project(K, W, R, torch.ones(3), torch.ones(3))):  # fmt: skip
                torch.testing.assert_close(ours, truth)
            W[0].data = W[0].clone()  # moved
            W[2] = W[2].t().contiguous().t()  # and laid out anew
            K[0].normal_()  # another value at the same place


def test_a_weight_that_was_freed_is_named():
    W, K = [torch.randn(8, 8, device=DEVICE) for _ in range(3)], [torch.randn(8, 2, device=DEVICE) for _ in range(3)]
    W[1].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"layer 1: the memory of a tensor \(8, 8\) has been freed"):
        deft.project(K, W, [None] * 3, torch.ones(3, device=DEVICE), torch.ones(3, device=DEVICE))
    with pytest.raises(RuntimeError, match=r"layer 1: the memory of a tensor \(8, 8\) has been freed"):
        deft.merge_into(W, W, K, K, [None] * 3)


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda W, K: W.__setitem__(1, W[1].to(torch.complex64)), r"W\[1\] is torch.complex64"),
        (lambda W, K: W.__setitem__(1, W[1].to(torch.int8)), r"W\[1\] is torch.int8"),
        (lambda W, K: W.__setitem__(0, W[0].double()), "layer 0: W is torch.float64"),
        (lambda W, K: K.__setitem__(1, torch.randn(130, 129, device=DEVICE)), "layer 1: rank 129 is more than the 128"),
        (lambda W, K: K.__setitem__(0, K[0].half()), "layer 0: K is torch.float16, torch.strided; the kernels take float32"),
    ],
)
def test_what_the_kernels_cannot_serve_is_named(change, message):
    W, K = [torch.randn(130, 8, device=DEVICE) for _ in range(2)], [torch.randn(130, 2, device=DEVICE) for _ in range(2)]
    change(W, K)
    with pytest.raises((RuntimeError, ValueError), match=message):
        deft.project(K, W, [None, None], torch.ones(2, device=DEVICE), torch.ones(2, device=DEVICE))


def test_what_merge_and_several_devices_cannot_have_is_named():
    W, K = [torch.randn(9, 8, device=DEVICE)], [torch.randn(9, 2, device=DEVICE)]
    with pytest.raises(
        RuntimeError, match="layer 0: a weight that is torch.float32 is merged into one that is torch.float16"
    ):
        deft.merge_into([W[0].half()], W, K, K, [None])
    reason = launch.cannot_serve({"W": [W[0], W[0].to("meta")]}, [2])
    assert reason == f"layer 1: tensors on {W[0].device} and meta"


def test_descriptors_are_used_where_they_can_be(monkeypatch):
    """Rows in steps of 16 bytes that do not overlap; where they cannot, the same numbers come without."""
    seen = []
    monkeypatch.setattr(kernels, "launch", lambda *_, **meta: seen.append(meta["DESCRIPTORS"]))
    monkeypatch.setattr(kernels, "has_descriptors", lambda device: True)
    force(monkeypatch, "fused")
    M, D, E = (torch.randn(*s, device=DEVICE) for s in ((16, 20), (16, 2), (2, 20)))
    wide = torch.randn(9, 17, device=DEVICE)
    for left in (
        torch.randn(9, 16, device=DEVICE),
        wide[:, :16],
        wide[:, 1:],
        wide[0, :16].expand(9, 16),
        wide.t()[:9, :].new_empty(16, 9).t(),
    ):
        kernels.product(left, M, None, D, E)
    assert seen == [True, False, False, False, False]


def test_auto_says_openly_what_serves(monkeypatch):
    assert dk.backends()["project"]["triton"] == "serves"
    monkeypatch.setenv("DEFT_KERNELS_BACKEND", "auto")
    row = dk.backends()["project"]
    if DEVICE.type == "cuda":
        assert row["triton"] == "serves" and row["reference"] == "serves what those before it cannot"
    else:
        assert "serves" in (row["cpp"], row["reference"]) and row["triton"].startswith("no GPU")
    P = [torch.randn(5, 2, dtype=torch.float64, device=DEVICE)]  # no kernel takes it
    torch.testing.assert_close(deft.orthonormalize(P), reference.orthonormalize(P))


@pytest.mark.gpu
def test_a_cuda_graph_of_a_step_replays_with_new_values():
    """Prepare, forward, backward and merge of a model, captured once: no synchronisation, tables that outlive the cache."""
    torch.manual_seed(0)
    layers = torch.nn.Sequential(*(torch.nn.Linear(96, 96) for _ in range(4))).cuda().requires_grad_(False)
    dk.inject_adapter(layers, dk.DeftConfig(r=4, target_modules=["0", "1", "2", "3"], init_weights=False))
    x = torch.randn(50, 96, device="cuda")
    parameters = [p for p in layers.parameters() if p.requires_grad]

    def run():
        loss = layers(x).square().mean()
        return [loss.detach(), *torch.autograd.grad(loss, parameters)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    launch._kept.cache_clear()
    with torch.no_grad():
        for p in parameters:
            p.add_(torch.randn_like(p) * 0.1)
    graph.replay()
    torch.testing.assert_close(captured, run(), rtol=0, atol=0)  # to the bit: nothing depends on the run


@pytest.mark.gpu
def test_nothing_waits_for_the_device():
    P, W = [torch.randn(320, 8, device="cuda") for _ in range(3)], [torch.randn(320, 640, device="cuda") for _ in range(3)]
    R, ones = [torch.randn(8, 640, device="cuda") for _ in range(3)], torch.ones(3, device="cuda")
    x = torch.randn(100, 640, device="cuda")

    def everything():
        Q = deft.orthonormalize(P)
        A = deft.project(Q, W, R, ones, ones)
        y, h = deft.lowrank_linear_forward(x, W[0], None, Q[0], A[0], False)
        deft.lowrank_linear_backward(y, x, h, W[0], Q[0], A[0], False, [True] * 4)
        dK, _ = deft.project_backward(A, W, ones, ones)
        deft.orthonormalize_backward(dK, Q, P)
        deft.merge(W, Q, Q, R)

    everything()
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_more_than_2_to_the_31_elements(dtype):
    T, n, m = (1 << 31) // 4096 + 100, 4096, 64
    x, W = torch.randn(T, n, device="cuda", dtype=dtype), torch.randn(m, n, device="cuda", dtype=dtype)
    B, A = torch.randn(m, 4, device="cuda", dtype=dtype), torch.randn(4, n, device="cuda", dtype=dtype) / 64
    tail = slice(T - 50, T)
    for form in ("chain", "expand", "fused"):
        with pytest.MonkeyPatch.context() as patch:
            force(patch, form)
            y, h = deft.lowrank_linear_forward(x, W, None, B, A, False)
            torch.testing.assert_close(y[tail], reference.lowrank_linear(x[tail], W, None, B, A), rtol=2e-2, atol=0.5)
            dy = torch.zeros_like(y)  # but for the last rows
            dy[tail] = torch.randn_like(dy[tail])
            ours = deft.lowrank_linear_backward(dy, x, h, W, B, A, False, [True, True, True, False])[:3]
            leaves = [t.double().requires_grad_() for t in (x[tail], B, A)]
            truth = reference.lowrank_linear(leaves[0], W.double(), None, *leaves[1:])
            truth = torch.autograd.grad(truth, leaves, dy[tail].double())
            for o, t in zip((ours[0][tail], *ours[1:]), truth):
                assert (o.double() - t).norm() <= 0.02 * t.norm()


@pytest.mark.gpu
def test_a_weight_of_more_than_2_to_the_31_elements():
    m, n, r, last = (1 << 31) // 4096 + 100, 4096, 4, slice(-50, None)
    W = torch.randn(m, n, device="cuda", dtype=torch.bfloat16)
    K = torch.zeros(m, r, device="cuda")
    K[last] = torch.randn(50, r, device="cuda")  # what is removed comes from the last rows
    R, one = torch.randn(r, n, device="cuda"), torch.ones(1, device="cuda")
    (A,), (truth,) = deft.project([K], [W], [R], one, one), reference.project([K[last]], [W[last]], [R], one, one)
    torch.testing.assert_close(A, truth, rtol=1e-4, atol=1e-3)
    (dK,), _ = deft.project_backward([R], [W], one, one)
    torch.testing.assert_close(dK[last], -(W[last].float() @ R.T), rtol=1e-4, atol=1e-2)
    (merged,) = deft.merge([W], [K], [K], [R])
    (truth,) = reference.merge([W[last]], [K[last]], [K[last]], [R])
    torch.testing.assert_close(merged[last], truth, rtol=1e-2, atol=1e-2)


# Without running them -------------------------------------------------------------------------------------------------


def test_every_kernel_compiles_for_every_architecture(record_property, tmp_path):
    """Every kernel x type x configuration, for five architectures; memory within limits, no spills in the default
    configurations on sm_90, matrix instructions wherever there is a product."""
    script, file = Path(__file__).with_name("compile_kernels.py"), tmp_path / "kernels.json"
    run = subprocess.run([sys.executable, script, "--json", file], capture_output=True, text=True, check=False)
    assert file.is_file(), run.stderr[-2000:]
    print(run.stdout)
    rows = json.loads(file.read_text())
    assert not [row for row in rows if "error" in row]
    assert {row["arch"] for row in rows} == {"sm_80", "sm_89", "sm_90", "sm_100", "gfx942"}
    assert not [row for row in rows if row["arch"] == "sm_90" and row["spills"]]
    products = [row for row in rows if not row["kernel"].endswith("thin sum")]
    assert all(row["matrix"].strip() not in ("", "mfma 0") for row in products)
    large = [r for r in products if r["arch"] == "sm_90" and r["type"] != "fp32" and "vectors" in r["access"]]
    large = [r for r in large if not r["kernel"].startswith(("orthonormalize", "lowrank_linear expand"))]
    assert large and all("wgmma" in row["matrix"] for row in large)
    record_property("table", run.stdout)
