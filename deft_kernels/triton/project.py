"""project: A = injection R - removal K^T W of many layers in one launch that reads every W once; and its backward."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import address, cannot_serve, cdiv, groups, launch_layers
from .tile import column_powers, columns_of, dot_pieces, find, pointer, row_powers, size

FIELDS = 11  # K, W, R, A (backward: dA, W, dR, dK), m, n, r, W's strides, layer, tiles; what is missing has address 0


@triton.jit
def removed_strip(
    k, w, m, n, r, stride_m, stride_n, columns,
    DTYPE: tl.constexpr, RANK: tl.constexpr, ALIGNED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PIECES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """W^T K of a strip of columns, (BN, RANK): the strip's rows go through the chip once, a block of BM at a time."""
    rows = tl.arange(0, BM)
    ranks = tl.arange(0, RANK)
    w_tile = w + rows[:, None] * stride_m + columns_of(stride_n, columns, ALIGNED)[None, :]
    k_tile = k + rows[:, None] * r + ranks[None, :]
    if tl.float16 == DTYPE:
        up, down = column_powers(k, m, r, RANK, BM)
    if tl.float32 == DTYPE:  # the matrix units take float32 from shared memory in one order only: W stays on the right
        total = tl.zeros((RANK, BN), tl.float32)
    else:
        total = tl.zeros((BN, RANK), tl.float32)
    for start in range(0, m, BM):
        inside = (start + rows < m)[:, None]
        weight = tl.load(w_tile, mask=inside & (columns < n)[None, :], other=0.0)
        basis = tl.load(k_tile, mask=inside & (ranks < r)[None, :], other=0.0)
        if tl.float16 == DTYPE:
            basis *= up[None, :]
        if tl.float32 == DTYPE:
            total = tl.dot(tl.trans(basis), weight, total, input_precision=PRECISION)
        else:
            total = dot_pieces(tl.trans(weight), basis, total, PIECES, PRECISION)
        w_tile += BM * stride_m
        k_tile += BM * r
    if tl.float32 == DTYPE:
        total = tl.trans(total)
    if tl.float16 == DTYPE:
        total *= down[None, :]
    return total


