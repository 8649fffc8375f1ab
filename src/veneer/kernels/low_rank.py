"""Batched low-rank matmul: every row of a step gets its own adapter's update.

For each row of each segment with an adapter, at one site:  y += B^T (A x) + bias    A: [rank, in], B: [rank, out]

Where tiles are `hidden`, what stands between A and B is applied too: B^T phi(A x + d) (kernels/activation.py).
Where they have `row_slots`, so are the factors of adapters that share A and B (kernels/shared.py).

`shrink` makes h = A x for the sites of one input; an epilogue (kernels/epilogue.py) adds B^T h to what the base
computed. Sums run in float32. h is rounded once to the engine's dtype before B, as PEFT's lora_A does; in
float32 nothing is rounded and no reduced-precision matrix unit is used.

The Triton path reads no device memory on the host and never synchronizes. Its grid follows from shapes and from
the capacity of the tile table, and its programs loop over the tiles in use, so a captured graph replays any mix
of adapters and a table that is mostly empty costs nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from veneer.kernels.backend import launch_options, resolve
from veneer.kernels.tables import (
    ABSENT,
    ALIGNED,
    BASE_SLOT,
    NO_TRANSFORMS,
    RANK,
    UPDATE_SCALE,
    AdapterTables,
    RowTiles,
    Segment,
    Transforms,
    join_kin,
)
from veneer.kernels.upload import upload

GROUP_SITES = 3  # the most sites that share an input: q, k and v
DECODE_TILE = 8  # rows; the fewest that a matrix unit takes
SHARED_TILE = 32  # rows of decode steps in which adapters share A and B, which are read once for each tile
PROGRAMS = 1056  # eight for each multiprocessor of an H100, so that loads are in flight everywhere
MAX_SPLITS = 16  # planes of h; the epilogue reads them all
MIN_SPLIT = 256  # columns; a shorter split costs more in planes than it wins
SPLIT_ROWS = 4096  # splits x rows stays under this, which bounds the planes
MAX_PARTS = 8  # programs that share the ranks of a tile
MAX_VIEWS = 1 << 15  # cached views of the arena; more are rebuilt


@dataclass(frozen=True)
class ShrinkPlan:
    """Tile sizes of one launch. Depends on nothing that changes between replays of a graph."""

    block_m: int  # rows
    block_r: int  # ranks
    block_k: int  # columns of x
    splits: int
    split_size: int  # columns of x in one split, a multiple of block_k
    parts: int  # programs that share the ranks of a tile in one split
    programs: int
    num_warps: int
    num_stages: int


def plan(
    rows: int,
    in_features: int,
    sites: int,
    capacity: int,
    tile_rows: int,
    rank_bound: int,
    shared: bool = False,
) -> ShrinkPlan:
    """Choose tiles: few rows are split over the columns of x to fill the GPU, many rows are not.

    Decode steps of every size are split alike, so that a row's sums do not depend on the others. With `shared` a
    tile may have all rows of a step, and many ranks: programs share these, too.
    """
    prefill = tile_rows > DECODE_TILE
    block_k = 64 if prefill else 128
    wanted = min(MAX_SPLITS, in_features // MIN_SPLIT, SPLIT_ROWS // max(rows, 1) if prefill else MAX_SPLITS)
    split_size = _ceil_div(_ceil_div(in_features, _power_of_two_up_to(wanted)), block_k) * block_k
    splits = _ceil_div(in_features, split_size)
    block_r = 16 if rank_bound <= 16 else 32
    parts = min(_ceil_div(rank_bound, block_r), MAX_PARTS) if shared else 1
    return ShrinkPlan(
        block_m=tile_rows,
        block_r=block_r,
        block_k=block_k,
        splits=splits,
        split_size=split_size,
        parts=parts,
        programs=min(capacity * sites * splits * parts, PROGRAMS),
        num_warps=4 if prefill else 2,
        num_stages=3,
    )


def _power_of_two_up_to(value: int) -> int:
    return 1 << max(value, 1).bit_length() - 1


def choose_tile_rows(rows: int, shared: bool = False) -> int:
    """Rows of a tile for a step of `rows` rows: 8 for decode, 64 once prefill chunks fill tiles."""
    if rows > 256:
        return 64
    return SHARED_TILE if shared else DECODE_TILE


def tile_capacity(rows: int, slots: int, tile_rows: int) -> int:
    """The most tiles that `rows` rows over the base and at most `slots` adapters can need."""
    segments = min(rows, slots + 1)
    return segments + (rows - segments) // tile_rows


def fill_tiles(block: NDArray[np.int32], segments: Sequence[Segment], tile_rows: int) -> None:
    """Write a tile table on the host: int32 [1 + capacity, 3], (tiles in use, 0, 0) and then the tiles.

    Raises ValueError when the tiles do not fit.
    """
    used = [
        (slot, first, min(tile_rows, stop - first))
        for slot, start, stop in segments
        for first in range(start, stop, tile_rows)
    ]
    if len(used) >= len(block):
        raise ValueError(
            f"{len(used)} tiles do not fit a table of {len(block) - 1}; size it with tile_capacity()"
        )
    block[0] = len(used), 0, 0
    if used:
        block[1 : len(used) + 1] = used


def view_tiles(
    block: torch.Tensor,
    segments: Sequence[Segment],
    adapted: bool,
    tile_rows: int,
    transforms: Transforms = NO_TRANSFORMS,
    deltas: bool = False,
    hidden: bool = False,
    row_slots: torch.Tensor | None = None,
) -> RowTiles:
    """The tiles that `fill_tiles` wrote, once they are on the device: views of `block`."""
    does = (transforms, deltas, hidden, row_slots)
    return RowTiles(tuple(segments), block[1:], block[0, :1], adapted, tile_rows, *does)


def make_tiles(
    segments: Sequence[Segment],
    rows: int,
    slots: int,
    device: torch.device,
    transforms: Transforms = NO_TRANSFORMS,
    deltas: bool = False,
    hidden: bool = False,
    kin: Mapping[int, bytes] | None = None,
) -> RowTiles:
    """Cut segments into tiles, on `device` by one asynchronous copy. For what adapters do see `RowTiles`.

    Neighbours of one kin (by slot, see `tables.find_kin`) come into the same tiles.

    The segments must cover rows 0 to `rows` in order, those of the base included; raises ValueError otherwise.
    """
    stops = [0, *(segment.stop for segment in segments)]
    if [segment.start for segment in segments] != stops[:-1] or stops[-1] != rows:
        raise ValueError(f"segments {list(segments)} do not cover rows 0 to {rows} in order")
    shared = kin is not None and any(segment.slot in kin for segment in segments)
    tile_rows = choose_tile_rows(rows, shared)
    joined = join_kin(segments, kin) if kin else segments
    # Those of the base can lie between those of adapters: then there are more segments than slots.
    places = 3 * (1 + tile_capacity(rows, max(slots, len(segments) - 1), tile_rows))
    block = np.zeros(places + (rows if shared else 0), np.int32)
    fill_tiles(block[:places].reshape(-1, 3), joined, tile_rows)
    if shared:
        block[places:] = slots_of_rows(segments)
    uploaded = upload(block, np.int32, device)
    adapted = any(segment.slot != BASE_SLOT for segment in segments)
    does = (transforms, deltas, hidden, uploaded[places:] if shared else None)
    return view_tiles(uploaded[:places].view(-1, 3), joined, adapted, tile_rows, *does)


def slots_of_rows(segments: Sequence[Segment]) -> NDArray[np.int32]:
    """The slot of each row."""
    slots, starts, stops = np.array(segments, np.int32).reshape(-1, 3).T
    return np.repeat(slots, stops - starts)


class Workspace:
    """Scratch for steps of up to `max_rows` rows on one `AdapterTables`, kept for the life of the engine.

    It holds h between a `shrink` and the epilogue that uses it. No adapter in the tables may have a rank over
    `rank_bound`; the engine refuses such adapters at load.
    """

    def __init__(self, tables: AdapterTables, max_rows: int, rank_bound: int) -> None:
        self.arena = tables.arena
        self.rank_bound = max(rank_bound, 1)
        self.rank_stride = _ceil_div(self.rank_bound, ALIGNED) * ALIGNED
        elements = GROUP_SITES * max(max_rows, SPLIT_ROWS) * self.rank_stride
        self.planes = torch.empty(elements, dtype=torch.float32, device=tables.arena.device)
        # what activations make of h, while other programs still read h
        self.plane = torch.empty(
            GROUP_SITES * max_rows * self.rank_stride, dtype=torch.float32, device=tables.arena.device
        )
        self._held: tuple[int, int] | None = None  # first site, sites
        self._h = self.planes
        self.entries = tables.entries_host.numpy()  # the same memory; indexing it is much cheaper
        self.factors = functools.lru_cache(MAX_VIEWS)(functools.partial(_factors, tables.arena))

    def hold(self, site: int, sites: int, splits: int, rows: int) -> torch.Tensor:
        """Float32 planes [sites, splits, rows, rank_stride] for h of these sites; what was held is lost."""
        shape = (sites, splits, rows, self.rank_stride)
        if sites > GROUP_SITES or (size := int(np.prod(shape))) > self.planes.numel():
            raise ValueError(f"{sites} sites of {rows} rows are more than the workspace was made for")
        self._held, self._h = (site, sites), self.planes[:size].view(shape)
        return self._h

    def hold_one(self, site: int, sites: int, rows: int) -> torch.Tensor:
        """A float32 plane [sites, 1, rows, rank_stride] in place of those held, which stay readable."""
        self.held(site, sites, rows)
        shape = (sites, 1, rows, self.rank_stride)
        self._h = self.plane[: int(np.prod(shape))].view(shape)
        return self._h

    def held(self, site: int, sites: int, rows: int) -> torch.Tensor:
        """The planes of the last `hold`. Raises ValueError when they are not of these sites and rows."""
        if self._held != (site, sites) or self._h.shape[2] != rows:
            raise ValueError(
                f"the workspace holds sites {self._held} of {list(self._h.shape)}, not {(site, sites)} of "
                f"{rows} rows; call shrink for them first"
            )
        return self._h


def _matrix(arena: torch.Tensor, offset: int, rows: int, columns: int) -> torch.Tensor:
    return torch.as_strided(arena, (rows, columns), (columns, 1), offset)


def _factors(
    arena: torch.Tensor, a_offset: int, b_offset: int, bias_offset: int, rank: int, inputs: int, outputs: int
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Views of A^T [in, rank], B [rank, out] and the bias [out]. They hold whatever the arena holds."""
    a = _matrix(arena, a_offset, rank, inputs).T if rank else None
    b = _matrix(arena, b_offset, rank, outputs) if rank else None
    bias = None if bias_offset == ABSENT else _matrix(arena, bias_offset, 1, outputs)[0]
    return a, b, bias


