"""What tests of adapters' kernels share: segments of rows, and tiles with anything past those in use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from veneer.kernels.low_rank import fill_tiles, slots_of_rows, tile_capacity, view_tiles
from veneer.kernels.tables import NO_TRANSFORMS, RowTiles, Segment, join_kin


def segments_of(counts: Sequence[tuple[int, int]]) -> list[Segment]:
    """Segments of (slot, rows) in row order."""
    segments: list[Segment] = []
    start = 0
    for slot, rows in counts:
        segments.append(Segment(slot, start, start + rows))
        start += rows
    return segments


def tiles_of(
    segments: Sequence[Segment],
    slots: int,
    tile_rows: int,
    device: torch.device | str,
    *,
    spare: int = 3,
    adapted: bool = True,
    deltas: bool = False,
    hidden: bool = False,
    kin: Mapping[int, bytes] | None = None,
) -> RowTiles:
    """The tiles of segments on a device, with `spare` places more than they can need; those of one kin joined."""
    rows = segments[-1].stop if segments else 0
    capacity = tile_capacity(rows, slots, tile_rows) + spare
    block = torch.full((1 + capacity, 3), 12345, dtype=torch.int32)  # past the used ones anything
    joined = join_kin(segments, kin or {})
    fill_tiles(block.numpy(), joined, tile_rows)
    row_slots = torch.from_numpy(slots_of_rows(segments)).to(device) if kin else None
    does = (NO_TRANSFORMS, deltas, hidden, row_slots)
    return view_tiles(block.to(device), joined, adapted, tile_rows, *does)
