"""The packed layout of resident NF4 weights, made from bitsandbytes' and read by the kernels.

    W[n, k] = NF4[code[n, k]] * absmax[n, k // 64]

What differs from bitsandbytes' dequantize_4bit, which rounds each float32 product to bf16 once: the 16 values
of NF4 are rounded to bf16 (by at most 1.6 * 2^-9 of the value) and absmax to float16 (by at most 2^-12).

Layout: tiles of 64 output features x 128 columns. In each half of 64 columns lane t = 32 warp + 4 g + q of 128
holds 4 words, one for each 16 columns, and nibble c + 2 h + 4 d of word w is the code at

    row 16 warp + g + 8 h,    column 16 w + 2 q + c + 8 d

which is the fragment of the left operand of mma.m16n8k16 and wgmma.m64k16, so a lane's one 16-byte load needs
no exchange with others. Codes are relabelled for decoding by byte permutes (see `permute_tables`). Both scales
of a row of a tile are one word. absmax in float16 costs 6 % of the codes' bytes and float32 would cost 12 %;
its error is an eighth of that of rounding a weight to bf16.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch

LAYOUT_VERSION = 1  # raise when the same weight is packed into other bytes: kept files are then made again
BLOCK = 64  # columns that share an absmax
TILE_ROWS = 64  # output features
ROW_PADDING = 128  # output features are padded to this, so that a program may have one or two tiles
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, -0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""QLoRA's values (arXiv 2305.14314, appendix E) as bitsandbytes has them, with zero as -0.0."""
STORED = (0, 4, 1, 5, 8, 12, 9, 13, 3, 6, 2, 7, 11, 15, 10, 14)
"""The code of each stored label. Labels i and i + 8 agree in the top bit of both bytes of their bf16 value."""
_PACK_ROWS = 1024  # packed at a time, which bounds the int32 temporaries


@dataclass(frozen=True)
class Nf4Weight:
    """A packed [out_features, in_features] weight. Tiles past out_features and columns past in_features are 0."""

    packed: torch.Tensor  # int32 [tiles, pairs, 2, 128, 4]
    scales: torch.Tensor  # int32 [tiles, pairs, 64]: float16 scales of a row's two blocks, the first one low
    multiplier: float  # of all scales; a power of two that keeps float16 in its normal range
    out_features: int
    in_features: int

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + self.scales.nbytes

    @property
    def pairs(self) -> int:
        """Pairs of blocks in a row."""
        return self.packed.shape[1]

    def to(self, device: torch.device | str) -> Nf4Weight:
        return Nf4Weight(
            self.packed.to(device),
            self.scales.to(device),
            self.multiplier,
            self.out_features,
            self.in_features,
        )


