"""A dense change of the base's weight: each row of a step gets that of its own adapter.

For each row of each segment with an adapter, at one site:  y += x W^T    W: [out, in], at DENSE_OFFSET

Sums run in float32 and are rounded to the engine's dtype once, when they are added to y. A decode step reads W
once for each tile of its adapter's rows: it costs what the base's own product costs in that dtype.

As in kernels/low_rank.py the Triton path never synchronizes, and its programs loop over the tiles in use.
"""

from __future__ import annotations

import torch

from veneer.kernels.backend import launch_options, resolve
from veneer.kernels.low_rank import DECODE_TILE, PROGRAMS
from veneer.kernels.tables import ABSENT, BASE_SLOT, DENSE_OFFSET, AdapterTables, RowTiles


def add_dense(x: torch.Tensor, y: torch.Tensor, tables: AdapterTables, tiles: RowTiles, site: int) -> None:
    """Add the adapters' dense changes at `site` to y, in place. Rows without one are not touched.

    x: [rows, in], contiguous; y: [rows, out], columns of a wider tensor if need be; both of the arena's dtype.
    Raises ValueError otherwise.
    """
    check_rows(x, y, tables)
    run = add_dense_triton if resolve(x.device).name == "triton" else add_dense_torch
    run(x, y, tables, tiles, site)


def add_dense_torch(
    x: torch.Tensor, y: torch.Tensor, tables: AdapterTables, tiles: RowTiles, site: int
) -> None:
    """Reference of `add_dense`, and what CPU serving runs: one matmul for each segment."""
    outputs, inputs = y.shape[1], x.shape[1]
    for slot, start, stop in tiles.segments:
        offset = ABSENT if slot == BASE_SLOT else int(tables.entries_host[slot, site, DENSE_OFFSET])
        if offset != ABSENT:
            weight = tables.arena[offset : offset + outputs * inputs].view(outputs, inputs)
            y[start:stop].addmm_(x[start:stop], weight.T)


def add_dense_triton(
    x: torch.Tensor, y: torch.Tensor, tables: AdapterTables, tiles: RowTiles, site: int
) -> None:
    """`add_dense` in Triton: a program has a block of columns of one tile of rows."""
    from veneer.kernels.jit import dense as jit

    (rows, inputs), outputs = x.shape, y.shape[1]
    if rows:
        decode, capacity = tiles.tile_rows <= DECODE_TILE, tiles.tiles.shape[0]
        block_n = 16 if decode else 64
        jit.add_dense[(min(capacity * -(-outputs // block_n), PROGRAMS),)](
            x, y, tables.arena, tables.entries, tiles.tiles, tiles.used, site, capacity, inputs, outputs,
            y.stride(0), tables.entries.stride(0), BLOCK_M=tiles.tile_rows, BLOCK_N=block_n,
            BLOCK_K=256 if decode else 64, num_warps=4, num_stages=3, **launch_options(x.device),
        )  # fmt: skip


def check_rows(x: torch.Tensor, y: torch.Tensor, tables: AdapterTables) -> None:
    """Raises ValueError unless x and y are rows as `add_dense` takes them."""
    dtype = tables.arena.dtype
    if x.dtype != dtype or x.ndim != 2 or not x.is_contiguous():
        raise ValueError(f"x is {x.dtype} {list(x.shape)}; it must be {dtype}, contiguous rows")
    if y.dtype != dtype or y.ndim != 2 or y.stride(1) != 1 or len(y) != len(x):
        raise ValueError(f"y is {y.dtype} {list(y.shape)}; it must be {len(x)} rows of {dtype}")
