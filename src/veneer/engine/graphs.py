"""CUDA graphs of steps: one forward, replayed without Python. Decode steps and mixed ones have each their own.

A decode graph is captured for each bucket of rows and each `Variant`: every row is a sequence. A mixed
graph takes prompt chunks, too: a bucket of rows in all, cut anyhow among up to as many sequences as may run.
Which tokens, adapters, pages and lengths a step has is only content of one static buffer, filled by one copy a
step, so one graph replays any mix. Rows that pad a bucket write to and read from a page set aside for them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from enum import IntEnum
from itertools import chain, cycle, groupby, product
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from veneer.engine.base import Base
from veneer.engine.scheduler import Scheduled
from veneer.engine.sequence import ALWAYS
from veneer.kernels.attention import PagedBatch
from veneer.kernels.low_rank import choose_tile_rows, fill_tiles, slots_of_rows, tile_capacity, view_tiles
from veneer.kernels.tables import RowTiles, Segment, Transforms, join_kin
from veneer.kernels.upload import copy_by_kernel

_WARM_UPS = 2  # the first compiles the kernels
# Of few rows are steps with drafts; with more rows the GPU is busy for longer than the host.
MIXED_BUCKETS = (16, 64, 128, 256, 512, 1024)
# A row has the first five (for PREVIOUS see `HostTables.fill`), a sequence the next two, one that samples the last.
# ADAPTERS and HEAD_ADAPTERS, the slots of adapters, are written for steps that read them: see `RowTiles.row_slots`.
IDS, POSITIONS, SLOTS, PREVIOUS, ADAPTERS, LENGTHS, QUERY_START, LAST_ROWS, HEAD_ADAPTERS = range(9)
DECODE_FIELDS, MIXED_FIELDS = 6, 9


def buckets_up_to(max_batch: int) -> list[int]:
    """Batch sizes to capture: powers of two up to 16, then multiples of 16."""
    small = [size for size in (1, 2, 4, 8) if size < max_batch]
    return [*small, *range(16, max_batch, 16), max_batch]


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


class Variant(IntEnum):
    """What a graph does for adapters. Up to HIDDEN each does what those before it do."""

    BASE = 0
    ADAPTED = 1
    SCALED = 2  # changes the base's outputs
    TURNED = 3  # changes its inputs
    # the plain layers do what the others add
    CHANGED = 4  # adds dense and sparse changes, too: `RowTiles.deltas`
    HIDDEN = 5  # has activations and hidden states, too: `RowTiles.hidden`
    # as ADAPTED, TURNED and HIDDEN, with factors that adapters share, too: `RowTiles.row_slots`
    SHARED = 6
    SHARED_TURNED = 7
    SHARED_HIDDEN = 8

    @property
    def is_shared(self) -> bool:
        return self >= Variant.SHARED

    @property
    def does(self) -> Variant:
        """The one up to HIDDEN that does the same, but for shared factors."""
        if not self.is_shared:
            return self
        return (Variant.ADAPTED, Variant.TURNED, Variant.HIDDEN)[self - Variant.SHARED]


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


def _view(
    block: torch.Tensor, row_slots: torch.Tensor, variant: Variant, tile_rows: int, sites: int
) -> RowTiles:
    """Tiles of a step in which an adapter may do at each of `sites` sites what the variant does."""
    everywhere, nowhere = frozenset(range(sites)), frozenset[int]()
    shared, variant = variant.is_shared, variant.does
    transforms = Transforms(
        inputs=everywhere if variant >= Variant.TURNED else nowhere,
        outputs=everywhere if variant >= Variant.SCALED else nowhere,
    )
    flags = variant >= Variant.CHANGED, variant >= Variant.HIDDEN
    slots = row_slots if shared else None
    return view_tiles(block, (), variant >= Variant.ADAPTED, tile_rows, transforms, *flags, slots)


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    logits: torch.Tensor  # [bucket or sequences, vocabulary], overwritten by each replay
    ids: torch.Tensor  # int64 [bucket or sequences], the tokens that went in there, likewise


class StepGraphs(ABC):
    """Captured one by one. `run` is a drop-in for an eager forward and the argmax of its logits."""

    def __init__(
        self,
        base: Base,
        tokens: torch.Tensor,
        buckets: Rows[int],
        sizes: TableSizes,
        page_size: int,
        scratch_page: int,
        variants: tuple[Variant, ...],
    ) -> None:
        """Allocate the static buffers. `variants` are in order.

        `tokens` (int64) is where each step finds the tokens of the step before and leaves the likeliest ones of
        its own; `scratch_page` is a page that no sequence ever has.
        """
        self.replays = 0
        self._base = base
        self._tokens = tokens
        self._buckets = buckets
        self._variants = variants
        self._captured: dict[tuple[int, Variant], _Captured] = {}
        device = base.device
        self._tables = StepTables(sizes, device=device, pin=False)
        cpu, pin = torch.device("cpu"), device.type == "cuda"
        hosts = [
            HostTables(StepTables(sizes, device=cpu, pin=pin), page_size, scratch_page) for _ in range(2)
        ]
        self._hosts = cycle(hosts)
        self._max_keys = sizes.max_pages * page_size

    @abstractmethod
    def fits(self, planned: Rows[Scheduled]) -> bool:
        """Whether there is a graph for these."""

    def missing(self) -> list[tuple[int, Variant]]:
        """What is not captured: the simplest variant first, of its buckets the largest, whose memory others use."""
        every = product(self._variants, reversed(self._buckets))
        return [(bucket, variant) for variant, bucket in every if (bucket, variant) not in self._captured]

    @torch.inference_mode()
    def capture(self, bucket: int, variant: Variant, pool: Any) -> None:
        """Capture one of those. No step may be under way."""
        self._fill([], bucket, None, variant)
        self._captured[bucket, variant] = self._capture(bucket, variant, pool)

    @torch.inference_mode()
    def run(self, planned: Rows[Scheduled], previous: Rows[int] | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [sampling rows, vocabulary] and the tokens that went in there, valid until the next call.

        `planned` is sorted by slot; `previous` as for `HostTables.fill`. The argmax of each row of the logits is
        left in the first rows of `tokens`.
        """
        bucket = self._bucket(planned)
        assert bucket is not None  # `fits` says so
        variant = self._find(planned, bucket)
        assert variant is not None
        self._fill(planned, bucket, previous, variant)
        captured = self._captured[bucket, variant]
        captured.graph.replay()
        self.replays += 1
        count = sum(item.num_sampled for item in planned)
        return captured.logits[:count], captured.ids[:count]

    def _bucket(self, planned: Rows[Scheduled]) -> int | None:
        """The least bucket with room for the rows and their tiles."""
        rows, regular = sum(item.count for item in planned), self._is_regular(planned)
        segments = [] if regular else segments_of(planned)
        for size in self._buckets:
            if size >= rows and count_tiles(segments, self._tile_rows_of(size)) < self._tile_entries(size):
                return size
        return None

    def _find(self, planned: Rows[Scheduled], bucket: int) -> Variant | None:
        """The least variant that does what these need and is captured, if there is one."""
        tables = self._base.context.tables
        assert tables is not None  # the runner sets them
        slots = tables.acting.intersection(slot for item in planned for slot, _ in item.parts)
        need = Variant.ADAPTED if slots else Variant.BASE
        if changes := [tables.transforms[slot] for slot in slots if slot in tables.transforms]:
            need = Variant.TURNED if any(change.inputs for change in changes) else Variant.SCALED
        if not slots.isdisjoint(tables.deltas):
            need = Variant.CHANGED
        if not slots.isdisjoint(tables.hidden):
            need = Variant.HIDDEN
        shared = not slots.isdisjoint(tables.kin)
        for variant in self._variants:
            if variant.does >= need and variant.is_shared == shared and (bucket, variant) in self._captured:
                return variant
        return None

    def _is_regular(self, planned: Rows[Scheduled]) -> bool:
        """Whether there is one segment of the base and of each adapter at most: tables are sized for that."""
        return all(item.sequence.changes == ALWAYS for item in planned)

    @abstractmethod
    def _tile_rows_of(self, bucket: int) -> int:
        """How many rows a tile has at most."""

    @abstractmethod
    def _tile_entries(self, bucket: int) -> int:
        """How many tiles there is room for, and one."""

    def _fill(
        self, planned: Rows[Scheduled], bucket: int, previous: Rows[int] | None, variant: Variant
    ) -> None:
        host = next(self._hosts)
        host.wait()
        host.copy_to(self._tables, self._fill_host(host, planned, bucket, previous, variant))

    def _kin(self, variant: Variant) -> Mapping[int, bytes] | None:
        """As for `HostTables.fill`."""
        tables = self._base.context.tables
        assert tables is not None  # the runner sets them
        return tables.kin if variant.is_shared else None

    @abstractmethod
    def _fill_host(
        self,
        host: HostTables,
        planned: Rows[Scheduled],
        bucket: int,
        previous: Rows[int] | None,
        variant: Variant,
    ) -> int:
        """Write a step; returns how many elements of the buffer it needs."""

    @abstractmethod
    def _bind(self, bucket: int, variant: Variant) -> None:
        """Let the layers read the static tables."""

    def _last_rows(self) -> torch.Tensor | None:
        """Rows that have logits, int64; None for all."""
        return None

    def _capture(self, bucket: int, variant: Variant, pool: Any) -> _Captured:
        self._bind(bucket, variant)
        stream = torch.cuda.Stream(self._base.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._base.device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                self._forward(bucket)
        torch.cuda.current_stream(self._base.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # The loader's thread may allocate and wait meanwhile: by default that would break the capture and the load.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            logits, ids = self._forward(bucket)
        return _Captured(graph, logits, ids)

    def _forward(self, bucket: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows = self._tables.rows[:, :bucket]
        previous = rows[PREVIOUS].long()
        # An index of -1 is harmless: it reads the last token, and the row has an id of its own.
        ids = torch.where(previous < 0, rows[IDS], self._tokens[previous])
        last_rows = self._last_rows()
        hidden = self._base.forward(ids, rows[POSITIONS].long())
        logits = self._base.logits(hidden if last_rows is None else hidden[last_rows])
        torch.argmax(logits, -1, out=self._tokens[: len(logits)])
        return logits, ids if last_rows is None else ids[last_rows]


class DecodeGraphs(StepGraphs):
    """Of steps in which every sequence has one row, and samples."""

    def __init__(
        self,
        base: Base,
        tokens: torch.Tensor,
        *,
        page_size: int,
        scratch_page: int,
        max_pages: int,
        max_batch: int,
        slots: int,
        every_variant: bool = True,
    ) -> None:
        """As for `StepGraphs`; `max_pages` of a sequence, `slots` of adapters.

        Without `every_variant` steps that run plain layers have no graph: these are hundreds of launches each.
        """
        self._slots = slots
        self._max_batch = max_batch
        self._tile_rows = choose_tile_rows(max_batch)
        sizes = TableSizes(DECODE_FIELDS, max_batch, self._tile_entries(max_batch), 0, max_batch, max_pages)
        buckets = buckets_up_to(max_batch)
        variants = tuple(each for each in Variant if every_variant or each.does < Variant.CHANGED)
        super().__init__(base, tokens, buckets, sizes, page_size, scratch_page, variants)
        self._query_start = torch.arange(max_batch + 1, dtype=torch.int32, device=base.device)

    def fits(self, planned: Rows[Scheduled]) -> bool:
        one_row_each = all(item.count == 1 and item.samples for item in planned)
        bucket = self._bucket(planned) if one_row_each else None
        return bucket is not None and self._find(planned, bucket) is not None

    def _fill_host(
        self,
        host: HostTables,
        planned: Rows[Scheduled],
        bucket: int,
        previous: Rows[int] | None,
        variant: Variant,
    ) -> int:
        tile_rows = choose_tile_rows(self._max_batch, variant.is_shared)
        return host.fill(planned, bucket, bucket, tile_rows, previous, self._kin(variant))

    def _tile_rows_of(self, bucket: int) -> int:
        return self._tile_rows

    def _tile_entries(self, bucket: int) -> int:
        return 1 + tile_capacity(bucket, self._slots, self._tile_rows)

    def _bind(self, bucket: int, variant: Variant) -> None:
        step, tables = self._base.context, self._tables
        tiles = tables.tiles[: self._tile_entries(bucket)]
        slots, tile_rows = (
            tables.rows[ADAPTERS, :bucket],
            choose_tile_rows(self._max_batch, variant.is_shared),
        )
        step.rows = step.head_rows = _view(tiles, slots, variant, tile_rows, len(self._base.sites))
        step.batch = PagedBatch(
            query_start=self._query_start[: bucket + 1],
            kv_len=tables.rows[LENGTHS, :bucket],
            block_table=tables.block_table[:, :bucket].T,
            slot_mapping=tables.rows[SLOTS, :bucket],
            query_lens=[1] * bucket,
            kv_lens=[self._max_keys] * bucket,
        )


class MixedGraphs(StepGraphs):
    """Of steps of up to so many rows in all. Those of the base are in tiles as well, which costs them nothing."""

    def __init__(
        self,
        base: Base,
        tokens: torch.Tensor,
        *,
        page_size: int,
        scratch_page: int,
        max_pages: int,
        max_batch: int,
        max_rows: int,
        slots: int,
    ) -> None:
        """As for `DecodeGraphs`; `max_rows` (the least of MIXED_BUCKETS or more) bounds the buckets."""
        # Two at least, so that attention launches both of its kernels: see `_bind`.
        self._sequences = max(max_batch, 2)
        self._slots = slots
        self._head_tile_rows = choose_tile_rows(self._sequences)
        buckets = [size for size in MIXED_BUCKETS if size <= max_rows]
        sizes = TableSizes(
            MIXED_FIELDS,
            max(buckets[-1], self._sequences + 1),
            max(map(self._tile_entries, buckets)),
            1 + tile_capacity(self._sequences, slots, self._head_tile_rows),
            self._sequences,
            max_pages,
        )
        variants = tuple(each for each in Variant if each not in (Variant.BASE, Variant.SCALED))
        super().__init__(base, tokens, buckets, sizes, page_size, scratch_page, variants)

    def fits(self, planned: Rows[Scheduled]) -> bool:
        sampled = sum(item.num_sampled for item in planned)
        if max(len(planned), sampled) > self._sequences:
            return False
        bucket = self._bucket(planned)
        if bucket is None or self._find(planned, bucket) is None:
            return False
        head_tiles = count_tiles(head_segments_of(planned), self._head_tile_rows)
        return self._is_regular(planned) or head_tiles < len(self._tables.head_tiles)

    def _fill_host(
        self,
        host: HostTables,
        planned: Rows[Scheduled],
        bucket: int,
        previous: Rows[int] | None,
        variant: Variant,
    ) -> int:
        shared, kin = variant.is_shared, self._kin(variant)
        host.fill_chunks(planned, self._sequences, choose_tile_rows(self._sequences, shared), kin)
        return host.fill(planned, bucket, self._sequences, choose_tile_rows(bucket, shared), previous, kin)

    def _tile_rows_of(self, bucket: int) -> int:
        return choose_tile_rows(bucket)

    def _tile_entries(self, bucket: int) -> int:
        return 1 + tile_capacity(bucket, self._slots, choose_tile_rows(bucket))

    def _last_rows(self) -> torch.Tensor:
        return self._tables.rows[LAST_ROWS, : self._sequences].long()

    def _bind(self, bucket: int, variant: Variant) -> None:
        step, tables, count = self._base.context, self._tables, self._sequences
        tiles = tables.tiles[: self._tile_entries(bucket)]
        sites = len(self._base.sites)
        tile_rows, head_tile_rows = (choose_tile_rows(n, variant.is_shared) for n in (bucket, count))
        step.rows = _view(tiles, tables.rows[ADAPTERS, :bucket], variant, tile_rows, sites)
        head_slots = tables.rows[HEAD_ADAPTERS, :count]
        step.head_rows = _view(tables.head_tiles, head_slots, variant, head_tile_rows, sites)
        step.batch = PagedBatch(
            query_start=tables.rows[QUERY_START, : count + 1],
            kv_len=tables.rows[LENGTHS, :count],
            block_table=tables.block_table.T,
            slot_mapping=tables.rows[SLOTS, :bucket],
            query_lens=[1] * (count - 1) + [bucket],  # bounds: some may have one row, some up to all
            kv_lens=[self._max_keys] * count,
        )
