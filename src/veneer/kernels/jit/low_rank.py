"""Device code of the batched low-rank matmul. See kernels/low_rank.py for the formula and the launcher.

Only builtins of triton.language are used, so that the kernels can be interpreted in a process that imported
Triton for compiling.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["site", "rows_total"])
def shrink(
    x,  # [rows_total, in]
    arena,
    entries,  # int64 [slots, sites, 4]
    tiles,  # int32 [capacity, 3]
    planes,  # float32 [splits, rows_total, rank_bound]
    site,
    rows_total,
    in_features,
    rank_bound,
    slot_stride,  # elements of `entries` from slot to slot
    split_size,  # columns of x in one split
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """planes[split, row] = A[:, columns of split] @ x[row, columns of split], for the rows of one tile."""
    tile = tl.program_id(0)
    split = tl.program_id(2)
    rows = tl.load(tiles + tile * 3 + 2)
    if rows == 0:
        return
    slot = tl.load(tiles + tile * 3).to(tl.int64)
    entry = entries + slot * slot_stride + site * 4
    a = arena + tl.load(entry)
    rank = tl.load(entry + 3).to(tl.int32)

    local = tl.arange(0, BLOCK_M)
    row = tl.load(tiles + tile * 3 + 1).to(tl.int64) + local
    live = local < rows
    start = split * split_size
    stop = tl.minimum(start + split_size, in_features)
    for r_start in range(tl.program_id(1) * BLOCK_R, rank, tl.num_programs(1) * BLOCK_R):
        r = r_start + tl.arange(0, BLOCK_R)
        a_rows = a + r.to(tl.int64) * in_features
        h = tl.full((BLOCK_M, BLOCK_R), 0.0, tl.float32)
        for k_start in range(start, stop, BLOCK_K):
            k = k_start + tl.arange(0, BLOCK_K)
            x_tile = tl.load(
                x + row[:, None] * in_features + k[None, :],
                mask=live[:, None] & (k < stop)[None, :],
                other=0.0,
            )
            a_tile = tl.load(
                a_rows[None, :] + k[:, None], mask=(r < rank)[None, :] & (k < stop)[:, None], other=0.0
            )
            h = tl.dot(x_tile, a_tile, h, input_precision="ieee")
        out = planes + (split.to(tl.int64) * rows_total + row)[:, None] * rank_bound + r[None, :]
        tl.store(out, h, mask=live[:, None] & (r < rank)[None, :])


@triton.jit(do_not_specialize=["site", "rows_total"])
def expand(
    y,  # [rows_total, out], added to; rows are y_stride apart
    arena,
    entries,
    tiles,
    planes,
    site,
    rows_total,
    out_features,
    y_stride,
    rank_bound,
    slot_stride,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """y[row, block] += (sum of the planes of row) @ B[:, block] + bias[block], for the rows of one tile."""
    tile = tl.program_id(0)
    rows = tl.load(tiles + tile * 3 + 2)
    if rows == 0:
        return
    slot = tl.load(tiles + tile * 3).to(tl.int64)
    entry = entries + slot * slot_stride + site * 4
    b = arena + tl.load(entry + 1)
    bias_offset = tl.load(entry + 2)
    rank = tl.load(entry + 3).to(tl.int32)
    if (rank == 0) & (bias_offset < 0):
        return

    local = tl.arange(0, BLOCK_M)
    row = tl.load(tiles + tile * 3 + 1).to(tl.int64) + local
    live = local < rows
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < out_features
    total = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    for r_start in range(0, rank, BLOCK_R):
        r = r_start + tl.arange(0, BLOCK_R)
        h = tl.full((BLOCK_M, BLOCK_R), 0.0, tl.float32)
        for split in range(SPLITS):
            plane = planes + (split * rows_total.to(tl.int64) + row)[:, None] * rank_bound + r[None, :]
            h += tl.load(plane, mask=live[:, None] & (r < rank)[None, :], other=0.0)
        b_tile = tl.load(
            b + r.to(tl.int64)[:, None] * out_features + n[None, :],
            mask=(r < rank)[:, None] & inside[None, :],
            other=0.0,
        )
        total = tl.dot(h.to(b_tile.dtype), b_tile, total, input_precision="ieee")
    if bias_offset >= 0:
        total += tl.load(arena + bias_offset + n, mask=inside, other=0.0).to(tl.float32)[None, :]
    target = y + row[:, None] * y_stride + n[None, :]
    mask = live[:, None] & inside[None, :]
    total += tl.load(target, mask=mask, other=0.0).to(tl.float32)
    tl.store(target, total.to(y.dtype.element_ty), mask=mask)
