"""orthonormalize: Q of the thin QR of every layer's P in one launch, column signs as `torch.linalg.qr`; and its backward.

A program takes a layer, in panels of at most 32 columns, and passes over them in blocks of rows:

    Cholesky-QR2   twice for each panel V: take from it what lies along the panels before, then with V^T V = L L^T make it
                   V L^-T. Everything large is a product on the matrix units.
    Householder    where a Gram matrix says that digits would be lost (P is nearly, or not at all, of full rank), and where
                   a column has nothing below its diagonal, which Householder does not reflect. About 2r passes.

Columns are first brought to a largest entry of one, which leaves Q as it is. The rule for the signs: Ballard, Demmel,
Grigori, Jacquelin, Knight, Nguyen, "Reconstructing Householder vectors from tall-skinny QR" (2015).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import address, cannot_serve, configuration, launch_layers, padded, precision
from .tile import find, pointer, size

FIELDS = 6  # P, Q, m, r; backward: P, Q, m, r, dQ, dP

# The square of what is left of a unit column beside those before it, below which round-off has too large a share in it.
SMALLEST_PIVOT = tl.constexpr(1e-5)
# How far from the identity Q1's Gram matrix may be for the second round to bring it there.
LARGEST_DEFECT = tl.constexpr(0.05)
# A pivot entry of Q this near one leaves nothing for the rows below it.
WHOLE = tl.constexpr(1 - 1e-6)
NOTHING = tl.constexpr(1e-15)


@triton.jit
def inverse_cholesky(G, RANK: tl.constexpr):
    """X = L^-1 of G = L L^T, by elimination, and the smallest pivot; rows and columns that hold only a diagonal stay."""
    i = tl.arange(0, RANK)
    X = (i[:, None] == i[None, :]).to(tl.float32)
    smallest = float("inf")
    for j in range(RANK):
        column = tl.sum(tl.where(i[None, :] == j, G, 0.0), 1)
        pivot = tl.sum(tl.where(i == j, column, 0.0), 0)
        smallest = tl.minimum(smallest, tl.where(pivot == pivot, pivot, -1.0))  # NaN is no pivot
        inverse = tl.where(pivot > 0, 1 / tl.sqrt(tl.where(pivot > 0, pivot, 1.0)), 0.0)
        x = tl.sum(tl.where(i[:, None] == j, X, 0.0), 0) * inverse  # row j, final
        l = tl.where(i > j, column * inverse, 0.0)
        X = tl.where(i[:, None] == j, x[None, :], X - l[:, None] * x[None, :])
        G -= l[:, None] * l[None, :]
    return X, smallest


@triton.jit
def householder_signs(Y, r, RANK: tl.constexpr):
    """The sign that Householder gives each column of a Q with positive R, from its top block Y (r, r); and the largest
    pivot, by modulus."""
    i = tl.arange(0, RANK)
    signs = tl.full((RANK,), 1.0, tl.float32)
    largest = 0.0
    for j in range(r):
        row = tl.sum(tl.where(i[:, None] == j, Y, 0.0), 0)
        column = tl.sum(tl.where(i[None, :] == j, Y, 0.0), 1)
        pivot = tl.sum(tl.where(i == j, row, 0.0), 0)
        sign = tl.where(pivot >= 0, -1.0, 1.0)
        largest = tl.maximum(largest, tl.abs(pivot))
        signs = tl.where(i == j, sign, signs)
        below = tl.where(i > j, column / (pivot - sign), 0.0)
        Y -= below[:, None] * tl.where(i > j, row, 0.0)[None, :]
    return signs, largest


@triton.jit
def load_rows(matrix, start, first, m, r, WIDTH: tl.constexpr, BM: tl.constexpr):
    """BM rows and WIDTH columns of a contiguous (m, r) matrix, zeros beyond it."""
    rows, columns = start + tl.arange(0, BM), first + tl.arange(0, WIDTH)
    inside = (rows < m)[:, None] & (columns < r)[None, :]
    return tl.load(matrix + rows[:, None] * r + columns[None, :], mask=inside, other=0.0)


@triton.jit
def store_rows(matrix, values, start, first, m, r, WIDTH: tl.constexpr, BM: tl.constexpr):
    rows, columns = start + tl.arange(0, BM), first + tl.arange(0, WIDTH)
    inside = (rows < m)[:, None] & (columns < r)[None, :]
    tl.store(matrix + rows[:, None] * r + columns[None, :], values, mask=inside)


@triton.jit
def top_block(q, m, r, RANK: tl.constexpr):
    """Q's first RANK rows; one at a time where the addresses of all would take too many registers."""
    if RANK <= 64:
        return load_rows(q, 0, 0, m, r, RANK, RANK)
    i = tl.arange(0, RANK)
    block = tl.zeros((RANK, RANK), tl.float32)
    for j in range(RANK):
        row = tl.load(q + j * r + i, mask=(i < r) & (j < m), other=0.0)
        block = tl.where(i[:, None] == j, row[None, :], block)
    return block


