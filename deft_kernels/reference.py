"""The maths of DEFT in plain torch: one readable function each, any dtype up to float64, differentiable by autograd.

This file is the oracle of every test and the `reference` backend of every operation. Notation throughout:

    W (m, n)  frozen weight, out x in          P (m, r)  trained, becomes the bases B and K
    B (m, r)  injection basis                  R (r, n)  trained, what is injected (None: PaRa, nothing is)
    K (m, r)  removal basis (None: LoRA, nothing is removed)

    W' = W - B K^T W + s B R = W + B A,        A = s R - K^T W  (r, n)

DEFT: arXiv 2509.22793 (NeurIPS 2025), W' = (I - P P^T) W + P R.  PaRa is the case R = None, LoRA the case K = None.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

DECOMPOSITIONS = ("qr", "svd", "relu", "none")


def decompose(P: Tensor, method: str) -> tuple[Tensor, Tensor]:
    """P (m, r) -> injection basis B (m, r) and removal basis K (m, r).

    `qr`: both are Q of P = QR, so that B K^T is an orthogonal projector; `svd`: both are P's left singular vectors;
    `relu`: B = P, K = relu(P) (PEFT's default, the reference code's 'None'); `none`: B = K = P.
    """
    if method == "qr":
        (Q,) = orthonormalize([P])
        return Q, Q
    if method == "svd":
        U = torch.linalg.svd(P, full_matrices=False).U
        return U, U
    if method == "relu":
        return P, torch.relu(P)
    if method == "none":
        return P, P
    raise ValueError(f"unknown decomposition_method {method!r}: expected one of {', '.join(DECOMPOSITIONS)}")


def factors(W: Tensor, P: Tensor, R: Tensor | None, method: str = "qr", scale: float | Tensor = 1.0):
    """(B, A) with W' = W + B A.  `scale` is alpha/r, times sigmoid(gate) where there is a gate; R None is PaRa."""
    B, K = decompose(P, method)
    removal = K.mT @ W
    return B, -removal if R is None else scale * R - removal


def merged_weight(W: Tensor, P: Tensor, R: Tensor | None, method: str = "qr", scale: float | Tensor = 1.0) -> Tensor:
    """W' (m, n), the weight that a layer adapted by (P, R) acts as."""
    B, A = factors(W, P, R, method, scale)
    return W + B @ A


def activation_linear(x: Tensor, y0: Tensor, bias: Tensor | None, B: Tensor, K: Tensor | None, R: Tensor | None):
    """The activation form, which needs the base layer's output y0 (T, m) but never its weight.

    y = y0 + h B^T with h = x R^T - (y0 - b) K  (T, r), which equals x A^T because y0 - b = x W^T.
    """
    h = 0
    if R is not None:
        h = x @ R.mT
    if K is not None:
        h = h - (y0 if bias is None else y0 - bias) @ K
    return y0 + h @ B.mT


def lowrank_conv2d(x, W, bias, B, A, stride=1, padding=0, dilation=1) -> Tensor:
    """conv2d(x, W) + b + conv1x1(conv2d(x, A), B); x (N, in, H, W'), W (out, in, kh, kw), A (r, in*kh*kw)."""
    h = F.conv2d(x, A.reshape(A.shape[0], *W.shape[1:]), None, stride, padding, dilation)
    return F.conv2d(x, W, bias, stride, padding, dilation) + F.conv2d(h, B[:, :, None, None])


# Several adapters at once --------------------------------------------------------------------------------------------


def compose(pairs: list[tuple[Tensor, Tensor]], weights: list[float]) -> tuple[Tensor, Tensor]:
    """k adapters together: sum_i w_i B_i A_i as one pair of factors (m, sum r_i), (sum r_i, n)."""
    return torch.cat([B for B, _ in pairs], 1), torch.cat([w * A for (_, A), w in zip(pairs, weights)], 0)


def compose_sequential(W: Tensor, adapters: list[tuple[Tensor, Tensor | None, str, float]]) -> tuple[Tensor, Tensor]:
    """Adapters (P, R, method, scale) one after the other: each acts on the weight that the ones before have made.

    A_2 = s_2 R_2 - K_2^T (W + B_1 A_1) = s_2 R_2 - K_2^T W - (K_2^T B_1) A_1: an r x r coupling, no m x n work.
    """
    Bs, As = W.new_empty(W.shape[0], 0), W.new_empty(0, W.shape[1])
    for P, R, method, scale in adapters:
        B, K = decompose(P, method)
        A = -(K.mT @ W) - (K.mT @ Bs) @ As
        As = torch.cat([As, A if R is None else scale * R + A])
        Bs = torch.cat([Bs, B], 1)
    return Bs, As


