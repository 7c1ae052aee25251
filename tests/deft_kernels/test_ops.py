"""The operations as torch sees them: opcheck, dispatch, borders, and every form against the reference."""

import pytest
import torch

import deft_kernels as dk
from deft_kernels import ops, reference
from deft_kernels.ops._dispatch import BACKENDS, _kernels, kernel
from deft_kernels.ops.lowrank_linear import LowRankLinear, lowrank_linear, merged_is_cheaper

deft = torch.ops.deft_kernels
opcheck = torch.library.opcheck


def randn(*shape, grad=False):
    return torch.randn(*shape, dtype=torch.float64).requires_grad_(grad)


def test_opcheck_orthonormalize():
    P = [randn(7, 3, grad=True), randn(9, 4, grad=True), randn(7, 3, grad=True), randn(5, 5, grad=True)]
    opcheck(deft.orthonormalize.default, (P,))
    P = [p.detach() for p in P]
    opcheck(deft.orthonormalize_backward.default, ([randn(*p.shape) for p in P], deft.orthonormalize(P), P))


@pytest.mark.parametrize("gate", [False, True])
def test_opcheck_project(gate):
    K, W, R = [randn(7, 3, grad=True), None, randn(4, 2, grad=True)], [randn(7, 5), randn(9, 6), randn(4, 6)], None
    R = [randn(3, 5, grad=True), randn(4, 6, grad=True), None]
    opcheck(deft.project.default, (K, W, R, randn(3, grad=gate), randn(3)))
    opcheck(deft.project_backward.default, ([randn(3, 5), randn(2, 6)], [randn(7, 5), None], randn(2), randn(2)))


