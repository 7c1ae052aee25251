"""orthonormalize: thin QR of many tall matrices in one call, P (m, r) -> Q (m, r), signs as `torch.linalg.qr`."""

from collections import defaultdict

import torch
from torch import Tensor

from .. import reference
from ._dispatch import (
    below_autograd,
    check_lists,
    contiguous,
    cpp_kernel,
    cuda_kernel,
    define,
    differentiable,
    fake,
    kernel,
    native,
    native_cuda,
    triton_kernels,
)


def _check(P) -> None:
    for i, p in enumerate(P):
        shape = p.shape
        if len(shape) != 2 or shape[0] < shape[1]:
            raise ValueError(f"orthonormalize: P[{i}] has shape {tuple(p.shape)}, expected (m, r) with r <= m")
        if p.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"orthonormalize: P[{i}] is {p.dtype}, expected float32 or float64")


def _check_backward(dQ, Q, P) -> None:
    _check(P)
    check_lists("orthonormalize_backward", P=P, Q=Q, dQ=dQ)
    for i, (d, q, p) in enumerate(zip(dQ, Q, P)):
        if not d.shape == q.shape == p.shape:
            shapes = ", ".join(f"{name}[{i}] {tuple(t.shape)}" for name, t in (("dQ", d), ("Q", q), ("P", p)))
            raise ValueError(f"orthonormalize_backward: {shapes}: expected one shape")


define("orthonormalize(Tensor[] P) -> Tensor[]", _check)
define("orthonormalize_backward(Tensor[] dQ, Tensor[] Q, Tensor[] P) -> Tensor[]", _check_backward)


@fake("orthonormalize")
def _(P):
    return [torch.empty_like(p, memory_format=torch.contiguous_format) for p in P]


@fake("orthonormalize_backward")
def _(dQ, Q, P):
    return [torch.empty_like(p, memory_format=torch.contiguous_format) for p in P]


def _by_shape(function, *lists):
    """Apply a batched function once per distinct shape, so that hundreds of layers are a handful of library calls."""
    groups = defaultdict(list)
    for i, t in enumerate(lists[0]):
        groups[t.shape, t.dtype, t.device].append(i)
    out = [None] * len(lists[0])
    for members in groups.values():
        if len(members) == 1:
            (i,) = members
            out[i] = function(*(tensors[i] for tensors in lists)).contiguous()
            continue
        result = function(*(torch.stack([tensors[i] for i in members]) for tensors in lists))
        for i, t in zip(members, result.unbind()):
            # contiguous and on its own storage: a custom operator's outputs may not alias one another
            out[i] = t.clone(memory_format=torch.contiguous_format)
    return out


@kernel("orthonormalize", "reference")
def _(P):
    return _by_shape(lambda p: reference.orthonormalize([p])[0], P)


@kernel("orthonormalize_backward", "reference")
def _(dQ, Q, P):
    return _by_shape(lambda *one: reference.orthonormalize_backward(*([t] for t in one))[0], dQ, Q, P)


@cpp_kernel("orthonormalize", P="float32")
def _(P):
    P = contiguous(P)
    Q = [torch.empty_like(p) for p in P]
    native.orthonormalize(Q, P)
    return Q


@cpp_kernel("orthonormalize_backward", dQ="float32", Q="float32", P="float32")
def _(dQ, Q, P):
    dQ, Q, P = contiguous(dQ), contiguous(Q), contiguous(P)
    dP = [torch.empty_like(p) for p in P]
    native.orthonormalize_backward(dP, dQ, Q, P)
    return dP


def _cannot_cuda(P) -> str | None:
    for i, p in enumerate(P):
        if p.device.type != "cuda" or p.device != P[0].device or p.dtype != torch.float32 or p.shape[1] > 128:
            return f"P[{i}] is {p.dtype}, {tuple(p.shape)} on {p.device}; the kernel takes float32, r <= 128, on one GPU"
    return None


@cuda_kernel("orthonormalize", _cannot_cuda)
def _(P):
    P = contiguous(P)
    Q = [torch.empty_like(p) for p in P]
    if P:
        native_cuda.orthonormalize(Q, P, torch.cuda.current_stream(P[0].device).cuda_stream)
    return Q


triton_kernels("orthonormalize", "orthonormalize", "orthonormalize_backward")


class Orthonormalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *P: Tensor):
        with below_autograd():
            Q = torch.ops.deft_kernels.orthonormalize(list(P))
        ctx.save_for_backward(*P, *Q)
        return tuple(Q)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *dQ: Tensor):
        P, Q = ctx.saved_tensors[: len(dQ)], ctx.saved_tensors[len(dQ) :]
        return tuple(torch.ops.deft_kernels.orthonormalize_backward(list(dQ), list(Q), list(P)))


differentiable("orthonormalize", lambda P: list(Orthonormalize.apply(*P)) if P else [])


def orthonormalize(P: list[Tensor]) -> list[Tensor]:
    """Q of P_i = Q_i T_i for every P_i (m, r), r <= m, float32 or float64; differentiable once, where P_i has full rank.
    Q is orthonormal for any finite P_i.

    Raises:
        ValueError: a matrix that is not tall, or not float32/float64 (half precision has no QR).
    """
    _check(P)
    return torch.ops.deft_kernels.orthonormalize(P)
