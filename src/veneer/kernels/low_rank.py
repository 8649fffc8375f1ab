"""Batched low-rank matmul: every row of a step gets its own adapter's update, in place.

For each row of each segment, at one site:  y += B^T (A x) + bias      A: [rank, in], B: [rank, out]

Sums run in float32. A x is rounded once to the engine's dtype before B, as PEFT's lora_A does; in float32
nothing is rounded and no reduced-precision matrix unit is used. Rows in no segment are not touched.

The Triton path reads no device memory on the host and never synchronizes. Its grid follows from shapes, the
capacity of the tile table and the rank bound, so a captured graph replays any mix of adapters.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from veneer.kernels.backend import resolve
from veneer.kernels.tables import ABSENT, AdapterTables, RowTiles, Segment

TARGET_PROGRAMS = 528  # four for each multiprocessor of an H100, so that loads are in flight everywhere
SPLIT_ROWS = 2048  # splits x rows stays under this, which bounds the planes
MIN_SPLIT = 128  # columns; a shorter split costs more in planes than it wins
RANK_PROGRAMS = 4  # programs that share the ranks of one tile; each walks its blocks of ranks
MAX_VIEWS = 1 << 15  # cached views of the arena; more are rebuilt


@dataclass(frozen=True)
class LowRankPlan:
    """Tile sizes of one launch. Depends on nothing that changes between replays of a graph."""

    block_m: int  # rows
    block_r: int  # ranks
    block_k: int  # columns of x
    block_n: int  # columns of y
    rank_programs: int
    splits: int
    split_size: int  # columns of x in one split, a multiple of block_k
    num_warps: int


def plan(rows: int, in_features: int, capacity: int, tile_rows: int, rank_bound: int) -> LowRankPlan:
    """Choose tiles: few rows are split over the columns of x to fill the GPU, many rows are not."""
    prefill = tile_rows > 16
    block_r = 16 if not prefill or rank_bound <= 16 else 32
    block_k = 64 if prefill else 128
    wanted = min(TARGET_PROGRAMS // max(capacity, 1), in_features // MIN_SPLIT, SPLIT_ROWS // max(rows, 1))
    split_size = _ceil_div(_ceil_div(in_features, max(wanted, 1)), block_k) * block_k
    return LowRankPlan(
        block_m=tile_rows,
        block_r=block_r,
        block_k=block_k,
        block_n=64 if not prefill else 128,
        rank_programs=min(RANK_PROGRAMS, _ceil_div(rank_bound, block_r)),
        splits=_ceil_div(in_features, split_size),
        split_size=split_size,
        num_warps=4,
    )


def choose_tile_rows(rows: int) -> int:
    """Rows of a tile for a step of `rows` rows: 16 for decode, 64 once prefill chunks fill tiles."""
    return 16 if rows <= 256 else 64


def tile_capacity(rows: int, slots: int, tile_rows: int) -> int:
    """The most tiles that `rows` rows over at most `slots` adapters can need."""
    segments = min(rows, slots)
    return segments + (rows - segments) // tile_rows


def make_tiles(
    segments: Sequence[Segment], capacity: int, tile_rows: int, out: torch.Tensor | None = None
) -> RowTiles:
    """Cut segments into tiles of at most `tile_rows` rows.

    `out` is the static int32 [capacity, 3] buffer to fill, by one asynchronous copy when it is on a GPU;
    without it a new CPU tensor is made. Raises ValueError when the tiles do not fit.
    """
    used = [
        (segment.slot, first, min(tile_rows, segment.stop - first))
        for segment in segments
        for first in range(segment.start, segment.stop, tile_rows)
    ]
    if len(used) > capacity:
        raise ValueError(f"{len(used)} tiles do not fit a table of {capacity}; size it with tile_capacity()")
    on_gpu = out is not None and out.is_cuda
    padded = used + [(0, 0, 0)] * (capacity - len(used))
    host = torch.tensor(padded, dtype=torch.int32, pin_memory=on_gpu).view(capacity, 3)
    tiles = host if out is None else out.copy_(host, non_blocking=on_gpu)
    return RowTiles(tuple(segments), tiles, len(used), tile_rows)


class Workspace:
    """Scratch for steps of up to `max_rows` rows on one `AdapterTables`, kept for the life of the engine.

    No adapter in the tables may have a rank over `rank_bound`; the engine refuses such adapters at load.
    """

    def __init__(self, tables: AdapterTables, max_rows: int, rank_bound: int) -> None:
        self.arena = tables.arena
        self.rank_bound = max(rank_bound, 1)
        elements = max(max_rows, SPLIT_ROWS) * self.rank_bound
        self.planes = torch.empty(elements, dtype=torch.float32, device=tables.arena.device)
        self.entries = tables.entries_host.numpy()  # the same memory; indexing it is much cheaper
        self.factors = functools.lru_cache(MAX_VIEWS)(functools.partial(_factors, tables.arena))


def _factors(
    arena: torch.Tensor, a_offset: int, b_offset: int, bias_offset: int, rank: int, inputs: int, outputs: int
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Views of A^T [in, rank], B [rank, out] and the bias [out]. They hold whatever the arena holds."""
    a = torch.as_strided(arena, (inputs, rank), (1, inputs), a_offset) if rank else None
    b = torch.as_strided(arena, (rank, outputs), (outputs, 1), b_offset) if rank else None
    bias = None if bias_offset == ABSENT else torch.as_strided(arena, (outputs,), (1,), bias_offset)
    return a, b, bias


