"""Device code of the transforms of the base's input and output. See kernels/transform.py for the formulas."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from veneer.kernels.jit.low_rank import ENTRY, load_tile
from veneer.kernels.tables import IN_BLOCK, IN_OFFSET, OUT_OFFSET, OUT_PAIR

IN_COLUMN = tl.constexpr(IN_OFFSET)
BLOCK_COLUMN = tl.constexpr(IN_BLOCK)
OUT_COLUMN = tl.constexpr(OUT_OFFSET)
PAIR_COLUMN = tl.constexpr(OUT_PAIR)


@triton.jit
def load_transform(entries, slot, slot_stride, site, OFFSET: tl.constexpr, SIZE: tl.constexpr):
    """(offset or -1, block or pair) of an adapter at a site; (-1, 0) for the base."""
    entry = entries + slot.to(tl.int64) * slot_stride + site * ENTRY
    size = tl.load(entry + SIZE, mask=slot >= 0, other=0)
    return tl.load(entry + OFFSET, mask=slot >= 0, other=-1), size.to(tl.int32)


@triton.jit(
    do_not_specialize=["site", "rows_total", "capacity"], do_not_specialize_on_alignment=["tiles", "used"]
)
def transform_input(
    x,  # [rows_total, features]
    out,  # [SITES, rows_total, features]
    arena,
    entries,  # int64 [slots, sites, ENTRY]
    tiles,  # int32 [capacity, 3]
    used,  # int32 [1]
    site,  # the first
    rows_total,
    capacity,
    features,
    slot_stride,  # elements of `entries` from slot to slot
    SITES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """out[s] = x + x D with D = R - I of site + s, block diagonal: only columns that share a block are read.

    Tiles are computed transposed, columns x rows: a matrix unit takes as few as eight rows that way.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    blocks = (features + BLOCK_N - 1) // BLOCK_N
    count = tl.load(used)
    for item in range(tl.program_id(0), count * (SITES * blocks), tl.num_programs(0)):
        slot, first, rows = load_tile(tiles, item // (SITES * blocks), capacity, count)
        member = item // blocks % SITES
        offset, block = load_transform(entries, slot, slot_stride, site + member, IN_COLUMN, BLOCK_COLUMN)
        row = first.to(tl.int64) + tl.arange(0, BLOCK_M)
        live = tl.arange(0, BLOCK_M) < rows
        left = item % blocks * BLOCK_N
        n = left + tl.arange(0, BLOCK_N)
        inside = n < features
        place = row[None, :] * features + n[:, None]
        mask = live[None, :] & inside[:, None]
        total = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
        if block == 1:
            scale = tl.load(arena + offset + n, mask=inside, other=0.0).to(tl.float32)
            total += total * scale[:, None]
        elif block > 1:
            turn = arena + offset
            group = n // block
            column = group * block * block + n % block
            stop = tl.minimum((tl.minimum(left + BLOCK_N, features) + block - 1) // block * block, features)
            for start in range(left // block * block, stop, BLOCK_K):
                k = start + tl.arange(0, BLOCK_K)
                shared = inside[:, None] & (group[:, None] == (k // block)[None, :])
                d = tl.load(turn + column[:, None] + (k % block * block)[None, :], mask=shared, other=0.0)
                part = tl.load(
                    x + row[None, :] * features + k[:, None],
                    mask=live[None, :] & (k < stop)[:, None],
                    other=0.0,
                )
                total = tl.dot(d, part, total, input_precision="ieee")
        at = out + member.to(tl.int64) * rows_total * features
        tl.store(at + place, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def load_row(vector, n, inside):
    return tl.load(vector + n, mask=inside, other=0.0).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["site", "capacity"], do_not_specialize_on_alignment=["tiles", "used"])
def transform_output(
    y,  # [rows, features], rows y_stride apart
    arena,
    entries,  # int64 [slots, sites, ENTRY]
    tiles,  # int32 [capacity, 3]
    used,  # int32 [1]
    site,
    capacity,
    features,
    y_stride,
    slot_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    """y <- scale y + cross (partner's y): a block of columns and the block of their partners at once."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    blocks = (features + 2 * BLOCK_N - 1) // (2 * BLOCK_N)
    count = tl.load(used)
    for item in range(tl.program_id(0), count * blocks, tl.num_programs(0)):
        slot, first, rows = load_tile(tiles, item // blocks, capacity, count)
        offset, pair = load_transform(entries, slot, slot_stride, site, OUT_COLUMN, PAIR_COLUMN)
        if offset >= 0:
            row = first.to(tl.int64) + tl.arange(0, BLOCK_M)
            live = (tl.arange(0, BLOCK_M) < rows)[:, None]
            # without pairs the halves of all columns stand for partners
            half = tl.where(pair > 0, pair // 2, (features + 1) // 2)
            position = item % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
            n = position // half * (2 * half) + position % half
            partner = n + half
            is_left = n < features
            is_right = partner < features
            left_place = y + row[:, None] * y_stride + n[None, :]
            right_place = left_place + half
            mask_left = live & is_left[None, :]
            mask_right = live & is_right[None, :]
            left = tl.load(left_place, mask=mask_left, other=0.0).to(tl.float32)
            right = tl.load(right_place, mask=mask_right, other=0.0).to(tl.float32)
            scale = arena + offset
            scaled_left = left + left * load_row(scale, n, is_left)
            scaled_right = right + right * load_row(scale, partner, is_right)
            if pair > 0:
                scaled_left += right * load_row(scale + features, n, is_left)
                scaled_right += left * load_row(scale + features, partner, is_right)
            dtype = y.dtype.element_ty
            tl.store(left_place, scaled_left.to(dtype), mask=mask_left)
            tl.store(right_place, scaled_right.to(dtype), mask=mask_right)
