"""merge: W' = W + B (R - K^T W), projected and written in one pass, for many layers in one call; and its backward."""

import torch
from torch import Tensor

from .. import reference
from ._dispatch import (
    below_autograd,
    check_layers,
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


def _check(W, B, K, R) -> None:
    check_lists("merge", W=W, B=B, K=K, R=R)
    check_layers("merge", W, B=B, K=K, R=R)
    for i, (w, b, k, r) in enumerate(zip(W, B, K, R)):
        shape = b.shape
        fits = len(shape) == 2 and shape[0] == w.shape[0] and (k is None or k.shape == shape)
        if not fits or (r is not None and r.shape != (shape[1], w.shape[1])):
            raise ValueError(f"merge: factors of layer {i} do not fit its weight {tuple(w.shape)}")
        if k is None and r is None:
            raise ValueError(f"merge: layer {i} has neither K nor R")


def _check_beside(operation: str, name: str, others, W) -> None:
    """That each tensor is of its W's shape, and on its device."""
    check_lists(operation, W=W, **{name: others})
    for i, (t, w) in enumerate(zip(others, W)):
        if t.shape != w.shape or t.device != w.device:
            raise ValueError(
                f"{operation}: {name}[{i}] is {tuple(t.shape)} on {t.device}, W[{i}] {tuple(w.shape)} on {w.device}"
            )


def _check_into(out, W, B, K, R) -> None:
    _check(W, B, K, R)
    _check_beside("merge_into", "out", out, W)
    for i, o in enumerate(out):
        if o.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"merge_into: out[{i}] requires grad: write to it under torch.no_grad()")


def _check_backward(dW, W, B, K, R) -> None:
    _check(W, B, K, R)
    _check_beside("merge_backward", "dW", dW, W)


define("merge(Tensor[] W, Tensor[] B, Tensor?[] K, Tensor?[] R) -> Tensor[]", _check)
define("merge_into(Tensor(a!)[] out, Tensor[] W, Tensor[] B, Tensor?[] K, Tensor?[] R) -> ()", _check_into, writes=0)
define(
    "merge_backward(Tensor[] dW, Tensor[] W, Tensor[] B, Tensor?[] K, Tensor?[] R) -> (Tensor[], Tensor[], Tensor[])",
    _check_backward,
)


@fake("merge")
def _(W, B, K, R):
    return [torch.empty_like(w, memory_format=torch.contiguous_format) for w in W]


@fake("merge_into")
def _(out, W, B, K, R):
    return None


@fake("merge_backward")
def _(dW, W, B, K, R):
    def like(given):
        return [b.new_empty(0 if t is None else t.shape) for b, t in zip(B, given)]

    return like(B), like(K), like(R)


kernel("merge", "reference")(reference.merge)
kernel("merge_backward", "reference")(reference.merge_backward)


@kernel("merge_into", "reference")
def _(out, W, B, K, R):
    for i in range(len(out)):  # a layer at a time: W' exists twice for one layer only
        out[i].copy_(reference.merge(W[i : i + 1], B[i : i + 1], K[i : i + 1], R[i : i + 1])[0])


@cpp_kernel("merge", W="weights", B="float32", K="float32", R="float32")
def _(W, B, K, R):
    out = [torch.empty_like(w, memory_format=torch.contiguous_format) for w in W]
    native.merge(out, W, contiguous(B), contiguous(K), contiguous(R))
    return out


def _other_type(name: str, others, W) -> str | None:
    return next(
        (
            f"{name}[{i}] is {o.dtype}, W[{i}] {w.dtype}: the CPU kernels take one"
            for i, (o, w) in enumerate(zip(others, W))
            if o.dtype != w.dtype
        ),
        None,
    )


@cpp_kernel(
    "merge_into", lambda out, W, *_: _other_type("out", out, W),
    out="weights", W="weights", B="float32", K="float32", R="float32",
)  # fmt: skip
def _(out, W, B, K, R):
    native.merge(out, W, contiguous(B), contiguous(K), contiguous(R))


