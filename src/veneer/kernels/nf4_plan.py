"""How an NF4 matmul is cut into programs: a pure function of the shapes and the number of multiprocessors."""

from __future__ import annotations

from dataclasses import dataclass

FUSED_ROWS = 256  # up to this many rows decode inside the matmul; more dequantize once and use cuBLAS
MAX_SPLITS = 16
DEPENDENT_LAUNCH = False  # programmatic dependent launch; gains at M=1, loses at 16 and 64 (LOG.md)

# The cost of a launch in microseconds, for the choice of splits only. One step is 64 output features x 128
# columns. Counted in SASS: 166 operations of the integer unit for each of 4 warps, 2 cycles each, at 1.755 GHz.
STEP = 0.19
STEP_LATENCY = 0.6  # of one step when nothing else runs on the multiprocessor
SECOND_LAUNCH = 2.0
PLANE_BYTES = 3e6  # each microsecond


@dataclass(frozen=True)
class Nf4Plan:
    """Sizes of one launch. Depends on nothing that changes between replays of a graph."""

    fused: bool  # False: dequantize into a scratch, then a dense matmul; the rest is unused
    tiles: int = 1  # of 64 output features in a program; four warps for each
    block_m: int = 16  # rows of x
    splits: int = 1
    split_pairs: int = 1  # of blocks of 64 columns
    num_stages: int = 3
    dependent_launch: bool = False


def plan(
    rows: int, out_features: int, in_features: int, multiprocessors: int, dependent_launch: bool = False
) -> Nf4Plan:
    """Choose tiles and splits. `dependent_launch`: whether the device can do it."""
    if rows > FUSED_ROWS:
        return Nf4Plan(fused=False)
    block_m = next((size for size in (16, 32, 64) if rows <= size), 128)
    tiles = 1 if block_m == 16 else 2  # two share a block of x, which is most of what is read then
    return make_plan(
        rows,
        out_features,
        in_features,
        multiprocessors,
        tiles=tiles,
        block_m=block_m,
        dependent_launch=DEPENDENT_LAUNCH and dependent_launch,
    )


def make_plan(
    rows: int,
    out_features: int,
    in_features: int,
    multiprocessors: int,
    *,
    tiles: int,
    block_m: int,
    splits: int | None = None,
    num_stages: int = 3,
    dependent_launch: bool = False,
) -> Nf4Plan:
    """A fused plan with given tiles; the splits that cost least unless they are given."""
    pairs = _ceil_div(in_features, 128)
    programs = _ceil_div(out_features, 64 * tiles) * _ceil_div(rows, block_m)

    def cost(count: int) -> float:
        resident = _ceil_div(programs * count, multiprocessors)
        steps = _ceil_div(pairs, count) + 1  # one more to fill the pipeline
        planes = SECOND_LAUNCH + 8 * count * rows * out_features / PLANE_BYTES if count > 1 else 0.0
        return steps * max(resident * tiles * STEP, STEP_LATENCY) + planes

    if splits is None:
        splits = min(range(1, max(min(MAX_SPLITS, pairs // 2), 1) + 1), key=cost)
    split_pairs = _ceil_div(pairs, splits)
    return Nf4Plan(
        fused=True,
        tiles=tiles,
        block_m=block_m,
        splits=_ceil_div(pairs, split_pairs),
        split_pairs=split_pairs,
        num_stages=num_stages,
        dependent_launch=dependent_launch,
    )


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
