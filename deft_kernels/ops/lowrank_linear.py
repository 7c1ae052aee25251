"""lowrank_linear: y = x W^T + b + (x A^T) B^T, forward and backward, and the rule that picks its form.

Exact forms of one map (T rows of x, W (m, n), rank r), in multiply-adds of a training step beyond the frozen layer's:

    factor      h = x A^T, y = x W^T + h B^T            T r (3n + 3m)   h, dh, dB, dA, and the expansions into y and dx
    merged      W' = W + B A, y = x W'^T                T r (2n + 2m) + 2 m n r     W' made twice, no expansions
    activation  h = x R^T - (y0 - b) K, y = y0 + h B^T  needs no A, so that the forward spares K^T W (m n r); and the
                                                        backward W dA^T too, where rows are so few that y0 is kept
    weight      W' of many layers by `merge`, y = x W'^T    T m n + 3 m n r     a gradient of W', but no A, and no call for
                                                        a layer but the library's; on the CPU
"""

import functools

import torch
from torch import Tensor

from ._dispatch import cpp_kernel, define, differentiable, fake, kernel, native, triton_kernels

define(
    "lowrank_linear(Tensor x, Tensor W, Tensor? bias, Tensor B, Tensor A) -> Tensor",
    through=lambda *args: torch.ops.deft_kernels.lowrank_linear_forward(*args, _merged(*args[:2]))[0],
)
define(
    "lowrank_linear_forward(Tensor x, Tensor W, Tensor? bias, Tensor B, Tensor A, bool merged) -> (Tensor, Tensor)",
    lambda x, W, bias, B, A, merged: _check(x, W, bias, B, A),
)
define(
    "lowrank_linear_backward(Tensor dy, Tensor x, Tensor h, Tensor W, Tensor B, Tensor A, bool merged, bool[4] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    lambda dy, x, h, W, B, A, merged, needs: _check_backward(dy, x, h, W, B, A, needs),
)

# Reading and writing an element of y0 once costs about as much as this many multiply-adds of a product with a rank-r side
# (read off a CPU at r = 16; the rule is about orders of magnitude).
PASS = 8

# Elements of a weight whose gradient, for the tokens that such layers see, takes less than the calls of a layer's low-rank
# products, some 100 us of a CPU core a step. By shape alone: were it by tokens, the first forward, which does not know them,
# would round otherwise, and a resumed run with it.
SMALL = 1 << 15


def merged_is_cheaper(tokens: int, m: int, n: int, dtype: torch.dtype) -> bool:
    """Whether a step in merged form costs less than in factor form: T (n + m) >= 2 m n, whatever r is.

    Never in half precision, where rounding W' would lose an update smaller than half a unit of W.
    """
    return dtype in (torch.float32, torch.float64) and tokens * (m + n) >= 2 * m * n


def _merged(x: Tensor, W: Tensor) -> bool:
    return merged_is_cheaper(x.shape[:-1].numel(), *W.shape, x.dtype)


def activation_is_cheaper(tokens: int, m: int, n: int, r: int) -> bool:
    """Whether (y0 - b) K and a pass over y0 cost less than projecting A = s R - K^T W first: T m (r + PASS) < m n r.

    `r` counts the adapters that remove something; a LoRA has nothing to project.
    """
    return tokens * m * (r + PASS) < m * n * r


def weight_is_cheaper(m: int, n: int) -> bool:
    """Whether a layer is so small that the calls of the other forms cost more than the gradient of W'."""
    return m * n <= SMALL


@fake("lowrank_linear")
def _(x, W, bias, B, A):
    return x.new_empty(*x.shape[:-1], W.shape[0])


@fake("lowrank_linear_forward")
def _(x, W, bias, B, A, merged):
    return x.new_empty(*x.shape[:-1], W.shape[0]), x.new_empty(0 if merged else x.shape[:-1].numel(), A.shape[0])


@fake("lowrank_linear_backward")
def _(dy, x, h, W, B, A, merged, needs):
    like = (x, B, A, B[:, 0])
    return tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format) if need else t.new_empty(0)
        for t, need in zip(like, needs)
    )


@kernel("lowrank_linear_forward", "reference")
def _(x, W, bias, B, A, merged):
    """Returns y and h (T, r), or an empty h where the form makes none."""
    rows = x.reshape(-1, x.shape[-1])
    W = W.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    if merged:
        y, h = torch.nn.functional.linear(rows, torch.addmm(W, B, A), bias), x.new_empty(0, A.shape[0])
    else:
        h = rows @ A.t()
        y = torch.nn.functional.linear(rows, W, bias).addmm_(h, B.t())
    return y.view(*x.shape[:-1], W.shape[0]), h


