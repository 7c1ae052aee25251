"""merge: W' = W + B (R - K^T W) of many layers, projected and written in one launch, out of place or in place."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import address, cannot_serve, cdiv, chip, configuration, groups, launch_layers, padded
from .project import project, project_backward, removed_strip
from .tile import columns_of, find, pointer, size

FIELDS = 13  # K, W, R, B, out, m, n, r, W's strides, out's strides, rows of a part; what is missing has address 0


@triton.jit
def merge_kernel(
    table, jobs,
    DTYPE: tl.constexpr, FIELDS: tl.constexpr, RANK: tl.constexpr, ALIGNED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PIECES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per strip of BN columns of one layer (where nothing is removed, per part of its rows). The strip is read
    from the top for A, then from the bottom for W': what was read last is still in the L2 cache."""
    row, tile = find(table, jobs, FIELDS)
    k = pointer(row, 0, tl.float32, ALIGNED)
    w = pointer(row, 1, DTYPE, ALIGNED)
    injected = pointer(row, 2, tl.float32, ALIGNED)
    b = pointer(row, 3, tl.float32, ALIGNED)
    out = pointer(row, 4, DTYPE, ALIGNED)
    m, n, r = tl.load(row + 5), size(row, 6, 16, ALIGNED), size(row, 7, 4, ALIGNED)
    stride_m, stride_n = size(row, 8, 16, ALIGNED), tl.load(row + 9)
    out_m, out_n = size(row, 10, 16, ALIGNED), tl.load(row + 11)
    part = tl.load(row + 12)

    strips = tl.cdiv(n, BN)
    columns, ranks = (tile % strips) * BN + tl.arange(0, BN), tl.arange(0, RANK)
    a = tl.zeros((BN, RANK), tl.float32)
    if tl.load(row) != 0:
        a -= removed_strip(k, w, m, n, r, stride_m, stride_n, columns,
                           DTYPE, RANK, ALIGNED, BM, BN, PIECES, PRECISION)  # fmt: skip
    if tl.load(row + 2) != 0:
        inside = (columns < n)[:, None] & (ranks < r)[None, :]
        a += tl.load(injected + ranks[None, :] * n + columns[:, None], mask=inside, other=0.0)

    first = (tile // strips) * part
    rows = first + tl.cdiv(tl.minimum(part, m - first), BM) * BM - BM + tl.arange(0, BM)
    w_tile = w + rows[:, None] * stride_m + columns_of(stride_n, columns, ALIGNED)[None, :]
    out_tile = out + rows[:, None] * out_m + columns_of(out_n, columns, ALIGNED)[None, :]
    b_tile = b + rows[:, None] * r + ranks[None, :]
    for _ in range(first, tl.minimum(first + part, m), BM):
        inside = (rows < m)[:, None] & (columns < n)[None, :]
        weight = tl.load(w_tile, mask=inside, other=0.0).to(tl.float32)
        basis = tl.load(b_tile, mask=(rows < m)[:, None] & (ranks < r)[None, :], other=0.0)
        weight = tl.dot(basis, tl.trans(a), weight, input_precision=PRECISION)
        tl.store(out_tile, weight.to(DTYPE), mask=inside)
        rows -= BM
        w_tile -= BM * stride_m
        out_tile -= BM * out_m
        b_tile -= BM * r


def cannot_merge(W, B, K, R) -> str | None:
    return cannot_merge_into(W, W, B, K, R)


def cannot_merge_into(out, W, B, K, R) -> str | None:
    for i, (o, w) in enumerate(zip(out, W)):
        if o.dtype != w.dtype:
            return f"layer {i}: a weight that is {w.dtype} is merged into one that is {o.dtype}"
    return cannot_serve({"out": out, "W": W, "B": B, "K": K, "R": R}, [b.shape[1] for b in B], float32=("B", "K", "R"))


def merge(W, B, K, R) -> list[Tensor]:
    """As `reference.merge`."""
    out = [torch.empty_like(w, memory_format=torch.contiguous_format) for w in W]
    merge_into(out, W, B, K, R)
    return out


def merge_into(out, W, B, K, R) -> None:
    """As `merge`, into given tensors, each of which may be its own W. One launch; tall layers, whose strips the L2 cache
    would not hold until they are needed again, are projected first, by a launch of their own that they share."""
    B, K, R = ([None if t is None else t.contiguous() for t in tensors] for tensors in (B, K, R))
    tall = [i for i, k in enumerate(K) if k is not None and is_tall(W[i], B[i].shape[1])]
    if tall:
        ones = torch.ones(len(tall), device=W[tall[0]].device)
        for i, A in zip(tall, project(*([tensors[i] for i in tall] for tensors in (K, W, R)), ones, ones)):
            K[i], R[i] = None, A
    for members, device, meta in groups("merge", [W, out], [b.shape[1] for b in B], B, K, R):
        rows, tiles = [], []
        for i in members:
            (m, n), strips = W[i].shape, cdiv(W[i].shape[1], meta["BN"])
            part = m if K[i] is not None else 4 * meta["BM"]
            tiles.append(strips * cdiv(m, part) if m else 0)
            pointers = (address(t[i], i) for t in (K, W, R, B, out))
            rows.append((*pointers, m, n, B[i].shape[1], *W[i].stride(), *out[i].stride(), part))
        launch_layers(merge_kernel, rows, tiles, FIELDS=FIELDS, device=device, **meta)


def cannot_merge_backward(dW, W, B, K, R) -> str | None:
    return cannot_serve({"dW": dW, "W": W, "B": B, "K": K, "R": R}, [b.shape[1] for b in B], float32=("B", "K", "R"))


def merge_backward(dW, W, B, K, R) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """As `reference.merge_backward`: by the kernels of project and its backward, with dW' in W's place too."""
    layers, removing = len(W), [i for i, k in enumerate(K) if k is not None]
    ones = torch.ones(2 * layers, device=W[0].device if W else None)
    signs = ones.clone()
    signs[:layers] = -1  # dA, or dB, is a product as it is; A, and dK, one with its sign turned
    count = layers + len(removing)
    made = project(
        [*B, *(K[i] for i in removing)],
        [*dW, *(W[i] for i in removing)],
        [*[None] * layers, *(R[i] for i in removing)],
        ones[:count],
        signs[:count],
    )
    dA, A = made[:layers], list(R)
    for i, a in zip(removing, made[layers:]):
        A[i] = a
    out, _ = project_backward([*A, *dA], [*dW, *(None if k is None else w for k, w in zip(K, W))], ones, signs)
    return out[:layers], out[layers:], [b.new_empty(0) if r is None else d for b, r, d in zip(B, R, dA)]


def is_tall(w: Tensor, rank: int) -> bool:
    """Whether the strips that all multiprocessors work on take more than half of the L2 cache."""
    processors, cache = chip(w.device)
    strip = w.shape[0] * configuration("merge", w.dtype, padded(rank), w.device)["BN"] * w.element_size()
    return strip * processors > cache // 2
