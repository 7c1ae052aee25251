"""prepare: from the trained P and R of any number of layers to the factors (B, A) that their forwards use.

    P --decompose--> B, K          A = injection R - removal K^T W          cast to the compute dtype

or, of a small layer on the CPU (weight form), by one operation,

    P --decompose--> B, K          W' = W + B (injection R - removal K^T W)

One autograd node for all layers; its backward runs once, after every layer's. Decompositions, projections and all
accumulation are float32 (float64 for float64 weights), whatever the compute dtype.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference

_ops = torch.ops.deft_kernels


class Spec(NamedTuple):
    """What prepare must know of one adapter on one layer, beyond its tensors."""

    method: str  # a decomposition, or "lora": B is P itself and nothing is removed
    project: bool  # factor form: make A. Otherwise hand out K and R for the activation form
    fold: bool  # whether the injection is part of A (or of h); not under dropout, which acts on it alone
    dtype: torch.dtype  # compute dtype
    whole: bool = False  # weight form: hand out W' alone. Needs `project`, `fold`, and W in the compute dtype


class Factors(NamedTuple):
    """What prepare hands out for one adapter on one layer, in the compute dtype."""

    B: Tensor | None  # (m, r); None in weight form, as the next three
    A: Tensor | None  # (r, n), factor form; lacks the injection where that is not folded
    K: Tensor | None  # (m, r), activation form, strength included; None for LoRA
    R: Tensor | None  # (r, n), scale and strength included, where the injection is not part of A
    W: Tensor | None = None  # (m, n), weight form: W'


def beside(factors: list[Factors], role: str, n: int) -> Tensor | None:
    """The B, A, K or R of several adapters on one layer side by side along r, zeros where an adapter has none; None where
    none has one. `n` is W's width."""
    parts = [getattr(f, role) for f in factors]
    if all(part is None for part in parts):
        return None
    if len(parts) == 1:
        return parts[0]
    dim = 1 if role in "BK" else 0
    zeros = [torch.zeros_like(f.B) if dim else f.B.new_zeros(f.B.shape[1], n) for f in factors]
    return torch.cat([z if part is None else part for part, z in zip(parts, zeros)], dim)


def stacked(factors: list[Factors], role: str, n: int) -> Tensor | None:
    """The B, A, K or R of several adapters on one layer in one (adapters + 1, ...) tensor, ranks padded with zeros, the last
    entry all zeros: no adapter. None where none has one."""
    parts = [getattr(f, role) for f in factors]
    if all(part is None for part in parts):
        return None
    m, r = factors[0].B.shape[0], max(f.B.shape[1] for f in factors)
    out = factors[0].B.new_zeros(len(parts) + 1, *((m, r) if role in "BK" else (r, n)))
    for i, part in enumerate(parts):
        if part is not None:
            out[i, : part.shape[0], : part.shape[1]] = part
    return out


COMBINATIONS = ("sum", "sequential", "joint")


def combined(factors: list[Factors], K: list[Tensor | None], how: str) -> list[Factors]:
    """The factors with which several adapters of one layer act together, from those with which each acts alone, where every
    A_i = s_i R_i - K_i^T W is from the pristine W. By r x r couplings, never by W again:

        sum         W' = W + sum_i B_i A_i
        sequential  W_i = W_(i-1) + B_i (s_i R_i - K_i^T W_(i-1)): each removes from what those before it injected, so that
                    B_j becomes (I - B_k K_k^T) ... (I - B_(j+1) K_(j+1)^T) B_j, and nothing else changes
        joint       PaRa: W' = W - w Q Q^T W with [B_1, B_2, ...] = Q T: B becomes Q, A becomes T^-T A. A direction that
                    several share is removed once: as T_ii = 0 tells, it has no row of A of its own.

    K: (m, r_i) with strengths folded in, None where nothing is removed. All in float32 or float64. Differentiable.
    """
    if how == "sum" or len(factors) == 1:
        return factors
    with torch.autocast(factors[0].B.device.type, enabled=False):
        if how == "sequential":
            B: list[Tensor] = []
            for f, k in zip(factors, K):
                if k is not None:
                    B = [b - f.B @ (k.mT @ b) for b in B]
                B.append(f.B)
            return [f._replace(B=b) for f, b in zip(factors, B)]
        together, ranks = torch.cat([f.B for f in factors], 1), [f.B.shape[1] for f in factors]
        (Q,) = _ops.orthonormalize([together])
        T = torch.triu(Q.mT @ together)
        own = T.diagonal().abs() > 32 * torch.finfo(T.dtype).eps  # columns have length 1
        T = T + torch.diag(torch.where(own, 0, 1 - T.diagonal()))
        parts = [list(Q.split(ranks, 1))]
        for role, left in (("A", True), ("K", False)):
            whole = [getattr(f, role) for f in factors]
            if whole[0] is not None:
                stack = torch.cat(whole, 0 if left else 1)
                stack = torch.linalg.solve_triangular(T.mT if left else T, stack, upper=not left, left=left)
                whole = list(stack.split(ranks, 0 if left else 1))
            parts.append(whole)
        return [f._replace(B=b, A=a, K=k) for f, b, a, k in zip(factors, *parts)]


