"""Device code of the epilogues. See kernels/epilogue.py for the formulas and the launchers.

Each program computes two blocks of columns at once: the halves of a head, a block of gate and of up, or simply
neighbours. So nothing is ever moved between columns, and more loads are on their way.

Tiles are computed transposed, columns x rows: a matrix unit takes as few as eight rows that way.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.language.standard import _sum_combine

from veneer.kernels.jit.low_rank import ENTRY, load_tile
from veneer.kernels.jit.shared import load_scales
from veneer.kernels.jit.transform import OUT_COLUMN, PAIR_COLUMN, load_transform
from veneer.kernels.tables import UPDATE_SCALE

UPDATE_COLUMN = tl.constexpr(UPDATE_SCALE)


@triton.jit
def count_tiles(used, rows_total, ADAPTED: tl.constexpr, BLOCK_M: tl.constexpr):
    found = (rows_total + BLOCK_M - 1) // BLOCK_M
    if ADAPTED:
        found = tl.load(used)
    return found


@triton.jit
def find_tile(tiles, tile, capacity, tile_count, rows_total, ADAPTED: tl.constexpr, BLOCK_M: tl.constexpr):
    """(slot, first row, rows); without adapters the rows are simply counted off."""
    found = (-1, tile * BLOCK_M, tl.minimum(rows_total - tile * BLOCK_M, BLOCK_M))
    if ADAPTED:
        found = load_tile(tiles, tile, capacity, tile_count)
    return found


@triton.jit
def find_entry(entries, slot, slot_stride, site, ADAPTED: tl.constexpr):
    """(offset of B, offset of the bias, rank) of an adapter at a site; (0, -1, 0) for the base."""
    found = (0, -1, 0)
    if ADAPTED:
        # masked loads instead of a branch: the hint must stay on the one value that it is true of
        entry = entries + slot.to(tl.int64) * slot_stride + site * ENTRY
        b_offset = tl.multiple_of(tl.load(entry + 1, mask=slot >= 0, other=0), 16)
        bias_offset = tl.load(entry + 2, mask=slot >= 0, other=-1)
        found = (b_offset, bias_offset, tl.load(entry + 3, mask=slot >= 0, other=0).to(tl.int32))
    return found


@triton.jit
def sum_parts(
    parts, row, live, column, inside, count, part_size, part_stride, bias,
    PARTS: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Sum of the parts [BLOCK_N, BLOCK_M], plus bias.

    Pairs are loaded as one tile and added at last: the compiler would move the layout change that the matrix
    unit needs from the sum to each load, but not through a reduction.
    """
    at = parts + row[None, :] * part_stride + column[:, None]
    mask = live[None, :] & inside[:, None]
    if PARTS == 1:
        total = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    else:
        pair = tl.arange(0, 2)[:, None, None]
        at = at[None, :, :] + pair * part_size
        mask = mask[None, :, :] & (pair < count)
        totals = tl.load(at, mask=mask, other=0.0)
        for part in tl.static_range(2, PARTS, 2):
            totals += tl.load(at + part * part_size, mask=mask & (pair < count - part), other=0.0)
        total = tl.reduce(totals, 0, _sum_combine)
    if HAS_BIAS:
        total += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)[:, None]
    return total


@triton.jit
def find_change(entries, slot, slot_stride, site, SCALED: tl.constexpr):
    """(offset of the scale or -1, pair) of an adapter at a site; (-1, 0) for the base."""
    found = (-1, 0)
    if SCALED:
        found = load_transform(entries, slot, slot_stride, site, OUT_COLUMN, PAIR_COLUMN)
    return found


