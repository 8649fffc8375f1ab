"""Device code of sparse changes of the base's weight. See kernels/sparse.py for the layout and the launcher."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.language.standard import _elementwise_max, _sum_combine

from veneer.kernels.jit.dense import add_block, load_offset
from veneer.kernels.jit.low_rank import load_tile
from veneer.kernels.tables import ALIGNED, SPARSE_OFFSET

SPARSE_COLUMN = tl.constexpr(SPARSE_OFFSET)
ALIGN = tl.constexpr(ALIGNED)


@triton.jit
def int_elements(count, PER_INT: tl.constexpr):
    """Elements of the arena that `count` int32 take, in whole ALIGN."""
    return (count * PER_INT + ALIGN - 1) // ALIGN * ALIGN


@triton.jit(do_not_specialize=["site", "capacity"], do_not_specialize_on_alignment=["tiles", "used"])
def add_sparse(
    x,  # [rows, in_features]
    y,  # [rows, out_features], rows y_stride apart
    arena,
    ints,  # the arena as int32
    entries,  # int64 [slots, sites, ENTRY]
    tiles,  # int32 [capacity, 3]
    used,  # int32 [1]
    site,
    capacity,
    in_features,
    out_features,
    y_stride,
    slot_stride,  # elements of `entries` from slot to slot
    PER_INT: tl.constexpr,  # elements of the arena in an int32
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """y += x S^T: so many entries of each of our rows of S at a time, each with its column of x."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    blocks = (out_features + BLOCK_N - 1) // BLOCK_N
    count = tl.load(used)
    for item in range(tl.program_id(0), count * blocks, tl.num_programs(0)):
        slot, first, rows = load_tile(tiles, item // blocks, capacity, count)
        offset = load_offset(entries, slot, slot_stride, site, SPARSE_COLUMN)
        if offset >= 0:
            row = first.to(tl.int64) + tl.arange(0, BLOCK_M)
            live = tl.arange(0, BLOCK_M) < rows
            n = item % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
            inside = n < out_features
            starts = ints + offset // PER_INT
            begin = tl.load(starts + n, mask=inside, other=0)
            end = tl.load(starts + n + 1, mask=inside, other=0)
            columns = offset + int_elements(out_features + 1, PER_INT)
            values = columns + int_elements(tl.load(starts + out_features), PER_INT)
            total = tl.full((BLOCK_N, BLOCK_M), 0.0, tl.float32)
            for start in range(0, tl.reduce(end - begin, 0, _elementwise_max), BLOCK_K):
                at = begin[:, None] + start + tl.arange(0, BLOCK_K)[None, :]
                there = at < end[:, None]
                column = tl.load(ints + columns // PER_INT + at, mask=there, other=0)
                value = tl.load(arena + values + at, mask=there, other=0.0).to(tl.float32)
                part = tl.load(
                    x + row[None, None, :] * in_features + column[:, :, None],
                    mask=there[:, :, None] & live[None, None, :],
                    other=0.0,
                )
                total += tl.reduce(value[:, :, None] * part.to(tl.float32), 1, _sum_combine)
            add_block(y, total, row, live, n, inside, y_stride)
