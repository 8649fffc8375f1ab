"""Device code of tokens with rows of their own. See kernels/token_rows.py for the formulas and the launchers."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from veneer.kernels.jit.dense import load_offset, multiply_rows
from veneer.kernels.jit.low_rank import ENTRY, load_a, load_tile
from veneer.kernels.jit.sparse import int_elements
from veneer.kernels.tables import B_OFFSET, TOKENS, TOKENS_OFFSET

B_COLUMN = tl.constexpr(B_OFFSET)
TOKENS_COLUMN = tl.constexpr(TOKENS_OFFSET)
COUNT_COLUMN = tl.constexpr(TOKENS)
STEPS = tl.constexpr(31)  # halvings that end a search among any number of int32 ids


@triton.jit
def load_tokens(entries, slot, slot_stride, site, PER_INT: tl.constexpr):
    """(where the ids begin, where the rows begin, how many) of an adapter at a site; (-1, -1, 0) without any."""
    entry = entries + slot.to(tl.int64) * slot_stride + site * ENTRY
    offset = tl.load(entry + TOKENS_COLUMN, mask=slot >= 0, other=-1)
    count = tl.load(entry + COUNT_COLUMN, mask=slot >= 0, other=0).to(tl.int32)
    return offset // PER_INT, offset + int_elements(count, PER_INT), count


@triton.jit
def find(known, count, token):
    """The place of each token among `count` ascending ids, or of the next larger one."""
    last = tl.maximum(count - 1, 0)
    # ids that are all there from 0 on are their own places
    steps = tl.where(tl.load(known + last, mask=count > 0, other=-1) == last, 0, STEPS)
    low = tl.where(steps == 0, token, token * 0)
    high = tl.where(steps == 0, token, token * 0 + count)
    for _ in range(steps):
        middle = (low + high) // 2
        searching = low < high
        less = tl.load(known + middle, mask=searching, other=0) < token
        low = tl.where(searching & less, middle + 1, low)
        high = tl.where(searching & (less == 0), middle, high)
    return tl.minimum(low, last)


@triton.jit(do_not_specialize=["site", "capacity"], do_not_specialize_on_alignment=["tiles", "used"])
def embed_rows(
    ids,  # int64 [rows]
    out,  # [rows, hidden]
    arena,
    ints,  # the arena as int32
    entries,  # int64 [slots, sites, ENTRY]
    tiles,  # int32 [capacity, 3]
    used,  # int32 [1]
    site,
    capacity,
    hidden,
    vocabulary,
    slot_stride,  # elements of `entries` from slot to slot
    PER_INT: tl.constexpr,  # elements of the arena in an int32
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PDL: tl.constexpr,
):
    """out <- the token's own row, then + B^T A[:, token]; computed transposed, columns x rows."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    blocks = (hidden + BLOCK_N - 1) // BLOCK_N
    total_tiles = tl.load(used)
    for item in range(tl.program_id(0), total_tiles * blocks, tl.num_programs(0)):
        slot, first, rows = load_tile(tiles, item // blocks, capacity, total_tiles)
        known, values, count = load_tokens(entries, slot, slot_stride, site, PER_INT)
        a_offset, rank = load_a(entries, slot, slot_stride, site)
        if (count > 0) | (rank > 0):
            row = first.to(tl.int64) + tl.arange(0, BLOCK_M)
            live = tl.arange(0, BLOCK_M) < rows
            n = item % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
            place = out + row[None, :] * hidden + n[:, None]
            mask = live[None, :] & (n < hidden)[:, None]
            token = tl.load(ids + row, mask=live, other=0)
            total = tl.load(place, mask=mask, other=0.0).to(tl.float32)
            if count > 0:
                at = find(ints + known, count, token)
                is_own = tl.load(ints + known + at) == token
                own = tl.load(
                    arena + values + at[None, :] * hidden + n[:, None],
                    mask=mask & is_own[None, :],
                    other=0.0,
                )
                total = tl.where(is_own[None, :], own.to(tl.float32), total)
            b = arena + load_offset(entries, slot, slot_stride, site, B_COLUMN)
            for start in range(0, rank, BLOCK_R):
                r = (start + tl.arange(0, BLOCK_R)).to(tl.int64)
                a_tile = tl.load(
                    arena + a_offset + r[:, None] * vocabulary + token[None, :],
                    mask=(r < rank)[:, None] & (live & (token < vocabulary))[None, :],
                    other=0.0,
                )
                b_tile = tl.load(
                    b + r[None, :] * hidden + n[:, None],
                    mask=(r < rank)[None, :] & (n < hidden)[:, None],
                    other=0.0,
                )
                total = tl.dot(b_tile, a_tile, total, input_precision="ieee")
            tl.store(place, total.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["site", "capacity"], do_not_specialize_on_alignment=["tiles", "used"])
def token_logits(
    x,  # [rows, hidden]
    y,  # [rows, vocabulary]
    added,  # [rows or more, columns]
    arena,
    ints,  # the arena as int32
    entries,  # int64 [slots, sites, ENTRY]
    tiles,  # int32 [capacity, 3]
    used,  # int32 [1]
    site,
    capacity,
    hidden,
    vocabulary,
    columns,
    slot_stride,  # elements of `entries` from slot to slot
    PER_INT: tl.constexpr,  # elements of the arena in an int32
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """The logits of an adapter's own tokens, tokens x rows."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    total_tiles = tl.load(used)
    programs = tl.num_programs(0)
    for tile in range(total_tiles):
        slot, first, rows = load_tile(tiles, tile, capacity, total_tiles)
        known, values, count = load_tokens(entries, slot, slot_stride, site, PER_INT)
        # each tile begins with another program, so that those with few tokens do not meet in one
        begin = (tl.program_id(0) + tile * 37) % programs
        for block in range(begin, (count + BLOCK_N - 1) // BLOCK_N, programs):
            row = first.to(tl.int64) + tl.arange(0, BLOCK_M)
            live = tl.arange(0, BLOCK_M) < rows
            n = block * BLOCK_N + tl.arange(0, BLOCK_N)
            there = n < count
            weights = arena + values + n.to(tl.int64)[:, None] * hidden
            total = multiply_rows(weights, x, row, live, there, hidden, BLOCK_M, BLOCK_N, BLOCK_K)
            token = tl.load(ints + known + n, mask=there, other=0)
            logits = total.to(y.dtype.element_ty)
            mask = there[:, None] & live[None, :]
            is_base = token < vocabulary
            tl.store(y + row[None, :] * vocabulary + token[:, None], logits, mask=mask & is_base[:, None])
            beyond = token - vocabulary
            is_added = (beyond >= 0) & (beyond < columns)
            tl.store(added + row[None, :] * columns + beyond[:, None], logits, mask=mask & is_added[:, None])
