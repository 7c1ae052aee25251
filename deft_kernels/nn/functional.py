"""Functions: DEFT on plain tensors, and the autograd nodes of the modules that are no operation of their own."""

import torch
from torch import Tensor

from .. import reference
from ..ops.lowrank_linear import lowrank_linear, merged_is_cheaper
from .prepare import Spec, prepare


def _factors(weight: Tensor, P: Tensor, R: Tensor | None, method: str, scale: float, dtype: torch.dtype):
    m, n = weight.shape
    if method not in reference.DECOMPOSITIONS:
        raise ValueError(f"unknown decomposition_method {method!r}: expected one of {', '.join(reference.DECOMPOSITIONS)}")
    if P.dim() != 2 or P.shape[0] != m or P.shape[1] > m or (R is not None and R.shape != (P.shape[1], n)):
        raise ValueError(
            f"P {tuple(P.shape)} and R {None if R is None else tuple(R.shape)} do not fit a weight of "
            f"{tuple(weight.shape)}: expected P (m, r) with r <= m and R (r, n)"
        )
    if weight.requires_grad:
        raise ValueError("weight requires grad, but DEFT treats the base weight as frozen: pass weight.detach()")
    if not weight.is_floating_point():
        raise ValueError(f"weight is {weight.dtype}, expected a floating dtype")
    wide = torch.promote_types(weight.dtype, torch.float32)
    P, R = P.to(wide), None if R is None else R.to(wide)
    scales = torch.tensor([scale, 1.0], dtype=wide).to(weight.device)
    (factors,) = prepare([Spec(method, True, True, dtype)], scales[:1], scales[1:], [P], [R], [weight])
    return factors


def deft_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    P: Tensor,
    R: Tensor | None,
    *,
    decomposition_method: str = "qr",
    scale: float = 1.0,
) -> Tensor:
    """y = x W'^T + b with W' = (I - B K^T) W + scale B R: a DEFT-adapted linear layer as a function.

    Args:
        x: (..., n) in the compute dtype.
        weight: (m, n), frozen; bias: (m,) or None.
        P: (m, r), r <= m; R: (r, n), or None for PaRa. Used in float32 (float64 where `weight` is).
        decomposition_method: how P becomes B and K: "qr", "svd", "relu" or "none".
        scale: factor on the injection, alpha/r.

    Returns y (..., m) in x's dtype, differentiable once in x, bias, P and R. It keeps x and x A^T (T, r) for that.
    Raises ValueError for shapes that do not fit, an unknown decomposition, or a weight that requires grad.
    Source: arXiv 2509.22793, W = (I - P P^T) W0 + P R.
    """
    factors = _factors(weight, P, R, decomposition_method, scale, x.dtype)
    return lowrank_linear(x, weight, bias, factors.B, factors.A)


