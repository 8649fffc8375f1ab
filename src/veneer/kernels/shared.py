"""Factors of adapters that share A and B, as VeRA's do: of each rank of A x, and of each feature of the update.

For each row, at one site, with the factors d [rank] and b [out] of the row's own adapter:

    y += b * B^T (d * (A x))        A: [rank, in], B: [rank, out], the same for all adapters of one kin

So rows of adapters that differ by d and b alone lie in one tile, A and B are read for all of them at once, and
`RowTiles.row_slots` says whose factors a row has. `scale_ranks` comes between `shrink` and an epilogue, which
applies b (kernels/epilogue.py); rows of other adapters keep their h. It also adds up the planes of h: with the rank
that such adapters have, the many programs of an epilogue would each read a lot of them.
"""

from __future__ import annotations

import torch

from veneer.kernels.backend import launch_options, resolve
from veneer.kernels.low_rank import MAX_PARTS, PROGRAMS, SHARED_TILE, Workspace
from veneer.kernels.tables import ABSENT, BASE_SLOT, RANK, RANK_SCALE, AdapterTables, RowTiles


def scale_ranks(
    tables: AdapterTables, tiles: RowTiles, site: int, sites: int, rows: int, workspace: Workspace
) -> None:
    """Replace the held h of `sites` neighbouring sites by d * h, in one plane. Call `shrink` for them first.

    The tiles must have `row_slots`. Raises ValueError when the workspace does not hold these sites.
    """
    run = scale_ranks_triton if resolve(tables.arena.device).name == "triton" else scale_ranks_torch
    run(tables, tiles, site, sites, rows, workspace)


def scale_ranks_torch(
    tables: AdapterTables, tiles: RowTiles, site: int, sites: int, rows: int, workspace: Workspace
) -> None:
    """Reference of `scale_ranks`."""
    planes = workspace.held(site, sites, rows)
    out = workspace.hold_one(site, sites, rows)[:, 0]
    for slot, start, stop in tiles.segments:
        for index in range(sites if slot != BASE_SLOT else 0):
            rank = int(workspace.entries[slot, site + index, RANK])
            h = planes[index, :, start:stop, :rank].sum(0)
            out[index, start:stop, :rank] = scale_rows(h, tables, tiles, site + index, start)


def scale_rows(
    h: torch.Tensor, tables: AdapterTables, tiles: RowTiles, site: int, start: int
) -> torch.Tensor:
    """d * h of the rows from `start` on, h [rows, rank] of a segment."""
    scales = scales_of(tables, tiles, site, RANK_SCALE, start, start + len(h), h.shape[1])
    return h if scales is None else h * scales


def scales_of(
    tables: AdapterTables, tiles: RowTiles, site: int, column: int, start: int, stop: int, width: int
) -> torch.Tensor | None:
    """The factors [stop - start, width] of each row of a segment; None when its adapters have none.

    column: RANK_SCALE or UPDATE_SCALE.
    """
    if tiles.row_slots is None or start == stop:
        return None
    offsets = tables.entries_host[tiles.row_slots[start:stop].cpu().long(), site, column]
    if int(offsets[0]) == ABSENT:
        return None
    return tables.arena[(offsets[:, None] + torch.arange(width)).to(tables.arena.device)]


def scale_ranks_triton(
    tables: AdapterTables, tiles: RowTiles, site: int, sites: int, rows: int, workspace: Workspace
) -> None:
    """`scale_ranks` in Triton: a program has some of the ranks of one tile of rows at one site."""
    from veneer.kernels.jit import shared as jit

    if tiles.row_slots is None:
        raise ValueError("the tiles have no row_slots, so no row has factors")
    planes = workspace.held(site, sites, rows)
    out = workspace.hold_one(site, sites, rows)
    if not rows:
        return
    capacity, block_r = tiles.tiles.shape[0], 16 if workspace.rank_bound <= 16 else 32
    parts = min(-(-workspace.rank_bound // block_r), MAX_PARTS)
    jit.scale_ranks[(min(capacity * sites * parts, PROGRAMS),)](
        planes, out, tables.arena, tables.entries, tiles.tiles, tiles.used, tiles.row_slots, site, rows,
        capacity, planes.shape[1], workspace.rank_stride, tables.entries.stride(0),
        SITES=sites, PARTS=parts, BLOCK_M=tiles.tile_rows, BLOCK_R=block_r,
        num_warps=8 if tiles.tile_rows > SHARED_TILE else 4, **launch_options(tables.arena.device),
    )  # fmt: skip
