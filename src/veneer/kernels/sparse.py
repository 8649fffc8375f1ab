"""A change of the base's weight with few entries: each row of a step gets that of its own adapter.

For each row of each segment with an adapter, at one site:  y += x S^T    S: [out, in], by rows (CSR)

At SPARSE_OFFSET stand, each from a multiple of ALIGNED elements on: int32 [out + 1] where each row's entries start,
int32 [entries] their columns, and [entries] their values, of the arena's dtype. Sums run in float32.

As in kernels/low_rank.py the Triton path never synchronizes, and its programs loop over the tiles in use.
"""

from __future__ import annotations

import torch

from veneer.kernels.backend import launch_options, resolve
from veneer.kernels.dense import check_rows
from veneer.kernels.low_rank import DECODE_TILE, PROGRAMS
from veneer.kernels.tables import ABSENT, BASE_SLOT, SPARSE_OFFSET, AdapterTables, RowTiles, int_elements


def sparse_size(outputs: int, entries: int, itemsize: int) -> int:
    """Elements of `itemsize` bytes that a sparse change takes in the arena."""
    return int_elements(outputs + 1, itemsize) + int_elements(entries, itemsize) + entries


def add_sparse(x: torch.Tensor, y: torch.Tensor, tables: AdapterTables, tiles: RowTiles, site: int) -> None:
    """Add the adapters' sparse changes at `site` to y, in place. Rows without one are not touched.

    x: [rows, in], contiguous; y: [rows, out], columns of a wider tensor if need be; both of the arena's dtype.
    Raises ValueError otherwise.
    """
    check_rows(x, y, tables)
    run = add_sparse_triton if resolve(x.device).name == "triton" else add_sparse_torch
    run(x, y, tables, tiles, site)


def add_sparse_torch(
    x: torch.Tensor, y: torch.Tensor, tables: AdapterTables, tiles: RowTiles, site: int
) -> None:
    """Reference of `add_sparse`, and what CPU serving runs: one sparse matmul for each segment."""
    for slot, start, stop in tiles.segments:
        offset = ABSENT if slot == BASE_SLOT else int(tables.entries_host[slot, site, SPARSE_OFFSET])
        if offset != ABSENT:
            matrix = _matrix(tables, offset, y.shape[1], x.shape[1])
            y[start:stop] += torch.sparse.mm(matrix, x[start:stop].float().T).T.to(y.dtype)


def _matrix(tables: AdapterTables, offset: int, outputs: int, inputs: int) -> torch.Tensor:
    """The change at an offset as torch's sparse matrix [out, in], float32."""
    itemsize = tables.arena.itemsize
    at = offset * itemsize // 4
    starts = tables.ints[at : at + outputs + 1].long()
    entries = int(starts[-1])
    offset += int_elements(outputs + 1, itemsize)
    at = offset * itemsize // 4
    columns = tables.ints[at : at + entries].long()
    offset += int_elements(entries, itemsize)
    rows = torch.repeat_interleave(torch.arange(outputs), starts.diff())
    return torch.sparse_coo_tensor(
        torch.stack((rows, columns)),
        tables.arena[offset : offset + entries].float(),
        (outputs, inputs),
        is_coalesced=True,
        check_invariants=False,
    )


def add_sparse_triton(
    x: torch.Tensor, y: torch.Tensor, tables: AdapterTables, tiles: RowTiles, site: int
) -> None:
    """`add_sparse` in Triton: a program has a block of columns of one tile of rows, and gathers x."""
    from veneer.kernels.jit import sparse as jit

    (rows, inputs), outputs = x.shape, y.shape[1]
    if rows:
        decode, capacity = tiles.tile_rows <= DECODE_TILE, tiles.tiles.shape[0]
        block_n = 16 if decode else 8
        jit.add_sparse[(min(capacity * -(-outputs // block_n), PROGRAMS),)](
            x, y, tables.arena, tables.ints, tables.entries, tiles.tiles, tiles.used, site, capacity, inputs,
            outputs, y.stride(0), tables.entries.stride(0), PER_INT=4 // tables.arena.itemsize,
            BLOCK_M=tiles.tile_rows, BLOCK_N=block_n, BLOCK_K=8, num_warps=4, **launch_options(x.device),
        )  # fmt: skip
