"""Device code of the activations of adapters. See kernels/activation.py for the formulas and the launcher.

Tiles are ranks x rows, as in the kernels that leave h and read it.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.language.standard import _elementwise_max, _elementwise_min, _sum_combine

from veneer.kernels.jit.low_rank import ENTRY, load_tile
from veneer.kernels.tables import (
    ACTIVATION,
    ACTIVATIONS,
    DETAIL,
    ELEMENTWISE,
    GROUP,
    INNER_OFFSET,
    RANK,
)

INNER_COLUMN = tl.constexpr(INNER_OFFSET)
RANK_COLUMN = tl.constexpr(RANK)
KIND_COLUMN = tl.constexpr(ACTIVATION)
GROUP_COLUMN = tl.constexpr(GROUP)
DETAIL_COLUMN = tl.constexpr(DETAIL)
LAST_ELEMENTWISE = tl.constexpr(len(ELEMENTWISE) - 1)
RELU = tl.constexpr(ACTIVATIONS.index("relu"))
SILU = tl.constexpr(ACTIVATIONS.index("silu"))
GELU = tl.constexpr(ACTIVATIONS.index("gelu"))
GELU_TANH = tl.constexpr(ACTIVATIONS.index("gelu_tanh"))
TANH = tl.constexpr(ACTIVATIONS.index("tanh"))
SIGMOID = tl.constexpr(ACTIVATIONS.index("sigmoid"))
LEAKY_RELU = tl.constexpr(ACTIVATIONS.index("leaky_relu"))
SOFTMAX = tl.constexpr(ACTIVATIONS.index("softmax"))
ARROW = tl.constexpr(ACTIVATIONS.index("arrow"))


@triton.jit
def load_number(entry, COLUMN: tl.constexpr, slot):
    """A column of an entry; 0 for the base."""
    return tl.load(entry + COLUMN, mask=slot >= 0, other=0).to(tl.int32)


@triton.jit
def load_inner(
    planes, arena, inner, row, live, r, inside, splits, plane_size, rank_stride
):  # fmt: skip
    """h + d [BLOCK_R, BLOCK_M] at ranks r; 0 where not `inside`. inner: offset of d, or -1."""
    at = planes + row[None, :] * rank_stride + r[:, None]
    mask = live[None, :] & inside[:, None]
    h = tl.load(at, mask=mask, other=0.0)
    # not unrolled in full: there are many of these loops, and compiling them would take long
    for split in tl.range(1, splits, loop_unroll_factor=4):
        h += tl.load(at + split * plane_size, mask=mask, other=0.0)
    if inner >= 0:
        h += tl.load(arena + inner + r, mask=inside, other=0.0).to(tl.float32)[:, None]
    return h


@triton.jit
def store_rows(out, h, row, live, r, inside, rank_stride):
    tl.store(out + row[None, :] * rank_stride + r[:, None], h, mask=live[None, :] & inside[:, None])


@triton.jit
def apply(h, kind):
    """The elementwise activation of this number."""
    scaled = h
    if kind == GELU_TANH:  # (1 + tanh(u)) / 2 = sigmoid(2u)
        scaled = 1.5957691216057308 * (h + 0.044715 * h * h * h)
    elif kind == TANH:
        scaled = 2 * h
    sigmoid = 1 / (1 + tl.exp(-scaled))  # of several kinds: code once
    result = h
    if kind == RELU:
        result = tl.maximum(h, 0.0)
    elif (kind == SILU) | (kind == GELU_TANH):
        result = h * sigmoid
    elif kind == GELU:
        result = 0.5 * h * (1 + tl.erf(h * 0.7071067811865476))
    elif kind == TANH:
        result = 2 * sigmoid - 1
    elif kind == SIGMOID:
        result = sigmoid
    elif kind == LEAKY_RELU:
        result = tl.where(h < 0, 0.01 * h, h)
    return result


@triton.jit
def choose(score, kept):
    """Softmax [CHOICES, BLOCK_M] over the kept scores of each row; 0 elsewhere."""
    peak = tl.reduce(tl.where(kept, score, float("-inf")), 0, _elementwise_max)
    weight = tl.where(kept, tl.exp(score - peak[None, :]), 0.0)
    return weight / tl.reduce(weight, 0, _sum_combine)[None, :]


@triton.jit
def keep_largest(score, choice, top_k, CHOICES: tl.constexpr):
    """The `top_k` largest of each row's scores, none negative; the lowest number among equals."""
    left = score
    for _ in range(top_k):
        best = tl.reduce(left, 0, _elementwise_max)
        first = tl.reduce(tl.where(left == best[None, :], choice[:, None], CHOICES), 0, _elementwise_min)
        left = tl.where(choice[:, None] == first[None, :], -2.0, left)
    return left == -2.0


