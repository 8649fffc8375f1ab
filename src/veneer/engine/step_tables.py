"""The tables of a step in one buffer: what the host writes and a captured graph reads.

One int32 buffer holds ids, positions, slots, lengths, tiles and the block table; a step fills its front on the host
and one copy brings that to the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Rows
from itertools import chain, groupby
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from veneer.engine.batch import Scheduled
from veneer.kernels.low_rank import fill_tiles, slots_of_rows
from veneer.kernels.tables import Segment, join_kin
from veneer.kernels.upload import copy_by_kernel

# A row has the first five (for PREVIOUS see `HostTables.fill`), a sequence the next two, one that samples the last.
# ADAPTERS and HEAD_ADAPTERS, the slots of adapters, are written for steps that read them: see `RowTiles.row_slots`.
IDS, POSITIONS, SLOTS, PREVIOUS, ADAPTERS, LENGTHS, QUERY_START, LAST_ROWS, HEAD_ADAPTERS = range(9)
DECODE_FIELDS, MIXED_FIELDS = 6, 9


def segments_of(planned: Rows[Scheduled]) -> list[Segment]:
    """Neighbouring rows of one adapter or of the base, of items sorted by slot.

    Where an adapter acts on a part of an item, rows of the base lie between those of adapters.
    """
    return _merge([part for item in planned for part in item.parts])


def head_segments_of(planned: Rows[Scheduled]) -> list[Segment]:
    """The same of the rows that sample alone."""
    return _merge([(item.slot, item.num_sampled) for item in planned if item.samples])


def count_tiles(segments: Rows[Segment], tile_rows: int) -> int:
    """Into how many tiles the segments are cut."""
    return sum(-(-(stop - start) // tile_rows) for _, start, stop in segments)


def _merge(parts: Rows[tuple[int, int]]) -> list[Segment]:
    """Segments of neighbours (slot, rows)."""
    segments = []
    row = 0
    for slot, group in groupby(parts, key=lambda part: part[0]):
        rows = sum(count for _, count in group)
        segments.append(Segment(slot, row, row + rows))
        row += rows
    return segments


class TableSizes(NamedTuple):
    """What a family of graphs needs at most."""

    fields: int  # DECODE_FIELDS or MIXED_FIELDS
    columns: int  # rows, or one more than there are sequences
    tiles: int  # entries with the one that counts them
    head_tiles: int  # 0: those of the rows
    sequences: int
    max_pages: int  # of a sequence


class StepTables:
    """Views of one int32 buffer with all that changes from step to step.

    The block table comes last and pages are its rows, so the part that a step uses is the front of the buffer.
    """

    def __init__(self, sizes: TableSizes, *, device: torch.device, pin: bool) -> None:
        fields, columns, tiles, head_tiles, sequences, max_pages = sizes
        shapes = [(fields, columns), (tiles, 3), (head_tiles, 3), (max_pages, sequences)]
        lengths = [a * b for a, b in shapes]
        self.buffer = torch.zeros(sum(lengths), dtype=torch.int32, device=device, pin_memory=pin)
        self.rows, self.tiles, self.head_tiles, self.block_table = (
            part.view(shape) for part, shape in zip(torch.split(self.buffer, lengths), shapes, strict=True)
        )

    def used(self, pages: int) -> int:
        """Elements of the buffer that a step with at most `pages` pages for a sequence needs."""
        return int(self.buffer.numel() - self.block_table[pages:].numel())


class HostTables:
    """The host's side of the tables, pinned where there is a GPU. One of two: while the copy of one is pending,
    the next step is written to the other."""

    def __init__(self, tables: StepTables, page_size: int, scratch_page: int) -> None:
        self._tables = tables
        self._rows, self._tiles, self._head_tiles, self._block_table = (
            part.numpy() for part in (tables.rows, tables.tiles, tables.head_tiles, tables.block_table)
        )
        self._page_size = page_size
        self._scratch = [scratch_page]
        self._written: list[tuple[list[int], int]] = [([], 0)] * self._block_table.shape[1]
        pinned = tables.buffer.is_pinned()
        self._copied = torch.cuda.Event() if pinned else None  # type: ignore[no-untyped-call]

    def fill(
        self,
        planned: Rows[Scheduled],
        bucket: int,
        sequences: int,
        tile_rows: int,
        previous: Rows[int] | None,
        kin: Mapping[int, bytes] | None = None,
    ) -> int:
        """Write a step, padded to `bucket` rows and `sequences` sequences; returns how many elements it needs.

        With `kin` neighbours of one kin come into the same tiles, and the slots of all rows are written.

        `previous` are the places of the rows' tokens among those of the step before, when only the device
        knows them: then every sequence has one row. Raises ValueError when the tiles do not fit.
        """
        used = self._fill_pages([item.sequence.pages for item in planned], sequences)
        counts = [item.count for item in planned]
        lengths = self._rows[LENGTHS]
        lengths[: len(planned)] = [item.start + item.count for item in planned]
        lengths[len(planned) : sequences] = 1
        self._fill_rows(planned, np.array(counts, np.int64), bucket, previous)
        self._fill_tiles(self._tiles, segments_of(planned), tile_rows, ADAPTERS, kin)
        return used

    def fill_chunks(
        self,
        planned: Rows[Scheduled],
        sequences: int,
        tile_rows: int,
        kin: Mapping[int, bytes] | None = None,
    ) -> None:
        """Write what a mixed step has besides: the rows of each sequence, and those of the logits."""
        starts, last_rows = self._rows[QUERY_START], self._rows[LAST_ROWS]
        starts[1 : len(planned) + 1] = np.cumsum([item.count for item in planned])
        starts[len(planned) + 1 : sequences + 1] = starts[len(planned)]  # no rows
        stops = zip(planned, starts[1 : len(planned) + 1].tolist(), strict=True)
        rows = [row for item, stop in stops for row in range(stop - item.num_sampled, stop)]
        last_rows[: len(rows)] = rows
        last_rows[len(rows) : sequences] = 0
        self._fill_tiles(self._head_tiles, head_segments_of(planned), tile_rows, HEAD_ADAPTERS, kin)

    def copy_to(self, device: StepTables, used: int) -> None:
        """Start the copy of the first `used` elements."""
        copy_by_kernel(self._tables.buffer[:used], device.buffer[:used])
        if self._copied is not None:
            self._copied.record()

    def wait(self) -> None:
        """Until the last copy is done: it is, when the step that it was for is."""
        if self._copied is not None:
            self._copied.synchronize()

    def _fill_tiles(
        self,
        tiles: NDArray[np.int32],
        segments: list[Segment],
        tile_rows: int,
        field: int,
        kin: Mapping[int, bytes] | None,
    ) -> None:
        """Write tiles and, with `kin`, the slots of their rows into `field`."""
        if kin is not None:
            slots = slots_of_rows(segments)
            self._rows[field, : len(slots)] = slots
            segments = join_kin(segments, kin)
        fill_tiles(tiles, segments, tile_rows)

    def _fill_pages(self, tables: list[list[int]], sequences: int) -> int:
        """Write the block table; returns how many elements of the buffer are in use."""
        tables = tables + [self._scratch] * (sequences - len(tables))
        for column, pages in enumerate(tables):
            # A sequence's list of pages only grows while it is the same list: write what is new.
            known, written = self._written[column]
            fresh = pages[written:] if pages is known else pages
            if fresh:
                self._block_table[len(pages) - len(fresh) : len(pages), column] = fresh
                self._written[column] = pages, len(pages)
        return self._tables.used(max(map(len, tables)))

    def _fill_rows(
        self, planned: Rows[Scheduled], counts: NDArray[np.int64], bucket: int, previous: Rows[int] | None
    ) -> None:
        """Write the fields of each row; lengths and pages are written."""
        size, rows = self._page_size, int(counts.sum())
        fields = self._rows[:ADAPTERS, :rows]
        owner = np.repeat(np.arange(len(planned)), counts)
        # A sequence's last row is its last token, and so on backwards.
        index = np.arange(rows) + (self._rows[LENGTHS, : len(planned)] - counts.cumsum())[owner]
        unplaced = np.array([item.sequence.num_unplaced for item in planned], np.int64)
        fields[IDS] = 0 if previous else list(chain.from_iterable(item.tokens for item in planned))
        fields[POSITIONS] = index - unplaced[owner]
        fields[SLOTS] = self._block_table[index // size, owner] * size + index % size
        fields[PREVIOUS] = previous or -1
        self._rows[:ADAPTERS, rows:bucket] = [[0], [0], [self._scratch[0] * size], [-1]]
