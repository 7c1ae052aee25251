"""lowrank_linear: y = x W^T + b + (x A^T) B^T and its backward, split at the bottleneck of rank r.

Forward and dx are one map, out = left M + (left D) E with a bottleneck H = left D:

    y  = x  W^T + (x  A^T) B^T      left = x,  M = W^T, D = A^T, E = B^T, H = h
    dx = dy W   + (dy B)   A        left = dy, M = W,   D = B,   E = A,   H = dh

and so is what is left of the backward, a pair of thin products over the rows: dB = dy^T h, dA^T = x^T dh. The ways to make
them are listed here; which one serves a shape is read from a table (`launch.choice`), which `benchmarks/tune.py` measures:

    chain    library products: H = left D, out = left M, out += H E
    expand   the large product by the library; H and its expansion by one kernel, which reads left once and out once
    fused    one kernel, in which each tile of left is multiplied by M's and by D's tile while it is on chip
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .launch import INTERPRETED, cannot_serve, cdiv, chip, choice, configuration, in_vectors, launch, padded, precision

GROUP = 8  # rows of tiles that programs walk through column by column, so that left and M stay in the L2 cache


@triton.jit
def expand_kernel(
    left, d, e, out, h, rows, width, columns, r, left_row, left_column, d_row, d_rank, e_rank, e_column, out_row,
    RANK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """H = left D and out += H E for BM rows: left (rows, width), D (width, r), E (r, columns)."""
    here = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    ranks, k, c = tl.arange(0, RANK), tl.arange(0, BK), tl.arange(0, BN)
    left_tile = left + here[:, None] * left_row + k[None, :] * left_column
    d_tile = d + k[:, None] * d_row + ranks[None, :] * d_rank
    total = tl.zeros((BM, RANK), tl.float32)
    for start in range(0, width, BK):
        inside = start + k < width
        tile = tl.load(left_tile, mask=(here < rows)[:, None] & inside[None, :], other=0.0)
        basis = tl.load(d_tile, mask=inside[:, None] & (ranks < r)[None, :], other=0.0)
        total = tl.dot(tile, basis, total, input_precision=PRECISION)
        left_tile += BK * left_column
        d_tile += BK * d_row
    bottleneck = total.to(out.dtype.element_ty)
    tl.store(h + here[:, None] * r + ranks[None, :], bottleneck, mask=(here < rows)[:, None] & (ranks < r)[None, :])

    out_tile = out + here[:, None] * out_row + c[None, :]
    e_tile = e + ranks[:, None] * e_rank + c[None, :] * e_column
    for start in range(0, columns, BN):
        inside = (here < rows)[:, None] & (start + c < columns)[None, :]
        basis = tl.load(e_tile, mask=(ranks < r)[:, None] & (start + c < columns)[None, :], other=0.0)
        tile = tl.load(out_tile, mask=inside, other=0.0).to(tl.float32)
        tile = tl.dot(bottleneck, basis, tile, input_precision=PRECISION)
        tl.store(out_tile, tile.to(out.dtype.element_ty), mask=inside)
        out_tile += BN
        e_tile += BN * e_column


@triton.jit
def fused_kernel(
    left, matrix, bias, d, e, out, h, rows, width, columns, r,
    left_row, left_column, m_row, m_column, d_row, d_rank, e_rank, e_column,
    DESCRIPTORS: tl.constexpr, M_BY_COLUMN: tl.constexpr, RANK: tl.constexpr, GROUP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out = left M + bias + (left D) E and H = left D, persistent over the tiles of out: left (rows, width), M (width,
    columns), D (width, r), E (r, columns). With DESCRIPTORS left and M are tensor descriptors; M's then holds M^T where
    M_BY_COLUMN."""
    DTYPE: tl.constexpr = out.dtype.element_ty
    down, across = tl.cdiv(rows, BM), tl.cdiv(columns, BN)
    ranks, k = tl.arange(0, RANK), tl.arange(0, BK)
    for tile in range(tl.program_id(0), down * across, tl.num_programs(0)):
        band = tile // (GROUP * across)
        tall = tl.minimum(down - band * GROUP, GROUP)
        first_row = (band * GROUP + (tile % (GROUP * across)) % tall) * BM
        first_column = ((tile % (GROUP * across)) // tall) * BN
        here = (first_row + tl.arange(0, BM)).to(tl.int64)
        c = (first_column + tl.arange(0, BN)).to(tl.int64)

        d_tile = d + k[:, None] * d_row + ranks[None, :] * d_rank
        total, bottleneck = tl.zeros((BM, BN), tl.float32), tl.zeros((BM, RANK), tl.float32)
        if not DESCRIPTORS:
            left_tile = left + here[:, None] * left_row + k[None, :] * left_column
            m_tile = matrix + k.to(tl.int64)[:, None] * m_row + c[None, :] * m_column
        for start in range(0, width, BK):
            inside = start + k < width
            if DESCRIPTORS:
                x = left.load([first_row, start])
                if M_BY_COLUMN:
                    w = tl.trans(matrix.load([first_column, start]))
                else:
                    w = matrix.load([start, first_column])
            else:
                x = tl.load(left_tile, mask=(here < rows)[:, None] & inside[None, :], other=0.0)
                w = tl.load(m_tile, mask=inside[:, None] & (c < columns)[None, :], other=0.0)
                left_tile += BK * left_column
                m_tile += BK * m_row
            basis = tl.load(d_tile, mask=inside[:, None] & (ranks < r)[None, :], other=0.0)
            d_tile += BK * d_row
            total = tl.dot(x, w, total, input_precision=PRECISION)
            bottleneck = tl.dot(x, basis, bottleneck, input_precision=PRECISION)

        narrow = bottleneck.to(DTYPE)
        if first_column == 0:
            tl.store(h + here[:, None] * r + ranks[None, :], narrow, mask=(here < rows)[:, None] & (ranks < r)[None, :])
        basis = tl.load(
            e + ranks[:, None] * e_rank + c[None, :] * e_column,
            mask=(ranks < r)[:, None] & (c < columns)[None, :],
            other=0.0,
        )
        total = tl.dot(narrow, basis, total, input_precision=PRECISION)
        if bias is not None:
            total += tl.load(bias + c, mask=c < columns, other=0.0).to(tl.float32)[None, :]
        tl.store(
            out + here[:, None] * columns + c[None, :], total.to(DTYPE), mask=(here < rows)[:, None] & (c < columns)[None, :]
        )


@triton.jit
def thin_product(wide, thin, first, start, stop, columns, r, wide_row, wide_column,
                 RANK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """wide^T thin over rows start..stop, for BN columns of wide: (BN, RANK)."""
    c, ranks = first + tl.arange(0, BN), tl.arange(0, RANK)
    here = (start + tl.arange(0, BM)).to(tl.int64)
    w_tile = wide + here[:, None] * wide_row + c.to(tl.int64)[None, :] * wide_column
    t_tile = thin + here[:, None] * r + ranks[None, :]
    HALF: tl.constexpr = wide.dtype.element_ty != tl.float32
    total = tl.zeros((BN, RANK), tl.float32) if HALF else tl.zeros((RANK, BN), tl.float32)
    for _ in range(start, stop, BM):
        inside = (here < stop)[:, None]
        tile = tl.load(w_tile, mask=inside & (c < columns)[None, :], other=0.0)
        narrow = tl.load(t_tile, mask=inside & (ranks < r)[None, :], other=0.0)
        if HALF:
            total = tl.dot(tl.trans(tile), narrow, total)
        else:  # as in project.py: the matrix units take float32 from shared memory in one order only
            total = tl.dot(tl.trans(narrow), tile, total, input_precision=PRECISION)
        here += BM
        w_tile += BM * wide_row
        t_tile += BM * r
    return total if HALF else tl.trans(total)


@triton.jit
def thin_kernel(
    dy, h, x, dh, partial, rows, m, n, r, dy_row, dy_column, x_row, x_column, m_tiles, part,
    RANK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dB = dy^T h and dA^T = x^T dh over a part of the rows: partial (parts, m + n, RANK), dB's rows first. Programs with a
    tile below m_tiles make dB, the others dA."""
    tile, start = tl.program_id(0), tl.program_id(1) * part
    stop = tl.minimum(start + part, rows)
    if tile < m_tiles:
        total = thin_product(dy, h, tile * BN, start, stop, m, r, dy_row, dy_column, RANK, BM, BN, PRECISION)
        c = tile * BN + tl.arange(0, BN)
        inside, first = c < m, 0
    else:
        total = thin_product(x, dh, (tile - m_tiles) * BN, start, stop, n, r, x_row, x_column, RANK, BM, BN, PRECISION)
        c = (tile - m_tiles) * BN + tl.arange(0, BN)
        inside, first = c < n, m
    here = (tl.program_id(1) * (m + n) + first + c).to(tl.int64)[:, None] * RANK + tl.arange(0, RANK)[None, :]
    tl.store(partial + here, total, mask=inside[:, None])


@triton.jit
def thin_sum_kernel(partial, db, da, parts, m, n, r, RANK: tl.constexpr, BN: tl.constexpr):
    """dB (m, r) and dA (r, n) from the sums over the parts, always in the same order."""
    c, ranks = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, RANK)
    total = tl.zeros((BN, RANK), tl.float32)
    tile = partial + c[:, None] * RANK + ranks[None, :]
    for _ in range(parts):
        total += tl.load(tile, mask=(c < m + n)[:, None], other=0.0)
        tile += (m + n) * RANK
    within = (ranks < r)[None, :]
    tl.store(db + c[:, None] * r + ranks[None, :], total.to(db.dtype.element_ty), mask=(c < m)[:, None] & within)
    c -= m
    tl.store(
        da + ranks[None, :] * n + c[:, None], total.to(da.dtype.element_ty), mask=((c >= 0) & (c < n))[:, None] & within
    )


def cannot_lowrank_linear_forward(x, W, bias, B, A, merged) -> str | None:
    return _cannot({"x": x, "B": B, "A": A}, {"W": W, "bias": bias}, A.shape[0])


def cannot_lowrank_linear_backward(dy, x, h, W, B, A, merged, needs) -> str | None:
    return _cannot({"dy": dy, "x": x, "h": h, "B": B, "A": A}, {"W": W}, A.shape[0])


def _cannot(tensors: dict[str, Tensor], cast: dict[str, Tensor | None], rank: int) -> str | None:
    if len({t.dtype for t in tensors.values()}) > 1:
        return ", ".join(f"{name} is {t.dtype}" for name, t in tensors.items()) + ": expected one type"
    reason = cannot_serve({name: [t] for name, t in (tensors | cast).items()}, [rank])
    return reason and reason.removeprefix("layer 0: ")


def lowrank_linear_forward(x, W, bias, B, A, merged: bool) -> tuple[Tensor, Tensor]:
    """y (..., m) and h (T, r), which is empty in the merged form: that is two library products."""
    rows, W, bias = x.reshape(-1, x.shape[-1]), W.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if merged:
        y, h = torch.nn.functional.linear(rows, torch.addmm(W, B, A), bias), x.new_empty(0, A.shape[0])
    else:
        y, h = product(rows, W.t(), bias, A.t(), B.t())
    return y.view(*x.shape[:-1], W.shape[0]), h


def lowrank_linear_backward(dy, x, h, W, B, A, merged: bool, needs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dB, dA, dbias; an empty tensor for each that is not needed."""
    dx = dB = dA = dbias = None
    g, W = dy.reshape(-1, dy.shape[-1]), W.to(dy.dtype)
    if needs[0] and not merged:
        dx, dh = product(g, W, None, B, A)
    elif needs[2]:
        dh = g @ B
    if needs[0] and merged:
        dx = g @ torch.addmm(W, B, A)
    if needs[1] or needs[2]:
        rows = x.reshape(-1, x.shape[-1])
    if needs[1] and h.shape[0] != g.shape[0]:
        h = rows @ A.t()
    if needs[1] and needs[2]:
        dB, dA = thin_products(g, h, rows, dh)
    elif needs[1]:
        dB = g.t() @ h
    elif needs[2]:
        dA = dh.t() @ rows
    if needs[3]:
        dbias = g.sum(0)
    dx = None if dx is None else dx.view(*dy.shape[:-1], W.shape[1])
    return tuple(dy.new_empty(0) if t is None else t for t in (dx, dB, dA, dbias))


def product(left: Tensor, M: Tensor, bias: Tensor | None, D: Tensor, E: Tensor) -> tuple[Tensor, Tensor]:
    """out = left M + bias + H E, (rows, columns), and H = left D, (rows, r)."""
    (rows, width), columns, r = left.shape, M.shape[1], D.shape[1]
    form = choice("product", left.dtype, (rows, width, columns, r), left.device)
    if form == "chain" or 0 in (rows, width, columns):
        H = left @ D
        out = left @ M if bias is None else torch.addmm(bias, left, M)
        return out.addmm_(H, E), H
    if left.stride(1) >= 1 << 24:  # kernels step over blocks of columns by 32-bit products
        left = left.contiguous()
    H = left.new_empty(rows, r)
    rank, device = padded(r), left.device
    strides = (*D.stride(), *E.stride())
    by_column = M.stride(0) == 1
    vectors = in_vectors(left) and (form == "expand" or in_vectors(M.t() if by_column else M))
    config = configuration(f"lowrank_linear {form}", left.dtype, rank, device, vectors)
    meta = {"RANK": rank, "PRECISION": precision(), **config}
    if form == "expand":
        out = left @ M if bias is None else torch.addmm(bias, left, M)
        launch(expand_kernel, cdiv(rows, meta["BM"]), left, D, E, out, H, rows, width, columns, r,
               *left.stride(), *strides, out.stride(0), device=device, **meta)  # fmt: skip
        return out, H
    out = left.new_empty(rows, columns)
    tiles = cdiv(rows, meta["BM"]) * cdiv(columns, meta["BN"])
    operands, descriptors = (left, M), can_describe(left) and can_describe(M.t() if by_column else M)
    if descriptors:
        block = [meta["BN"], meta["BK"]] if by_column else [meta["BK"], meta["BN"]]
        operands = (
            TensorDescriptor.from_tensor(left, [meta["BM"], meta["BK"]]),
            TensorDescriptor.from_tensor(M.t() if by_column else M, block),
        )
    launch(fused_kernel, min(tiles, chip(device)[0]), *operands[:2], bias, D, E, out, H, rows, width, columns, r,
           *left.stride(), *M.stride(), *strides, DESCRIPTORS=descriptors, M_BY_COLUMN=by_column, GROUP=GROUP,
           device=device, **meta)  # fmt: skip
    return out, H


def can_describe(matrix: Tensor) -> bool:
    """Whether a matrix can be read through a tensor descriptor: on a device that has them, its rows in 16-byte steps."""
    step = matrix.stride(0) * matrix.element_size() % 16 == 0 and matrix.data_ptr() % 16 == 0
    apart = matrix.stride(1) == 1 and matrix.stride(0) >= matrix.shape[1]
    return has_descriptors(matrix.device) and apart and step


@functools.lru_cache
def has_descriptors(device: torch.device) -> bool:
    return INTERPRETED or (torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0))


def thin_products(dy: Tensor, h: Tensor, x: Tensor, dh: Tensor) -> tuple[Tensor, Tensor]:
    """dB = dy^T h (m, r) and dA = dh^T x (r, n)."""
    (rows, m), n, r = dy.shape, x.shape[1], h.shape[1]
    if choice("thin", dy.dtype, (rows, m, n, r), dy.device) == "chain" or 0 in (rows, m, n):
        return dy.t() @ h, dh.t() @ x
    rank, device = padded(r), dy.device
    config = configuration("lowrank_linear thin", dy.dtype, rank, device, in_vectors(dy) and in_vectors(x))
    meta = {"RANK": rank, "PRECISION": precision(), **config}
    m_tiles, n_tiles = cdiv(m, meta["BN"]), cdiv(n, meta["BN"])
    # as many parts as fill the multiprocessors twice, of no fewer than 4 blocks of rows
    part = max(cdiv(rows * (m_tiles + n_tiles), 2 * chip(device)[0]), 4 * meta["BM"])
    part = cdiv(part, meta["BM"]) * meta["BM"]
    parts = cdiv(rows, part)
    partial = torch.empty(parts, m + n, rank, dtype=torch.float32, device=device)
    launch(thin_kernel, (m_tiles + n_tiles, parts), dy, h.contiguous(), x, dh.contiguous(), partial, rows, m, n, r,
           *dy.stride(), *x.stride(), m_tiles, part, device=device, **meta)  # fmt: skip
    dB, dA = dy.new_empty(m, r), dy.new_empty(r, n)
    launch(thin_sum_kernel, cdiv(m + n, 64), partial, dB, dA, parts, m, n, r, RANK=rank, BN=64, device=device)
    return dB, dA
