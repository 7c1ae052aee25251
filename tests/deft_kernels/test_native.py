"""What is csrc's alone: its own borders, threads, memory, and malformed calls. Its numbers are in test_backends.py."""

import os
import random
import subprocess
import sys

import pytest
import torch
from common import use_isa, without_native

import deft_kernels as dk
from deft_kernels import reference

deft, native = torch.ops.deft_kernels, torch.ops.deft_kernels_native
pytestmark = pytest.mark.skipif(without_native() is not None, reason=str(without_native()))


@pytest.fixture(autouse=True)
def forced(monkeypatch):
    monkeypatch.setenv("DEFT_KERNELS_BACKEND", "cpp")
    assert dk.backends()["merge"]["cpp"] == "serves"


def layers(shapes, r, dtype=torch.float32):
    W = [torch.randn(m, n).to(dtype) for m, n in shapes]
    return (
        W,
        [torch.randn(m, r) for m, _ in shapes],
        [torch.randn(m, r) for m, _ in shapes],
        [torch.randn(r, n) for _, n in shapes],
    )


def everything(W, B, K, R, x):
    ones = torch.ones(len(W))
    Q = deft.orthonormalize(K)
    A = deft.project(Q, W, R, ones, ones)
    dK, dR = deft.project_backward(A, W, ones, ones)
    through = [t for grads in deft.merge_backward([w + 1 for w in W], W, B, Q, R) for t in grads]
    y, h = deft.lowrank_linear_forward(x, W[0], None, B[0], A[0], False)
    grads = deft.lowrank_linear_backward(y, x, h, W[0], B[0], A[0], False, [True] * 4)
    return [*Q, *A, *dK, *dR, *deft.orthonormalize_backward(dK, Q, K), *deft.merge(W, B, Q, R), *through, y, h, *grads]