def compose_joint(W: Tensor, Ps: list[Tensor]) -> tuple[Tensor, Tensor]:
    """PaRa adapters jointly: the union of their subspaces is removed once, Q = qr([Q_1, Q_2, ...]).

    Equal to the sequential composition only where the subspaces are orthogonal.
    """
    Q = torch.linalg.qr(torch.cat([decompose(P, "qr")[0] for P in Ps], 1)).Q
    return Q, -(Q.mT @ W)


# The four operations, over lists of layers where the operation is one -------------------------------------------------


def orthonormalize(P: list[Tensor]) -> list[Tensor]:
    """Q of the thin QR of each P (m, r), r <= m, with the column signs of `torch.linalg.qr` (Householder's)."""
    return [torch.linalg.qr(p).Q for p in P]


def orthonormalize_backward(dQ: list[Tensor], Q: list[Tensor], P: list[Tensor]) -> list[Tensor]:
    """dP of the thin QR, from Q's gradient alone: with P = Q T and X = triu(Q^T dQ),

    dP = (dQ - Q (X + X^T - diag X)) T^-T.  T = Q^T P is recomputed, so nothing but Q and P is kept.
    """
    out = []
    for dq, q, p in zip(dQ, Q, P):
        X = torch.triu(q.mT @ dq)
        inner = dq - q @ (X + torch.triu(X, 1).mT)
        out.append(torch.linalg.solve_triangular(torch.triu(q.mT @ p).mT, inner, upper=False, left=False))
    return out


def left_singular_backward(dU: Tensor, U: Tensor, S: Tensor, Vh: Tensor) -> Tensor:
    """dP of P = U S V^T from U's gradient alone (Townsend 2016, eq. 24-26): distinct singular values assumed."""
    G = U.mT @ dU
    gaps = S[None, :] ** 2 - S[:, None] ** 2
    gaps.fill_diagonal_(1)
    inner = U @ ((G - G.mT) / gaps * S) + (dU - U @ G) / S
    return inner @ Vh


def project(K, W, R, injection: Tensor, removal: Tensor) -> list[Tensor]:
    """A_i = injection_i R_i - removal_i K_i^T W_i for every layer, (r_i, n_i), in the dtype of R_i or K_i.

    K_i None leaves out the removal (LoRA), R_i None the injection (PaRa); `injection` and `removal` are (layers,).
    """
    out = []
    for k, w, r, s, t in zip(K, W, R, injection, removal):
        injected = 0 if r is None else r * s.to(r.dtype)
        # K^T laid out by rows: BLAS reads W faster beside it
        out.append(injected if k is None else injected - (k * t.to(k.dtype)).mT.contiguous() @ w.to(k.dtype))
    return out


def project_backward(dA, W, injection: Tensor, removal: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """dK_i = -removal_i W_i dA_i^T (m_i, r_i), empty where W_i is None, and dR_i = injection_i dA_i, in dA's dtype."""
    dK = [da.new_empty(0) if w is None else w.to(da.dtype) @ da.mT * -s.to(da.dtype) for da, w, s in zip(dA, W, removal)]
    return dK, [da * s.to(da.dtype) for da, s in zip(dA, injection)]


def lowrank_linear(x: Tensor, W: Tensor, bias: Tensor | None, B: Tensor, A: Tensor) -> Tensor:
    """The factor form: y = x W^T + b + (x A^T) B^T, x (..., n) -> y (..., m)."""
    return F.linear(x, W, bias) + (x @ A.mT) @ B.mT


def merge(W, B, K, R) -> list[Tensor]:
    """W'_i = W_i + B_i (R_i - K_i^T W_i) for every layer, rounded once to W_i's dtype; K_i or R_i may be None.

    Scales and strengths are folded into K and R by the caller.
    """
    out = []
    for w, b, k, r in zip(W, B, K, R):
        wide = w.to(b.dtype)
        A = (0 if r is None else r) - (0 if k is None else k.mT @ wide)
        out.append(torch.addmm(wide, b, A).to(w.dtype))
    return out


def merge_backward(dW, W, B, K, R) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """dB_i = dW'_i A_i^T (m_i, r_i), dK_i = -W_i dA_i^T (m_i, r_i) and dR_i = dA_i (r_i, n_i) of `merge`, in B's dtype, with
    A_i = R_i - K_i^T W_i and dA_i = B_i^T dW'_i; empty for a K_i or R_i that is None. dW_i is the gradient of W'_i."""
    dB, dK, dR = [], [], []
    for dw, w, b, k, r in zip(dW, W, B, K, R):
        dw, w = dw.to(b.dtype), w.to(b.dtype)
        A = (0 if r is None else r) - (0 if k is None else k.mT @ w)
        dA = b.mT @ dw
        dB.append(dw @ A.mT)
        dK.append(b.new_empty(0) if k is None else -(w @ dA.mT))
        dR.append(b.new_empty(0) if r is None else dA)
    return dB, dK, dR