@pytest.mark.parametrize("rows", [4, 200])  # factor form, merged form
def test_opcheck_lowrank_linear(rows):
    x, W, bias, B, A = randn(2, rows // 2, 6), randn(5, 6), randn(5), randn(5, 2), randn(2, 6)
    grads = [t.clone().requires_grad_() for t in (x, B, A)]
    opcheck(deft.lowrank_linear.default, (grads[0], W, bias, *grads[1:]))
    merged = merged_is_cheaper(rows, 5, 6, x.dtype)
    opcheck(deft.lowrank_linear_forward.default, (x, W, bias, B, A, merged))
    h = deft.lowrank_linear_forward(x, W, bias, B, A, merged)[1]
    for needs in ([True] * 4, [False, True, True, False], [True, False, False, False]):
        opcheck(deft.lowrank_linear_backward.default, (randn(2, rows // 2, 5), x, h, W, B, A, merged, needs))


def test_opcheck_merge():
    W, B = [randn(7, 5), randn(4, 6)], [randn(7, 3, grad=True), randn(4, 2, grad=True)]
    K, R = [randn(7, 3, grad=True), None], [None, randn(2, 6, grad=True)]
    opcheck(deft.merge.default, (W, B, K, R))
    detached = [[None if t is None else t.detach() for t in list_] for list_ in (W, B, K, R)]
    opcheck(deft.merge_into.default, ([randn(7, 5), randn(4, 6)], *detached))
    opcheck(deft.merge_backward.default, ([randn(7, 5), randn(4, 6)], *detached))


def test_every_operation_was_checked():
    checked = {"orthonormalize", "project", "merge", "merge_into", "orthonormalize_backward", "project_backward"}
    assert set(_kernels) == checked | {"merge_backward", "lowrank_linear_forward", "lowrank_linear_backward"}


def test_empty_lists():
    none = torch.empty(0)
    assert deft.orthonormalize([]) == [] and deft.merge([], [], [], []) == [] and deft.project([], [], [], none, none) == []


@pytest.mark.parametrize("grad", [torch.autograd.gradcheck, None])
def test_gradients_of_list_operations(grad):
    P, W, R = [randn(7, 3, grad=True), randn(5, 2, grad=True)], [randn(7, 4), randn(5, 6)], [randn(3, 4, grad=True), None]
    scales = randn(2, grad=True), randn(2)
    flat = [*P, R[0], scales[0]]
    if grad is None:  # the same without autograd
        with torch.inference_mode():
            Q = ops.orthonormalize([p.detach() for p in P])
        torch.testing.assert_close(Q, reference.orthonormalize(P))
        return

    def run(p0, p1, r0, injection):
        K = ops.orthonormalize([p0, p1])
        A = ops.project(K, W, [r0, None], injection, scales[1])
        return tuple(ops.merge(W, K, K, A))

    assert grad(run, flat)


def test_gradients_of_merge():
    W, B = [randn(7, 5, grad=True), randn(4, 6, grad=True)], [randn(7, 3, grad=True), randn(4, 2, grad=True)]
    K, R = [randn(7, 3, grad=True), None], [None, randn(2, 6, grad=True)]
    flat = [*W, *B, K[0], R[1]]
    assert torch.autograd.gradcheck(lambda *t: tuple(ops.merge(t[:2], t[2:4], [t[4], None], [None, t[5]])), flat)
    W, B, K, R = [randn(7, 5, grad=True)], [randn(7, 3)], [randn(7, 3, grad=True)], [randn(3, 5, grad=True)]
    assert torch.autograd.gradcheck(lambda w, k, r: ops.merge([w], B, [k], [r])[0], [*W, *K, *R])


@pytest.mark.parametrize("rows", [1, 3, 50, 0])
@pytest.mark.parametrize("bias", [False, True])
def test_gradients_of_lowrank_linear(rows, bias):
    x, W, B, A = randn(rows, 6, grad=True), randn(5, 6), randn(5, 2, grad=True), randn(2, 6, grad=True)
    b = randn(5, grad=True) if bias else None
    torch.testing.assert_close(lowrank_linear(x, W, b, B, A), reference.lowrank_linear(x, W, b, B, A))
    if rows:
        assert torch.autograd.gradcheck(lambda *t: lowrank_linear(t[0], W, b if b is None else t[3], *t[1:3]),
                                        [x, B, A] + ([b] if bias else []))  # fmt: skip
    else:
        lowrank_linear(x, W, b, B, A).sum().backward()
        assert B.grad.abs().sum() == 0 and A.grad.abs().sum() == 0


def test_both_forms_are_exercised():
    assert not merged_is_cheaper(5, 5, 6, torch.float64) and merged_is_cheaper(6, 5, 6, torch.float64)
    assert not merged_is_cheaper(10**6, 5, 6, torch.bfloat16)  # W' rounded to half precision would lose small updates


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "m,n,r,leading", [(40, 59, 3, (111,)), (97, 33, 16, (2, 5)), (64, 64, 8, (1,)), (5, 200, 1, (3, 67))]
)
def test_error_is_at_most_twice_that_of_plain_torch(dtype, m, n, r, leading):
    exact = [randn(*leading, n), randn(m, n), randn(m), randn(m, r), randn(r, n)]
    exact = [t.to(dtype).double() for t in exact]
    gradient = randn(*leading, m).to(dtype).double()

    def run(function, dtype):
        x, W, b, B, A = (t.to(dtype) for t in exact)
        inputs = [t.requires_grad_() for t in (x, B, A)]
        y = function(x, W, b, B, A)
        return [y, *torch.autograd.grad(y, inputs, gradient.to(dtype))]

    truth, plain = run(reference.lowrank_linear, torch.float64), run(reference.lowrank_linear, dtype)
    for name, t, p, o in zip(("y", "dx", "dB", "dA"), truth, plain, run(LowRankLinear.apply, dtype)):
        assert o.dtype == dtype
        error, allowed = (o.double() - t).norm() / t.norm(), (p.double() - t).norm() / t.norm()
        assert error <= 2 * allowed, (name, error.item(), allowed.item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layers_that_share_x(dtype):
    x, sizes = randn(3, 7, 6), [(5, 2), (9, 3), (4, 1)]
    W, B, A = ([randn(m, 6) for m, _ in sizes], [randn(m, r) for m, r in sizes], [randn(r, 6) for _, r in sizes])
    bias = [randn(5), None, randn(4)]
    exact = [[t if t is None else t.to(dtype).double() for t in list_] for list_ in ([x], W, bias, B, A)]
    dy = [randn(3, 7, m).to(dtype).double() for m, _ in sizes]

    def run(function, dtype):
        (x,), W, bias, B, A = ([t if t is None else t.to(dtype) for t in list_] for list_ in exact)
        inputs = [t.requires_grad_() for t in (x, *B, *A, bias[0], bias[2])]
        y = function(x, W, bias, B, A)
        return [*y, *torch.autograd.grad(y, inputs, [d.to(dtype) for d in dy])]

    def apart(x, *lists):
        return [reference.lowrank_linear(x, *one) for one in zip(*lists)]

    truth, plain, ours = run(apart, torch.float64), run(apart, dtype), run(ops.lowrank_linear_shared, dtype)
    for t, p, o in zip(truth, plain, ours):
        assert o.dtype == dtype and o.shape == t.shape
        error, allowed = (o.double() - t).norm() / t.norm(), (p.double() - t).norm() / t.norm()
        assert error <= 2 * allowed + torch.finfo(dtype).eps / 2
    with torch.autocast("cpu", torch.bfloat16):  # the caller's types stand
        again = run(ops.lowrank_linear_shared, dtype)
    assert all(torch.equal(a, b) for a, b in zip(again, ours))
    with pytest.raises(ValueError, match=r"B \(8, 3\).*do not fit"):
        ops.lowrank_linear_shared(x, W, bias, [B[0], randn(8, 3), B[2]], A)


def test_non_contiguous_inputs():
    x, W, B, A = randn(6, 30).T, randn(6, 5).T, randn(2, 5).T, randn(6, 2).T
    torch.testing.assert_close(lowrank_linear(x, W, None, B, A), reference.lowrank_linear(x, W, None, B, A))
    dy = randn(5, 30).T
    grads = [t.clone().requires_grad_() for t in (x, B, A)]
    ours = torch.autograd.grad(lowrank_linear(grads[0], W, None, *grads[1:]), grads, dy)
    torch.testing.assert_close(ours, torch.autograd.grad(reference.lowrank_linear(grads[0], W, None, *grads[1:]), grads, dy))


def test_merge_into_rounds_once_and_may_overwrite():
    W = torch.randn(40, 30, dtype=torch.bfloat16)
    B, K, R = torch.randn(40, 3), torch.randn(40, 3), torch.randn(3, 30)
    expected = (W.double() + B.double() @ (R.double() - K.double().T @ W.double())).float()
    out = torch.empty_like(W)
    deft.merge_into([out], [W], [B], [K], [R])
    assert (out.float() - expected).abs().max() <= expected.abs().max() * 2**-8
    deft.merge_into([W], [W], [B], [K], [R])
    assert torch.equal(W, out)


def test_a_forced_backend_that_cannot_serve_raises(monkeypatch):
    monkeypatch.setenv("DEFT_KERNELS_BACKEND", "reference")
    expected = deft.orthonormalize([randn(5, 2)])
    assert expected[0].shape == (5, 2)
    monkeypatch.setitem(_kernels, "orthonormalize", dict(_kernels["orthonormalize"]))
    kernel("orthonormalize", "triton", cannot=lambda P: "P is on the CPU" if not P[0].is_cuda else None)(None)
    monkeypatch.setenv("DEFT_KERNELS_BACKEND", "triton")
    with pytest.raises(RuntimeError, match="triton cannot serve deft_kernels::orthonormalize: P is on the CPU"):
        deft.orthonormalize([randn(5, 2)])
    with pytest.raises(RuntimeError, match="triton cannot serve deft_kernels::project: layer 0: K is torch.float64"):
        deft.project([randn(5, 2)], [randn(5, 3)], [None], torch.ones(1), torch.ones(1))
    monkeypatch.setenv("DEFT_KERNELS_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match="cuda cannot serve deft_kernels::project: this build has no cuda kernel"):
        deft.project([randn(5, 2)], [randn(5, 3)], [None], torch.ones(1), torch.ones(1))
    monkeypatch.setenv("DEFT_KERNELS_BACKEND", "auto")
    assert deft.orthonormalize([randn(5, 2)])[0].shape == (5, 2)  # openly: backends() shows both
    assert dk.backends()["orthonormalize"]["reference"].startswith("serves")
    monkeypatch.setenv("DEFT_KERNELS_BACKEND", "cubals")
    with pytest.raises(ValueError, match="'cubals': expected auto, cuda, triton, cpp, reference"):
        deft.orthonormalize([randn(5, 2)])


def test_backends_tells_who_serves_what():
    table = dk.backends()
    assert set(table) == set(_kernels)
    for row in table.values():
        assert set(row) == set(BACKENDS) and list(row.values()).count("serves") == 1


def test_borders_name_the_fact():
    with pytest.raises(ValueError, match=r"P\[1\] has shape \(2, 5\)"):
        ops.orthonormalize([randn(5, 2), randn(2, 5)])
    with pytest.raises(ValueError, match=r"P\[0\] is torch.bfloat16"):
        ops.orthonormalize([randn(5, 2).bfloat16()])
    with pytest.raises(ValueError, match=r"layer 0 has neither K nor R"):
        ops.project([None], [randn(5, 3)], [None], torch.ones(1), torch.ones(1))
    with pytest.raises(ValueError, match=r"project: W\[1\] is torch.complex64, expected a floating type"):
        ops.project([randn(5, 2)] * 2, [randn(5, 3), randn(5, 3).to(torch.complex64)], [None] * 2, *torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"merge: W\[0\] is on cpu, K\[0\] on meta"):
        ops.merge([randn(5, 6)], [randn(5, 2)], [randn(5, 2).to("meta")], [None])
    with pytest.raises(ValueError, match=r"W\[0\] requires grad"):
        ops.project([randn(5, 2)], [randn(5, 3, grad=True)], [None], torch.ones(1), torch.ones(1))
    one, two = torch.ones(1, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    K, W, R = [randn(5, 2)] * 2, [randn(5, 3)] * 2, [randn(2, 3)] * 2
    with pytest.raises(ValueError, match=r"project: removal is \(1,\) on cpu, expected one entry for each of 2 layers"):
        deft.project(K, W, R, two, one)
    with pytest.raises(ValueError, match=r"project: 2 W but 1 K"):
        deft.project(K[:1], W, R, two, two)
    with pytest.raises(ValueError, match=r"dA\[1\] \(2, 4\) does not fit W\[1\] \(5, 3\)"):
        deft.project_backward([randn(2, 3), randn(2, 4)], W, two, two)
    with pytest.raises(ValueError, match=r"injection is \(1,\)"):
        deft.project_backward(R, W, one, two)
    with pytest.raises(ValueError, match=r"out\[1\] is \(5, 2\) on cpu, W\[1\] \(5, 3\)"):
        deft.merge_into([randn(5, 3), randn(5, 2)], W, K, K, R)
    with pytest.raises(ValueError, match=r"merge_backward: dW\[1\] is \(5, 2\) on cpu, W\[1\] \(5, 3\)"):
        deft.merge_backward([randn(5, 3), randn(5, 2)], W, K, K, R)
    with pytest.raises(ValueError, match=r"merge_backward: 2 W but 1 dW"):
        deft.merge_backward([randn(5, 3)], W, K, K, R)
    with pytest.raises(ValueError, match=r"layer 1 do not fit"):
        deft.merge_into([randn(5, 3)] * 2, W, K, K, [R[0], randn(2, 5)])
    with pytest.raises(ValueError, match=r"merge_into: 2 W but 1 out"):
        deft.merge_into([randn(5, 3)], W, K, K, R)
    with pytest.raises(ValueError, match=r"W\[0\] has shape \(5, 3, 1\)"):
        deft.merge([randn(5, 3, 1)], K[:1], K[:1], R[:1])
    with pytest.raises(ValueError, match=r"P\[0\] has shape \(2, 5\)"):
        deft.orthonormalize([randn(2, 5)])
    with pytest.raises(ValueError, match=r"dQ\[1\] \(5, 1\), Q\[1\] \(5, 2\), P\[1\] \(5, 2\)"):
        deft.orthonormalize_backward([randn(5, 2), randn(5, 1)], K, K)
    for wrong in (randn(5, 6).to(torch.complex64), torch.ones(5, 6, dtype=torch.int8)):
        with pytest.raises(ValueError, match=f"W is {wrong.dtype}; expected floating types"):
            lowrank_linear(randn(4, 6), wrong, None, randn(5, 2), randn(2, 6))
    with pytest.raises(ValueError, match=r"dy \(4, 5\), x \(3, 6\).*do not fit"):
        deft.lowrank_linear_backward(
            randn(4, 5), randn(3, 6), randn(4, 2), randn(5, 6), randn(5, 2), randn(2, 6), False, [True] * 4
        )
    with pytest.raises(ValueError, match="no layers"):
        ops.lowrank_linear_shared(randn(4, 6), [], [], [], [])
    with pytest.raises(ValueError, match=r"x \(4, 3\).*do not fit"):
        lowrank_linear(randn(4, 3), randn(5, 6), None, randn(5, 2), randn(2, 6))
    with pytest.raises(ValueError, match=r"layer 0 do not fit its weight \(5, 6\)"):
        ops.merge([randn(5, 6)], [randn(4, 2)], [None], [randn(2, 6)])