def shrink(
    x: torch.Tensor,
    tables: AdapterTables,
    tiles: RowTiles,
    site: int,
    sites: int,
    workspace: Workspace,
    beside: bool = False,
) -> None:
    """h = A x at `sites` neighbouring sites from `site` on, for the epilogue that comes next. One launch.

    x: [rows, in], contiguous, of the arena's dtype. Raises ValueError otherwise. `beside`: another kernel was
    launched since x was made, usually the base's product, and this one may run at the same time.
    """
    run = shrink_triton if resolve(x.device).name == "triton" else shrink_torch
    run(x, tables, tiles, site, sites, workspace, beside)


def shrink_torch(
    x: torch.Tensor,
    tables: AdapterTables,
    tiles: RowTiles,
    site: int,
    sites: int,
    workspace: Workspace,
    beside: bool = False,
) -> None:
    """Reference of `shrink`: one matmul for each segment and site."""
    _check_input(x, tables, workspace)
    if not tiles.adapted:
        return
    h = workspace.hold(site, sites, 1, x.shape[0])
    for slot, start, stop in tiles.segments:
        for index in range(sites if slot != BASE_SLOT else 0):
            a_offset, _, _, rank = workspace.entries[slot, site + index, : RANK + 1].tolist()
            if rank:
                a = _matrix(tables.arena, a_offset, rank, x.shape[1])
                h[index, 0, start:stop, :rank] = x[start:stop] @ a.T