def packed_shapes(out_features: int, in_features: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of `Nf4Weight.packed` and `Nf4Weight.scales`."""
    tiles, pairs = -(-out_features // ROW_PADDING) * ROW_PADDING // 64, -(-in_features // (2 * BLOCK))
    return (tiles, pairs, 2, 128, 4), (tiles, pairs, 64)


@dataclass(frozen=True)
class Nf4Codes:
    """A plain NF4 weight. Weights of one input are fused by concatenating these before packing."""

    codes: torch.Tensor  # uint8 [out_features, in_features], 0 to 15
    absmax: torch.Tensor  # float32 [out_features, in_features / 64]


def read_bitsandbytes(data: torch.Tensor, state: Any) -> Nf4Codes:
    """Codes and absmax of bitsandbytes' `Params4bit.data` and `quant_state`, nested absmax undone.

    Raises ValueError for fp4, another block size or rows that are no multiple of 64: keep bitsandbytes there.
    """
    if state.quant_type != "nf4" or state.blocksize != BLOCK:
        raise ValueError(
            f"the weight is {state.quant_type} in blocks of {state.blocksize}; packed are nf4 in blocks of {BLOCK}"
        )
    out_features, in_features = state.shape
    if in_features % BLOCK:
        raise ValueError(
            f"in_features is {in_features}; a block must not span rows, so {BLOCK} must divide it"
        )
    nibbles = data.contiguous().view(torch.uint8).view(-1)
    codes = torch.stack((nibbles >> 4, nibbles & 15), dim=1).view(out_features, in_features)
    return Nf4Codes(codes, read_absmax(state).view(out_features, in_features // BLOCK))


def read_absmax(state: Any) -> torch.Tensor:
    """float32 absmax of each block of a bitsandbytes `quant_state`, with double quantization undone."""
    absmax: torch.Tensor = state.absmax
    if state.nested:
        inner = state.state2
        outer = inner.absmax.repeat_interleave(inner.blocksize)[: absmax.numel()]
        absmax = inner.code[absmax.view(-1).long()] * outer + state.offset
    return absmax.float().view(-1)


def pack_nf4(weight: Nf4Codes) -> Nf4Weight:
    """Pack codes [N, K] and absmax [N, K / 64], on their device. Raises ValueError when they do not fit."""
    codes, absmax = weight.codes, weight.absmax
    (rows, columns), device = codes.shape, codes.device
    if columns % BLOCK or absmax.shape != (rows, columns // BLOCK):
        raise ValueError(
            f"codes {list(codes.shape)} and absmax {list(absmax.shape)}; one absmax for each {BLOCK} columns"
        )
    pairs, padded = -(-columns // (2 * BLOCK)), -(-rows // ROW_PADDING) * ROW_PADDING
    largest = float(absmax.abs().max()) if absmax.numel() else 0.0
    if not math.isfinite(largest):
        raise ValueError(f"absmax holds {largest}; all must be finite")
    multiplier = 2.0 ** (math.frexp(largest)[1] - 15)  # the largest scale is in [2^14, 2^15)

    label = torch.empty(16, dtype=torch.int32, device=device)
    label[list(STORED)] = torch.arange(16, dtype=torch.int32, device=device)
    packed = torch.empty(padded // 64, pairs, 2, 128, 4, dtype=torch.int32, device=device)
    for start in range(0, padded, _PACK_ROWS):
        stop = min(start + _PACK_ROWS, padded)
        labels = label.new_full((stop - start, pairs * 2 * BLOCK), int(label[NF4.index(0.0)]))
        part = codes[start:stop]
        labels[: part.shape[0], :columns] = label[part.int()]
        packed[start // 64 : stop // 64] = _pack_labels(labels)

    scales = torch.zeros(padded, pairs * 2, dtype=torch.float16, device=device)
    scales[:rows, : columns // BLOCK] = absmax.float() / multiplier
    words = scales.view(torch.int32).view(-1, 64, pairs).transpose(1, 2).contiguous()
    return Nf4Weight(packed, words, multiplier, rows, columns)


def _pack_labels(labels: torch.Tensor) -> torch.Tensor:
    """int32 labels [rows, columns] -> words [rows / 64, columns / 128, 2, 128, 4]."""
    rows, columns = labels.shape
    # tile, warp, h, g; pair, half, w, d, q, c
    axes = labels.view(rows // 64, 4, 2, 8, columns // 128, 2, 4, 2, 4, 2)
    nibbles = axes.permute(0, 4, 5, 1, 3, 8, 6, 7, 2, 9).reshape(-1, 8)  # last: d, h, c
    words = nibbles[:, 0].clone()
    for nibble in range(1, 8):
        words |= nibbles[:, nibble] << (4 * nibble)
    return words.view(rows // 64, columns // 128, 2, 128, 4)


def unpack_nf4(weight: Nf4Weight, dtype: torch.dtype) -> torch.Tensor:
    """Reference of `dequantize_nf4`: W [N, K], scaled in float32 and rounded to `dtype` once."""
    tiles, pairs = weight.packed.shape[:2]
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=weight.packed.device)
    labels = (weight.packed.view(-1, 1) >> shifts) & 15
    axes = labels.view(tiles, pairs, 2, 4, 8, 4, 4, 2, 2, 2)  # tile, pair, half, warp, g, q, w, d, h, c
    labels = axes.permute(0, 3, 8, 4, 1, 2, 6, 7, 5, 9).reshape(tiles * 64, -1)
    scales = weight.scales.view(tiles, pairs, 64).transpose(1, 2).flatten().view(torch.float16)
    scales = scales.view(tiles * 64, pairs * 2).float() * weight.multiplier
    values = codebook(torch.float32, weight.packed.device)[labels] * scales.repeat_interleave(BLOCK, dim=1)
    return values[: weight.out_features, : weight.in_features].to(dtype).contiguous()


@functools.cache
def codebook(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The 16 values in the order of the stored labels, rounded to bf16 whatever `dtype` is."""
    return torch.tensor(NF4)[list(STORED)].bfloat16().to(device, dtype)


@functools.cache
def permute_tables(device: torch.device) -> torch.Tensor:
    """The tables of the decode, int32 [8, 32]: low bytes A0 A1 B0 B1, high bytes A0 A1 B0 B1, for 32 lanes.

    prmt replaces a byte by its sign when bit 3 of its selector is set, so with T the 16 bytes of a plane

        T[n] = prmt(A, n) xor prmt(B, n xor 8)    A[i] = T[i],   B[i] = T[i + 8] xor sign(T[i])
    """
    bits = codebook(torch.bfloat16, torch.device("cpu")).view(torch.int16).int()
    tables: list[int] = []
    for plane in (bits & 0xFF, (bits >> 8) & 0xFF):
        low, high = plane[:8], plane[8:]
        for half in (low, high ^ (low >> 7) * 0xFF):
            tables += (int.from_bytes(bytes(half[i : i + 4].tolist()), "little", signed=True) for i in (0, 4))
    return torch.tensor(tables, dtype=torch.int32, device=device)[:, None].repeat(1, 32)


@functools.cache
def pair_table(device: torch.device) -> torch.Tensor:
    """The two values of each byte of a word, int32 [256]: bf16 of its low nibble in the low half."""
    bits = codebook(torch.bfloat16, torch.device("cpu")).view(torch.int16).int() & 0xFFFF
    byte = torch.arange(256)
    return (bits[byte & 15] | bits[byte >> 4] << 16).to(device)