@triton.jit
def project_kernel(
    table, jobs, injection, removal,
    DTYPE: tl.constexpr, FIELDS: tl.constexpr, RANK: tl.constexpr, ALIGNED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PIECES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per strip of BN columns of one layer."""
    row, tile = find(table, jobs, FIELDS)
    k = pointer(row, 0, tl.float32, ALIGNED)
    w = pointer(row, 1, DTYPE, ALIGNED)
    injected = pointer(row, 2, tl.float32, ALIGNED)
    out = pointer(row, 3, tl.float32, ALIGNED)
    m, n, r = tl.load(row + 4), size(row, 5, 16, ALIGNED), size(row, 6, 4, ALIGNED)
    stride_m, stride_n = size(row, 7, 16, ALIGNED), tl.load(row + 8)

    columns, ranks = tile * BN + tl.arange(0, BN), tl.arange(0, RANK)
    a = tl.zeros((BN, RANK), tl.float32)
    if tl.load(row) != 0:
        a = removed_strip(k, w, m, n, r, stride_m, stride_n, columns,
                          DTYPE, RANK, ALIGNED, BM, BN, PIECES, PRECISION)  # fmt: skip
        a *= -tl.load(removal + tl.load(row + 9))
    inside = (columns < n)[:, None] & (ranks < r)[None, :]
    here = ranks[None, :] * n + columns[:, None]
    if tl.load(row + 2) != 0:
        a += tl.load(injection + tl.load(row + 9)) * tl.load(injected + here, mask=inside, other=0.0)
    tl.store(out + here, a, mask=inside)


def cannot_project(K, W, R, injection, removal) -> str | None:
    scales = {"injection": [injection], "removal": [removal]}
    return cannot_serve({"K": K, "W": W, "R": R} | scales, _ranks(K, R), float32=("K", "R"))


def _ranks(K, R) -> list[int]:
    return [k.shape[1] if r is None else r.shape[0] for k, r in zip(K, R)]


def project(K, W, R, injection: Tensor, removal: Tensor) -> list[Tensor]:
    """As `reference.project`: one launch for the layers whose W can be read in vectors, one for the others."""
    ranks = _ranks(K, R)
    A = [torch.empty(r, w.shape[1], dtype=torch.float32, device=w.device) for r, w in zip(ranks, W)]
    K = [None if k is None else k.contiguous() for k in K]
    R = [None if r is None else r.contiguous() for r in R]
    for members, device, meta in groups("project", [W], ranks, K, R, A):
        launch_layers(
            project_kernel,
            [(*(address(t[i], i) for t in (K, W, R, A)), *W[i].shape, ranks[i], *W[i].stride(), i, 0) for i in members],
            [cdiv(W[i].shape[1], meta["BN"]) for i in members],
            injection.contiguous(), removal.contiguous(), FIELDS=FIELDS, device=device, **meta,
        )  # fmt: skip
    return A


@triton.jit
def project_backward_kernel(
    table, jobs, injection, removal,
    DTYPE: tl.constexpr, FIELDS: tl.constexpr, RANK: tl.constexpr, ALIGNED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PIECES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per BM rows of one layer: their dK = -removal W dA^T, and a share of dR = injection dA."""
    row, tile = find(table, jobs, FIELDS)
    da = pointer(row, 0, tl.float32, ALIGNED)
    w = pointer(row, 1, DTYPE, ALIGNED)
    dr = pointer(row, 2, tl.float32, ALIGNED)
    dk = pointer(row, 3, tl.float32, ALIGNED)
    m, n, r = tl.load(row + 4), size(row, 5, 16, ALIGNED), size(row, 6, 4, ALIGNED)
    stride_m, stride_n = size(row, 7, 16, ALIGNED), tl.load(row + 8)
    tiles = tl.load(row + 10)

    columns, ranks = tl.arange(0, BN), tl.arange(0, RANK)
    if m > 0:
        rows = tile * BM + tl.arange(0, BM)
        w_tile = w + rows[:, None] * stride_m + columns_of(stride_n, columns, ALIGNED)[None, :]
        da_tile = da + ranks[:, None] * n + columns[None, :]
        if tl.float16 == DTYPE:
            up, down = row_powers(da, r, n, RANK, BN)
        total = tl.zeros((BM, RANK), tl.float32)
        for start in range(0, n, BN):
            inside = (start + columns < n)[None, :]
            weight = tl.load(w_tile, mask=inside & (rows < m)[:, None], other=0.0)
            gradient = tl.load(da_tile, mask=inside & (ranks < r)[:, None], other=0.0)
            if tl.float16 == DTYPE:
                gradient *= up[:, None]
            total = dot_pieces(weight, tl.trans(gradient), total, PIECES, PRECISION)
            w_tile += BN if ALIGNED else BN * stride_n
            da_tile += BN
        if tl.float16 == DTYPE:
            total *= down[None, :]
        inside = (rows < m)[:, None] & (ranks < r)[None, :]
        tl.store(dk + rows[:, None] * r + ranks[None, :], total * -tl.load(removal + tl.load(row + 9)), mask=inside)

    scale = tl.load(injection + tl.load(row + 9))
    for start in range(tile * BN, n, tiles * BN):
        inside = (start + columns < n)[None, :] & (ranks < r)[:, None]
        here = ranks[:, None] * n + (start + columns)[None, :]
        tl.store(dr + here, scale * tl.load(da + here, mask=inside, other=0.0), mask=inside)


def cannot_project_backward(dA, W, injection, removal) -> str | None:
    scales = {"injection": [injection], "removal": [removal]}
    return cannot_serve({"dA": dA, "W": W} | scales, [da.shape[0] for da in dA], float32=("dA",))


def project_backward(dA, W, injection: Tensor, removal: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """As `reference.project_backward`, dK and dR by one launch."""
    dA = [da.contiguous() for da in dA]
    dK = [da.new_empty(0) if w is None else da.new_empty(w.shape[0], da.shape[0]) for da, w in zip(dA, W)]
    dR = [torch.empty_like(da) for da in dA]
    ranks = [da.shape[0] for da in dA]
    for members, device, meta in groups("project_backward", [W], ranks, dA, dK, dR):
        rows, tiles = [], []
        for i in members:
            (r, n), (m, stride) = dA[i].shape, (0, (0, 0)) if W[i] is None else (W[i].shape[0], W[i].stride())
            tiles.append(cdiv(m, meta["BM"]) or cdiv(n, meta["BN"]))
            rows.append((*(address(t[i], i) for t in (dA, W, dR, dK)), m, n, r, *stride, i, tiles[-1]))
        launch_layers(
            project_backward_kernel,
            rows,
            tiles,
            injection.contiguous(),
            removal.contiguous(),
            FIELDS=FIELDS,
            device=device,
            **meta,
        )
    return dK, dR