def shrink_triton(
    x: torch.Tensor,
    tables: AdapterTables,
    tiles: RowTiles,
    site: int,
    sites: int,
    workspace: Workspace,
    beside: bool = False,
) -> None:
    """`shrink` in Triton: columns of x are split, and each split writes a plane."""
    from veneer.kernels.jit import low_rank as jit

    _check_input(x, tables, workspace)
    rows, inputs = x.shape
    if not tiles.adapted or rows == 0:
        return
    capacity = tiles.tiles.shape[0]
    shared = tiles.row_slots is not None
    sizes = plan(rows, inputs, sites, capacity, tiles.tile_rows, workspace.rank_bound, shared)
    jit.shrink[(sizes.programs,)](
        x,
        tables.arena,
        tables.entries,
        tiles.tiles,
        tiles.used,
        workspace.hold(site, sites, sizes.splits, rows),
        site,
        rows,
        capacity,
        inputs,
        workspace.rank_stride,
        tables.entries.stride(0),
        sizes.split_size,
        SITES=sites,
        SPLITS=sizes.splits,
        PARTS=sizes.parts,
        BLOCK_M=sizes.block_m,
        BLOCK_R=sizes.block_r,
        BLOCK_K=sizes.block_k,
        STAGES=sizes.num_stages,
        BESIDE=beside,
        num_warps=sizes.num_warps,
        **launch_options(x.device),
    )


