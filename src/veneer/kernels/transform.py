"""What adapters do to the base's input and output before their own update is added.

For each row of each segment with an adapter, at one site, beside y = W0 x' + b:

    x' = each block of x times its R_k, x as a row          IN_OFFSET, IN_BLOCK: R - I, [in / block, block, block]
    y_i <- scale_i y_i + cross_i y_partner(i)               OUT_OFFSET, OUT_PAIR: scale - 1 and cross, [1 or 2, out]

partner(i) is i + pair / 2 in the first half of a group of `pair` neighbours and i - pair / 2 in the second; with
pair 0 there is no cross. Sums run in float32 and are rounded to the engine's dtype once.

As in kernels/low_rank.py the Triton path never synchronizes, and its programs loop over the tiles in use.
"""

from __future__ import annotations

from itertools import product

import torch

from veneer.kernels.backend import launch_options, resolve
from veneer.kernels.low_rank import DECODE_TILE, PROGRAMS
from veneer.kernels.tables import (
    ABSENT,
    BASE_SLOT,
    IN_BLOCK,
    IN_OFFSET,
    OUT_OFFSET,
    OUT_PAIR,
    AdapterTables,
    RowTiles,
)


def transform_input(
    x: torch.Tensor, tables: AdapterTables, tiles: RowTiles, site: int, sites: int = 1
) -> torch.Tensor:
    """x' [sites, rows, in] of each of `sites` neighbouring sites from `site` on, a new tensor. One launch.

    Rows whose adapter leaves x alone, or without one, are copied. x: [rows, in], contiguous, of the arena's
    dtype. Raises ValueError otherwise.
    """
    if x.dtype != tables.arena.dtype or x.ndim != 2 or not x.is_contiguous():
        raise ValueError(f"x is {x.dtype} {list(x.shape)}; it must be {tables.arena.dtype}, contiguous rows")
    run = transform_input_triton if resolve(x.device).name == "triton" else transform_input_torch
    return run(x, tables, tiles, site, sites)


def transform_output(y: torch.Tensor, tables: AdapterTables, tiles: RowTiles, site: int) -> None:
    """Scale and turn y in place. Rows whose adapter leaves y alone, or without one, are not touched.

    y: [rows, out], columns of a wider tensor if need be, of the arena's dtype. Raises ValueError otherwise.
    """
    if y.dtype != tables.arena.dtype or y.ndim != 2 or y.stride(1) != 1:
        raise ValueError(
            f"y is {y.dtype} {list(y.shape)}; it must be {tables.arena.dtype}, each row contiguous"
        )
    run = transform_output_triton if resolve(y.device).name == "triton" else transform_output_torch
    run(y, tables, tiles, site)


def transform_input_torch(
    x: torch.Tensor, tables: AdapterTables, tiles: RowTiles, site: int, sites: int = 1
) -> torch.Tensor:
    """Reference of `transform_input`, and what CPU serving runs."""
    out, features = x.repeat(sites, 1, 1), x.shape[1]
    for index, (slot, start, stop) in product(range(sites), tiles.segments):
        if slot == BASE_SLOT:
            continue
        entry = tables.entries_host[slot, site + index].tolist()
        offset, block = entry[IN_OFFSET], entry[IN_BLOCK]
        if offset == ABSENT:
            continue
        turn = tables.arena[offset : offset + features * block].view(-1, block, block).float()
        blocks = x[start:stop].float().view(stop - start, -1, block).transpose(0, 1)
        out[index, start:stop] = torch.baddbmm(blocks, blocks, turn).transpose(0, 1).flatten(1)
    return out


def transform_output_torch(y: torch.Tensor, tables: AdapterTables, tiles: RowTiles, site: int) -> None:
    """Reference of `transform_output`, and what CPU serving runs."""
    features = y.shape[1]
    for slot, start, stop in tiles.segments:
        if slot == BASE_SLOT:
            continue
        entry = tables.entries_host[slot, site].tolist()
        offset, pair = entry[OUT_OFFSET], entry[OUT_PAIR]
        if offset == ABSENT:
            continue
        scale = tables.arena[offset : offset + features].float()
        rows = y[start:stop].float()
        total = torch.addcmul(rows, rows, scale)
        if pair:
            cross = tables.arena[offset + features : offset + 2 * features].float()
            total.addcmul_(rows.view(len(rows), -1, 2, pair // 2).flip(2).flatten(1), cross)
        y[start:stop] = total


def transform_input_triton(
    x: torch.Tensor, tables: AdapterTables, tiles: RowTiles, site: int, sites: int = 1
) -> torch.Tensor:
    """`transform_input` in Triton: a program has a block of columns of one tile of rows for one site."""
    from veneer.kernels.jit import transform as jit

    rows, features = x.shape
    out = torch.empty(sites, rows, features, dtype=x.dtype, device=x.device)
    if rows:
        decode, capacity = tiles.tile_rows <= DECODE_TILE, tiles.tiles.shape[0]
        block = 32 if decode else 64
        jit.transform_input[(min(capacity * sites * -(-features // block), PROGRAMS),)](
            x, out, tables.arena, tables.entries, tiles.tiles, tiles.used, site, rows, capacity, features,
            tables.entries.stride(0), SITES=sites, BLOCK_M=tiles.tile_rows, BLOCK_N=block, BLOCK_K=block,
            num_warps=2 if decode else 4, **launch_options(x.device),
        )  # fmt: skip
    return out


def transform_output_triton(y: torch.Tensor, tables: AdapterTables, tiles: RowTiles, site: int) -> None:
    """`transform_output` in Triton: a program has two blocks of columns, partners if there are any."""
    from veneer.kernels.jit import transform as jit

    rows, features = y.shape
    if rows:
        decode, capacity = tiles.tile_rows <= DECODE_TILE, tiles.tiles.shape[0]
        block_n = 128 if decode else 64
        jit.transform_output[(min(capacity * -(-features // (2 * block_n)), PROGRAMS),)](
            y, tables.arena, tables.entries, tiles.tiles, tiles.used, site, capacity, features, y.stride(0),
            tables.entries.stride(0), BLOCK_M=tiles.tile_rows, BLOCK_N=block_n,
            num_warps=2 if decode else 4, **launch_options(y.device),
        )  # fmt: skip
