"""Device code around the NF4 matmul: dequantization and the sum of planes. See kernels/nf4.py for the launchers.

With PERMUTE the codes are decoded by byte permutes in inline PTX: 19 operations for 8 weights, no table in
memory. Without it they are looked up in a table: what the interpreter and other vendors' GPUs run.

The order of the packed words makes a lane's 16 bytes its own fragment of the matrix unit's left operand, so
join, reshape and permute below move no data, as long as there are four warps for each tile of 64 rows.
"""

import triton
import triton.language as tl

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
def decode(words, tables, codebook, PERMUTE: tl.constexpr):
    """Words [128, 4] -> the unscaled weights [64, 64], in the codebook's type."""
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
    values = tl.reshape(values, [4, 8, 4, 4, 2, 2, 2])
    values = tl.permute(values, [0, 5, 1, 3, 6, 2, 4])
    return tl.reshape(values, [64, 64])


@triton.jit
def halves(pair):
    """The two float16 scales of one word, as float32."""
    low = (pair & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)
    high = ((pair >> 16) & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)
    return low.to(tl.float32), high.to(tl.float32)


@triton.jit(do_not_specialize=["size"])
def add_planes(
    planes,  # float32 [SPLITS, size]
    bias,
    out,  # [size], rows of out_features
    size,
    out_features,
    SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = the sum of the planes in their order, plus bias."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
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
        values = decode(tl.load(words + half * 512), table, codebook, PERMUTE).to(tl.float32)
        values *= (scale * multiplier)[:, None]
        column = k + half * 64
        mask = (n < out_features)[:, None] & (column < in_features)[None, :]
        at = n.to(tl.int64)[:, None] * in_features + column[None, :]
        tl.store(out + at, values.to(out.dtype.element_ty), mask=mask)