@triton.jit
def inner(a, i, b, j, m, r, PANEL: tl.constexpr, BM: tl.constexpr, PRECISION: tl.constexpr):
    """A_i^T B_j of two panels, named by their first columns: (PANEL, PANEL)."""
    total = tl.zeros((PANEL, PANEL), tl.float32)
    for start in range(0, m, BM):
        left = tl.trans(load_rows(a, start, i, m, r, PANEL, BM))
        total = tl.dot(left, load_rows(b, start, j, m, r, PANEL, BM), total, input_precision=PRECISION)
    return total


@triton.jit
def subtract(out, j, a, i, S, m, r, PANEL: tl.constexpr, BM: tl.constexpr, PRECISION: tl.constexpr):
    """out_j -= A_i S."""
    for start in range(0, m, BM):
        update = tl.dot(load_rows(a, start, i, m, r, PANEL, BM), S, input_precision=PRECISION)
        store_rows(out, load_rows(out, start, j, m, r, PANEL, BM) - update, start, j, m, r, PANEL, BM)
    tl.debug_barrier()


@triton.jit
def multiply(out, j, S, m, r, PANEL: tl.constexpr, BM: tl.constexpr, PRECISION: tl.constexpr):
    """out_j = out_j S."""
    for start in range(0, m, BM):
        block = tl.dot(load_rows(out, start, j, m, r, PANEL, BM), S, input_precision=PRECISION)
        store_rows(out, block, start, j, m, r, PANEL, BM)
    tl.debug_barrier()