def decompose(P: list[Tensor], methods: list[str]):
    """B and K (None for LoRA) of every P, all QRs in one call, and {i: (U, S, Vh)} of those taken by SVD."""
    qr = [i for i, method in enumerate(methods) if method == "qr"]
    svd = {i: torch.linalg.svd(P[i], full_matrices=False) for i, method in enumerate(methods) if method == "svd"}
    B = list(P)
    for i, Q in zip(qr, _ops.orthonormalize([P[i] for i in qr])):
        B[i] = Q
    for i, (U, _, _) in svd.items():
        B[i] = U.contiguous()
    return B, _removal_bases(B, methods), svd


def _cast(tensors: list[Tensor | None], dtypes: list[torch.dtype]) -> list[Tensor | None]:
    """Every tensor in its dtype, by one launch for all that change."""
    if all(t is None for t in tensors):
        return tensors
    out = [t if t is None or t.dtype == d else torch.empty_like(t, dtype=d) for t, d in zip(tensors, dtypes)]
    changed = [(o, t) for o, t in zip(out, tensors) if o is not t]
    if changed:
        torch._foreach_copy_([o for o, _ in changed], [t for _, t in changed])
    return out


def _removal_bases(B: list[Tensor], methods: list[str]) -> list[Tensor | None]:
    """K of every adapter, from its B."""
    return [None if m == "lora" else torch.relu(b) if m == "relu" else b for b, m in zip(B, methods)]


def _scaled(tensors: list[Tensor | None], scales: Tensor | None) -> list[Tensor | None]:
    """Each tensor times its entry of (L,); as they are where there are no scales."""
    if scales is None:
        return tensors
    return [None if t is None else t * s.to(t.dtype) for t, s in zip(tensors, scales.unbind())]


def _of(scales: Tensor, layers: list[int]) -> Tensor:
    """Some entries of (L,), without an index that would have to be copied to the device first."""
    return scales if len(layers) == len(scales) else torch.stack([scales[i] for i in layers]) if layers else scales[:0]