@kernel("lowrank_linear_backward", "reference")
def _(dy, x, h, W, B, A, merged, needs):
    """dx, dB, dA, dbias; an empty tensor for each that is not needed. The thin products come first and together: they
    share dy and x, which the large product would push out of the cache."""
    dx = dB = dA = dbias = None
    g = dy.reshape(-1, dy.shape[-1])
    W = W.to(g.dtype)
    if needs[2] or (needs[0] and not merged):
        dh = g @ B
    if needs[1] or needs[2]:
        rows = x.reshape(-1, x.shape[-1])
    if needs[1]:
        dB = g.t() @ (h if h.shape[0] == rows.shape[0] else rows @ A.t())
    if needs[2]:
        dA = dh.t() @ rows
    if needs[0]:
        dx = g @ torch.addmm(W, B, A) if merged else (g @ W).addmm_(dh, A)
        dx = dx.view(*dy.shape[:-1], W.shape[1])
    if needs[3]:
        dbias = g.sum(0)
    return tuple(dy.new_empty(0) if t is None else t for t in (dx, dB, dA, dbias))


@cpp_kernel("lowrank_linear_forward", x="float32", W="", bias="", B="float32", A="float32")
def _(x, W, bias, B, A, merged):
    """h and its expansion together, some rows at a time, with the bias; the base product, by the library, onto that."""
    rows, W = rows_of(x), W.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    h = x.new_empty(0 if merged else rows.shape[0], A.shape[0])
    if merged:
        y = torch.nn.functional.linear(rows, torch.addmm(W, B, A), bias)
    else:
        y = x.new_empty(rows.shape[0], W.shape[0])
        row = None if bias is None else bias.contiguous()[None]
        native.lowrank_linear_forward(y, h, rows, row, B.contiguous(), A.contiguous())
        y.addmm_(rows, W.t())
    return y.view(*x.shape[:-1], W.shape[0]), h


@cpp_kernel("lowrank_linear_backward", dy="float32", x="float32", h="float32", W="", B="float32", A="float32")
def _(dy, x, h, W, B, A, merged, needs):
    """The four thin products together, in one pass over dy, x and dx; the large one, by the library, onto dx."""
    g, W = rows_of(dy), W.to(dy.dtype)
    dx = dy.new_empty(g.shape[0], W.shape[1]) if needs[0] and not merged else None
    dB = torch.empty_like(B, memory_format=torch.contiguous_format) if needs[1] else None
    dA = torch.empty_like(A, memory_format=torch.contiguous_format) if needs[2] else None
    rows = rows_of(x) if needs[1] or needs[2] else x
    native.lowrank_linear_backward(
        dx,
        dB,
        dA,
        g,
        rows,
        h if len(h) == len(g) else None,
        B.contiguous(),
        A.contiguous(),
    )
    if needs[0]:
        dx = g @ torch.addmm(W, B, A) if merged else dx.addmm_(g, W)
        dx = dx.view(*dy.shape[:-1], W.shape[1])
    dbias = g.sum(0) if needs[3] else None
    return tuple(dy.new_empty(0) if t is None else t for t in (dx, dB, dA, dbias))


