"""Device code of the NF4 matmul. See kernels/nf4.py for the layout, the permute tables and the launcher.

With PERMUTE the codes are decoded by byte permutes in inline PTX: 19 operations for 8 weights, no table in
memory. Without it they are looked up in a table: what the interpreter and other vendors' GPUs run.

The order of the packed words makes a lane's 16 bytes its own fragment of the matrix unit's left operand, so
join, reshape and permute below move no data, as long as there are four warps for each tile of 64 rows.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# $0-$7: the values of nibbles 0-7 of the word $8. $9-$12: table of the low bytes, $13-$16: of the high bytes.
# prmt takes four nibbles as selectors; one with bit 3 set yields the sign of the byte, which the xor undoes.
DECODE = tl.constexpr("""{
.reg .b32 w, v, m, n, p, q, a, b, c, d, e;
mov.b32 w, $8;
xor.b32 m, w, 0x88888888;
shr.u32 v, w, 16;
shr.u32 n, m, 16;
prmt.b32 p, $9, $10, w;
prmt.b32 q, $11, $12, m;
xor.b32 a, p, q;
prmt.b32 p, $13, $14, w;
prmt.b32 q, $15, $16, m;
xor.b32 b, p, q;
prmt.b32 p, $9, $10, v;
prmt.b32 q, $11, $12, n;
xor.b32 c, p, q;
prmt.b32 p, $13, $14, v;
prmt.b32 q, $15, $16, n;
xor.b32 d, p, q;
prmt.b32 e, a, b, 0x5140;
mov.b32 {$0, $1}, e;
prmt.b32 e, a, b, 0x7362;
mov.b32 {$2, $3}, e;
prmt.b32 e, c, d, 0x5140;
mov.b32 {$4, $5}, e;
prmt.b32 e, c, d, 0x7362;
mov.b32 {$6, $7}, e;
}""")
DECODE_CONSTRAINTS = tl.constexpr("=h,=h,=h,=h,=h,=h,=h,=h,r,r,r,r,r,r,r,r,r")
PREFETCH = tl.constexpr("prefetch.global.L2 [$1]; mov.u32 $0, 0;")


@triton.jit
def load_tables(tables, lane):
    """The eight permute tables, for each lane in its own registers: uniform ones would be copied at each use."""
    at = tables + (lane % 32)[:, None]
    return (
        tl.load(at),
        tl.load(at + 32),
        tl.load(at + 64),
        tl.load(at + 96),
        tl.load(at + 128),
        tl.load(at + 160),
        tl.load(at + 192),
        tl.load(at + 224),
    )


@triton.jit
def decode(words, tables, codebook, TILES: tl.constexpr, PERMUTE: tl.constexpr):
    """Words [TILES * 128, 4] -> the unscaled weights [TILES * 64, 64], in the codebook's type."""
    if PERMUTE:
        v0, v1, v2, v3, v4, v5, v6, v7 = tl.inline_asm_elementwise(
            DECODE,
            DECODE_CONSTRAINTS,
            [words, tables[0], tables[1], tables[2], tables[3], tables[4], tables[5], tables[6], tables[7]],
            dtype=(tl.bfloat16,) * 8,
            is_pure=True,
            pack=1,
        )
    else:
        v0 = tl.load(codebook + (words & 15))
        v1 = tl.load(codebook + ((words >> 4) & 15))
        v2 = tl.load(codebook + ((words >> 8) & 15))
        v3 = tl.load(codebook + ((words >> 12) & 15))
        v4 = tl.load(codebook + ((words >> 16) & 15))
        v5 = tl.load(codebook + ((words >> 20) & 15))
        v6 = tl.load(codebook + ((words >> 24) & 15))
        v7 = tl.load(codebook + ((words >> 28) & 15))
    left = tl.join(tl.join(v0, v1), tl.join(v2, v3))
    right = tl.join(tl.join(v4, v5), tl.join(v6, v7))
    values = tl.join(left, right)  # [lane, k16 step, column bit 0, row bit 3, column bit 3]
    values = tl.reshape(values, [TILES * 4, 8, 4, 4, 2, 2, 2])
    values = tl.permute(values, [0, 5, 1, 3, 6, 2, 4])
    return tl.reshape(values, [TILES * 64, 64])


@triton.jit
def halves(pair):
    """The two float16 scales of one word, as float32."""
    low = (pair & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)
    high = ((pair >> 16) & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)
    return low.to(tl.float32), high.to(tl.float32)


