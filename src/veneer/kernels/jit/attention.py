"""Device code of paged attention. See kernels/attention.py for the formula and the launcher.

Only builtins of triton.language are used, so that the kernels can be interpreted in a process that imported
Triton for compiling; hence tl.reduce with Triton's own combine functions instead of tl.max and tl.sum.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.language.standard import _elementwise_max, _sum_combine

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LOWEST: tl.constexpr = tl.constexpr(-1e30)  # a score that is no score; finite, so that differences are too


@triton.jit(
    do_not_specialize=["window", "table_stride", "page_stride"],
    do_not_specialize_on_alignment=["query_start", "kv_len", "block_table"],
)
def attend(
    q,  # [rows, heads, HEAD_DIM]
    k_cache,  # [pages, PAGE_SIZE, kv heads, HEAD_DIM]
    v_cache,
    out,  # [rows, heads, HEAD_DIM]
    partial,  # float32 [sequences, heads, SPLITS, HEAD_DIM]; unused when SPLITS is 1
    stats,  # float32 [sequences, heads, SPLITS, 2]: maximum (base 2) and sum of the weights
    query_start,
    kv_len,
    block_table,  # int32 [sequences, pages]
    scale,
    window,
    softcap,
    q_row_stride,
    q_head_stride,
    table_stride,
    page_stride,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    DECODE: tl.constexpr,  # sequences with one query; otherwise the ones with more
    WINDOWED: tl.constexpr,
    SOFTCAPPED: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,  # rows of a tile: (query, head of the group) pairs
    BLOCK_Q: tl.constexpr,  # queries of a tile
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    GROUP: tl.constexpr = HEADS // KV_HEADS
    sequence = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    first_row = tl.load(query_start + sequence)
    queries = tl.load(query_start + sequence + 1) - first_row
    keys = tl.load(kv_len + sequence)
    if DECODE:
        first_query = 0
        skip = queries != 1
    else:
        first_query = tl.program_id(2) * BLOCK_Q
        skip = (queries <= 1) | (first_query >= queries)
    if skip:
        return

    tile_row = tl.arange(0, BLOCK_M)
    query = first_query + tile_row // GROUP
    head = kv_head * GROUP + tile_row % GROUP
    live = (tile_row < BLOCK_Q * GROUP) & (query < queries)
    position = keys - queries + query
    d = tl.arange(0, BLOCK_D)
    inside = d < HEAD_DIM
    row = (first_row + query).to(tl.int64)
    q_tile = tl.load(
        q + row[:, None] * q_row_stride + head[:, None] * q_head_stride + d[None, :],
        mask=live[:, None] & inside[None, :],
        other=0.0,
    )

    # keys that some query of this tile sees
    start = 0
    stop = keys - queries + tl.minimum(first_query + BLOCK_Q, queries)
    if WINDOWED:
        start = tl.maximum(keys - queries + first_query - window + 1, 0)
    if DECODE:
        blocks = (stop - start + BLOCK_N - 1) // BLOCK_N
        span = (blocks + SPLITS - 1) // SPLITS * BLOCK_N
        start += tl.program_id(2) * span
        stop = tl.minimum(stop, start + span)

    highest = tl.full((BLOCK_M,), LOWEST, tl.float32)
    weight = tl.full((BLOCK_M,), 0.0, tl.float32)
    total = tl.full((BLOCK_M, BLOCK_D), 0.0, tl.float32)
    for n_start in range(start, stop, BLOCK_N):
        n = n_start + tl.arange(0, BLOCK_N)
        valid = n < stop
        page = tl.load(
            block_table + sequence * table_stride + n // PAGE_SIZE * page_stride, mask=valid, other=0
        )
        slot = (page.to(tl.int64) * PAGE_SIZE + n % PAGE_SIZE) * KV_HEADS + kv_head
        k_tile = tl.load(
            k_cache + slot[None, :] * HEAD_DIM + d[:, None], mask=valid[None, :] & inside[:, None], other=0.0
        )
        score = tl.dot(q_tile, k_tile, input_precision="ieee") * scale
        if SOFTCAPPED:  # tanh(z) = 1 - 2 / (exp(2 z) + 1), right at both infinities
            score = softcap * (1.0 - 2.0 / (tl.exp2(score * (2.0 * LOG2E / softcap)) + 1.0))
        seen = valid[None, :] & (n[None, :] <= position[:, None])
        if WINDOWED:
            seen = seen & (position[:, None] - n[None, :] < window)
        score = tl.where(seen, score * LOG2E, LOWEST)
        new_highest = tl.maximum(highest, tl.reduce(score, 1, _elementwise_max))
        p = tl.where(seen, tl.exp2(score - new_highest[:, None]), 0.0)
        decay = tl.exp2(highest - new_highest)
        highest = new_highest
        weight = weight * decay + tl.reduce(p, 1, _sum_combine)
        v_tile = tl.load(
            v_cache + slot[:, None] * HEAD_DIM + d[None, :], mask=valid[:, None] & inside[None, :], other=0.0
        )
        total = tl.dot(p.to(v_tile.dtype), v_tile, total * decay[:, None], input_precision="ieee")

    mask = live[:, None] & inside[None, :]
    if SPLITS == 1:
        target = out + (row * HEADS + head)[:, None] * HEAD_DIM + d[None, :]
        weight = tl.where(live, weight, 1.0)
        tl.store(target, (total / weight[:, None]).to(out.dtype.element_ty), mask=mask)
    else:
        cell = (sequence * HEADS + head) * SPLITS + tl.program_id(2)
        tl.store(partial + cell[:, None] * HEAD_DIM + d[None, :], total, mask=mask)
        tl.store(stats + cell * 2, highest, mask=live)
        tl.store(stats + cell * 2 + 1, weight, mask=live)


@triton.jit(do_not_specialize_on_alignment=["query_start"])
def merge(
    out,
    partial,
    stats,
    query_start,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SPLITS: tl.constexpr,  # a power of two
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """Add the splits of one head of one decode row, each weighted by its own maximum and sum."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    sequence = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    row = tl.load(query_start + sequence).to(tl.int64)
    if tl.load(query_start + sequence + 1) - row != 1:
        return
    split = tl.arange(0, SPLITS)
    d = tl.arange(0, BLOCK_D)
    inside = d < HEAD_DIM
    cell = (sequence * HEADS + head) * SPLITS + split
    highest = tl.load(stats + cell * 2)
    factor = tl.exp2(highest - tl.reduce(highest, 0, _elementwise_max))
    weight = tl.reduce(factor * tl.load(stats + cell * 2 + 1), 0, _sum_combine)
    part = tl.load(partial + cell[:, None] * HEAD_DIM + d[None, :], mask=inside[None, :], other=0.0)
    total = tl.reduce(part * factor[:, None], 0, _sum_combine) / weight
    tl.store(out + (row * HEADS + head) * HEAD_DIM + d, total.to(out.dtype.element_ty), mask=inside)
