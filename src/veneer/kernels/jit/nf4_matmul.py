"""Device code of the NF4 matmul for few rows, in Gluon: Triton with explicit layouts and asynchronous products.

See kernels/nf4.py for the launcher and nf4_layout.py for the packed words, whose order makes a lane's 16 bytes its
own fragment of the matrix unit's left operand: no weight is ever exchanged between lanes.

Two ways of decoding, two ways of multiplying, chosen by the plan:

LOOKUP   A table of all 256 pairs of values in shared memory, a copy for each lane, so that no two lanes share a
         bank: 12 instructions for 8 weights. It takes 32 KiB.
else     Byte permutes on tables in registers: 19 instructions of the integer unit for 8 weights.
WGMMA    Hopper's asynchronous product: one block of columns is decoded while the one before is multiplied. Weights
         are scaled before it, in bfloat16, so that it goes on adding to one sum: scaling each product instead took
         twice the registers and one operation for each row and 64 weights.
else     mma.sync, whose short dependences the other warps hide. Products are scaled in float32.

Weights, scales and tables never change, so they are fetched before waiting for the kernel that makes x
(programmatic dependent launch).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from veneer.kernels.jit.nf4 import DECODE, DECODE_CONSTRAINTS

# The names before and after Triton 3.8.
async_load = getattr(async_copy, "async_load", async_copy.async_copy_global_to_shared)
barrier = getattr(gl, "barrier", None) or gl.thread_barrier

# Entry e of the table stands at bytes 128 e + 4 lane. $1: the 256 entries in memory; $0: where the table starts.
# Emitted once in a kernel, because the table is a static variable of it.
FILL_TABLE = gl.constexpr("""
.shared .align 128 .b8 veneer_nf4_pairs[32768];
{
.reg .b32 t, n, e, o, l, v<8>;
.reg .b64 p;
.reg .pred more;
mov.u32 t, %tid.x;
mov.u32 n, %ntid.x;
mov.u32 $0, veneer_nf4_pairs;
and.b32 l, t, 31;
shl.b32 l, l, 2;
add.u32 l, l, $0;
shr.u32 e, t, 5;
shl.b32 e, e, 3;
shr.u32 n, n, 5;
shl.b32 n, n, 3;
VENEER_NF4_FILL:
mul.wide.u32 p, e, 4;
add.u64 p, p, $1;
ld.global.nc.v4.b32 {v0, v1, v2, v3}, [p];
ld.global.nc.v4.b32 {v4, v5, v6, v7}, [p+16];
shl.b32 o, e, 7;
add.u32 o, o, l;
st.shared.b32 [o], v0;
st.shared.b32 [o+128], v1;
st.shared.b32 [o+256], v2;
st.shared.b32 [o+384], v3;
st.shared.b32 [o+512], v4;
st.shared.b32 [o+640], v5;
st.shared.b32 [o+768], v6;
st.shared.b32 [o+896], v7;
add.u32 e, e, n;
setp.lt.u32 more, e, 256;
@more bra VENEER_NF4_FILL;
}
""")
# $0-$7: the values of nibbles 0-7 of the word $8. $9: this lane's copy of the table.
LOOK_UP = gl.constexpr("""{
.reg .b32 a, b, c, d;
prmt.b32 a, $8, 0, 0x4440;
prmt.b32 b, $8, 0, 0x4441;
prmt.b32 c, $8, 0, 0x4442;
prmt.b32 d, $8, 0, 0x4443;
mad.lo.u32 a, a, 128, $9;
mad.lo.u32 b, b, 128, $9;
mad.lo.u32 c, c, 128, $9;
mad.lo.u32 d, d, 128, $9;
ld.shared.b32 a, [a];
ld.shared.b32 b, [b];
ld.shared.b32 c, [c];
ld.shared.b32 d, [d];
mov.b32 {$0, $1}, a;
mov.b32 {$2, $3}, b;
mov.b32 {$4, $5}, c;
mov.b32 {$6, $7}, d;
}""")
LOOK_UP_CONSTRAINTS = gl.constexpr("=h,=h,=h,=h,=h,=h,=h,=h,r,r")
# $0, $1: the two float16 scales of the word $2, each twice in bfloat16.
TWICE = gl.constexpr("""{
.reg .f16 l, h;
.reg .f32 f;
mov.b32 {l, h}, $2;
cvt.f32.f16 f, l;
cvt.rn.bf16x2.f32 $0, f, f;
cvt.f32.f16 f, h;
cvt.rn.bf16x2.f32 $1, f, f;
}""")
# $0-$7: the values $8-$15 times the scale of their row: $16 of a word's first row, $17 of the one 8 further.
SCALE = gl.constexpr("""{
.reg .b32 a, b, c, d;
mov.b32 a, {$8, $9};
mov.b32 b, {$10, $11};
mov.b32 c, {$12, $13};
mov.b32 d, {$14, $15};
mul.rn.bf16x2 a, a, $16;
mul.rn.bf16x2 b, b, $17;
mul.rn.bf16x2 c, c, $16;
mul.rn.bf16x2 d, d, $17;
mov.b32 {$0, $1}, a;
mov.b32 {$2, $3}, b;
mov.b32 {$4, $5}, c;
mov.b32 {$6, $7}, d;
}""")
SCALE_CONSTRAINTS = gl.constexpr("=h,=h,=h,=h,=h,=h,=h,=h,h,h,h,h,h,h,h,h,r,r")
AWAIT = gl.constexpr("griddepcontrol.wait; griddepcontrol.launch_dependents; mov.u32 $0, 0;")


@gluon.jit
def load_tables(tables, lane, LOOKUP: gl.constexpr):
    """What `decode` needs: the address of this lane's copy of the pairs, or eight registers of bytes."""
    if LOOKUP:
        start = gl.inline_asm_elementwise(FILL_TABLE, "=r,l", [tables], dtype=gl.int32, is_pure=False, pack=1)
        table = (start + lane % 32 * 4)[:, None]
    else:
        at = tables + (lane % 32)[:, None]
        table = (
            gl.load(at),
            gl.load(at + 32),
            gl.load(at + 64),
            gl.load(at + 96),
            gl.load(at + 128),
            gl.load(at + 160),
            gl.load(at + 192),
            gl.load(at + 224),
        )
    return table