def deft_weight(
    weight: Tensor, P: Tensor, R: Tensor | None, *, decomposition_method: str = "qr", scale: float = 1.0
) -> Tensor:
    """W' = (I - B K^T) W + scale B R, (m, n) in `weight`'s dtype, projected and written in one pass.

    Arguments and errors as `deft_linear`. Differentiable once in P and R.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    factors = _factors(weight, P, R, decomposition_method, scale, wide)
    return torch.ops.deft_kernels.merge([weight], [factors.B], [None], [factors.A])[0]


class ActivationLinear(torch.autograd.Function):
    """y = y0 + h B^T with h = x R^T - (y0 - b) K, for a base layer known by its output y0 alone.

    Keeps x and h (T, r). K's gradient is -(y0 - b)^T dh = -W (dh^T x)^T. Where rows are few, y0 - b is kept for it; where
    they are not, the r rows of dh^T x pass through the base layer, which (and hooks on it) is called once more for that.
    """

    @staticmethod
    def forward(ctx, base, x, y0, bias, B, K, R):
        rows, plain = x.reshape(-1, x.shape[-1]), y0.reshape(-1, y0.shape[-1])
        h, kept = None if R is None else rows @ R.t(), None
        if K is not None and few_rows(*rows.shape):
            kept = plain if bias is None else plain - bias.to(K.dtype)
            h = -(kept @ K) if h is None else torch.addmm(h, kept, K, alpha=-1)  # in place, autocast would not cast
        elif K is not None:
            h = -(plain @ K) if h is None else h - plain @ K
            if bias is not None:
                h = h + bias.to(K.dtype) @ K
        device = x.device.type
        ctx.base, ctx.autocast = base, (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        ctx.save_for_backward(x, h, kept if ctx.needs_input_grad[5] else None, bias, B, K, R)
        return torch.addmm(plain, h, B.t()).view(y0.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, h, kept, bias, B, K, R = ctx.saved_tensors
        _, nx, ny, nb, nB, nK, nR = ctx.needs_input_grad
        rows, g = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1]).to(B.dtype)
        dx = dy0 = db = dB = dK = dR = None
        dh = g @ B
        if nB:
            dB = g.t() @ h
        if nR or (nK and kept is None):
            dR = dh.t() @ rows
        if kept is not None:
            dK = (kept.t() @ dh).neg_()
        elif nK:
            # as rows of size one: a gradient is small beside the bias that is added to it and taken off again, and may be
            # too small for a layer that computes in float16
            size = dR.abs().amax(1, keepdim=True).clamp_min(torch.finfo(dR.dtype).tiny)
            with torch.autocast(*ctx.autocast):
                out = ctx.base(dR / size)
            dK = ((out if bias is None else out - bias.to(out.dtype)).to(K.dtype) * -size).t()
        if nx:
            dx = (dh @ R).view(x.shape) if R is not None else None
        if ny:
            dy0 = dy if K is None else torch.addmm(g, dh, K.t(), alpha=-1).view(dy.shape)
        if nb and K is not None:
            db = K @ dh.sum(0)
        return None, dx, dy0, db, dB, dK, dR if nR else None


def few_rows(rows: int, n: int) -> bool:
    """Whether an output of so many rows has at most a quarter of the elements of W (m, n): it is kept then, for rows m r
    multiply-adds in place of m n r."""
    return 4 * rows <= n


class LowRankConv2d(torch.autograd.Function):
    """conv(x, W) + b + conv1x1(conv(x, A), B); keeps x and, in factor form, h = conv(x, A) (N, r, H, W')."""

    @staticmethod
    def _merged(x, W, B, A) -> bool:
        return merged_is_cheaper(x.shape[0] * x.shape[2] * x.shape[3], W.shape[0], A.shape[1], x.dtype)

    @staticmethod
    def _weight(W, B, A):
        return torch.addmm(W.reshape(W.shape[0], -1), B, A).view(W.shape)

    @staticmethod
    def forward(ctx, x, W, bias, B, A, geometry):
        wide, b = W.to(x.dtype), None if bias is None else bias.to(x.dtype)
        conv = torch.nn.functional.conv2d
        if LowRankConv2d._merged(x, W, B, A):
            y, h = conv(x, LowRankConv2d._weight(wide, B, A), b, *geometry), None
        else:
            h = conv(x, A.view(-1, *W.shape[1:]), None, *geometry)
            y = conv(x, wide, b, *geometry) + conv(h, B[:, :, None, None])
        ctx.save_for_backward(x, h, W, B, A)
        ctx.geometry = geometry
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, h, W, B, A = ctx.saved_tensors
        nx, _, nb, nB, nA, _ = ctx.needs_input_grad
        stride, padding, dilation = (list(v) for v in ctx.geometry)
        dy = dy.to(x.dtype)
        thin = A.view(-1, *W.shape[1:])
        merged = LowRankConv2d._merged(x, W, B, A)

        def backward(grad, weight, dx: bool, dweight: bool):
            return torch.ops.aten.convolution_backward(
                grad, x, weight, None, stride, padding, dilation, False, [0, 0], 1, [dx, dweight, False]
            )[:2]

        dx = dB = dA = None
        if nA or (nx and not merged):
            dh = torch.nn.functional.conv2d(dy, B.t()[:, :, None, None])
            dx, dA = backward(dh, thin, nx and not merged, nA)
        if nx:
            wide = W.to(x.dtype)
            if merged:
                dx, _ = backward(dy, LowRankConv2d._weight(wide, B, A), True, False)
            else:
                dx = dx + backward(dy, wide, True, False)[0]
        if nB:
            h = torch.nn.functional.conv2d(x, thin, None, *ctx.geometry) if h is None else h
            dB = dy.transpose(0, 1).flatten(1) @ h.transpose(0, 1).flatten(1).t()
        return dx, None, dy.sum((0, 2, 3)) if nb else None, dB, dA.flatten(1) if nA else None, None
