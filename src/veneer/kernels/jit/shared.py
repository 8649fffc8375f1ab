"""Device code of the factors of adapters that share A and B. See kernels/shared.py for formulas and launcher.

Tiles are ranks, or columns, x rows, as in the kernels that leave h and read it.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from veneer.kernels.jit.low_rank import ENTRY, load_a, load_tile
from veneer.kernels.tables import RANK_SCALE

RANK_COLUMN = tl.constexpr(RANK_SCALE)


@triton.jit
def load_scales(
    arena, entries, row_slots, slot_stride, site, row, live, n, inside, COLUMN: tl.constexpr
):  # fmt: skip
    """Factors [BLOCK, BLOCK_M] at n of each row's own adapter at a site; 1 for rows whose adapter has none."""
    slot = tl.load(row_slots + row, mask=live, other=-1)
    entry = entries + slot.to(tl.int64) * slot_stride + site * ENTRY
    offset = tl.load(entry + COLUMN, mask=slot >= 0, other=-1)
    there = (offset >= 0)[None, :] & inside[:, None]
    return tl.load(arena + offset[None, :] + n[:, None], mask=there, other=1.0).to(tl.float32)


@triton.jit(
    do_not_specialize=["site", "rows_total", "capacity", "splits"],
    do_not_specialize_on_alignment=["tiles", "used", "row_slots"],
)
def scale_ranks(
    planes,  # float32 [SITES, splits, rows_total, rank_stride]
    out,  # float32 [SITES, 1, rows_total, rank_stride]; may be planes, when there is one for each site
    arena,
    entries,  # int64 [slots, sites, ENTRY]
    tiles,  # int32 [capacity, 3]
    used,  # int32 [1]
    row_slots,  # int32 [rows_total]
    site,  # the first
    rows_total,
    capacity,
    splits,  # planes of a site
    rank_stride,
    slot_stride,  # elements of `entries` from slot to slot
    SITES: tl.constexpr,
    PARTS: tl.constexpr,  # programs that share the ranks of a tile at a site
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PDL: tl.constexpr,
):
    """out[s, row] = the row's factors at site + s times the sum of planes[s, :, row], for rows of adapters."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    count = tl.load(used)
    plane_size = rows_total.to(tl.int64) * rank_stride
    for item in range(tl.program_id(0), count * (SITES * PARTS), tl.num_programs(0)):
        slot, first, rows = load_tile(tiles, item // (SITES * PARTS), capacity, count)
        member = item // PARTS % SITES
        _, rank = load_a(entries, slot, slot_stride, site + member)
        row = first.to(tl.int64) + tl.arange(0, BLOCK_M)
        live = tl.arange(0, BLOCK_M) < rows
        source = planes + member * splits * plane_size
        target = out + member * plane_size
        for start in range(item % PARTS * BLOCK_R, rank, PARTS * BLOCK_R):
            r = start + tl.arange(0, BLOCK_R)
            at = row[None, :] * rank_stride + r[:, None]
            mask = live[None, :] & (r < rank)[:, None]
            h = tl.load(source + at, mask=mask, other=0.0)
            for split in tl.range(1, splits, loop_unroll_factor=4):
                h += tl.load(source + at + split * plane_size, mask=mask, other=0.0)
            h *= load_scales(
                arena, entries, row_slots, slot_stride, site + member, row, live, r, r < rank, RANK_COLUMN
            )
            tl.store(target + at, h, mask=mask)
