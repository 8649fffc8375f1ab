"""Device code of the batched low-rank matmul. See kernels/low_rank.py for the formula and the launcher.

Only builtins of triton.language are used, so that the kernels can be interpreted in a process that imported
Triton for compiling.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from veneer.kernels.tables import COLUMNS

ENTRY = tl.constexpr(COLUMNS)


@triton.jit
def load_tile(tiles, tile, capacity, used):
    """(slot, first row, rows) of a tile. Past the used ones, where anything may stand, it is the base's.

    Its loads do not wait for the one of `used`.
    """
    at = tiles + tl.minimum(tile, capacity - 1) * 3
    return tl.where(tile < used, tl.load(at), -1), tl.load(at + 1), tl.load(at + 2)


@triton.jit
def load_a(entries, slot, slot_stride, site):
    """(offset of A, rank) of an adapter at a site; (0, 0) for the base.

    Masked loads, no branch: the hint that offsets are aligned must stay on the one value that it is true of.
    """
    entry = entries + slot.to(tl.int64) * slot_stride + site * ENTRY
    a_offset = tl.multiple_of(tl.load(entry, mask=slot >= 0, other=0), 16)
    return a_offset, tl.load(entry + 3, mask=slot >= 0, other=0).to(tl.int32)


@triton.jit(
    do_not_specialize=["site", "rows_total", "capacity"], do_not_specialize_on_alignment=["tiles", "used"]
)
def shrink(
    x,  # [rows_total, in]
    arena,
    entries,  # int64 [slots, sites, ENTRY]
    tiles,  # int32 [capacity, 3]
    used,  # int32 [1]
    planes,  # float32 [SITES, SPLITS, rows_total, rank_stride]
    site,  # the first
    rows_total,
    capacity,
    in_features,
    rank_stride,
    slot_stride,  # elements of `entries` from slot to slot
    split_size,  # columns of x in one split
    SITES: tl.constexpr,
    SPLITS: tl.constexpr,
    PARTS: tl.constexpr,  # programs that share the ranks of a tile at a site in one split
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    BESIDE: tl.constexpr,  # x was complete before the preceding launch
    PDL: tl.constexpr,
):
    """planes[s, split, row] = A[:, columns of split] @ x[row, columns of split] at site + s, for every tile.

    Tiles are computed transposed, ranks x rows: a matrix unit takes as few as eight columns, but not rows.
    """
    if PDL:
        if not BESIDE:
            gdc_wait()
        gdc_launch_dependents()
    pid = tl.program_id(0)
    step = tl.num_programs(0)
    count = tl.load(used)
    slot, first, rows = load_tile(tiles, pid // (SITES * SPLITS * PARTS), capacity, count)
    a_offset, rank = load_a(entries, slot, slot_stride, site + pid // (SPLITS * PARTS) % SITES)
    for item in range(pid, count * (SITES * SPLITS * PARTS), step):
        a = arena + a_offset
        ranks = rank
        row = first.to(tl.int64) + tl.arange(0, BLOCK_M)
        live = tl.arange(0, BLOCK_M) < rows
        # the next tile and its entry are on their way while this one is computed
        slot, first, rows = load_tile(tiles, (item + step) // (SITES * SPLITS * PARTS), capacity, count)
        a_offset, rank = load_a(entries, slot, slot_stride, site + (item + step) // (SPLITS * PARTS) % SITES)
        split = item // PARTS % SPLITS
        start = split * split_size
        stop = tl.minimum(start + split_size, in_features)
        plane = (
            planes
            + (item // (SPLITS * PARTS) % SITES * SPLITS + split).to(tl.int64) * rows_total * rank_stride
        )
        for r_start in range(item % PARTS * BLOCK_R, ranks, PARTS * BLOCK_R):
            r = r_start + tl.arange(0, BLOCK_R)
            a_rows = a + r.to(tl.int64)[:, None] * in_features
            h = tl.full((BLOCK_R, BLOCK_M), 0.0, tl.float32)
            for k_start in tl.range(start, stop, BLOCK_K, num_stages=STAGES):
                k = k_start + tl.arange(0, BLOCK_K)
                a_tile = tl.load(
                    a_rows + k[None, :], mask=(r < ranks)[:, None] & (k < stop)[None, :], other=0.0
                )
                x_tile = tl.load(
                    x + row[None, :] * in_features + k[:, None],
                    mask=live[None, :] & (k < stop)[:, None],
                    other=0.0,
                )
                h = tl.dot(a_tile, x_tile, h, input_precision="ieee")
            tl.store(
                plane + row[None, :] * rank_stride + r[:, None], h, mask=live[None, :] & (r < ranks)[:, None]
            )
    if PDL and BESIDE:  # whoever waits for this kernel waits for the preceding one, too
        gdc_wait()