@triton.jit(
    do_not_specialize=["site", "rows_total", "capacity", "splits"],
    do_not_specialize_on_alignment=["tiles", "used"],
)
def activate(
    planes,  # float32 [SITES, splits, rows_total, rank_stride]
    out,  # float32 [SITES, 1, rows_total, rank_stride]
    arena,
    entries,  # int64 [slots, sites, ENTRY]
    tiles,  # int32 [capacity, 3]
    used,  # int32 [1]
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
    CHOICES: tl.constexpr,  # the most of an arrow or a fusion
    PDL: tl.constexpr,
):
    """out[s, row] = phi(sum of planes[s, :, row] + d) at site + s, for every row of an adapter."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    count = tl.load(used)
    plane_size = rows_total.to(tl.int64) * rank_stride
    for item in range(tl.program_id(0), count * (SITES * PARTS), tl.num_programs(0)):
        slot, first, rows = load_tile(tiles, item // (SITES * PARTS), capacity, count)
        member = item // PARTS % SITES
        part = item % PARTS
        entry = entries + slot.to(tl.int64) * slot_stride + (site + member) * ENTRY
        rank = load_number(entry, RANK_COLUMN, slot)
        kind = load_number(entry, KIND_COLUMN, slot)
        size = load_number(entry, GROUP_COLUMN, slot)
        detail = load_number(entry, DETAIL_COLUMN, slot)
        inner = tl.load(entry + INNER_COLUMN, mask=slot >= 0, other=-1)
        row = first.to(tl.int64) + tl.arange(0, BLOCK_M)
        live = tl.arange(0, BLOCK_M) < rows
        source = planes + member * splits * plane_size
        target = out + member * plane_size
        if kind <= LAST_ELEMENTWISE:
            for start in range(part * BLOCK_R, rank, PARTS * BLOCK_R):
                r = start + tl.arange(0, BLOCK_R)
                h = load_inner(source, arena, inner, row, live, r, r < rank, splits, plane_size, rank_stride)
                store_rows(target, apply(h, kind), row, live, r, r < rank, rank_stride)
        elif kind == SOFTMAX:
            for group in range(part, rank // size, PARTS):
                stop = (group + 1) * size
                peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
                for start in range(group * size, stop, BLOCK_R):
                    r = start + tl.arange(0, BLOCK_R)
                    h = load_inner(
                        source, arena, inner, row, live, r, r < stop, splits, plane_size, rank_stride
                    )
                    h = tl.where((r < stop)[:, None], h, float("-inf"))
                    peak = tl.maximum(peak, tl.reduce(h, 0, _elementwise_max))
                total = tl.full((BLOCK_M,), 0.0, tl.float32)
                for start in range(group * size, stop, BLOCK_R):
                    r = start + tl.arange(0, BLOCK_R)
                    h = load_inner(
                        source, arena, inner, row, live, r, r < stop, splits, plane_size, rank_stride
                    )
                    weight = tl.where((r < stop)[:, None], tl.exp(h - peak[None, :]), 0.0)
                    total += tl.reduce(weight, 0, _sum_combine)
                for start in range(group * size, stop, BLOCK_R):
                    r = start + tl.arange(0, BLOCK_R)
                    h = load_inner(
                        source, arena, inner, row, live, r, r < stop, splits, plane_size, rank_stride
                    )
                    weight = tl.exp(h - peak[None, :]) / total[None, :]
                    store_rows(target, weight, row, live, r, r < stop, rank_stride)
        else:
            choice = tl.arange(0, CHOICES)
            choices = rank // (1 + size) if kind == ARROW else rank // (1 + 2 * size)
            score = load_inner(
                source, arena, inner, row, live, choice, choice < choices, splits, plane_size, rank_stride
            )
            keys = choices * size  # from a bottleneck to its key
            if kind == ARROW:
                score = tl.where((choice < choices)[:, None], tl.abs(score), -1.0)
                gates = choose(score, keep_largest(score, choice, detail, CHOICES))
            else:
                for each in range(choices):
                    total = tl.full((BLOCK_M,), 0.0, tl.float32)
                    stop = choices + (each + 1) * size
                    for start in range(choices + each * size, stop, BLOCK_R):
                        r = start + tl.arange(0, BLOCK_R)
                        h = load_inner(
                            source, arena, inner, row, live, r, r < stop, splits, plane_size, rank_stride
                        )
                        key = load_inner(
                            source,
                            arena,
                            inner,
                            row,
                            live,
                            keys + r,
                            r < stop,
                            splits,
                            plane_size,
                            rank_stride,
                        )
                        total += tl.reduce(apply(h, detail) * key, 0, _sum_combine)
                    score += tl.where((choice == each)[:, None], total[None, :], 0.0)
                gates = choose(score, (choice < choices)[:, None])
            if part == 0:
                shown = tl.where(kind == ARROW, 0.0, gates)
                store_rows(target, shown, row, live, choice, choice < choices, rank_stride)
            for each in range(part, choices, PARTS):
                gate = tl.reduce(tl.where((choice == each)[:, None], gates, 0.0), 0, _sum_combine)
                stop = choices + (each + 1) * size
                for start in range(choices + each * size, stop, BLOCK_R):
                    r = start + tl.arange(0, BLOCK_R)
                    h = load_inner(
                        source, arena, inner, row, live, r, r < stop, splits, plane_size, rank_stride
                    )
                    if kind != ARROW:
                        h = apply(h, detail)
                        zero = tl.full((BLOCK_R, BLOCK_M), 0.0, tl.float32)
                        store_rows(target, zero, row, live, keys + r, r < stop, rank_stride)
                    store_rows(target, gate[None, :] * h, row, live, r, r < stop, rank_stride)
