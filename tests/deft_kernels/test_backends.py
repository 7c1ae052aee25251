"""Every backend with kernels of its own against the reference: Triton (in the interpreter where there is no GPU) and csrc's
CPU kernels, for each instruction set that this processor has.

The rule for numbers: with the same inputs, the distance from the float64 reference is at most twice that of the reference
run in the operation's own type, plus half a unit in the last place of the result, and of the terms summed in float32 (the
same maths on absolute values): one rounding each, which in plain torch a single number may by luck not have.
"""

import math
from typing import NamedTuple

import pytest
import torch
from common import gradients, small_model, use_isa, without_native
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import deft_kernels as dk
from deft_kernels import ops, reference
from deft_kernels.ops import lowrank_linear as op

deft = torch.ops.deft_kernels


class Backend(NamedTuple):
    name: str
    form: str  # of lowrank_linear and merge
    isa: str = ""

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if self.name == "triton" and torch.cuda.is_available() else "cpu")

    def type(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype, or float16 for bfloat16 in Triton's interpreter, which multiplies its bits."""
        interpreted = self.name == "triton" and self.device.type == "cpu"
        return torch.float16 if interpreted and dtype == torch.bfloat16 else dtype

    def force(self, monkeypatch) -> None:
        """This backend, and this form of it."""
        monkeypatch.setenv("DEFT_KERNELS_BACKEND", self.name)
        monkeypatch.setattr(op, "merged_is_cheaper", lambda *shape: self.form == "merged")
        if self.name == "cpp":
            if reason := without_native():
                pytest.skip(reason)
            assert dk.backends()["merge"]["cpp"] == "serves"
            use_isa(monkeypatch, self.isa)
            return
        pytest.importorskip("triton")
        from deft_kernels.triton import lowrank_linear, merge

        chosen = "chain" if self.form == "chain" else "kernel"
        monkeypatch.setattr(lowrank_linear, "choice", lambda what, *_: self.form if what == "product" else chosen)
        monkeypatch.setattr(merge, "is_tall", lambda w, rank: self.form == "expand")


TRITON = [Backend("triton", form) for form in ("chain", "expand", "fused", "merged")]
CPP = [Backend("cpp", form, isa) for isa in ("avx512", "avx2", "portable") for form in ("factor", "merged")]
ONCE = [TRITON[0], *CPP[::2]]  # for operations that have one form


def of(backends: list[Backend]):
    return pytest.mark.parametrize("backend", backends, ids=lambda b: " ".join(filter(None, b)))


# Blocks have 12 to 128 rows and columns, so that these have none, one and several of them, whole and not. The interpreter
# takes milliseconds for each.
sizes = st.one_of(st.integers(1, 40), st.sampled_from([1, 16, 48, 63, 64, 65, 96, 128, 130, 144, 257]))
ranks = st.one_of(st.integers(1, 20), st.sampled_from([4, 8, 16, 32, 33, 64]))
seeds = st.integers(0, 2**31)
types = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


def cases(count: int):
    return settings(
        max_examples=count, deadline=None, derandomize=True, database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )  # fmt: skip


@pytest.fixture(autouse=True)
def forced(monkeypatch, request):
    if "backend" in request.fixturenames:
        request.getfixturevalue("backend").force(monkeypatch)


class Draw:
    """Tensors that float64, float32 and the kernels' type all hold exactly."""

    def __init__(self, backend: Backend, seed: int, dtype: torch.dtype = torch.float32):
        self.generator, self.dtype, self.device = torch.Generator().manual_seed(seed), backend.type(dtype), backend.device

    def __call__(self, *shape, dtype=None, scale=1.0, transposed=False):
        values = torch.randn(*shape, generator=self.generator) * scale
        values = values.to(dtype or self.dtype).to(self.device)
        return values.t().contiguous().t() if transposed else values


def double(t):
    return t.double() if isinstance(t, torch.Tensor) else t


def size(t):
    return t.double().abs() if isinstance(t, torch.Tensor) else t


def assert_as_close_as_plain(ours, plain, truth, terms, name=""):
    assert ours.shape == truth.shape and ours.dtype == plain.dtype, name
    assert ours.isfinite().all(), f"{name} has values that are not finite"
    error, allowed = (ours.double() - truth).norm().item(), (plain.double() - truth).norm().item()
    result, summed = torch.finfo(ours.dtype).eps / 2 * truth.norm().item(), 2**-24 * terms.norm().item()
    assert error <= 2 * allowed + result + summed, (name, error, allowed)


# orthonormalize -------------------------------------------------------------------------------------------------------


@of(ONCE)
@cases(40)
@given(st.lists(st.tuples(sizes, ranks), min_size=1, max_size=2), seeds)
def test_orthonormalize(backend, shapes, seed):
    draw = Draw(backend, seed)
    P = [draw(m + (r if m < r else 0), r, scale=10.0 ** (i - 1)) for i, (m, r) in enumerate(shapes)]
    Q = deft.orthonormalize(P)
    dQ = [draw(*q.shape) for q in Q]
    dP = deft.orthonormalize_backward(dQ, Q, P)
    exact = [p.double().requires_grad_() for p in P]
    truth = reference.orthonormalize(exact)
    grads = torch.autograd.grad(truth, exact, [d.double() for d in dQ])
    plain = reference.orthonormalize(P)
    for p, q, t, grad, ours, d in zip(P, Q, truth, grads, dP, dQ):
        condition = torch.linalg.cond(p.double()).item()
        eye = torch.eye(q.shape[1], dtype=torch.float64, device=q.device)
        assert (q.double().T @ q.double() - eye).norm() <= 1e-5
        assert (q - t).norm() <= 3e-6 * condition * math.sqrt(q.shape[1])  # signs included
        assert (ours - grad).norm() <= 2e-6 * condition**2 * (d.norm() / p.norm()) * q.shape[1] + 1e-6 * grad.norm()
        if condition < 1e2:
            (plain_q,) = reference.orthonormalize([p])
            (plain_grad,) = reference.orthonormalize_backward([d], [plain_q], [p])
            assert (q - t).norm() <= 2 * (plain_q - t).norm() + 1e-6 * t.norm()
            assert (ours - grad).norm() <= 2 * (plain_grad - grad).norm() + 1e-6 * grad.norm()
    assert [q.shape for q in plain] == [q.shape for q in Q]


def conditioned(m: int, r: int, condition: float) -> torch.Tensor:
    u, v = torch.linalg.qr(torch.randn(m, r).double())[0], torch.linalg.qr(torch.randn(r, r).double())[0]
    return ((u * torch.logspace(0, -math.log10(condition), r).double()) @ v).float()


@of(ONCE)
@pytest.mark.parametrize("condition", [1e1, 1e2, 1e3, 1e4, 1e5, 1e6])
@pytest.mark.parametrize("m,r", [(200, 8), (70, 33)])
def test_orthonormalize_up_to_a_condition_of_a_million(backend, m, r, condition):
    P = [conditioned(m, r, condition).to(backend.device) for _ in range(4)]
    Q, plain, truth = deft.orthonormalize(P), reference.orthonormalize(P), reference.orthonormalize([p.double() for p in P])
    for q in Q:
        assert (q.double().T @ q.double() - torch.eye(r, device=q.device)).norm() <= 1e-5
    if condition > 1e4:  # a sign hangs on a pivot's, which may be no larger than round-off
        Q, plain = ([q * (q * t).sum(0).sign() for q, t in zip(list_, truth)] for list_ in (Q, plain))
    ours, plain, truth = map(torch.cat, (Q, plain, truth))
    assert (ours - truth).norm() <= 4 * (plain - truth).norm() + 1e-6  # both lose cond(P) digits, not the same ones


@of(ONCE)
def test_orthonormalize_of_anything_is_orthonormal(backend):
    twice = torch.randn(60, 3)
    P = {
        "zeros": torch.zeros(30, 4), "rank one": torch.randn(50, 1) @ torch.randn(1, 5), "twice": torch.cat([twice] * 2, 1),
        "identity": torch.eye(40)[:, :7], "triangle": torch.cat([torch.randn(3, 3).triu(), torch.zeros(20, 3)]),
        "square": torch.randn(16, 16), "one": torch.full((1, 1), -2.0), "a zero column": torch.randn(40, 5),
        "huge and tiny columns": torch.randn(64, 6) * torch.tensor([1e-30, 1e30, 1, 1e-3, 1e10, 1e-12]),
        "second panel depends": torch.randn(90, 40), "two of twelve": torch.randn(60, 2).repeat(1, 6),
        "one of eight": torch.randn(50, 1).repeat(1, 8), "graded": torch.cat([torch.ones(1, 4), 1e-22 * torch.randn(40, 4)]),
    }  # fmt: skip
    P["a zero column"][:, 2] = 0
    P["second panel depends"][:, 35] = P["second panel depends"][:, 1]
    P = {name: p.to(backend.device) for name, p in P.items()}
    for (name, p), q in zip(P.items(), deft.orthonormalize(list(P.values()))):
        assert (q.double().T @ q.double() - torch.eye(q.shape[1], device=q.device)).norm() <= 1e-5, name
        if name in ("identity", "triangle", "square", "one", "huge and tiny columns"):  # of full rank: Q is unique
            torch.testing.assert_close(q, torch.linalg.qr(p.double()).Q.float(), rtol=1e-4, atol=1e-5, msg=name)
        # span: what full rank there is lies in Q
        torch.testing.assert_close(q @ (q.T @ p), p, rtol=1e-4, atol=2e-5 * p.abs().max().item())


# project --------------------------------------------------------------------------------------------------------------

layer = st.tuples(sizes, sizes, ranks, st.sampled_from(["both", "K", "R"]), st.booleans())
large = st.tuples(st.just(257), st.sampled_from([128, 130]), ranks, st.sampled_from(["both", "K", "R"]), st.booleans())


@of(ONCE)
@cases(100)
@given(st.lists(layer, min_size=1, max_size=4), types, seeds, st.sampled_from([1.0, 1e-6, 1e4, 1e-34, 1e34]))
def test_project(backend, layers, dtype, seed, scale):
    draw = Draw(backend, seed, dtype)
    W = [draw(m, n, transposed=transposed and backend.name == "triton") for m, n, _, _, transposed in layers]
    K = [draw(m, r, dtype=torch.float32, scale=scale) if has != "R" else None for m, n, r, has, _ in layers]
    R = [draw(r, n, dtype=torch.float32, scale=scale) if has != "K" else None for m, n, r, has, _ in layers]
    injection, removal = draw(len(W), dtype=torch.float32), draw(len(W), dtype=torch.float32)
    A = deft.project(K, W, R, injection, removal)
    doubles = [[double(t) for t in list_] for list_ in (K, W, R)]
    truth = reference.project(*doubles, injection.double(), removal.double())
    plain = reference.project(K, W, R, injection, removal)
    terms = reference.project(*([size(t) for t in list_] for list_ in (K, W, R)), size(injection), -size(removal))
    for i, four in enumerate(zip(A, plain, truth, terms)):
        assert_as_close_as_plain(*four, f"A[{i}]")

    dA = [draw(*a.shape, dtype=torch.float32, scale=scale) for a in A]
    some = [w if k is not None else None for k, w in zip(K, W)]
    ours = deft.project_backward(dA, some, injection, removal)
    plain = reference.project_backward(dA, some, injection, removal)
    truth = reference.project_backward([d.double() for d in dA], map(double, some), injection.double(), removal.double())
    terms = reference.project_backward([*map(size, dA)], map(size, some), size(injection), size(removal))
    for name, grads in zip(("dK", "dR"), zip(ours, plain, truth, terms)):
        for i, four in enumerate(zip(*grads)):
            assert_as_close_as_plain(*four, f"{name}[{i}]")


# merge ----------------------------------------------------------------------------------------------------------------


@of([*TRITON[:2], *CPP[::2]])
@cases(50)
@given(st.lists(layer, min_size=1, max_size=4), types, seeds)
def test_merge(backend, layers, dtype, seed):
    draw = Draw(backend, seed, dtype)
    W = [draw(m, n, transposed=transposed and backend.name == "triton") for m, n, _, _, transposed in layers]
    B = [draw(m, r, dtype=torch.float32, scale=0.1) for m, n, r, _, _ in layers]
    K = [draw(m, r, dtype=torch.float32, scale=0.1) if has != "R" else None for m, n, r, has, _ in layers]
    R = [draw(r, n, dtype=torch.float32, scale=0.1) if has != "K" else None for m, n, r, has, _ in layers]
    merged = deft.merge(W, B, K, R)
    exact = reference.merge(*([double(t) for t in list_] for list_ in (W, B, K, R)))
    minus = [None if k is None else -size(k) for k in K]
    terms = reference.merge([*map(size, W)], [*map(size, B)], minus, [*map(size, R)])
    for i, four in enumerate(zip(merged, reference.merge(W, B, K, R), exact, terms)):
        assert_as_close_as_plain(*four, f"W'[{i}]")
    snapshot = [w.clone() for w in W]
    deft.merge_into(W, snapshot, B, K, R)  # from a snapshot,
    for w, expected in zip(W, merged):
        assert torch.equal(w, expected)
    deft.merge_into(snapshot, snapshot, B, K, R)  # and in place
    for w, expected in zip(snapshot, merged):
        assert torch.equal(w, expected)


@of(ONCE)
@cases(20)
@given(st.lists(st.one_of(layer, large), min_size=1, max_size=3), types, seeds)
def test_merge_backward(backend, layers, dtype, seed):
    draw = Draw(backend, seed, dtype)
    W, dW = ([draw(m, n, transposed=t and backend.name == "triton") for m, n, _, _, t in layers] for _ in range(2))
    B = [draw(m, r, dtype=torch.float32) for m, n, r, _, _ in layers]
    K = [draw(m, r, dtype=torch.float32) if has != "R" else None for m, n, r, has, _ in layers]
    R = [draw(r, n, dtype=torch.float32) if has != "K" else None for m, n, r, has, _ in layers]
    ours, plain = deft.merge_backward(dW, W, B, K, R), reference.merge_backward(dW, W, B, K, R)
    truth = reference.merge_backward(*([double(t) for t in list_] for list_ in (dW, W, B, K, R)))
    minus = [None if k is None else -size(k) for k in K]
    terms = reference.merge_backward([*map(size, dW)], [*map(size, W)], [*map(size, B)], minus, [*map(size, R)])
    for name, grads in zip(("dB", "dK", "dR"), zip(ours, plain, truth, terms)):
        for i, four in enumerate(zip(*grads)):
            assert_as_close_as_plain(*four, f"{name}[{i}]")


# lowrank_linear -------------------------------------------------------------------------------------------------------


@of([*TRITON, *CPP])
@cases(60)
@given(sizes, sizes, sizes, ranks, types, seeds, st.sampled_from(["", "bias", "leading", "strided", "transposed W"]))
def test_lowrank_linear(backend, T, m, n, r, dtype, seed, kind):
    if backend.name == "cpp" or backend.form == "merged":
        dtype = torch.float32
    draw = Draw(backend, seed, dtype)
    x, dy = draw(T, n, transposed=kind == "strided"), draw(T, m, transposed=kind == "strided")
    if kind == "leading":
        x, dy = draw(2, T, n).transpose(0, 1), draw(T, 2, m)
    W, B, A = draw(m, n, transposed=kind == "transposed W"), draw(m, r), draw(r, n)
    bias = draw(m) if kind == "bias" else None

    def run(function, *tensors):
        x, W, bias, B, A, dy = tensors
        inputs = [t.detach().clone().requires_grad_() for t in (x, B, A, *([] if bias is None else [bias]))]
        y = function(inputs[0], W, bias if bias is None else inputs[3], inputs[1], inputs[2])
        return [y.detach(), *torch.autograd.grad(y, inputs, dy)]

    tensors = (x, W, bias, B, A, dy)
    truth = run(reference.lowrank_linear, *map(double, tensors))
    plain = run(reference.lowrank_linear, *tensors)
    ours, terms = run(ops.LowRankLinear.apply, *tensors), run(reference.lowrank_linear, *map(size, tensors))
    for name, *four in zip(("y", "dx", "dB", "dA", "dbias"), ours, plain, truth, terms):
        assert_as_close_as_plain(*four, name)
    again = run(ops.LowRankLinear.apply, *tensors)
    assert all(torch.equal(a, b) for a, b in zip(ours, again))  # from run to run, to the bit


@of([*TRITON, *CPP])
def test_lowrank_linear_of_nothing(backend):
    x, W, B, A = (torch.randn(*s, device=backend.device) for s in ((0, 6), (5, 6), (5, 2), (2, 6)))
    B.requires_grad_(), A.requires_grad_(), x.requires_grad_()
    y = ops.LowRankLinear.apply(x, W, None, B, A)
    y.sum().backward()
    assert y.shape == (0, 5) and x.grad.shape == (0, 6) and B.grad.abs().sum() == 0 and A.grad.abs().sum() == 0


@of([TRITON[1], *CPP[:2]])
@pytest.mark.parametrize("needs", [(0, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1)])
def test_only_what_is_needed(backend, needs):
    x, W, B, A = (torch.randn(*s, device=backend.device) for s in ((20, 6), (5, 6), (5, 2), (2, 6)))
    inputs = [t for t, need in zip((x, B, A), needs) if need]
    for t in inputs:
        t.requires_grad_()
    dy = torch.randn(20, 5, device=backend.device)
    ours = torch.autograd.grad(ops.LowRankLinear.apply(x, W, None, B, A), inputs, dy)
    torch.testing.assert_close(ours, torch.autograd.grad(reference.lowrank_linear(x, W, None, B, A), inputs, dy))


# As operations of torch -----------------------------------------------------------------------------------------------


@of([TRITON[1], CPP[0]])
def test_opcheck(backend):
    """Schemas, shape functions and autograd hold for what the kernels return, too."""
    check, randn = torch.library.opcheck, lambda *shape: torch.randn(*shape, device=backend.device)
    P, W, R = [randn(20, 3), randn(9, 4)], [randn(20, 16), randn(9, 6)], [randn(3, 16), None]
    Q, scales = deft.orthonormalize(P), (randn(2), randn(2))
    check(deft.orthonormalize.default, (P,))
    check(deft.orthonormalize_backward.default, ([randn(20, 3), randn(9, 4)], Q, P))
    check(deft.project.default, ([Q[0], None], W, [None, randn(4, 6)], *scales))
    check(deft.project_backward.default, ([randn(3, 16), randn(4, 6)], [W[0], None], *scales))
    check(deft.merge.default, (W, P, Q, R))
    check(deft.merge_into.default, ([randn(20, 16), randn(9, 6)], W, P, Q, R))
    check(deft.merge_backward.default, ([randn(20, 16), randn(9, 6)], W, P, [Q[0], None], [None, randn(4, 6)]))
    x, B, A = randn(2, 4, 16), randn(20, 3), randn(3, 16)
    for merged in (False, True):
        check(deft.lowrank_linear_forward.default, (x, W[0], None, B, A, merged))
        h = deft.lowrank_linear_forward(x, W[0], None, B, A, merged)[1]
        for needs in ([True] * 4, [False, True, True, False]):
            check(deft.lowrank_linear_backward.default, (randn(2, 4, 20), x, h, W[0], B, A, merged, needs))


# All of it together ---------------------------------------------------------------------------------------------------


def step(model, x):
    loss = model(x).square().mean()
    loss.backward()
    return loss.detach(), gradients(model)


@of([TRITON[1], CPP[0]])
@pytest.mark.parametrize("method", ["qr", "relu", "none", "para", "lora"])
def test_a_model_trains_and_merges_as_on_the_reference(monkeypatch, backend, method):
    config = dk.LoraConfig(r=3) if method == "lora" else dk.DeftConfig(
        r=3, para=method == "para", decomposition_method="qr" if method == "para" else method, init_weights=False
    )  # fmt: skip
    results = {}
    for name in (backend.name, "reference"):
        torch.manual_seed(1)
        monkeypatch.setenv("DEFT_KERNELS_BACKEND", name)
        model = small_model(width=12).to(backend.device)
        dk.inject_adapter(model, config)
        x = torch.randn(1, 3, 4, 4, device=backend.device)
        results[name] = [step(model, x)]
        with torch.no_grad():
            dk.merge(model)
            results[name].append(model(x))
            dk.unmerge(model)
            results[name].append(model(x))
    torch.testing.assert_close(results[backend.name], results["reference"], rtol=1e-4, atol=1e-5)
