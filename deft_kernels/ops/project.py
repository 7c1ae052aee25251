"""project: the decomposed low-rank projection A = injection R - removal K^T W of many layers in one call."""

import torch
from torch import Tensor

from .. import reference
from ._dispatch import (
    below_autograd,
    check_layers,
    check_lists,
    contiguous,
    cpp_kernel,
    define,
    differentiable,
    fake,
    kernel,
    native,
    triton_kernels,
)


def _check(K, W, R, injection, removal) -> None:
    check_lists("project", W=W, K=K, R=R)
    check_layers("project", W, K=K, R=R)
    for i, (k, w, r) in enumerate(zip(K, W, R)):
        if k is None and r is None:
            raise ValueError(f"project: layer {i} has neither K nor R")
        if k is not None and (k.dim() != 2 or k.shape[0] != w.shape[0]):
            raise ValueError(f"project: K[{i}] {tuple(k.shape)} does not fit W[{i}] {tuple(w.shape)}")
        if r is not None and (r.dim() != 2 or r.shape[1] != w.shape[1] or (k is not None and r.shape[0] != k.shape[1])):
            raise ValueError(f"project: R[{i}] {tuple(r.shape)} does not fit W[{i}] {tuple(w.shape)}")
    _check_scales("project", W, injection, removal)


def _check_backward(dA, W, injection, removal) -> None:
    check_lists("project_backward", dA=dA, W=W)
    check_layers("project_backward", W, dA=dA)
    for i, (da, w) in enumerate(zip(dA, W)):
        if da.dim() != 2 or (w is not None and da.shape[1] != w.shape[1]):
            raise ValueError(
                f"project_backward: dA[{i}] {tuple(da.shape)} does not fit W[{i}] {None if w is None else tuple(w.shape)}"
            )
    _check_scales("project_backward", dA, injection, removal)


def _check_scales(operation: str, layers: list[Tensor], injection: Tensor, removal: Tensor) -> None:
    for name, scales in (("injection", injection), ("removal", removal)):
        if scales.shape != (len(layers),) or (layers and scales.device != layers[0].device):
            raise ValueError(
                f"{operation}: {name} is {tuple(scales.shape)} on {scales.device}, expected one entry for each of "
                f"{len(layers)} layers, on their device"
            )


define("project(Tensor?[] K, Tensor[] W, Tensor?[] R, Tensor injection, Tensor removal) -> Tensor[]", _check)
define(
    "project_backward(Tensor[] dA, Tensor?[] W, Tensor injection, Tensor removal) -> (Tensor[], Tensor[])", _check_backward
)


@fake("project")
def _(K, W, R, injection, removal):
    return [torch.empty_like(r) if r is not None else k.new_empty(k.shape[1], w.shape[1]) for k, w, r in zip(K, W, R)]


@fake("project_backward")
def _(dA, W, injection, removal):
    dK = [da.new_empty(0) if w is None else da.new_empty(w.shape[0], da.shape[0]) for da, w in zip(dA, W)]
    return dK, [torch.empty_like(da, memory_format=torch.contiguous_format) for da in dA]


kernel("project", "reference")(reference.project)
kernel("project_backward", "reference")(reference.project_backward)


@cpp_kernel("project", K="float32", W="weights", R="float32", injection="float32", removal="float32")
def _(K, W, R, injection, removal):
    A = [w.new_empty(k.shape[1] if r is None else r.shape[0], w.shape[1], dtype=torch.float32) for k, w, r in zip(K, W, R)]
    native.project(A, contiguous(K), W, contiguous(R), injection.contiguous(), removal.contiguous())
    return A


@cpp_kernel("project_backward", dA="float32", W="weights", injection="float32", removal="float32")
def _(dA, W, injection, removal):
    dA = contiguous(dA)
    dK = [None if w is None else da.new_empty(w.shape[0], da.shape[0]) for da, w in zip(dA, W)]
    dR = [torch.empty_like(da) for da in dA]
    native.project_backward(dK, dR, dA, W, injection.contiguous(), removal.contiguous())
    return [da.new_empty(0) if k is None else k for k, da in zip(dK, dA)], dR


triton_kernels("project", "project", "project_backward")


class Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx, layers: int, injection, removal, *tensors):
        K, W, R = tensors[:layers], tensors[layers : 2 * layers], tensors[2 * layers :]
        ctx.save_for_backward(injection, removal, *W, *R)
        ctx.has_K = [k is not None for k in K]
        with below_autograd():
            return tuple(torch.ops.deft_kernels.project(list(K), list(W), list(R), injection, removal))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *dA: Tensor):
        layers = len(dA)
        injection, removal, *rest = ctx.saved_tensors
        W, R = rest[:layers], rest[layers:]
        removed = [w if has else None for w, has in zip(W, ctx.has_K)]
        dK, dR = torch.ops.deft_kernels.project_backward(list(dA), removed, injection, removal)
        dinjection = None
        if ctx.needs_input_grad[1]:
            dots = [injection.new_zeros(()) if r is None else (r * dA[i]).sum() for i, r in enumerate(R)]
            dinjection = torch.stack(dots).to(injection.dtype)
        dK = [g if has else None for g, has in zip(dK, ctx.has_K)]
        return None, dinjection, None, *dK, *[None] * layers, *(None if r is None else g for r, g in zip(R, dR))


def _differentiable(K, W, R, *scales):
    check_lists("project", W=W, K=K, R=R)  # before they are one list
    return list(Project.apply(len(W), *scales, *K, *W, *R)) if W else []


differentiable("project", _differentiable)


def project(K, W, R, injection: Tensor, removal: Tensor) -> list[Tensor]:
    """A_i = injection_i R_i - removal_i K_i^T W_i, (r_i, n_i), for every layer.

    Args:
        K: removal bases (m_i, r_i) in float32 (or float64), or None for a layer from which nothing is removed.
        W: frozen weights (m_i, n_i), any floating dtype, any strides.
        R: injections (r_i, n_i) in K's dtype, or None for a layer into which nothing is injected.
        injection, removal: one factor per layer, shape (layers,), on the layers' device.

    Differentiable once in K, R and injection. Raises ValueError naming the layer whose shapes do
    not fit, whose tensors are on several devices, or whose weight is not of a floating type or requires grad.
    """
    _check(K, W, R, injection, removal)
    for i, w in enumerate(W):
        if w.requires_grad:
            raise ValueError(f"project: W[{i}] requires grad, but the projection treats the base weight as frozen")
    return torch.ops.deft_kernels.project(K, W, R, injection, removal)