def low_rank(
    x: torch.Tensor, y: torch.Tensor, tables: AdapterTables, tiles: RowTiles, site: int, workspace: Workspace
) -> None:
    """Add the adapters' updates at `site` to y, in place. Rows without one are not touched.

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
    from veneer.kernels.activation import activated
    from veneer.kernels.shared import scale_rows, scales_of

    _check(x, y, tables, workspace)
    inputs, outputs = x.shape[1], y.shape[1]
    hidden = tiles.hidden and tables.hidden_at(tiles.segments, site)
    for slot, start, stop in tiles.segments:
        if slot == BASE_SLOT:
            continue
        a, b, bias = workspace.factors(*workspace.entries[slot, site, : RANK + 1].tolist(), inputs, outputs)
        rows = y[start:stop]
        if a is not None and b is not None:
            h = torch.mm(x[start:stop], a)
            if hidden:
                h = activated(h, workspace.entries[slot, site].tolist(), tables.arena).to(b.dtype)
            scales = scales_of(tables, tiles, site, UPDATE_SCALE, start, stop, outputs)
            if scales is None:
                rows.addmm_(h, b)
            else:
                rows.add_(torch.mm(scale_rows(h, tables, tiles, site, start), b).mul_(scales))
        if bias is not None:
            rows.add_(bias)


def low_rank_triton(
    x: torch.Tensor, y: torch.Tensor, tables: AdapterTables, tiles: RowTiles, site: int, workspace: Workspace
) -> None:
    """`low_rank` as Triton kernels: `shrink`, the activation if there is one, and the epilogue that adds into y."""
    from veneer.kernels.activation import activate_triton
    from veneer.kernels.epilogue import add_update_triton
    from veneer.kernels.shared import scale_ranks_triton

    _check(x, y, tables, workspace)
    if not tiles.adapted or x.shape[0] == 0:
        return
    shrink_triton(x, tables, tiles, site, 1, workspace)
    if tiles.hidden and tables.hidden_at(tiles.segments, site):
        activate_triton(tables, tiles, site, 1, x.shape[0], workspace)
    if tiles.row_slots is not None:
        scale_ranks_triton(tables, tiles, site, 1, x.shape[0], workspace)
    add_update_triton(y[None], tables, tiles, site, workspace, out=y)


def _check(x: torch.Tensor, y: torch.Tensor, tables: AdapterTables, workspace: Workspace) -> None:
    _check_input(x, tables, workspace)
    if y.dtype != tables.arena.dtype or y.stride(1) != 1:
        raise ValueError(f"y is {y.dtype}; it must be the arena's {tables.arena.dtype}, each row contiguous")
    if x.shape[0] != y.shape[0]:
        raise ValueError(f"x has {x.shape[0]} rows and y {y.shape[0]}")


def _check_input(x: torch.Tensor, tables: AdapterTables, workspace: Workspace) -> None:
    if x.dtype != tables.arena.dtype or not x.is_contiguous():
        raise ValueError(f"x is {x.dtype}; it must be the arena's {tables.arena.dtype}, contiguous")
    if workspace.arena is not tables.arena:
        raise ValueError("the workspace was made for another arena")


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
