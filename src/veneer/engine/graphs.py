"""CUDA graphs of decode steps: one forward of one row for each sequence, replayed without Python.

A graph is captured for each bucket of rows, with and without adapters. Which tokens, adapters, pages and lengths
a step has is only content of one static buffer, filled by one copy a step, so one graph replays any mix. Rows
that pad a bucket write to and read from a page set aside for them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np
import torch

from veneer.engine.base import Base
from veneer.engine.scheduler import Scheduled
from veneer.kernels.attention import PagedBatch
from veneer.kernels.low_rank import choose_tile_rows, fill_tiles, tile_capacity, view_tiles
from veneer.kernels.tables import BASE_SLOT, Segment

logger = logging.getLogger(__name__)

_WARM_UPS = 2  # the first compiles the kernels
FIELDS = IDS, POSITIONS, SLOTS, LENGTHS, PREVIOUS = range(5)  # PREVIOUS: see `HostTables.fill`


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    logits: torch.Tensor  # [bucket, vocabulary], overwritten by each replay
    ids: torch.Tensor  # int64 [bucket], the tokens that went in, likewise


def buckets_up_to(max_batch: int) -> list[int]:
    """Batch sizes to capture: powers of two up to 16, then multiples of 16."""
    small = [size for size in (1, 2, 4, 8) if size < max_batch]
    return [*small, *range(16, max_batch, 16), max_batch]


class StepTables:
    """Views of one int32 buffer with all that changes from step to step.

    The block table comes last and pages are its rows, so the part that a step uses is the front of the buffer.
    """

    def __init__(
        self, max_batch: int, tiles: int, max_pages: int, *, device: torch.device, pin: bool
    ) -> None:
        sizes = [len(FIELDS) * max_batch, tiles * 3, max_pages * max_batch]
        self.buffer = torch.zeros(sum(sizes), dtype=torch.int32, device=device, pin_memory=pin)
        rows, tile_block, table = torch.split(self.buffer, sizes)
        self.rows = rows.view(len(FIELDS), max_batch)
        self.tiles = tile_block.view(tiles, 3)
        self.block_table = table.view(max_pages, max_batch)

    def used(self, pages: int) -> int:
        """Elements of the buffer that a step with at most `pages` pages for a sequence needs."""
        return int(self.buffer.numel() - self.block_table[pages:].numel())


class HostTables:
    """The host's side of the tables, pinned where there is a GPU. One of two: while the copy of one is pending,
    the next step is written to the other."""

    def __init__(self, tables: StepTables, page_size: int, scratch_page: int) -> None:
        self._tables = tables
        self._rows, self._tiles, self._block_table = (
            part.numpy() for part in (tables.rows, tables.tiles, tables.block_table)
        )
        self._page_size = page_size
        self._scratch = scratch_page
        self._written: list[tuple[list[int], int]] = [([], 0)] * self._rows.shape[1]
        pinned = tables.buffer.is_pinned()
        self._copied = torch.cuda.Event() if pinned else None  # type: ignore[no-untyped-call]

    def fill(
        self,
        planned: Rows[Scheduled],
        bucket: int,
        segments: Rows[Segment],
        tile_rows: int,
        previous: Rows[int] | None,
    ) -> int:
        """Write a step; returns how many elements of the buffer it needs.

        `previous` are the places of the rows' tokens among those of the step before, when only the device
        knows them. Raises ValueError when the tiles do not fit.
        """
        size, count = self._page_size, len(planned)
        fields = [
            (
                item.sequence.tokens[item.start] if row < 0 else 0,
                item.start,
                item.sequence.pages[item.start // size] * size + item.start % size,
                item.start + 1,
                row,
            )
            for item, row in zip(planned, previous or [-1] * count, strict=True)
        ]
        fields += [(0, 0, self._scratch * size, 1, -1)] * (bucket - count)
        self._rows[:, :bucket] = np.array(fields, dtype=np.int32).T
        fill_tiles(self._tiles, segments, tile_rows)
        tables = [item.sequence.pages for item in planned] + [[self._scratch] for _ in range(bucket - count)]
        for column, pages in enumerate(tables):
            # A sequence's list of pages only grows while it is the same list: write what is new.
            known, written = self._written[column]
            fresh = pages[written:] if pages is known else pages
            if fresh:
                self._block_table[len(pages) - len(fresh) : len(pages), column] = fresh
                self._written[column] = pages, len(pages)
        return self._tables.used(max(map(len, tables)))

    def copy_to(self, device: StepTables, used: int) -> None:
        """Start the copy of the first `used` elements."""
        device.buffer[:used].copy_(self._tables.buffer[:used], non_blocking=True)
        if self._copied is not None:
            self._copied.record()

    def wait(self) -> None:
        """Until the last copy is done: it is, when the step that it was for is."""
        if self._copied is not None:
            self._copied.synchronize()


class DecodeGraphs:
    """Captured once at start. `run` is a drop-in for an eager forward of decode rows and the argmax of it."""

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
    ) -> None:
        """Allocate the static buffers.

        `tokens` (int64) is where each step finds the tokens of the step before and leaves the likeliest ones of
        its own; `scratch_page` is a page that no sequence ever has.
        """
        self._base = base
        self._tokens = tokens
        self._buckets = buckets_up_to(max_batch)
        self._tile_rows = choose_tile_rows(max_batch)
        self._slots = slots
        self._captured: dict[tuple[int, bool], _Captured] = {}
        device = base.device
        sizes = max_batch, self._tile_entries(max_batch), max_pages
        self._tables = StepTables(*sizes, device=device, pin=False)
        cpu, pin = torch.device("cpu"), device.type == "cuda"
        hosts = [
            HostTables(StepTables(*sizes, device=cpu, pin=pin), page_size, scratch_page) for _ in range(2)
        ]
        self._hosts = cycle(hosts)
        self._query_start = torch.arange(max_batch + 1, dtype=torch.int32, device=device)
        self._max_keys = max_pages * page_size

    def fits(self, planned: Rows[Scheduled]) -> bool:
        """Whether every item is one row that samples, and there is a bucket for all."""
        one_row_each = all(item.count == 1 and item.samples for item in planned)
        return one_row_each and len(planned) <= self._buckets[-1]

    @torch.inference_mode()
    def capture(self) -> None:
        """Capture every bucket, largest first, so that the smaller ones reuse its memory."""
        started = time.monotonic()
        pool = torch.cuda.graph_pool_handle()
        self._fill([], self._buckets[-1], [], None)
        for bucket in reversed(self._buckets):
            for adapted in (False, True):
                self._captured[bucket, adapted] = self._capture(bucket, adapted, pool)
        torch.cuda.synchronize(self._base.device)
        logger.info("captured %d decode graphs in %.1f s", len(self._captured), time.monotonic() - started)

    @torch.inference_mode()
    def run(
        self, planned: Rows[Scheduled], segments: Rows[Segment], previous: Rows[int] | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [rows, vocabulary] and the tokens that went in [rows], both valid until the next call.

        `planned` is sorted by slot; `previous` as for `HostTables.fill`. The argmax of each row is left in the
        first rows of `tokens`.
        """
        count = len(planned)
        bucket = next(size for size in self._buckets if size >= count)
        self._fill(planned, bucket, segments, previous)
        captured = self._captured[bucket, any(segment.slot != BASE_SLOT for segment in segments)]
        captured.graph.replay()
        return captured.logits[:count], captured.ids[:count]

    def _fill(
        self, planned: Rows[Scheduled], bucket: int, segments: Rows[Segment], previous: Rows[int] | None
    ) -> None:
        host = next(self._hosts)
        host.wait()
        used = host.fill(planned, bucket, segments, self._tile_rows, previous)
        host.copy_to(self._tables, used)

    def _tile_entries(self, bucket: int) -> int:
        return 1 + tile_capacity(bucket, self._slots, self._tile_rows)

    def _capture(self, bucket: int, adapted: bool, pool: Any) -> _Captured:
        self._bind(bucket, adapted)
        stream = torch.cuda.Stream(self._base.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._base.device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                self._forward(bucket)
        torch.cuda.current_stream(self._base.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            logits, ids = self._forward(bucket)
        return _Captured(graph, logits, ids)

    def _bind(self, bucket: int, adapted: bool) -> None:
        """Let the layers read the static tables."""
        step, tables = self._base.context, self._tables
        step.rows = step.head_rows = view_tiles(
            tables.tiles[: self._tile_entries(bucket)], (), adapted, self._tile_rows
        )
        step.batch = PagedBatch(
            query_start=self._query_start[: bucket + 1],
            kv_len=tables.rows[LENGTHS, :bucket],
            block_table=tables.block_table[:, :bucket].T,
            slot_mapping=tables.rows[SLOTS, :bucket],
            query_lens=[1] * bucket,
            kv_lens=[self._max_keys] * bucket,
        )

    def _forward(self, bucket: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows = self._tables.rows[:, :bucket]
        previous = rows[PREVIOUS].long()
        # An index of -1 is harmless: it reads the last token, and the row has an id of its own.
        ids = torch.where(previous < 0, rows[IDS], self._tokens[previous])
        out = self._base.model(
            input_ids=ids.unsqueeze(0), position_ids=rows[POSITIONS].long().unsqueeze(0), use_cache=False
        )
        logits: torch.Tensor = out.logits[0]
        torch.argmax(logits, -1, out=self._tokens[:bucket])
        return logits, ids
