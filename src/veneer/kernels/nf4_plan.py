"""How an NF4 matmul is cut into programs: a pure function of the shapes and of what the device can do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

FUSED_ROWS = 256  # up to this many rows decode inside the matmul; more dequantize once and use cuBLAS
MAX_SPLITS = 16

# The cost of a launch, for the choice of splits only; the unit is a pair of blocks of one program. A program
# needs FILL pairs' time to fill its pipeline, and planes are written and read again by who adds them.
FILL = 2
PLANE_BYTES = 1.6e6  # in the time of one pair


@dataclass(frozen=True)
class Device:
    """What a plan depends on."""

    multiprocessors: int = 132
    wgmma: bool = True  # Hopper's asynchronous product; elsewhere mma.sync
    dependent_launch: bool = True


@dataclass(frozen=True)
class Nf4Plan:
    """Sizes of one launch. Depends on nothing that changes between replays of a graph."""

    fused: bool  # False: dequantize into a scratch, then a dense matmul; the rest is unused
    tiles: int = 1  # of 64 output features in a program
    warps: int = 4
    block_m: int = 16  # rows of x
    splits: int = 1
    split_pairs: int = 1  # of blocks of 64 columns
    stages: int = 3
    lookup: bool = False  # decode by a table in shared memory, not by byte permutes
    wgmma: bool = False  # and weights are scaled before the product
    dependent_launch: bool = False


class _Shape(NamedTuple):
    """What was found best for a block of rows."""

    tiles: int
    wide: bool  # four warps for each tile, rather than four in all
    stages: int
    lookup: bool
    wgmma: bool
    resident: int  # programs of a multiprocessor at once


_SMALLEST = _Shape(tiles=2, wide=False, stages=3, lookup=True, wgmma=False, resident=4)
_MMA = {
    16: _SMALLEST,
    32: _Shape(tiles=1, wide=True, stages=3, lookup=False, wgmma=False, resident=4),
    64: _Shape(tiles=1, wide=True, stages=3, lookup=False, wgmma=False, resident=2),
    128: _Shape(tiles=2, wide=True, stages=3, lookup=False, wgmma=False, resident=2),
}
# The rings of 32 and 64 rows take over 48 KiB because a launch with a static table is refused from 16 to 48.
_WGMMA = {
    16: _SMALLEST,
    32: _Shape(tiles=2, wide=True, stages=7, lookup=True, wgmma=True, resident=2),
    64: _Shape(tiles=2, wide=True, stages=4, lookup=True, wgmma=True, resident=2),
    128: _Shape(tiles=1, wide=True, stages=2, lookup=False, wgmma=True, resident=3),
}


def plan(rows: int, out_features: int, in_features: int, device: Device) -> Nf4Plan:
    """Choose blocks and splits."""
    if rows > FUSED_ROWS:
        return Nf4Plan(fused=False)
    block_m = next((size for size in (16, 32, 64) if rows <= size), 128)
    return make_plan(rows, out_features, in_features, device, block_m=block_m)


def make_plan(
    rows: int,
    out_features: int,
    in_features: int,
    device: Device,
    *,
    block_m: int,
    tiles: int | None = None,
    splits: int | None = None,
) -> Nf4Plan:
    """A fused plan with the given block of rows; tiles, and the splits that cost least, unless they are given.

    Several tiles share a lookup table and a block of x, where the sums leave registers for it.
    """
    shape = (_WGMMA if device.wgmma else _MMA)[block_m]
    tiles = tiles or shape.tiles
    pairs = _ceil_div(in_features, 128)
    programs = _ceil_div(out_features, 64 * tiles) * _ceil_div(rows, block_m)

    def cost(count: int) -> float:
        resident = max(_ceil_div(programs * count, device.multiprocessors), shape.resident)
        planes = 8 * count * rows * out_features / PLANE_BYTES if count > 1 else 0.0
        return resident * (_ceil_div(pairs, count) + FILL) + planes

    if splits is None:
        splits = min(range(1, max(min(MAX_SPLITS, pairs // 2), 1) + 1), key=cost)
    split_pairs = _ceil_div(pairs, splits)
    return Nf4Plan(
        fused=True,
        tiles=tiles,
        warps=4 * tiles if shape.wide else 4,
        block_m=block_m,
        splits=_ceil_div(pairs, split_pairs),
        split_pairs=split_pairs,
        stages=shape.stages,
        lookup=shape.lookup,
        wgmma=shape.wgmma,
        dependent_launch=device.dependent_launch,
    )


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