@gluon.jit
def decode(words, table, LOOKUP: gl.constexpr):
    """Words [TILES * 128, 4] -> the unscaled values of their nibbles, eight tensors of that shape."""
    if LOOKUP:
        values = gl.inline_asm_elementwise(
            LOOK_UP, LOOK_UP_CONSTRAINTS, [words, table], dtype=(gl.bfloat16,) * 8, is_pure=True, pack=1
        )
    else:
        values = gl.inline_asm_elementwise(
            DECODE,
            DECODE_CONSTRAINTS,
            [words, table[0], table[1], table[2], table[3], table[4], table[5], table[6], table[7]],
            dtype=(gl.bfloat16,) * 8,
            is_pure=True,
            pack=1,
        )
    return values


@gluon.jit
def as_operand(values, TILES: gl.constexpr, operand: gl.constexpr):
    """Eight tensors of `decode` -> the weights [TILES * 64, 64] as a left operand."""
    left = gl.join(gl.join(values[0], values[1]), gl.join(values[2], values[3]))
    right = gl.join(gl.join(values[4], values[5]), gl.join(values[6], values[7]))
    joined = gl.join(left, right)  # [lane, k16 step, column bit 0, row bit 3, column bit 3]
    joined = gl.reshape(joined, [TILES * 4, 8, 4, 4, 2, 2, 2])
    joined = gl.permute(joined, [0, 5, 1, 3, 6, 2, 4])
    return gl.convert_layout(gl.reshape(joined, [TILES * 64, 64]), operand, assert_trivial=True)