def test_the_same_bits_whatever_the_threads():
    W, B, K, R = layers([(300, 500), (1000, 70), (64, 64), (5, 7)], 5)
    x, before = torch.randn(333, 500), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 2, 3):
            torch.set_num_threads(threads)
            results.append(everything(W, B, K, R, x))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(results[1], results[2]))
    for one in results[2:]:  # of the operations over lists, for any number
        assert all(torch.equal(a, b) for a, b in zip(results[0][:-6], one[:-6]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("r", [1, 16, 128, 200])
def test_rows_apart_and_ranks_without_a_limit(dtype, r):
    wide = torch.randn(230, 300).to(dtype)
    W, out = wide[:, 3:133], wide.clone()
    B, K, R = torch.randn(230, r), torch.randn(230, r) / 16, torch.randn(r, 130)
    deft.merge_into([out[:, 3:133]], [W], [B], [K], [R])
    (truth,) = reference.merge([W.double()], [B.double()], [K.double()], [R.double()])
    (plain,) = reference.merge([W], [B], [K], [R])
    assert (out[:, 3:133].double() - truth).norm() <= 2 * (plain.double() - truth).norm()
    assert torch.equal(out[:, :3], wide[:, :3]) and torch.equal(out[:, 133:], wide[:, 133:])  # nothing beside it
    dW = wide[:, 100:230]
    ours, plain = deft.merge_backward([dW], [W], [B], [K], [R]), reference.merge_backward([dW], [W], [B], [K], [R])
    truth = reference.merge_backward(*([t.double()] for t in (dW, W, B, K, R)))
    for (o,), (p,), (t,) in zip(ours, plain, truth):
        assert (o - t).norm() <= 2 * (p - t).norm() + 1e-6 * t.norm()
    (A,) = deft.project([K], [W], [R], torch.ones(1), torch.ones(1))
    torch.testing.assert_close(A, R - K.T @ W.float(), rtol=1e-4, atol=1e-3)


def test_a_bias_of_any_stride():
    x, W, B, A = torch.randn(3, 7), torch.randn(6, 7), torch.randn(6, 2), torch.randn(2, 7)
    for bias in (torch.randn(12)[::2], torch.ones(1).expand(6)):
        y = deft.lowrank_linear(x, W, bias, B, A)
        torch.testing.assert_close(y, reference.lowrank_linear(x, W, bias, B, A))


@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_layers(monkeypatch, isa, dtype):
    """Results that go past the cache, strips kept as copies and strips too tall for it; aligned rows and others."""
    use_isa(monkeypatch, isa)
    for m, n, ld, offset, r in ((1024, 640, 640, 0, 16), (1024, 641, 704, 0, 5), (1024, 640, 641, 0, 17),
                                (1024, 640, 704, 5, 1), (9000, 96, 96, 0, 16)):  # fmt: skip
        W, out = ((torch.randn(m * ld + offset).to(dtype))[offset:].view(m, ld)[:, :n] for _ in range(2))
        B, K, R = torch.randn(m, r), torch.randn(m, r) / m**0.5, torch.randn(r, n)
        for removal in (K, None):
            (truth,) = reference.merge(
                [W.double()], [B.double()], [removal if removal is None else K.double()], [R.double()]
            )
            (plain,) = reference.merge([W], [B], [removal], [R])
            deft.merge_into([out], [W], [B], [removal], [R])
            assert (out.double() - truth).norm() <= 2 * (plain.double() - truth).norm()
            again = W.clone(memory_format=torch.preserve_format)
            deft.merge_into([again], [again], [B], [removal], [R])
            assert torch.equal(again, out)


@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_rounded_as_torch_rounds(monkeypatch, isa, dtype):
    """Every bfloat16 and float16 through the kernels and back, and sums of all sizes, ties, infinities and NaN to them."""
    use_isa(monkeypatch, isa)
    values = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype).view(-1, 1)
    (same,) = deft.merge([values], [torch.zeros(len(values), 1)], [None], [torch.ones(1, 1)])
    finite = values.isfinite()
    assert torch.equal(same[finite].view(torch.int16), (values[finite] + 0).view(torch.int16))
    # a sum of x and a product that float32 holds: rounded once, to the nearest even
    added = torch.tensor([2.0**e * f for e in range(-30, 16) for f in (1, -3, 1.0078125, 1.000001)])
    W = values[::37].expand(-1, len(added)).contiguous()
    (sums,) = deft.merge([W], [torch.ones(len(W), 1)], [None], [added.view(1, -1)])
    expected = (W.float() + added).to(dtype)
    assert torch.equal(sums.nan_to_num(7), expected.nan_to_num(7)) and torch.equal(sums.isnan(), expected.isnan())


def test_empty_lists_and_empty_matrices():
    none = torch.empty(0)
    assert deft.orthonormalize([]) == [] and deft.merge([], [], [], []) == [] and deft.project([], [], [], none, none) == []
    assert deft.project_backward([], [], none, none) == ([], []) and deft.merge_backward([], [], [], [], []) == ([], [], [])
    for m, n, r in ((0, 5, 2), (5, 0, 2), (5, 4, 0)):
        W, B, K, R = layers([(m, n)], r)
        merged, expected = deft.merge(W, B, K, R), reference.merge(W, B, K, R)
        torch.testing.assert_close(merged, expected)
        torch.testing.assert_close(deft.merge_backward(W, W, B, K, R), reference.merge_backward(W, W, B, K, R))
        torch.testing.assert_close(
            deft.project(K, W, R, torch.ones(1), torch.ones(1)), reference.project(K, W, R, *torch.ones(2, 1))
        )


def refused(message, operation, *args):
    with pytest.raises(RuntimeError, match=message):
        operation(*args)


def test_borders_name_argument_and_index():
    W, B, K, R = layers([(6, 5), (6, 5)], 2)
    out = [torch.empty_like(w) for w in W]
    refused(r"merge: B has 1 entries, expected 2", native.merge, out, W, B[:1], K, R)
    refused(r"merge: W\[1\] is not float32, bfloat16 or float16", native.merge, out, [W[0], W[1].double()], B, K, R)
    refused(r"merge: out\[0\] has another dtype", native.merge, [out[0].half(), out[1]], W, B, K, R)
    refused(r"merge: R\[1\] has shape \(2, 6\), expected \(2, 5\)", native.merge, out, W, B, K, [None, torch.randn(2, 6)])
    refused(r"merge: K\[0\] has shape \(6\), expected a matrix", native.merge, out, W, B, [torch.randn(6), None], R)
    refused(
        r"merge: W\[0\] has rows that are not contiguous: stride 6",
        native.merge,
        out,
        [torch.randn(5, 6).t(), W[1]],
        B,
        K,
        R,
    )
    refused(
        r"merge: B\[1\] is not contiguous: its rows are 4 elements apart",
        native.merge,
        out,
        W,
        [B[0], torch.randn(6, 4)[:, :2]],
        K,
        R,
    )
    refused(r"merge: W\[1\] is not on the CPU", native.merge, out, [W[0], W[1].to("meta")], B, K, R)
    refused(r"project: injection is not a contiguous float32 vector on the CPU of 2 entries: shape \(1\)",
            native.project, R, K, W, R, torch.ones(1), torch.ones(2))  # fmt: skip
    refused(
        r"project_backward: dK\[0\] and W must both be given",
        native.project_backward,
        [None, None],
        R,
        R,
        W,
        *torch.ones(2, 2),
    )
    refused(r"merge_backward: dW\[1\] has another dtype", native.merge_backward, B, K, R, [W[0], W[1].half()], W, B, K, R)
    refused(r"merge_backward: dR\[0\] and R must both be given", native.merge_backward, B, K, [None, None], W, W, B, K, R)
    refused(
        r"orthonormalize: P\[1\] has shape \(2, 6\), expected \(m, r\)",
        native.orthonormalize,
        [B[0], R[0]],
        [B[0], torch.randn(2, 6)],
    )
    refused(r"lowrank_linear_forward: A has shape \(2, 4\), expected \(2, 5\)",
            native.lowrank_linear_forward, None, torch.empty(3, 2), torch.randn(3, 5), None, B[0],
            torch.randn(2, 4))  # fmt: skip
    refused(r"lowrank_linear_backward: h has shape \(4, 2\), expected \(3, 2\)", native.lowrank_linear_backward, None,
            torch.empty_like(B[0]), None, torch.randn(3, 6), torch.randn(3, 5), torch.randn(4, 2), B[0], R[0])  # fmt: skip


def test_memory_that_is_shared():
    W, B, K, R = layers([(6, 5), (6, 5)], 2)
    both = torch.randn(6, 10)
    halves = [both[:, :5], both[:, 5:]]
    native.merge(halves, halves, B, K, R)  # each into itself, side by side in memory
    native.merge(W, W, B, K, R)
    refused(r"merge: out\[1\] shares memory with W\[0\]", native.merge, [W[1], W[0]], W, B, K, R)
    refused(r"merge: out\[.\] shares memory with out\[.\]", native.merge, [both[:, :5], both[:, 4:9]], W, B, K, R)
    refused(r"merge: out\[0\] shares memory with W\[0\]", native.merge, [both[:, 1:6], W[1]], [both[:, :5], W[1]], B, K, R)
    refused(r"merge: out\[0\] has rows that overlap", native.merge, [torch.empty(5).expand(6, 5), W[1]], W, B, K, R)
    refused(r"orthonormalize: Q\[0\] shares memory with P\[0\]", native.orthonormalize, B, B)
    inner, outer = torch.randn(40).split([20, 20]), torch.randn(4, 100)
    lists = [torch.randn(4, 2)] * 2, [None] * 2, [torch.randn(2, 5)] * 2
    W5 = [torch.randn(4, 5) for _ in range(2)]
    refused(r"shares memory", native.merge, [outer[:, :5], outer[2:4].reshape(-1)[20:40].view(4, 5)], W5, *lists)  # nested
    tail = outer[3, 5:25].view(4, 5)  # after the last row of out[0]: no byte of it
    native.merge([outer[:, :5], inner[0].view(4, 5)], [W5[0], tail], *lists)
    refused(
        r"merge: out\[0\] shares memory with W\[0\]",
        native.merge,
        [outer[:, :5], W5[1]],
        [outer.view(-1)[:20].view(4, 5), W5[1]],
        *lists,
    )  # the same beginning, other rows
    refused(
        r"out\[0\] shares memory with B\[1\]",
        native.merge,
        [W5[0], W5[1]],
        W5,
        [lists[0][0], W5[0].view(-1)[:8].view(4, 2)],
        *lists[1:],
    )
    flat = torch.randn(100)  # rows 10 apart, beside rows 7 apart; and beside elements of another size
    mine = flat.as_strided((4, 5), (10, 1))
    refused(
        r"out\[0\] shares memory with W\[1\]",
        native.merge,
        [mine, W5[1]],
        [W5[0], flat.as_strided((4, 5), (7, 1), 5)],
        *lists,
    )
    halves = flat.view(torch.bfloat16).as_strided((4, 5), (10, 1), 12)
    refused(r"out\[0\] shares memory with W\[1\]", native.merge, [mine, halves.clone()], [W5[0], halves], *lists)
    refused(r"merge_backward: dB\[0\] shares memory with K\[1\]", native.merge_backward,
            [K[1], B[1].clone()], [k.clone() for k in K], [r.clone() for r in R], W, W, B, K, R)  # fmt: skip
    memory = torch.randn(100)
    refused(r"project: A\[1\] shares memory with R\[1\]", native.project,
            [R[0].clone(), memory[:10].view(2, 5)], K, W, [None, memory[9:19].view(2, 5)], *torch.ones(2, 2))  # fmt: skip


def test_what_the_kernels_cannot_serve_is_named_or_goes_to_the_reference(monkeypatch):
    W, B, K, R = layers([(6, 5)], 2)
    turned = [torch.randn(5, 6).t()]
    refused(
        r"cpp cannot serve deft_kernels::merge: W\[0\] has rows that are not contiguous \(strides \(1, 6\)\)",
        deft.merge,
        turned,
        B,
        K,
        R,
    )
    refused(
        r"K\[0\] is torch.float64, torch.strided on cpu; the CPU kernels take float32", deft.merge, W, B, [K[0].double()], R
    )
    refused(
        r"x is torch.bfloat16",
        deft.lowrank_linear_forward,
        torch.randn(3, 5).bfloat16(),
        W[0],
        None,
        B[0].bfloat16(),
        R[0].bfloat16(),
        False,
    )
    monkeypatch.setenv("DEFT_KERNELS_BACKEND", "auto")
    torch.testing.assert_close(deft.merge(turned, B, K, R), reference.merge(turned, B, K, R))


def test_writing_is_seen_by_autograd(monkeypatch):
    W, B, K, R = layers([(6, 5)], 2)
    x = torch.randn(3, 6, requires_grad=True)
    y = (x @ W[0]).sum()
    deft.merge_into(W, W, B, K, R)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
    with pytest.raises(ValueError, match=r"out\[0\] requires grad"):
        deft.merge_into([torch.nn.Parameter(W[0])], W, B, K, R)
    with torch.inference_mode():
        held = [w.clone() for w in W]
        deft.merge_into(held, held, B, K, R)
    monkeypatch.setenv("DEFT_KERNELS_BACKEND", "auto")
    wide = [torch.empty(6, 5)]  # another type than W's: the reference serves
    deft.merge_into(wide, [W[0].bfloat16()], B, K, R)
    torch.testing.assert_close(wide[0], reference.merge([W[0].bfloat16().float()], B, K, R)[0], rtol=1e-2, atol=1e-2)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(K[0], torch.ones_like(K[0]))
        with pytest.raises(NotImplementedError):
            deft.orthonormalize([dual])


def test_another_instruction_set_is_refused_by_name(monkeypatch):
    monkeypatch.setenv("DEFT_KERNELS_ISA", "avx1024")
    refused("DEFT_KERNELS_ISA=avx1024: expected avx512, avx2 or portable", deft.orthonormalize, [torch.randn(3, 2)])


def test_a_library_that_does_not_load_is_said_once(tmp_path):
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    code = """
import deft_kernels as dk, torch
print(dk.backends()["merge"]["cpp"])
torch.ops.deft_kernels.merge([torch.ones(2, 2)], [torch.ones(2, 1)], [None], [torch.ones(1, 2)])
"""
    environment = {k: v for k, v in os.environ.items() if k != "DEFT_KERNELS_BACKEND"} | {
        "DEFT_KERNELS_LIBRARY": str(broken)
    }
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "broken.so does not load" in run.stdout and run.stderr.count("other backends serve") == 1


def test_a_thousand_malformed_calls():
    """Whatever is passed, a call returns or raises: the interpreter lives. Every tensor lies between guards, which stay."""
    chance = random.Random(0)
    calls = {
        native.merge: ("out", "W", "B", "K?", "R?"), native.project: ("A", "K?", "W", "R?", ":s", ":s"),
        native.merge_backward: ("B", "K?", "R?", "out", "W", "B", "K?", "R?"),
        native.project_backward: ("K?", "A", "R", "W?", ":s", ":s"), native.orthonormalize: ("Q", "P"),
        native.orthonormalize_backward: ("Q", "P", "P", "P"),
        native.lowrank_linear_forward: (":y?", ":h", ":x", ":v?", ":b", ":a"),
        native.lowrank_linear_backward: (":x?", ":b?", ":a?", ":y", ":x", ":h?", ":b", ":a"),
    }  # fmt: skip
    guards = []

    def tensor(m, n, r, role):
        shape = {"out": (m, n), "W": (m, n), "B": (m, r), "K": (m, r), "R": (r, n), "A": (r, n), "P": (m, r), "Q": (m, r),
                 "s": (2,), "y": (7, m), "h": (7, r), "x": (7, n), "v": (1, m), "b": (m, r), "a": (r, n)}[role]  # fmt: skip
        if wrong := chance.random() < 0.1:
            where = chance.randrange(len(shape))
            shape = chance.choice(
                [
                    shape,
                    shape,
                    shape[::-1],
                    shape[:1],
                    (*shape, 2),
                    (*shape[:where], chance.randrange(4), *shape[where + 1 :]),
                ]
            )
        count = 1
        for s in shape:
            count *= s
        memory = torch.full((count + 128,), 0.5)
        guards.append((memory, count))
        t = memory[64 : 64 + count].view(shape)
        t.fill_(1.0)
        if not wrong:
            return t
        return chance.choice([t, t.double(), t.half(), t.bfloat16(), t.long(), t.t() if t.dim() == 2 else t, t.to("meta"),
                              t[:1].expand_as(t) if t.shape[0] else t, t.to(torch.complex64), t.to_sparse()])  # fmt: skip

    outcomes = {"returned": 0, "raised": 0}
    for _ in range(4000):
        operation, roles = chance.choice(list(calls.items()))
        m, n, r = chance.choice([1, 5, 33]), chance.choice([1, 4, 50]), chance.choice([0, 1, 3])
        args = []
        for role in roles:
            one = lambda: None if "?" in role and chance.random() < 0.3 else tensor(m, n, r, role.strip(":?"))  # noqa: B023
            args.append(one() if role[0] == ":" else [one() for _ in range(chance.choice([2] * 9 + [0, 1, 3]))])
        try:
            operation(*args)
            outcomes["returned"] += 1
        except (RuntimeError, NotImplementedError) as error:
            assert str(error)
            outcomes["raised"] += 1
        for memory, count in guards:
            assert (memory[:64] == 0.5).all() and (memory[64 + count :] == 0.5).all()
        guards.clear()
    assert min(outcomes.values()) > 300, outcomes
