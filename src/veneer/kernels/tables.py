"""The static device buffers that describe resident adapters and a step's rows to the kernels.

The buffers keep their addresses for the life of the engine, so a captured graph can replay any mix of
adapters: what changes between steps is only their content.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

COLUMNS = 8  # of an entry
A_OFFSET, B_OFFSET, BIAS_OFFSET, RANK, IN_OFFSET, IN_BLOCK, OUT_OFFSET, OUT_PAIR = range(COLUMNS)
OFFSETS = [A_OFFSET, B_OFFSET, BIAS_OFFSET, IN_OFFSET, OUT_OFFSET]
ABSENT = -1  # an offset of a tensor that the adapter does not have at a site
BASE_SLOT = -1  # the slot of rows without an adapter
MAX_BLOCK = 256  # features of a rotation; a larger one would cost as much as the base's product
ALIGNED = 16  # elements; offsets are multiples, so that kernels load whole vectors


class Transforms(NamedTuple):
    """The sites at which an adapter changes the base's input or output."""

    inputs: frozenset[int]
    outputs: frozenset[int]


@dataclass(frozen=True)
class AdapterTables:
    """All resident adapters. Offsets count elements from the start of the arena.

    At `entries[slot, site]` stand, by column:

    A_OFFSET, B_OFFSET, RANK: A [rank, in] and B [rank, out]; rank 0 means no low-rank part.
    BIAS_OFFSET: the bias [out].
    IN_OFFSET, IN_BLOCK: R - I, [in / block, block, block], of the blocks R that turn the base's input.
    OUT_OFFSET, OUT_PAIR: scale - 1 [out] of the base's output; with a pair over 0 the weights [out] of each
        feature's partner follow (see kernels/transform.py).

    Tensors are row-major. Offsets that are not ABSENT must be multiples of ALIGNED: kernels rely on it unchecked.
    What multiplies is stored as its difference from the identity: it is mostly close to it, and bfloat16, which
    has 8 bits from 1 on, would round most of what was learned away.
    """

    arena: torch.Tensor  # [elements], the engine's dtype
    entries: torch.Tensor  # int64 [slots, sites, COLUMNS], on the arena's device
    entries_host: torch.Tensor  # the same on the CPU, for launches that need a rank on the host
    transforms: dict[int, Transforms] = field(default_factory=dict)  # host: by slot, where there are any

    def transform(self, segments: Iterable[Segment]) -> bool:
        """Whether an adapter of these segments changes the base's input or output anywhere."""
        return any(segment.slot in self.transforms for segment in segments)

    def transform_at(self, segments: Sequence[Segment], site: int) -> tuple[bool, bool]:
        """Whether they change the input and the output at a site; both in a captured graph (no segments)."""
        found = [self.transforms[segment.slot] for segment in segments if segment.slot in self.transforms]
        return (
            not segments or any(site in sites.inputs for sites in found),
            not segments or any(site in sites.outputs for sites in found),
        )


def find_transforms(entries: torch.Tensor) -> Transforms:
    """Read from an adapter's entries, int64 [sites, COLUMNS] on the CPU."""
    return Transforms(
        *(
            frozenset((entries[:, column] != ABSENT).nonzero().flatten().tolist())
            for column in (IN_OFFSET, OUT_OFFSET)
        )
    )


def absent_entries(*shape: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Entries without an adapter, int64 [*shape, COLUMNS]."""
    entries = torch.zeros(*shape, COLUMNS, dtype=torch.int64, device=device)
    entries[..., OFFSETS] = ABSENT
    return entries


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
    transformed: bool = False  # host: some row may have its base's input or output changed
