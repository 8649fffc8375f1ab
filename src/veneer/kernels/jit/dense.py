"""Device code of dense changes of the base's weight. See kernels/dense.py for the formula and the launcher."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from veneer.kernels.jit.low_rank import ENTRY, load_tile
from veneer.kernels.tables import DENSE_OFFSET

DENSE_COLUMN = tl.constexpr(DENSE_OFFSET)


@triton.jit
def load_offset(entries, slot, slot_stride, site, COLUMN: tl.constexpr):
    """An offset of an adapter at a site; -1 where it has no such tensor, and for the base."""
    entry = entries + slot.to(tl.int64) * slot_stride + site * ENTRY
    return tl.load(entry + COLUMN, mask=slot >= 0, other=-1)


@triton.jit
def multiply_rows(
    weight,
    x,
    row,
    live,
    inside,
    features,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """[BLOCK_N, BLOCK_M] in float32: the products of rows of a matrix, at `weight` [BLOCK_N, 1], and rows of x.

    Both have `features` columns; matrix rows that are not `inside`, and rows of x that are not `live`, are 0.
    """
    total = tl.full((BLOCK_N, BLOCK_M), 0.0, tl.float32)
    for start in tl.range(0, features, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        w = tl.load(weight + k[None, :], mask=inside[:, None] & (k < features)[None, :], other=0.0)
        part = tl.load(
            x + row[None, :] * features + k[:, None],
            mask=live[None, :] & (k < features)[:, None],
            other=0.0,
        )
        total = tl.dot(w, part, total, input_precision="ieee")
    return total


@triton.jit
def add_block(y, total, row, live, n, inside, y_stride):
    """y[row, n] += total, [columns, rows] in float32, where `live` and `inside`; rounded once."""
    place = y + row[None, :] * y_stride + n[:, None]
    mask = live[None, :] & inside[:, None]
    before = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    tl.store(place, (before + total).to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["site", "capacity"], do_not_specialize_on_alignment=["tiles", "used"])
def add_dense(
    x,  # [rows, in_features]
    y,  # [rows, out_features], rows y_stride apart
    arena,
    entries,  # int64 [slots, sites, ENTRY]
    tiles,  # int32 [capacity, 3]
    used,  # int32 [1]
    site,
    capacity,
    in_features,
    out_features,
    y_stride,
    slot_stride,  # elements of `entries` from slot to slot
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """y += x W^T, computed transposed, columns x rows: a matrix unit takes as few as eight rows that way."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    blocks = (out_features + BLOCK_N - 1) // BLOCK_N
    count = tl.load(used)
    for item in range(tl.program_id(0), count * blocks, tl.num_programs(0)):
        slot, first, rows = load_tile(tiles, item // blocks, capacity, count)
        offset = load_offset(entries, slot, slot_stride, site, DENSE_COLUMN)
        if offset >= 0:
            row = first.to(tl.int64) + tl.arange(0, BLOCK_M)
            live = tl.arange(0, BLOCK_M) < rows
            n = item % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
            inside = n < out_features
            weight = arena + tl.multiple_of(offset, 16) + n.to(tl.int64)[:, None] * in_features
            total = multiply_rows(weight, x, row, live, inside, in_features, BLOCK_M, BLOCK_N, BLOCK_K)
            add_block(y, total, row, live, n, inside, y_stride)