class Prepare(torch.autograd.Function):
    """(specs, unit, injection (L,), removal (L,), P..., R..., W...) -> B..., A..., K..., R..., W'... of the `Factors`."""

    @staticmethod
    def forward(ctx, specs, unit, injection, removal, *tensors):
        L = len(specs)
        P, R, W = tensors[:L], tensors[L : 2 * L], tensors[2 * L :]
        B, K, svd = decompose(P, [spec.method for spec in specs])

        # Which layers have an A at all: not a LoRA under dropout, whose only part is the injection.
        projected = [
            i
            for i, s in enumerate(specs)
            if s.project and not s.whole and (K[i] is not None or (s.fold and R[i] is not None))
        ]
        A_out: list[Tensor | None] = [None] * L
        if projected:
            made = _ops.project(
                [K[i] for i in projected],
                [W[i] for i in projected],
                [R[i] if specs[i].fold else None for i in projected],
                _of(injection, projected),
                _of(removal, projected),
            )
            for i, A in zip(projected, made):
                A_out[i] = A
        K_out = [None if s.project or k is None else removal[i].to(k.dtype) * k for i, (s, k) in enumerate(zip(specs, K))]
        R_out = [
            None if r is None or (s.project and s.fold) else injection[i].to(r.dtype) * r
            for i, (s, r) in enumerate(zip(specs, R))
        ]

        whole = [i for i, spec in enumerate(specs) if spec.whole]
        W_out: list[Tensor | None] = [None] * L
        if whole:
            some = ([each[i] for i in whole] for each in (W, B))
            terms = (_scaled([each[i] for i in whole], None if unit else _of(scales, whole))
                     for each, scales in ((K, removal), (R, injection)))  # fmt: skip
            for i, w in zip(whole, _ops.merge(*some, *terms)):
                W_out[i] = w

        ctx.specs, ctx.unit, ctx.projected, ctx.svd = specs, unit, projected, list(svd)
        ctx.save_for_backward(
            injection, removal, *P, *(None if s.method == "lora" else b for s, b in zip(specs, B)),
            *(r if s.whole or ctx.needs_input_grad[2] else None for s, r in zip(specs, R)),
            *(w if s.whole or A is not None else None for s, A, w in zip(specs, A_out, W)),
            *(t for usv in svd.values() for t in usv[1:]),
        )  # fmt: skip
        B = [None if s.whole else b for s, b in zip(specs, B)]
        ctx.set_materialize_grads(False)
        return (*_cast([*B, *A_out, *K_out, *R_out], [spec.dtype for spec in specs] * 4), *W_out)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        specs, L = ctx.specs, len(ctx.specs)
        ctx.pending = None
        injection, removal, *saved = ctx.saved_tensors
        P, B, R, W = (saved[i * L : (i + 1) * L] for i in range(4))
        svd = dict(zip(ctx.svd, zip(saved[4 * L :: 2], saved[4 * L + 1 :: 2])))
        wide = _cast(list(grads[: 4 * L]), [p.dtype for p in P] * 4)
        dB, dA, dK, dR = (list(wide[i * L : (i + 1) * L]) for i in range(4))

        # through W', as the activation form delivers them
        whole = [i for i, g in enumerate(grads[4 * L :]) if g is not None]
        if whole:
            bases = [P[i] if B[i] is None else B[i] for i in whole]
            K = _removal_bases(bases, [specs[i].method for i in whole])
            K_in, R_in = (_scaled(given, None if ctx.unit else _of(scales, whole))
                          for given, scales in ((K, removal), ([R[i] for i in whole], injection)))  # fmt: skip
            dW = [grads[4 * L + i].contiguous() for i in whole]
            moved = _ops.merge_backward(dW, [W[i] for i in whole], bases, K_in, R_in)
            for i, k, gB, gK, gR in zip(whole, K, *moved):
                dB[i], dK[i], dR[i] = gB, None if k is None else gK, None if R[i] is None else gR

        need_P, need_R = ctx.needs_input_grad[4 : 4 + L], ctx.needs_input_grad[4 + L : 4 + 2 * L]
        dinjection = None
        if ctx.needs_input_grad[2]:  # gates
            through = [dA[i] if s.project and s.fold and not s.whole else dR[i] for i, s in enumerate(specs)]
            zero = injection.new_zeros(())
            dots = [zero if g is None or r is None else (r * g).sum().to(zero.dtype) for g, r in zip(through, R)]
            dinjection = torch.stack(dots)

        # dK and dR as the activation form, the weight form, or an injection apart from A, delivered them
        dK, dR = (_scaled(given, None if ctx.unit else scales) for given, scales in ((dK, removal), (dR, injection)))
        # and through A: one pass over every W
        through_A = [i for i in ctx.projected if dA[i] is not None]
        if through_A:
            moved = _ops.project_backward(
                [dA[i].contiguous() for i in through_A],
                [W[i] if need_P[i] and specs[i].method != "lora" else None for i in through_A],
                _of(injection, through_A),
                _of(removal, through_A),
            )
            for i, gK, gR in zip(through_A, *moved):
                dK[i] = gK if gK.numel() else None
                dR[i] = gR if specs[i].fold else dR[i]
        dR = [g if need else None for g, need in zip(dR, need_R)]

        # dP: through the decomposition, B's and K's shares added
        relu = [i for i in range(L) if specs[i].method == "relu" and dK[i] is not None]
        if relu:
            slopes = torch._foreach_sign(torch._foreach_clamp_min([P[i] for i in relu], 0))
            for i, g in zip(relu, torch._foreach_mul([dK[i] for i in relu], slopes)):
                dK[i] = g
        dP = [(b if k is None else k) if need else None for b, k, need in zip(dB, dK, need_P)]
        both = [i for i in range(L) if need_P[i] and dB[i] is not None and dK[i] is not None]
        for i, g in zip(both, torch._foreach_add([dB[i] for i in both], [dK[i] for i in both]) if both else ()):
            dP[i] = g
        qr = [i for i in range(L) if specs[i].method == "qr" and dP[i] is not None]
        for i, g in zip(qr, _ops.orthonormalize_backward([dP[i] for i in qr], [B[i] for i in qr], [P[i] for i in qr])):
            dP[i] = g
        with torch.autocast(injection.device.type, enabled=False):  # a backward called inside autocast stays float32 here
            for i in ctx.svd:
                if dP[i] is not None:
                    dP[i] = reference.left_singular_backward(dP[i], B[i], *svd[i])
        return None, None, dinjection, None, *dP, *dR, *[None] * L


def prepare(
    specs: list[Spec], injection: Tensor, removal: Tensor, P, R, W, pending=None, unit: bool = False
) -> list[Factors]:
    """Factors of many adapters in one autograd node.

    Args:
        specs: one per adapter and layer, with L entries, as all the lists.
        injection: (L,) factor on R: strength times alpha/r times sigmoid(gate). Differentiable.
        removal: (L,) factor on K: the strength alone.
        P: (m, r) each, float32 or float64; R: (r, n) or None; W: (m, n), or None in the activation form.
        pending: anything that the node shall hold until its backward has run.
        unit: whether all of injection and removal is known to be 1, so that nothing need be multiplied by it.
    """
    L = len(specs)
    flat = Prepare.apply(tuple(specs), unit, injection, removal, *P, *R, *W)
    if pending is not None and (node := next(t for t in flat if t is not None).grad_fn) is not None:
        node.pending = pending
    return [Factors(*flat[i::L]) for i in range(L)]
