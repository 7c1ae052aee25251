"""What every kernel shares on the device: reading a layer's row of the table, and products on the matrix units.

A kernel that serves many layers gets `table` (layers, fields) of int64 and `jobs` (programs,) of int64, layer << 32 | tile.
"""

import triton
import triton.language as tl


@triton.jit
def find(table, jobs, FIELDS: tl.constexpr):
    """This program's row of the table, and its tile."""
    job = tl.load(jobs + tl.program_id(0))
    return table + (job >> 32) * FIELDS, job & 0xFFFFFFFF


@triton.jit
def pointer(row, field: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The pointer in a field; ALIGNED promises the compiler 16 bytes, so that it loads vectors."""
    address = tl.load(row + field).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        address = tl.multiple_of(address, 16)
    return address


@triton.jit
def size(row, field: tl.constexpr, MULTIPLE: tl.constexpr, ALIGNED: tl.constexpr):
    """The size or stride in a field; ALIGNED promises the compiler a MULTIPLE."""
    value = tl.load(row + field)
    if ALIGNED:
        value = tl.multiple_of(value, MULTIPLE)
    return value


@triton.jit
def columns_of(stride, offsets, ALIGNED: tl.constexpr):
    """Offsets along a matrix's second dimension; ALIGNED promises unit stride."""
    if ALIGNED:
        return offsets.to(tl.int64)
    return offsets * stride


# Products of a weight of any type with float32 --------------------------------------------------------------------------
#
# Half-precision weights go to the matrix units as they are, straight from shared memory; their float32 partner follows in
# pieces of the weight's type, each holding what the ones before have left: three make float32's accuracy, two of bfloat16
# or one of float16 TF32's. float16 has few exponents, so the partner is first brought near one
# by a power of two for each rank, which is exact.


@triton.jit
def dot_pieces(wide, narrow, total, PIECES: tl.constexpr, PRECISION: tl.constexpr):
    """total + wide (X, Y) @ narrow (Y, RANK): narrow is float32, wide of any type."""
    if wide.dtype == tl.float32:
        return tl.dot(wide, narrow, total, input_precision=PRECISION)
    rest = narrow
    for i in tl.static_range(PIECES):
        piece = rest.to(wide.dtype)
        total = tl.dot(wide, piece, total)
        if i + 1 < PIECES:
            rest -= piece.to(tl.float32)
    return total


@triton.jit
def power_of_two(peak):
    """2^e and 2^-e, exactly, such that values up to `peak` times the first are below 2^11."""
    exponent = tl.minimum(tl.maximum((peak.to(tl.int32, bitcast=True) >> 23) & 0xFF, 11), 254)
    return ((264 - exponent) << 23).to(tl.float32, bitcast=True), ((exponent - 10) << 23).to(tl.float32, bitcast=True)


@triton.jit
def column_powers(matrix, rows, r, RANK: tl.constexpr, BLOCK: tl.constexpr):
    """`power_of_two` of each column of a contiguous float32 matrix (rows, r)."""
    here, ranks = tl.arange(0, BLOCK), tl.arange(0, RANK)
    peak = tl.zeros((RANK,), tl.float32)
    for start in range(0, rows, BLOCK):
        inside = (start + here < rows)[:, None] & (ranks < r)[None, :]
        values = tl.load(matrix + (start + here)[:, None] * r + ranks[None, :], mask=inside, other=0.0)
        peak = tl.maximum(peak, tl.max(tl.abs(values), 0))
    return power_of_two(peak)


@triton.jit
def row_powers(matrix, r, columns, RANK: tl.constexpr, BLOCK: tl.constexpr):
    """`power_of_two` of each row of a contiguous float32 matrix (r, columns)."""
    here, ranks = tl.arange(0, BLOCK), tl.arange(0, RANK)
    peak = tl.zeros((RANK,), tl.float32)
    for start in range(0, columns, BLOCK):
        inside = (start + here < columns)[None, :] & (ranks < r)[:, None]
        values = tl.load(matrix + ranks[:, None] * columns + (start + here)[None, :], mask=inside, other=0.0)
        peak = tl.maximum(peak, tl.max(tl.abs(values), 1))
    return power_of_two(peak)