@triton.jit
def change_total(
    total, change, arena, parts, row, live, n, first, inside, width, count, part_size, part_stride, bias,
    PARTS: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """scale total + cross (partner's total); n are columns of a site that begins at column `first` of the parts.

    The partner's parts are added up a second time: another program may have them.
    """
    offset, pair = change
    if offset >= 0:
        scale = arena + offset
        factor = tl.load(scale + n, mask=inside, other=0.0).to(tl.float32)[:, None]
        changed = total + total * factor
        if pair > 0:
            partner = tl.where(n % pair < pair // 2, n + pair // 2, n - pair // 2)
            other = sum_parts(
                parts,
                row,
                live,
                first + partner,
                inside,
                count,
                part_size,
                part_stride,
                bias,
                PARTS,
                HAS_BIAS,
            )
            changed += other * tl.load(scale + width + n, mask=inside, other=0.0).to(tl.float32)[:, None]
        total = changed
    return total


@triton.jit
def load_h(planes, row, live, r, rank, plane_size, rank_stride, SPLITS: tl.constexpr):
    """h [BLOCK_R, BLOCK_M]; whole vectors are read, and what lies past the rank is dropped."""
    at = planes + row[None, :] * rank_stride + r[:, None]
    mask = live[None, :] & (r < (rank + 15) // 16 * 16)[:, None]
    h = tl.load(at, mask=mask, other=0.0)
    for split in tl.static_range(1, SPLITS):
        h += tl.load(at + split * plane_size, mask=mask, other=0.0)
    return tl.where((r < rank)[:, None], h, 0.0)


@triton.jit
def load_b(b, r, rank, n, inside, width):
    """B^T [BLOCK_N, BLOCK_R]."""
    mask = inside[:, None] & (r < rank)[None, :]
    return tl.load(b + r.to(tl.int64)[None, :] * width + n[:, None], mask=mask, other=0.0)


@triton.jit
def expand(
    left, right, arena, planes, entry_left, entry_right, second, row, live, n_left, n_right,
    inside_left, inside_right, width, plane_size, rank_stride, entries, row_slots, slot_stride,
    site_left, site_right, SPLITS: tl.constexpr, SHARED: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The totals plus B^T h and the adapter's bias; n_* are columns of B, `second` the right block's planes.

    SHARED: B^T h is multiplied by the factors of each row's own adapter at its site, where it has some. The next
    block of ranks is on its way while one is multiplied.
    """
    b_left, bias_left, rank_left = entry_left
    b_right, bias_right, rank_right = entry_right
    b_left = arena + b_left
    b_right = arena + b_right
    total_left = left
    total_right = right
    if SHARED:
        left = tl.full(left.shape, 0.0, tl.float32)
        right = tl.full(right.shape, 0.0, tl.float32)
    r = tl.arange(0, BLOCK_R)
    matrix_left = load_b(b_left, r, rank_left, n_left, inside_left, width)
    matrix_right = load_b(b_right, r, rank_right, n_right, inside_right, width)
    h_left = load_h(planes, row, live, r, rank_left, plane_size, rank_stride, SPLITS)
    h_right = h_left
    if second is not None:
        h_right = load_h(second, row, live, r, rank_right, plane_size, rank_stride, SPLITS)
    for r_start in range(BLOCK_R, tl.maximum(rank_left, rank_right), BLOCK_R):
        r = r_start + tl.arange(0, BLOCK_R)
        next_left = load_b(b_left, r, rank_left, n_left, inside_left, width)
        next_right = load_b(b_right, r, rank_right, n_right, inside_right, width)
        next_h_left = load_h(planes, row, live, r, rank_left, plane_size, rank_stride, SPLITS)
        next_h_right = next_h_left
        if second is not None:
            next_h_right = load_h(second, row, live, r, rank_right, plane_size, rank_stride, SPLITS)
        left = tl.dot(matrix_left, h_left.to(matrix_left.dtype), left, input_precision="ieee")
        right = tl.dot(matrix_right, h_right.to(matrix_right.dtype), right, input_precision="ieee")
        matrix_left, matrix_right, h_left, h_right = next_left, next_right, next_h_left, next_h_right
    left = tl.dot(matrix_left, h_left.to(matrix_left.dtype), left, input_precision="ieee")
    right = tl.dot(matrix_right, h_right.to(matrix_right.dtype), right, input_precision="ieee")
    if SHARED:
        left = total_left + left * load_scales(
            arena, entries, row_slots, slot_stride, site_left, row, live, n_left, inside_left, UPDATE_COLUMN
        )
        right = total_right + right * load_scales(
            arena,
            entries,
            row_slots,
            slot_stride,
            site_right,
            row,
            live,
            n_right,
            inside_right,
            UPDATE_COLUMN,
        )
    if bias_left >= 0:
        left += tl.load(arena + bias_left + n_left, mask=inside_left, other=0.0).to(tl.float32)[:, None]
    if bias_right >= 0:
        right += tl.load(arena + bias_right + n_right, mask=inside_right, other=0.0).to(tl.float32)[:, None]
    return left, right


@triton.jit(
    do_not_specialize=["site", "rows_total", "capacity", "count"],
    do_not_specialize_on_alignment=["tiles", "used", "row_slots"],
)
def add_update(
    parts,  # [count, rows_total, out], rows part_stride and parts part_size apart
    bias,  # [out], with HAS_BIAS
    residual,  # [rows_total, out], with HAS_RESIDUAL
    out,  # [rows_total, out], rows out_stride apart
    arena,
    entries,
    tiles,
    used,
    row_slots,  # int32 [rows_total], with SHARED
    planes,  # float32 [1, SPLITS, rows_total, rank_stride]
    site,
    rows_total,
    capacity,
    count,
    out_features,
    part_size,
    part_stride,
    residual_stride,
    out_stride,
    rank_stride,
    slot_stride,
    PARTS: tl.constexpr,  # count, rounded up to a power of two
    SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ADAPTED: tl.constexpr,
    SCALED: tl.constexpr,  # some row's adapter may change the base's output
    SHARED: tl.constexpr,  # some row's adapter may share A and B with others
    IN_PLACE: tl.constexpr,  # out is parts, and there is nothing else to add: tiles of the base are skipped
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # of each of the two blocks of columns
    BLOCK_R: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    pid = tl.program_id(0)
    step = tl.num_programs(0)
    blocks = (out_features + 2 * BLOCK_N - 1) // (2 * BLOCK_N)
    tile_count = count_tiles(used, rows_total, ADAPTED, BLOCK_M)
    slot, first, rows = find_tile(tiles, pid // blocks, capacity, tile_count, rows_total, ADAPTED, BLOCK_M)
    plane_size = rows_total.to(tl.int64) * rank_stride
    ahead_entry = find_entry(entries, slot, slot_stride, site, ADAPTED)
    ahead_change = find_change(entries, slot, slot_stride, site, SCALED)
    for item in range(pid, tile_count * blocks, step):
        entry, change = ahead_entry, ahead_change
        row = first.to(tl.int64) + tl.arange(0, BLOCK_M)
        if IN_PLACE:
            rows = tl.where((entry[1] >= 0) | (entry[2] > 0), rows, 0)
        live = tl.arange(0, BLOCK_M) < rows
        slot, first, rows = find_tile(
            tiles, (item + step) // blocks, capacity, tile_count, rows_total, ADAPTED, BLOCK_M
        )
        ahead_entry = find_entry(entries, slot, slot_stride, site, ADAPTED)
        ahead_change = find_change(entries, slot, slot_stride, site, SCALED)
        n_left = item % blocks * (2 * BLOCK_N) + tl.arange(0, BLOCK_N)
        n_right = n_left + BLOCK_N
        inside_left = n_left < out_features
        inside_right = n_right < out_features
        left = sum_parts(
            parts, row, live, n_left, inside_left, count, part_size, part_stride, bias, PARTS, HAS_BIAS
        )
        right = sum_parts(
            parts, row, live, n_right, inside_right, count, part_size, part_stride, bias, PARTS, HAS_BIAS
        )
        if SCALED:
            left = change_total(
                left, change, arena, parts, row, live, n_left, 0, inside_left, out_features, count,
                part_size, part_stride, bias, PARTS, HAS_BIAS,
            )  # fmt: skip
            right = change_total(
                right, change, arena, parts, row, live, n_right, 0, inside_right, out_features, count,
                part_size, part_stride, bias, PARTS, HAS_BIAS,
            )  # fmt: skip
        if ADAPTED:
            left, right = expand(
                left, right, arena, planes, entry, entry, None, row, live, n_left, n_right,
                inside_left, inside_right, out_features, plane_size, rank_stride, entries, row_slots, slot_stride,
                site, site, SPLITS, SHARED, BLOCK_R,
            )  # fmt: skip
        dtype = out.dtype.element_ty
        left = left.to(dtype)
        right = right.to(dtype)
        mask_left = live[None, :] & inside_left[:, None]
        mask_right = live[None, :] & inside_right[:, None]
        if HAS_RESIDUAL:
            at = residual + row[None, :] * residual_stride
            left = tl.load(at + n_left[:, None], mask=mask_left, other=0.0).to(tl.float32) + left
            right = tl.load(at + n_right[:, None], mask=mask_right, other=0.0).to(tl.float32) + right
        at = out + row[None, :] * out_stride
        tl.store(at + n_left[:, None], left.to(dtype), mask=mask_left)
        tl.store(at + n_right[:, None], right.to(dtype), mask=mask_right)


@triton.jit
def multiply(a, b):
    """a b, rounded once: what a separate kernel would leave."""
    return (a.to(tl.float32) * b.to(tl.float32)).to(a.dtype)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    inner = x
    if ACTIVATION == "gelu_tanh":  # (1 + tanh(u)) / 2 = sigmoid(2u)
        inner = 1.5957691216057308 * (x + 0.044715 * x * x * x)
    return x / (1 + tl.exp(-inner))


@triton.jit(
    do_not_specialize=["site", "rows_total", "capacity", "count"],
    do_not_specialize_on_alignment=["tiles", "used", "row_slots"],
)
def gated(
    parts,  # [count, rows_total, 2 * half]: gate, up
    bias,
    out,  # [rows_total, half]
    arena,
    entries,
    tiles,
    used,
    row_slots,  # int32 [rows_total], with SHARED
    planes,  # float32 [SITES, SPLITS, rows_total, rank_stride]
    site,
    rows_total,
    capacity,
    count,
    half,
    part_size,
    part_stride,
    rank_stride,
    slot_stride,
    PARTS: tl.constexpr,
    SPLITS: tl.constexpr,
    SITES: tl.constexpr,  # 2: gate and up; 1: one site makes both
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ADAPTED: tl.constexpr,
    SCALED: tl.constexpr,  # some row's adapter may change the base's output
    SHARED: tl.constexpr,  # some row's adapter may share A and B with others
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    pid = tl.program_id(0)
    step = tl.num_programs(0)
    blocks = (half + BLOCK_N - 1) // BLOCK_N
    tile_count = count_tiles(used, rows_total, ADAPTED, BLOCK_M)
    slot, first, rows = find_tile(tiles, pid // blocks, capacity, tile_count, rows_total, ADAPTED, BLOCK_M)
    plane_size = rows_total.to(tl.int64) * rank_stride
    ahead_entry = find_entry(entries, slot, slot_stride, site, ADAPTED)
    ahead_up = find_entry(entries, slot, slot_stride, site + SITES - 1, ADAPTED)
    ahead_change = find_change(entries, slot, slot_stride, site, SCALED)
    ahead_change_up = find_change(entries, slot, slot_stride, site + SITES - 1, SCALED)
    for item in range(pid, tile_count * blocks, step):
        entry, entry_up = ahead_entry, ahead_up
        change, change_up = ahead_change, ahead_change_up
        row = first.to(tl.int64) + tl.arange(0, BLOCK_M)
        live = tl.arange(0, BLOCK_M) < rows
        slot, first, rows = find_tile(
            tiles, (item + step) // blocks, capacity, tile_count, rows_total, ADAPTED, BLOCK_M
        )
        ahead_entry = find_entry(entries, slot, slot_stride, site, ADAPTED)
        ahead_up = find_entry(entries, slot, slot_stride, site + SITES - 1, ADAPTED)
        ahead_change = find_change(entries, slot, slot_stride, site, SCALED)
        ahead_change_up = find_change(entries, slot, slot_stride, site + SITES - 1, SCALED)
        n = item % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = n < half
        gate = sum_parts(parts, row, live, n, inside, count, part_size, part_stride, bias, PARTS, HAS_BIAS)
        up = sum_parts(
            parts, row, live, n + half, inside, count, part_size, part_stride, bias, PARTS, HAS_BIAS
        )
        if SCALED:
            FIRST: tl.constexpr = SITES - 1  # whether up is a site of its own, which begins at `half`
            gate = change_total(
                gate, change, arena, parts, row, live, n, 0, inside, (2 - FIRST) * half, count,
                part_size, part_stride, bias, PARTS, HAS_BIAS,
            )  # fmt: skip
            up = change_total(
                up, change_up, arena, parts, row, live, n + (1 - FIRST) * half, FIRST * half, inside,
                (2 - FIRST) * half, count, part_size, part_stride, bias, PARTS, HAS_BIAS,
            )  # fmt: skip
        if ADAPTED:
            if SITES == 2:
                gate, up = expand(
                    gate, up, arena, planes, entry, entry_up, planes + SPLITS * plane_size, row, live, n, n,
                    inside, inside, half, plane_size, rank_stride, entries, row_slots, slot_stride,
                    site, site + 1, SPLITS, SHARED, BLOCK_R,
                )  # fmt: skip
            else:
                gate, up = expand(
                    gate, up, arena, planes, entry, entry_up, None, row, live, n, n + half,
                    inside, inside, 2 * half, plane_size, rank_stride, entries, row_slots, slot_stride,
                    site, site, SPLITS, SHARED, BLOCK_R,
                )  # fmt: skip
        dtype = out.dtype.element_ty
        gate = activate(gate.to(dtype).to(tl.float32), ACTIVATION)
        product = multiply(gate.to(dtype), up.to(dtype))
        tl.store(out + row[None, :] * half + n[:, None], product, mask=live[None, :] & inside[:, None])


@triton.jit
def member_of(block, SITES: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr):
    """Which site a head belongs to: 0 for q, 1 for k, 2 for v; 0 when one site makes all."""
    member = (block >= HEADS).to(tl.int32) + (block >= HEADS + KV_HEADS).to(tl.int32)
    return member * (SITES // 2)


@triton.jit
def normalize(first, second, weight, d, inside, eps, HEAD_DIM: tl.constexpr, HALF: tl.constexpr):
    """RMSNorm over a head that is given by its halves, rounded once."""
    left = first.to(tl.float32)
    right = second.to(tl.float32)
    square = tl.reduce(left * left + right * right, 0, _sum_combine)
    scale = tl.rsqrt(square / HEAD_DIM + eps)[None, :]
    left *= scale * tl.load(weight + d, mask=inside, other=0.0).to(tl.float32)[:, None]
    right *= scale * tl.load(weight + HALF + d, mask=inside, other=0.0).to(tl.float32)[:, None]
    return left.to(first.dtype), right.to(first.dtype)


@triton.jit(
    do_not_specialize=["site", "rows_total", "capacity", "count", "eps"],
    do_not_specialize_on_alignment=["tiles", "used", "row_slots", "slot_mapping"],
)
def rope(
    parts,  # [count, rows_total, (HEADS + 2 * KV_HEADS) * HEAD_DIM]
    bias,
    q,  # [rows_total, HEADS, HEAD_DIM]
    k_cache,  # [slots, KV_HEADS, HEAD_DIM]
    v_cache,
    slot_mapping,  # [rows_total]
    cos,  # [rows_total, HEAD_DIM]
    sin,
    q_norm,  # [HEAD_DIM], with HAS_Q_NORM
    k_norm,
    arena,
    entries,
    tiles,
    used,
    row_slots,  # int32 [rows_total], with SHARED
    planes,  # float32 [SITES, SPLITS, rows_total, rank_stride]
    site,
    rows_total,
    capacity,
    count,
    eps,
    part_size,
    part_stride,
    rank_stride,
    slot_stride,
    PARTS: tl.constexpr,
    SPLITS: tl.constexpr,
    SITES: tl.constexpr,  # 3: q, k, v; 1: one site makes all
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_Q_NORM: tl.constexpr,
    HAS_K_NORM: tl.constexpr,
    ADAPTED: tl.constexpr,
    SCALED: tl.constexpr,  # some row's adapter may change the base's output
    SHARED: tl.constexpr,  # some row's adapter may share A and B with others
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # half of HEAD_DIM, rounded up to a power of two
    BLOCK_R: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    BLOCKS: tl.constexpr = HEADS + 2 * KV_HEADS
    HALF: tl.constexpr = HEAD_DIM // 2
    pid = tl.program_id(0)
    step = tl.num_programs(0)
    tile_count = count_tiles(used, rows_total, ADAPTED, BLOCK_M)
    slot, first, rows = find_tile(tiles, pid // BLOCKS, capacity, tile_count, rows_total, ADAPTED, BLOCK_M)
    plane_size = rows_total.to(tl.int64) * rank_stride
    d = tl.arange(0, BLOCK_N)
    inside = d < HALF
    ahead_member = member_of(pid % BLOCKS, SITES, HEADS, KV_HEADS)
    ahead_entry = find_entry(entries, slot, slot_stride, site + ahead_member, ADAPTED)
    ahead_change = find_change(entries, slot, slot_stride, site + ahead_member, SCALED)
    for item in range(pid, tile_count * BLOCKS, step):
        entry, change = ahead_entry, ahead_change
        block = item % BLOCKS
        is_q = block < HEADS
        is_k = (block >= HEADS) & (block < HEADS + KV_HEADS)
        head = tl.where(is_q, block, tl.where(is_k, block - HEADS, block - HEADS - KV_HEADS))
        member = member_of(block, SITES, HEADS, KV_HEADS)
        row = first.to(tl.int64) + tl.arange(0, BLOCK_M)
        live = tl.arange(0, BLOCK_M) < rows
        slot, first, rows = find_tile(
            tiles, (item + step) // BLOCKS, capacity, tile_count, rows_total, ADAPTED, BLOCK_M
        )
        ahead_member = member_of((item + step) % BLOCKS, SITES, HEADS, KV_HEADS)
        ahead_entry = find_entry(entries, slot, slot_stride, site + ahead_member, ADAPTED)
        ahead_change = find_change(entries, slot, slot_stride, site + ahead_member, SCALED)
        mask = live[None, :] & inside[:, None]
        column = block * HEAD_DIM + d
        left = sum_parts(
            parts, row, live, column, inside, count, part_size, part_stride, bias, PARTS, HAS_BIAS
        )
        right = sum_parts(
            parts, row, live, column + HALF, inside, count, part_size, part_stride, bias, PARTS, HAS_BIAS
        )
        # column of the site, and how many it has
        n = (head if SITES == 3 else block) * HEAD_DIM + d
        width = tl.where(is_q, HEADS, KV_HEADS) * HEAD_DIM if SITES == 3 else BLOCKS * HEAD_DIM
        if SCALED:
            start = (block - head) * HEAD_DIM if SITES == 3 else 0
            left = change_total(
                left, change, arena, parts, row, live, n, start, inside, width, count,
                part_size, part_stride, bias, PARTS, HAS_BIAS,
            )  # fmt: skip
            right = change_total(
                right, change, arena, parts, row, live, n + HALF, start, inside, width, count,
                part_size, part_stride, bias, PARTS, HAS_BIAS,
            )  # fmt: skip
        if ADAPTED:
            left, right = expand(
                left, right, arena, planes + member * SPLITS * plane_size, entry, entry, None, row, live,
                n, n + HALF, inside, inside, width, plane_size, rank_stride, entries, row_slots, slot_stride,
                site + member, site + member, SPLITS, SHARED, BLOCK_R,
            )  # fmt: skip
        dtype = q.dtype.element_ty
        left = left.to(dtype)
        right = right.to(dtype)
        if HAS_Q_NORM:  # noqa: SIM102  one is of the compilation, the other of the run
            if is_q:
                left, right = normalize(left, right, q_norm, d, inside, eps, HEAD_DIM, HALF)
        if HAS_K_NORM:  # noqa: SIM102
            if is_k:
                left, right = normalize(left, right, k_norm, d, inside, eps, HEAD_DIM, HALF)
        if is_q | is_k:
            angle = row[None, :] * HEAD_DIM + d[:, None]
            cos_left = tl.load(cos + angle, mask=mask, other=0.0)
            cos_right = tl.load(cos + angle + HALF, mask=mask, other=0.0)
            sin_left = tl.load(sin + angle, mask=mask, other=0.0)
            sin_right = tl.load(sin + angle + HALF, mask=mask, other=0.0)
            turned = multiply(left, cos_left).to(tl.float32) - multiply(right, sin_left).to(tl.float32)
            other = multiply(right, cos_right).to(tl.float32) + multiply(left, sin_right).to(tl.float32)
            left = turned.to(dtype)
            right = other.to(dtype)
        if is_q:
            at = (row[None, :] * HEADS + head) * HEAD_DIM + d[:, None]
            tl.store(q + at, left, mask=mask)
            tl.store(q + at + HALF, right, mask=mask)
        else:
            place = tl.load(slot_mapping + row, mask=live, other=0).to(tl.int64)
            at = (place[None, :] * KV_HEADS + head) * HEAD_DIM + d[:, None]
            if is_k:
                tl.store(k_cache + at, left, mask=mask)
                tl.store(k_cache + at + HALF, right, mask=mask)
            else:
                tl.store(v_cache + at, left, mask=mask)
                tl.store(v_cache + at + HALF, right, mask=mask)