@cpp_kernel(
    "merge_backward", lambda dW, W, *_: _other_type("dW", dW, W),
    dW="weights", W="weights", B="float32", K="float32", R="float32",
)  # fmt: skip
def _(dW, W, B, K, R):
    B, K, R = contiguous(B), contiguous(K), contiguous(R)
    dB, dK, dR = ([None if t is None else torch.empty_like(t) for t in list_] for list_ in (B, K, R))
    native.merge_backward(dB, dK, dR, dW, W, B, K, R)
    return dB, *([b.new_empty(0) if t is None else t for b, t in zip(B, list_)] for list_ in (dK, dR))


def _cannot_cuda_into(out, W, B, K, R) -> str | None:
    for i, tensors in enumerate(zip(out, W, B, K, R)):
        for name, t in zip(("out", "W", "B", "K", "R"), tensors):
            expected = torch.bfloat16 if name in ("out", "W") else torch.float32
            if t is not None and (t.dtype != expected or t.device.type != "cuda" or t.device != W[0].device):
                return f"{name}[{i}] is {t.dtype} on {t.device}; the kernel takes {expected}, on one GPU"
        for w in tensors[:2]:
            if w.stride(1) != 1 or w.stride(0) % 8 or w.shape[1] % 8 or w.data_ptr() % 16:
                return f"layer {i}: a weight that cannot be read in vectors of 16 bytes"
        if tensors[2].shape[1] > 64:
            return f"layer {i}: rank {tensors[2].shape[1]}, more than 64"
    return None


@cuda_kernel("merge", lambda W, B, K, R: _cannot_cuda_into(W, W, B, K, R))
def _(W, B, K, R):
    out = [torch.empty_like(w, memory_format=torch.contiguous_format) for w in W]
    _merge_on_cuda(out, W, B, K, R)
    return out


@cuda_kernel("merge_into", _cannot_cuda_into)
def _merge_on_cuda(out, W, B, K, R):
    if W:
        stream = torch.cuda.current_stream(W[0].device).cuda_stream
        native_cuda.merge(out, W, contiguous(B), contiguous(K), contiguous(R), stream)


triton_kernels("merge", "merge", "merge_into", "merge_backward")


class Merge(torch.autograd.Function):
    @staticmethod
    def forward(ctx, layers: int, *tensors):
        W, B, K, R = (list(tensors[i * layers : (i + 1) * layers]) for i in range(4))
        ctx.save_for_backward(*tensors)
        ctx.layers = layers
        with below_autograd():
            return tuple(torch.ops.deft_kernels.merge(W, B, K, R))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *dW1):
        L = ctx.layers
        W, B, K, R = (ctx.saved_tensors[i * L : (i + 1) * L] for i in range(4))
        g = contiguous(dW1)
        dB, dK, dR = torch.ops.deft_kernels.merge_backward(g, list(W), list(B), list(K), list(R))
        dW = [None] * L
        for i, (w, b, k) in enumerate(zip(W, B, K)):
            if ctx.needs_input_grad[1 + i]:  # dW = dW' - K dA
                dA = None if k is None else dR[i] if R[i] is not None else b.mT @ g[i].to(b.dtype)
                dW[i] = g[i] if k is None else torch.addmm(g[i].to(b.dtype), k, dA, alpha=-1).to(w.dtype)
        dK, dR = ([None if t is None else d for d, t in zip(*pair)] for pair in ((dK, K), (dR, R)))
        return None, *dW, *dB, *dK, *dR


def _differentiable(W, B, K, R):
    check_lists("merge", W=W, B=B, K=K, R=R)  # before they are one list
    return list(Merge.apply(len(W), *W, *B, *K, *R)) if W else []


differentiable("merge", _differentiable)


def merge(W, B, K, R) -> list[Tensor]:
    """W'_i = W_i + B_i (R_i - K_i^T W_i), (m_i, n_i), rounded once to W_i's dtype.

    Args:
        W: weights (m_i, n_i), any floating dtype; B, K: (m_i, r_i), R: (r_i, n_i), float32 or float64, scales folded
            in. K_i None removes nothing, R_i None injects nothing.

    Differentiable once in all four. `torch.ops.deft_kernels.merge_into` writes into given tensors, W's own allowed.
    Raises ValueError naming the layer whose shapes do not fit, whose tensors are on several devices, or whose weight is
    not of a floating type.
    """
    _check(W, B, K, R)  # here too, since tensors on the meta device do not reach the kernel
    return torch.ops.deft_kernels.merge(W, B, K, R)