@triton.jit
def orthonormalize_kernel(
    table, jobs, FIELDS: tl.constexpr, RANK: tl.constexpr, ALIGNED: tl.constexpr,
    PANEL: tl.constexpr, BM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per layer."""
    row, _tile = find(table, jobs, FIELDS)
    p, q = pointer(row, 0, tl.float32, ALIGNED), pointer(row, 1, tl.float32, ALIGNED)
    m, r = tl.load(row + 2).to(tl.int32), size(row, 3, 4, ALIGNED).to(tl.int32)  # P has far less than 2^31 elements

    i = tl.arange(0, PANEL)
    diagonal = i[:, None] == i[None, :]
    well = 1  # whether the Gram matrices have been good so far
    for j in range(0, r, PANEL):
        unit_columns(p, q, j, m, r, PANEL, BM)
        for once_more in range(2):
            for before in range(0, j, PANEL):
                along = inner(q, before, q, j, m, r, PANEL, BM, PRECISION)
                subtract(q, j, q, before, along, m, r, PANEL, BM, PRECISION)
            G = inner(q, j, q, j, m, r, PANEL, BM, PRECISION)
            G = tl.where(diagonal & (j + i >= r)[None, :], 1.0, G)
            defect = tl.max(tl.max(tl.abs(G - diagonal.to(tl.float32)), 1), 0)
            X, pivot = inverse_cholesky(G, PANEL)
            well &= ((pivot > SMALLEST_PIVOT) & ((defect < LARGEST_DEFECT) | (once_more == 0))).to(tl.int32)
            multiply(q, j, tl.trans(X), m, r, PANEL, BM, PRECISION)

    signs, whole = householder_signs(top_block(q, m, r, RANK), r, RANK)
    if (well == 1) & (whole < WHOLE):
        tl.debug_barrier()
        for start in range(0, m, BM):
            store_rows(q, load_rows(q, start, 0, m, r, RANK, BM) * signs[None, :], start, 0, m, r, RANK, BM)
    else:
        householder(p, q, m, r, RANK, BM)


@triton.jit
def peaks(p, first, m, r, WIDTH: tl.constexpr, BM: tl.constexpr):
    """The largest entry of each column by modulus, or 1 for a column of zeros."""
    peak = tl.zeros((WIDTH,), tl.float32)
    for start in range(0, m, BM):
        peak = tl.maximum(peak, tl.max(tl.abs(load_rows(p, start, first, m, r, WIDTH, BM)), 0))
    return tl.where(peak == 0, 1.0, peak)


@triton.jit
def unit_columns(p, q, j, m, r, PANEL: tl.constexpr, BM: tl.constexpr):
    """Panel j of P into Q's memory, with columns of unit length."""
    peak = peaks(p, j, m, r, PANEL, BM)
    squares = tl.zeros((PANEL,), tl.float32)
    for start in range(0, m, BM):
        block = load_rows(p, start, j, m, r, PANEL, BM) / peak[None, :]
        squares += tl.sum(block * block, 0)
    norms = tl.sqrt(tl.where(squares > 0, squares, 1.0))
    for start in range(0, m, BM):
        block = load_rows(p, start, j, m, r, PANEL, BM) / peak[None, :]
        store_rows(q, block / norms[None, :], start, j, m, r, PANEL, BM)
    tl.debug_barrier()


@triton.jit
def householder(p, q, m, r, RANK: tl.constexpr, BM: tl.constexpr):
    """LAPACK's geqr2 and org2r, in Q's memory: reflectors below the diagonal, then Q in their place. Each step reads what
    the one before has written, in this program alone, so barriers order them."""
    i = tl.arange(0, RANK)
    rows = tl.arange(0, BM)
    peak = peaks(p, 0, m, r, RANK, BM)
    tl.debug_barrier()
    for start in range(0, m, BM):
        store_rows(q, load_rows(p, start, 0, m, r, RANK, BM) / peak[None, :], start, 0, m, r, RANK, BM)
    tl.debug_barrier()

    taus = tl.zeros((RANK,), tl.float32)
    for j in range(r):
        # below the diagonal: its largest entry, and the products of column j with all columns
        largest = 0.0
        products = tl.zeros((RANK,), tl.float32)
        for start in range(0, m, BM):
            block = tl.where((start + rows > j)[:, None], load_rows(q, start, 0, m, r, RANK, BM), 0.0)
            column = tl.sum(tl.where(i[None, :] == j, block, 0.0), 1)
            largest = tl.maximum(largest, tl.max(tl.abs(column), 0))
            products += tl.sum(column[:, None] * block, 0)
        top = tl.load(q + j * r + i, mask=i < r, other=0.0)
        alpha = tl.sum(tl.where(i == j, top, 0.0), 0)
        norm = tl.sqrt(alpha * alpha + tl.sum(tl.where(i == j, products, 0.0), 0))
        beta = tl.where(alpha >= 0, -norm, norm)
        # Nothing below the diagonal: no reflection. A column's peak is 1, so that what has come to less than NOTHING is
        # round-off of round-off; its squares have no digits left, and a reflection by them would not be orthogonal.
        nothing = (largest == 0) | (norm < NOTHING)
        tau = tl.where(nothing, 0.0, (beta - alpha) / tl.where(nothing, 1.0, beta))
        shrink = 1 / tl.where(nothing, 1.0, alpha - beta)
        taus = tl.where(i == j, tau, taus)
        through = tl.where(i > j, tau * (top + products * shrink), 0.0)  # tau v^T A
        tl.debug_barrier()
        for start in range(0, m, BM):
            block = load_rows(q, start, 0, m, r, RANK, BM)
            here = start + rows
            v = tl.sum(tl.where(i[None, :] == j, block, 0.0), 1) * shrink
            v = tl.where(here > j, v, (here == j).to(tl.float32))
            block = tl.where((i[None, :] == j) & (here > j)[:, None], v[:, None], block - v[:, None] * through[None, :])
            store_rows(q, block, start, 0, m, r, RANK, BM)
        tl.debug_barrier()

    for back in range(r):
        j = r - 1 - back
        tau = tl.sum(tl.where(i == j, taus, 0.0), 0)
        products = tl.zeros((RANK,), tl.float32)  # v^T of the columns of Q made so far, below the diagonal
        for start in range(0, m, BM):
            block = tl.where((start + rows > j)[:, None], load_rows(q, start, 0, m, r, RANK, BM), 0.0)
            column = tl.sum(tl.where(i[None, :] == j, block, 0.0), 1)
            products += tl.sum(column[:, None] * block, 0)
        # and H_j leaves in row j what it takes from below: the row itself, which still holds R, counts as zero
        through = tl.where(i > j, tau * products, tl.where(i == j, tau, 0.0))
        tl.debug_barrier()
        for start in range(0, m, BM):
            block = load_rows(q, start, 0, m, r, RANK, BM)
            here = start + rows
            v = tl.sum(tl.where(i[None, :] == j, block, 0.0), 1)
            v = tl.where(here > j, v, (here == j).to(tl.float32))
            made = tl.where((i > j)[None, :] & (here > j)[:, None], block, 0.0)
            made += ((i[None, :] == j) & (here == j)[:, None]).to(tl.float32)
            later = (i < j)[None, :] | (here < j)[:, None]
            block = tl.where(later, block, made - v[:, None] * through[None, :])
            store_rows(q, block, start, 0, m, r, RANK, BM)
        tl.debug_barrier()


@triton.jit
def inverse_triangular(T, RANK: tl.constexpr):
    """T^-1 of an upper triangular T, a column of ones left of the diagonal at a time."""
    i = tl.arange(0, RANK)
    X = (i[:, None] == i[None, :]).to(tl.float32)
    for back in range(RANK):
        j = RANK - 1 - back
        column = tl.sum(tl.where(i[None, :] == j, T, 0.0), 1)
        pivot = tl.sum(tl.where(i == j, column, 0.0), 0)
        x = tl.sum(tl.where(i[:, None] == j, X, 0.0), 0) / pivot
        above = tl.where(i < j, column, 0.0)
        X = tl.where(i[:, None] == j, x[None, :], X - above[:, None] * x[None, :])
    return X


@triton.jit
def upper(matrix, PANEL: tl.constexpr):
    i = tl.arange(0, PANEL)
    return tl.where(i[:, None] <= i[None, :], matrix, 0.0)


@triton.jit
def orthonormalize_backward_kernel(
    table, jobs, FIELDS: tl.constexpr, RANK: tl.constexpr, ALIGNED: tl.constexpr,
    PANEL: tl.constexpr, BM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per layer: with P = Q T and X = triu(Q^T dQ), dP T^T = dQ - Q (X + X^T - diag X), which is solved from
    the last panel to the first. Blocks of X and T are made where they are needed."""
    row, _tile = find(table, jobs, FIELDS)
    p, q = pointer(row, 0, tl.float32, ALIGNED), pointer(row, 1, tl.float32, ALIGNED)
    m, r = tl.load(row + 2).to(tl.int32), size(row, 3, 4, ALIGNED).to(tl.int32)  # P has far less than 2^31 elements
    dq, dp = pointer(row, 4, tl.float32, ALIGNED), pointer(row, 5, tl.float32, ALIGNED)
    i = tl.arange(0, PANEL)

    panels = tl.cdiv(r, PANEL)
    for back in range(panels):
        j = (panels - 1 - back) * PANEL
        X = upper(inner(q, j, dq, j, m, r, PANEL, BM, PRECISION), PANEL)
        X += tl.trans(X) - tl.where(i[:, None] == i[None, :], X, 0.0)
        for start in range(0, m, BM):
            update = tl.dot(load_rows(q, start, j, m, r, PANEL, BM), X, input_precision=PRECISION)
            store_rows(dp, load_rows(dq, start, j, m, r, PANEL, BM) - update, start, j, m, r, PANEL, BM)
        tl.debug_barrier()
        for before in range(0, j, PANEL):
            X = inner(q, before, dq, j, m, r, PANEL, BM, PRECISION)
            subtract(dp, j, q, before, X, m, r, PANEL, BM, PRECISION)
        for after in range(j + PANEL, r, PANEL):
            X = tl.trans(inner(q, j, dq, after, m, r, PANEL, BM, PRECISION))
            subtract(dp, j, q, after, X, m, r, PANEL, BM, PRECISION)
            T = tl.trans(inner(q, j, p, after, m, r, PANEL, BM, PRECISION))
            subtract(dp, j, dp, after, T, m, r, PANEL, BM, PRECISION)
        T = upper(inner(q, j, p, j, m, r, PANEL, BM, PRECISION), PANEL)
        T = tl.where((i[:, None] == i[None, :]) & (j + i >= r)[None, :], 1.0, T)
        multiply(dp, j, tl.trans(inverse_triangular(T, PANEL)), m, r, PANEL, BM, PRECISION)


def cannot_orthonormalize(P) -> str | None:
    return cannot_serve({"P": P}, [p.shape[1] for p in P], float32=("P",))


def cannot_orthonormalize_backward(dQ, Q, P) -> str | None:
    return cannot_serve({"dQ": dQ, "Q": Q, "P": P}, [p.shape[1] for p in P], float32=("dQ", "Q", "P"))


def orthonormalize(P) -> list[Tensor]:
    """As `reference.orthonormalize`."""
    P = [p.contiguous() for p in P]
    Q = [torch.empty_like(p) for p in P]
    _launch("orthonormalize", orthonormalize_kernel, P, Q)
    return Q


def orthonormalize_backward(dQ, Q, P) -> list[Tensor]:
    """As `reference.orthonormalize_backward`."""
    dQ, Q, P = ([t.contiguous() for t in tensors] for tensors in (dQ, Q, P))
    dP = [torch.empty_like(p) for p in P]
    _launch("orthonormalize_backward", orthonormalize_backward_kernel, P, Q, dQ, dP)
    return dP


def _launch(name: str, kernel, P, Q, *others) -> None:
    """All layers by one launch; tall ones start first, since each program takes as long as its layer is tall."""
    if not P:
        return
    device, rank = P[0].device, padded(max(p.shape[1] for p in P))
    tensors = (P, Q, *others)
    rows = [(address(P[i], i), address(Q[i], i), *P[i].shape, *(address(t[i], i) for t in others), *(0, 0)[len(others):])
            for i in sorted(range(len(P)), key=lambda i: -P[i].shape[0])]  # fmt: skip
    vectors = all(t.data_ptr() % 16 == 0 and t.shape[1] % 4 == 0 for list_ in tensors for t in list_)
    launch_layers(kernel, rows, [1] * len(P), device=device, FIELDS=FIELDS, RANK=rank, ALIGNED=vectors,
                  PRECISION=precision(exact=True), **configuration(name, torch.float32, rank, device, vectors))  # fmt: skip