@triton.jit(do_not_specialize=["rows", "split_pairs"])
def matmul(
    x,  # [rows, in]
    packed,  # int32 [out / 64, pairs, 2, 128, 4]
    scales,  # int32 [out / 64, pairs, 64], two float16 each
    multiplier,  # of all scales
    tables,  # int32 [8, 32]
    codebook,  # [16], x's type
    bias,  # [out], x's type, with HAS_BIAS
    out,  # [splits, rows, out]
    rows,
    in_features,
    out_features,
    pairs,  # of blocks of 64 columns
    split_pairs,
    TILES: tl.constexpr,  # of 64 output features; four warps for each
    BLOCK_M: tl.constexpr,
    EVEN: tl.constexpr,  # in_features is a multiple of 128
    HAS_BIAS: tl.constexpr,
    PERMUTE: tl.constexpr,
    PREFETCHED: tl.constexpr,  # pairs to bring into L2 before waiting for x
    PDL: tl.constexpr,
    STAGES: tl.constexpr,
):
    """out[split] = x[:, columns of split] @ W[:, columns of split]^T for TILES * 64 output features."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # neighbours share weights, so L2 has them
    tile = tl.program_id(1) * TILES
    split = tl.program_id(2)
    first = split * split_pairs
    last = tl.minimum(first + split_pairs, pairs)

    lane = tl.arange(0, TILES * 128)
    word_tile = (tile + lane // 128).to(tl.int64) * pairs
    words = packed + (word_tile * 1024 + lane % 128 * 4)[:, None] + tl.arange(0, 4)[None, :]
    n = tl.arange(0, TILES * 64)
    scale_rows = scales + (tile + n // 64).to(tl.int64) * pairs * 64 + n % 64
    if PDL:
        ahead = packed + word_tile * 1024 + lane % 128 * 4
        for pair in tl.static_range(PREFETCHED):
            at = ahead + tl.minimum(first + pair, pairs - 1) * 1024
            tl.inline_asm_elementwise(PREFETCH, "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1)
            tl.inline_asm_elementwise(PREFETCH, "=r,l", [at + 512], dtype=tl.int32, is_pure=False, pack=1)
    table = load_tables(tables, lane) if PERMUTE else ()
    if PDL:
        gdc_wait()
        gdc_launch_dependents()

    k = tl.arange(0, 64)
    x_rows = x + m.to(tl.int64)[:, None] * in_features + k[None, :]
    live = (m < rows)[:, None]
    total = tl.full((TILES * 64, BLOCK_M), 0.0, tl.float32)
    for pair in tl.range(first, last, num_stages=STAGES):
        scale = tl.load(scale_rows + pair * 64)
        words0 = tl.load(words + pair * 1024)
        x0 = tl.load(x_rows + pair * 128, mask=live, other=0.0)
        words1 = tl.load(words + pair * 1024 + 512)
        live1 = live if EVEN else live & (k < in_features - 64 - pair * 128)[None, :]
        x1 = tl.load(x_rows + pair * 128 + 64, mask=live1, other=0.0)
        part0 = tl.dot(decode(words0, table, codebook, TILES, PERMUTE), tl.trans(x0), input_precision="ieee")
        part1 = tl.dot(decode(words1, table, codebook, TILES, PERMUTE), tl.trans(x1), input_precision="ieee")
        scale0, scale1 = halves(scale)
        total += part0 * scale0[:, None]
        total += part1 * scale1[:, None]

    total *= multiplier
    n += tile * 64
    inside = n < out_features
    if HAS_BIAS:
        total += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)[:, None]
    at = (split.to(tl.int64) * rows + m)[:, None] * out_features + n[None, :]
    tl.store(out + at, tl.trans(total).to(out.dtype.element_ty), mask=live & inside[None, :])


@triton.jit(do_not_specialize=["size"])
def add_planes(
    planes,  # float32 [SPLITS, size]
    bias,
    out,  # [size], rows of out_features
    size,
    out_features,
    SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = the sum of the planes in their order, plus bias."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    total = tl.load(planes + at, mask=inside, other=0.0)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(planes + split * size.to(tl.int64) + at, mask=inside, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + at % out_features, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def dequantize(
    packed,
    scales,
    multiplier,
    tables,
    codebook,
    out,  # [out_features, in_features]
    in_features,
    out_features,
    pairs,
    PERMUTE: tl.constexpr,
):
    """One 64 x 128 tile of the weight, rounded once after scaling."""
    pair = tl.program_id(0)
    tile = tl.program_id(1)
    lane = tl.arange(0, 128)
    block = tile.to(tl.int64) * pairs + pair
    words = packed + block * 1024 + (lane * 4)[:, None] + tl.arange(0, 4)[None, :]
    table = load_tables(tables, lane) if PERMUTE else ()
    n = tl.arange(0, 64)
    scale0, scale1 = halves(tl.load(scales + block * 64 + n))
    n += tile * 64
    k = pair * 128 + tl.arange(0, 64)
    for half in tl.static_range(2):
        scale = scale0 if half == 0 else scale1
        values = decode(tl.load(words + half * 512), table, codebook, 1, PERMUTE).to(tl.float32)
        values *= (scale * multiplier)[:, None]
        column = k + half * 64
        mask = (n < out_features)[:, None] & (column < in_features)[None, :]
        at = n.to(tl.int64)[:, None] * in_features + column[None, :]
        tl.store(out + at, values.to(out.dtype.element_ty), mask=mask)
