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
from itertools import cycle, product
from typing import Any

import torch

from veneer.engine.base import Base
from veneer.engine.batch import Scheduled
from veneer.engine.sequence import ALWAYS
from veneer.engine.step_tables import (
    ADAPTERS,
    DECODE_FIELDS,
    HEAD_ADAPTERS,
    IDS,
    LAST_ROWS,
    LENGTHS,
    MIXED_FIELDS,
    POSITIONS,
    PREVIOUS,
    QUERY_START,
    SLOTS,
    HostTables,
    StepTables,
    TableSizes,
    count_tiles,
    head_segments_of,
    segments_of,
)
from veneer.kernels.attention import PagedBatch
from veneer.kernels.low_rank import choose_tile_rows, tile_capacity, view_tiles
from veneer.kernels.tables import RowTiles, Transforms

_WARM_UPS = 2  # the first compiles the kernels
# Of few rows are steps with drafts; with more rows the GPU is busy for longer than the host.
MIXED_BUCKETS = (16, 64, 128, 256, 512, 1024)


def buckets_up_to(max_batch: int) -> list[int]:
    """Batch sizes to capture: powers of two up to 16, then multiples of 16."""
    small = [size for size in (1, 2, 4, 8) if size < max_batch]
    return [*small, *range(16, max_batch, 16), max_batch]


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
        if self._is_regular(planned):
            return True
        head_tiles = count_tiles(head_segments_of(planned), self._head_tile_rows)
        return head_tiles < len(self._tables.head_tiles)

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