def low_rank(
    x: torch.Tensor, y: torch.Tensor, tables: AdapterTables, tiles: RowTiles, site: int, workspace: Workspace
) -> None:
    """Add the adapters' updates at `site` to y, in place.

    x: [rows, in], contiguous; y: [rows, out], columns of a wider tensor if need be; both of the arena's dtype.
    Raises ValueError otherwise.
    """
    run = low_rank_triton if resolve(x.device).name == "triton" else low_rank_torch
    run(x, y, tables, tiles, site, workspace)


def low_rank_torch(
    x: torch.Tensor, y: torch.Tensor, tables: AdapterTables, tiles: RowTiles, site: int, workspace: Workspace
) -> None:
    """Reference of `low_rank`, and what CPU serving runs: two small matmuls for each segment.

    Measured for 32 rows over 8 rank-16 adapters on 576 x 576: this loop over cached views 54 us, one masked
    matmul over concatenated factors 97 us (the concatenation is most of it), the base's own matmul 102 us.
    """
    _check(x, y, tables, workspace)
    inputs, outputs = x.shape[1], y.shape[1]
    for slot, start, stop in tiles.segments:
        a, b, bias = workspace.factors(*workspace.entries[slot, site].tolist(), inputs, outputs)
        rows = y[start:stop]
        if a is not None and b is not None:
            rows.addmm_(torch.mm(x[start:stop], a), b)
        if bias is not None:
            rows.add_(bias)


def low_rank_triton(
    x: torch.Tensor, y: torch.Tensor, tables: AdapterTables, tiles: RowTiles, site: int, workspace: Workspace
) -> None:
    """`low_rank` as two Triton kernels: shrink writes float32 planes, expand adds them into y once."""
    from veneer.kernels.jit.low_rank import expand, shrink

    _check(x, y, tables, workspace)
    (rows, inputs), outputs = x.shape, y.shape[1]
    capacity = tiles.tiles.shape[0]
    if rows == 0 or capacity == 0:
        return
    sizes = plan(rows, inputs, capacity, tiles.tile_rows, workspace.rank_bound)
    if sizes.splits * rows * workspace.rank_bound > workspace.planes.numel():
        raise ValueError(f"{rows} rows are more than the workspace was made for")
    shared = (tables.arena, tables.entries, tiles.tiles, workspace.planes, site, rows)
    shrink[(capacity, sizes.rank_programs, sizes.splits)](
        x,
        *shared,
        inputs,
        workspace.rank_bound,
        tables.entries.stride(0),
        sizes.split_size,
        BLOCK_M=sizes.block_m,
        BLOCK_R=sizes.block_r,
        BLOCK_K=sizes.block_k,
        num_warps=sizes.num_warps,
    )
    expand[(capacity, _ceil_div(outputs, sizes.block_n))](
        y,
        *shared,
        outputs,
        y.stride(0),
        workspace.rank_bound,
        tables.entries.stride(0),
        SPLITS=sizes.splits,
        BLOCK_M=sizes.block_m,
        BLOCK_N=sizes.block_n,
        BLOCK_R=sizes.block_r,
        num_warps=sizes.num_warps,
    )


def _check(x: torch.Tensor, y: torch.Tensor, tables: AdapterTables, workspace: Workspace) -> None:
    if x.dtype != tables.arena.dtype or y.dtype != tables.arena.dtype:
        raise ValueError(f"x is {x.dtype} and y {y.dtype}; both must be the arena's {tables.arena.dtype}")
    if not x.is_contiguous() or y.stride(1) != 1:
        raise ValueError("x must be contiguous [rows, features], and so must each row of y")
    if x.shape[0] != y.shape[0]:
        raise ValueError(f"x has {x.shape[0]} rows and y {y.shape[0]}")
    if workspace.arena is not tables.arena:
        raise ValueError("the workspace was made for another arena")


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
