"""merge: W' = W + B (R - K^T W), projected and written in one pass, for many layers in one call."""

import torch
from torch import Tensor

from .. import reference
from ._dispatch import (
    below_autograd,
    check_layer,
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
    for i, (w, b, k, r) in enumerate(zip(W, B, K, R)):
        check_layer("merge", i, w, B=b, K=k, R=r)
        m, n = w.shape
        fits = b.dim() == 2 and b.shape[0] == m and (k is None or k.shape == b.shape)
        if not fits or (r is not None and r.shape != (b.shape[1], n)):
            raise ValueError(f"merge: factors of layer {i} do not fit its weight {tuple(w.shape)}")
        if k is None and r is None:
            raise ValueError(f"merge: layer {i} has neither K nor R")


def _check_into(out, W, B, K, R) -> None:
    _check(W, B, K, R)
    check_lists("merge_into", W=W, out=out)
    for i, (o, w) in enumerate(zip(out, W)):
        if o.shape != w.shape or o.device != w.device:
            raise ValueError(
                f"merge_into: out[{i}] is {tuple(o.shape)} on {o.device}, W[{i}] {tuple(w.shape)} on {w.device}"
            )
        if o.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"merge_into: out[{i}] requires grad: write to it under torch.no_grad()")


define("merge(Tensor[] W, Tensor[] B, Tensor?[] K, Tensor?[] R) -> Tensor[]", _check)
define("merge_into(Tensor(a!)[] out, Tensor[] W, Tensor[] B, Tensor?[] K, Tensor?[] R) -> ()", _check_into, writes=0)


@fake("merge")
def _(W, B, K, R):
    return [torch.empty_like(w, memory_format=torch.contiguous_format) for w in W]


@fake("merge_into")
def _(out, W, B, K, R):
    return None


kernel("merge", "reference")(reference.merge)


@kernel("merge_into", "reference")
def _(out, W, B, K, R):
    for i in range(len(out)):  # a layer at a time: W' exists twice for one layer only
        out[i].copy_(reference.merge(W[i : i + 1], B[i : i + 1], K[i : i + 1], R[i : i + 1])[0])


@cpp_kernel("merge", W="weights", B="float32", K="float32", R="float32")
def _(W, B, K, R):
    out = [torch.empty_like(w, memory_format=torch.contiguous_format) for w in W]
    native.merge(out, W, contiguous(B), contiguous(K), contiguous(R))
    return out


def _other_type(out, W, *_) -> str | None:
    return next(
        (
            f"out[{i}] is {o.dtype}, W[{i}] {w.dtype}: the CPU kernels take one"
            for i, (o, w) in enumerate(zip(out, W))
            if o.dtype != w.dtype
        ),
        None,
    )


@cpp_kernel("merge_into", _other_type, out="weights", W="weights", B="float32", K="float32", R="float32")
def _(out, W, B, K, R):
    native.merge(out, W, contiguous(B), contiguous(K), contiguous(R))


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


triton_kernels("merge", "merge", "merge_into")


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
        need_W, need_B, need_K, need_R = (ctx.needs_input_grad[1 + i * L : 1 + (i + 1) * L] for i in range(4))
        dW, dB, dK, dR = ([None] * L for _ in range(4))
        for i, (w, b, k, r, g) in enumerate(zip(W, B, K, R, dW1)):
            g = g.to(b.dtype)
            if k is None and r is None:
                dW[i] = g.to(w.dtype) if need_W[i] else None
                dB[i] = torch.zeros_like(b) if need_B[i] else None
                continue
            dA = b.mT @ g
            if need_B[i]:
                A = r if k is None else -(k.mT @ w.to(b.dtype)) if r is None else r - k.mT @ w.to(b.dtype)
                dB[i] = g @ A.mT
            if need_K[i]:
                dK[i] = -(w.to(b.dtype) @ dA.mT)
            dR[i] = dA if need_R[i] else None
            if need_W[i]:
                dW[i] = (g if k is None else g - k @ dA).to(w.dtype)
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