def rows_of(x: Tensor) -> Tensor:
    """x (..., n) as a matrix (T, n) with contiguous rows."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


triton_kernels("lowrank_linear", "lowrank_linear_forward", "lowrank_linear_backward")


class LowRankLinear(torch.autograd.Function):
    """Keeps x and h (T, r), nothing of size T x m."""

    @staticmethod
    def forward(ctx, x, W, bias, B, A):
        ctx.merged = _merged(x, W)
        y, h = torch.ops.deft_kernels.lowrank_linear_forward(x, W, bias, B, A, ctx.merged)
        train = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
        ctx.save_for_backward(x if train else x.new_empty(0), h, W, B, A)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, h, W, B, A = ctx.saved_tensors
        nx, _, nb, nB, nA = ctx.needs_input_grad
        dx, dB, dA, dbias = torch.ops.deft_kernels.lowrank_linear_backward(
            dy.to(B.dtype), x, h, W, B, A, ctx.merged, [nx, nB, nA, nb]
        )
        return dx if nx else None, None, dbias if nb else None, dB if nB else None, dA if nA else None


differentiable("lowrank_linear", LowRankLinear.apply)


def _check(x: Tensor, W: Tensor, bias: Tensor | None, B: Tensor, A: Tensor) -> None:
    m, n = W.shape
    if x.shape[-1] != n or B.shape[0] != m or A.shape != (B.shape[1], n) or (bias is not None and bias.shape != (m,)):
        raise ValueError(
            f"lowrank_linear: x {tuple(x.shape)}, W {tuple(W.shape)}, B {tuple(B.shape)}, A {tuple(A.shape)}"
            f"{'' if bias is None else f', bias {tuple(bias.shape)}'} do not fit y = x W^T + b + (x A^T) B^T"
        )
    if not all(t is None or t.is_floating_point() for t in (x, W, bias)):
        types = {"x": x.dtype, "W": W.dtype} | ({} if bias is None else {"bias": bias.dtype})
        raise ValueError(f"lowrank_linear: {', '.join(f'{k} is {v}' for k, v in types.items())}; expected floating types")


def _check_backward(dy: Tensor, x: Tensor, h: Tensor, W: Tensor, B: Tensor, A: Tensor, needs) -> None:
    (m, n), r, rows = W.shape, A.shape[0], dy.shape[:-1].numel()
    kept = not (needs[1] or needs[2]) or (x.shape[-1] == n and x.shape[:-1].numel() == rows)
    if dy.shape[-1] != m or not kept or B.shape != (m, r) or A.shape[1] != n or h.shape not in ((rows, r), (0, r)):
        shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in zip("dy x h W B A".split(), (dy, x, h, W, B, A)))
        raise ValueError(f"lowrank_linear_backward: {shapes} do not fit one another")


def _frozen(W: Tensor) -> None:
    if W.requires_grad:
        raise ValueError("lowrank_linear: W requires grad, but the factor form treats the base weight as frozen")


def lowrank_linear(x: Tensor, W: Tensor, bias: Tensor | None, B: Tensor, A: Tensor) -> Tensor:
    """y = x W^T + b + (x A^T) B^T.

    Args:
        x: (..., n), float; B: (m, r) and A: (r, n) in x's dtype.
        W: (m, n) frozen, cast to x's dtype where it differs; bias: (m,) or None.

    Returns y (..., m) in x's dtype. Differentiable once in x, bias, B and A.
    Raises ValueError for shapes that do not fit, types that are not floating, or a W that requires grad.
    """
    _check(x, W, bias, B, A)
    _frozen(W)
    return LowRankLinear.apply(x, W, bias, B, A)


def _without_autocast(function):
    """The caller has chosen dtypes; matmuls in here must not be recast (operations have this from `_dispatch`)."""

    @functools.wraps(function)
    def wrapped(ctx, *args):
        with torch.autocast(next(a for a in args if isinstance(a, Tensor)).device.type, enabled=False):
            return function(ctx, *args)

    return wrapped


class SharedLowRankLinear(torch.autograd.Function):
    """Several layers on one x: their A stacked, so that x is read once for all h, once for all dA, and dx is written once
    for all expansions. Keeps x and h (T, sum r)."""

    @staticmethod
    @_without_autocast
    def forward(ctx, layers: int, x, *tensors):
        W, bias, B, A = (tensors[i * layers : (i + 1) * layers] for i in range(4))
        rows, D = x.reshape(-1, x.shape[-1]), torch.cat(A)
        h = rows @ D.t()
        y = [torch.nn.functional.linear(rows, w.to(x.dtype), None if b is None else b.to(x.dtype)) for w, b in zip(W, bias)]
        for out, part, b in zip(y, h.split([a.shape[0] for a in A], 1), B):
            out.addmm_(part, b.t())
        ctx.layers, ctx.bias_types = layers, [None if b is None else b.dtype for b in bias]
        ctx.save_for_backward(x, h, D, *W, *B)
        return tuple(out.view(*x.shape[:-1], out.shape[1]) for out in y)

    @staticmethod
    @torch.autograd.function.once_differentiable
    @_without_autocast
    def backward(ctx, *dy):
        x, h, D, *rest = ctx.saved_tensors
        W, B = rest[: ctx.layers], rest[ctx.layers :]
        rows, ranks = x.reshape(-1, x.shape[-1]), [b.shape[1] for b in B]
        g = [d.reshape(-1, d.shape[-1]).to(x.dtype) for d in dy]
        dh = torch.cat([d @ b for d, b in zip(g, B)], 1)
        dB = [d.t() @ part for d, part in zip(g, h.split(ranks, 1))]
        dA = (dh.t() @ rows).split(ranks)
        dx = None
        if ctx.needs_input_grad[1]:
            dx = g[0] @ W[0].to(x.dtype)
            for d, w in zip(g[1:], W[1:]):
                dx.addmm_(d, w.to(x.dtype))
            dx = dx.addmm_(dh, D).view(x.shape)
        dbias = [None if t is None else d.sum(0, dtype=t) for d, t in zip(g, ctx.bias_types)]
        return None, dx, *[None] * ctx.layers, *dbias, *dB, *(a.contiguous() for a in dA)


def lowrank_linear_shared(x: Tensor, W: list[Tensor], bias: list[Tensor | None], B: list[Tensor], A: list[Tensor]):
    """y_i = x W_i^T + b_i + (x A_i^T) B_i^T of several layers that read the same x, as an attention's Q, K and V do.

    Arguments and errors as `lowrank_linear`, in lists with one entry per layer; ranks and m_i may differ. Returns a tuple of
    y_i (..., m_i). Against a call for each layer this saves, of L layers, L - 1 passes over x in the forward, and L - 1
    over x and L - 1 over dx in the backward. It is made of library products on every backend.
    """
    for w, b, B_i, A_i in zip(W, bias, B, A, strict=True):
        _check(x, w, b, B_i, A_i)
        _frozen(w)
    if not W:
        raise ValueError("lowrank_linear_shared: no layers")
    return SharedLowRankLinear.apply(len(W), x, *W, *bias, *B, *A)