@gluon.jit
def scaled(values, low, high, TILES: gl.constexpr, operand: gl.constexpr):
    """`as_operand` of values times the scales of their rows, rounded to bfloat16.

    low, high: scales [TILES * 128, 1] of a word's first row and of the one 8 further, from `twice`.
    """
    values = gl.inline_asm_elementwise(
        SCALE,
        SCALE_CONSTRAINTS,
        [values[0], values[1], values[2], values[3], values[4], values[5], values[6], values[7], low, high],
        dtype=(gl.bfloat16,) * 8,
        is_pure=True,
        pack=1,
    )
    return as_operand(values, TILES, operand)


@gluon.jit
def twice(word):
    """The two float16 scales of each word in bfloat16, each twice in a word of its own."""
    return gl.inline_asm_elementwise(
        TWICE, "=r,=r,r", [word], dtype=(gl.int32, gl.int32), is_pure=True, pack=1
    )


@gluon.jit
def halves(pair):
    """The two float16 scales of one word, as float32."""
    low = (pair & 0xFFFF).to(gl.int16).to(gl.float16, bitcast=True)
    high = ((pair >> 16) & 0xFFFF).to(gl.int16).to(gl.float16, bitcast=True)
    return low.to(gl.float32), high.to(gl.float32)


@gluon.jit
def copy_x(x_rows, live, column, ring, slot, pair, last, in_features, EVEN: gl.constexpr):
    """Start copying x's two blocks of columns of a pair into the ring; nothing of pairs from `last` on."""
    for half in gl.static_range(2):
        first_column = pair * 128 + half * 64
        mask = live & (pair < last)
        if not EVEN:
            mask = mask & (column < in_features - first_column)[None, :]
        async_load(ring.index(slot * 2 + half), x_rows + first_column, mask=mask)
    async_copy.commit_group()


