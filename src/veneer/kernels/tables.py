"""The static device buffers that describe resident adapters and a step's rows to the kernels.

The buffers keep their addresses for the life of the engine, so a captured graph can replay any mix of
adapters: what changes between steps is only their content.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

A_OFFSET, B_OFFSET, BIAS_OFFSET, RANK = range(4)
ABSENT = -1  # an offset of a tensor that the adapter does not have at a site
BASE_SLOT = -1  # the slot of rows without an adapter
ALIGNED = 16  # elements; offsets are multiples, so that kernels load whole vectors


@dataclass(frozen=True)
class AdapterTables:
    """All resident adapters. Offsets count elements from the start of the arena.

    At `entries[slot, site]` stand (a_offset, b_offset, bias_offset, rank): A is [rank, in] row-major at
    a_offset, B is [rank, out] at b_offset, the bias [out] at bias_offset. rank 0 means no low-rank part.
    Offsets that are not ABSENT must be multiples of ALIGNED: kernels rely on it unchecked.
    """

    arena: torch.Tensor  # [elements], the engine's dtype
    entries: torch.Tensor  # int64 [slots, sites, 4], on the arena's device
    entries_host: torch.Tensor  # the same on the CPU, for launches that need a rank on the host


class Segment(NamedTuple):
    """Neighbouring rows of a step that use the same adapter, or the base alone."""

    slot: int  # BASE_SLOT for rows without an adapter
    start: int  # first row
    stop: int  # one past the last row


@dataclass(frozen=True)
class RowTiles:
    """Which rows of x use which slot. Rows of one adapter are neighbours, and every row is in one tile.

    `tiles[i] = (slot, first_row, rows)` cuts the segments into at most `tile_rows` rows each. Kernels read
    `used` on the device and loop over that many tiles, so a captured graph replays any mix.
    """

    segments: tuple[Segment, ...]  # host; may be empty in a captured graph
    tiles: torch.Tensor  # int32 [capacity, 3], on the arena's device; past the used ones anything
    used: torch.Tensor  # int32 [1], on the arena's device: tiles in use
    adapted: bool  # host: some row may have an adapter
    tile_rows: int