@gluon.jit(do_not_specialize=["rows", "split_pairs", "second", "third"])
def matmul(
    x,  # bf16 [GROUPS, rows, in]
    packed,  # int32 [out / 64, pairs, 2, 128, 4]
    scales,  # int32 [out / 64, pairs, 64], two float16 each
    multiplier,  # of all scales
    tables,  # int32 [256] with LOOKUP, else [8, 32]
    bias,  # bf16 [out], with HAS_BIAS
    out,  # [splits, rows, out]
    rows,
    in_features,
    out_features,
    pairs,  # of blocks of 64 columns
    split_pairs,
    second,  # tile of 64 output features at which the second group begins, with GROUPS > 1
    third,  # and the third
    GROUPS: gl.constexpr,  # of output features, each with an x of its own
    TILES: gl.constexpr,  # of 64 output features
    BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr,  # pairs of blocks of x in shared memory
    EVEN: gl.constexpr,  # in_features is a multiple of 128
    HAS_BIAS: gl.constexpr,
    LOOKUP: gl.constexpr,
    WGMMA: gl.constexpr,
    PDL: gl.constexpr,
):
    """out[split] = x[:, columns of split] @ W[:, columns of split]^T for TILES * 64 output features."""
    WARPS: gl.constexpr = gl.num_warps()
    if WGMMA:
        acc: gl.constexpr = gl.NVMMADistributedLayout(
            version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, BLOCK_M, 16]
        )
    else:
        acc: gl.constexpr = gl.NVMMADistributedLayout(
            version=[2, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, 8]
        )
    left: gl.constexpr = gl.DotOperandLayout(0, acc, 2)
    right: gl.constexpr = gl.DotOperandLayout(1, acc, 2)
    word_layout: gl.constexpr = gl.BlockedLayout([1, 4], [32, 1], [WARPS, 1], [1, 0])
    x_layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    first_row = gl.program_id(0) * BLOCK_M  # neighbours share weights, so L2 has them
    tile = gl.program_id(1) * TILES
    split = gl.program_id(2)
    first = split * split_pairs
    last = gl.minimum(first + split_pairs, pairs)

    lane = gl.arange(0, TILES * 128, gl.SliceLayout(1, word_layout))
    table = load_tables(tables, lane, LOOKUP)
    words = packed + ((tile + lane // 128).to(gl.int64) * pairs * 1024 + lane % 128 * 4)[:, None]
    words += gl.arange(0, 4, gl.SliceLayout(0, word_layout))[None, :]
    n = gl.arange(0, TILES * 64, gl.SliceLayout(1, acc))
    if WGMMA:
        row = lane % 128 // 32 * 16 + lane % 32 // 4
        scale_rows = scales + ((tile + lane // 128).to(gl.int64) * pairs * 64 + row)[:, None]
    else:
        scale_rows = scales + (tile + n // 64).to(gl.int64) * pairs * 64 + n % 64
    words0 = gl.load(words + first * 1024)
    words1 = gl.load(words + first * 1024 + 512)
    scale = gl.load(scale_rows + first * 64)
    scale_high = gl.load(scale_rows + first * 64 + 8) if WGMMA else scale
    if PDL:
        gl.inline_asm_elementwise(AWAIT, "=r,r", [rows], dtype=gl.int32, is_pure=False, pack=1)

    ring = gl.allocate_shared_memory(
        gl.bfloat16,
        [STAGES * 2, BLOCK_M, 64],
        gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2),
    )
    column = gl.arange(0, 64, gl.SliceLayout(0, x_layout))
    x_row = first_row + gl.arange(0, BLOCK_M, gl.SliceLayout(1, x_layout))
    x_rows = x + x_row.to(gl.int64)[:, None] * in_features + column[None, :]
    if GROUPS > 1:
        group = (tile >= second).to(gl.int32)
        if GROUPS > 2:
            group += (tile >= third).to(gl.int32)
        x_rows += group.to(gl.int64) * rows * in_features
    live = (x_row < rows)[:, None]
    for stage in gl.static_range(STAGES - 1):
        copy_x(x_rows, live, column, ring, stage, first + stage, last, in_features, EVEN)

    zero = gl.full([TILES * 64, BLOCK_M], 0.0, gl.float32, acc)
    total = zero
    for pair in range(first, last):
        ahead = gl.minimum(pair + 1, last - 1)
        next0 = gl.load(words + ahead * 1024)
        next1 = gl.load(words + ahead * 1024 + 512)
        next_scale = gl.load(scale_rows + ahead * 64)
        next_high = gl.load(scale_rows + ahead * 64 + 8) if WGMMA else next_scale
        async_copy.wait_group(STAGES - 2)
        if WGMMA:
            fence_async_shared()
        barrier()  # x and the table are whole, and no warp reads the pair before any more
        slot = (pair - first) % STAGES
        filled = (slot + STAGES - 1) % STAGES
        copy_x(x_rows, live, column, ring, filled, pair + STAGES - 1, last, in_features, EVEN)
        x0 = ring.index(slot * 2).permute([1, 0])
        x1 = ring.index(slot * 2 + 1).permute([1, 0])
        if WGMMA:
            low0, low1 = twice(scale)
            high0, high1 = twice(scale_high)
            w0 = scaled(decode(words0, table, LOOKUP), low0, high0, TILES, left)
            total = warpgroup_mma(w0, x0, total, is_async=True)
            w1 = scaled(decode(words1, table, LOOKUP), low1, high1, TILES, left)
            total = warpgroup_mma(w1, x1, total, is_async=True)
            total = warpgroup_mma_wait(0, deps=[total])
        else:
            scale0, scale1 = halves(scale)
            w0 = as_operand(decode(words0, table, LOOKUP), TILES, left)
            total += mma_v2(w0, x0.load(right), zero) * scale0[:, None]
            w1 = as_operand(decode(words1, table, LOOKUP), TILES, left)
            total += mma_v2(w1, x1.load(right), zero) * scale1[:, None]
        words0, words1, scale, scale_high = next0, next1, next_scale, next_high
    async_copy.wait_group(0)

    total *= multiplier
    n += tile * 64
    inside = n < out_features
    if HAS_BIAS:
        total += gl.load(bias + n, mask=inside, other=0.0).to(gl.float32)[:, None]
    m = first_row + gl.arange(0, BLOCK_M, gl.SliceLayout(0, acc))
    at = (split.to(gl.int64) * rows + m)[None, :] * out_features + n[:, None]
    gl.store(out + at, total.to(out.dtype.element_ty), mask=inside[:, None] & (m < rows)[None, :])
