"""CUDA graphs of decode steps: one forward of one row for each sequence, replayed without Python.

A graph is captured for each bucket of rows, with and without adapters. Which adapters, pages and lengths a step
has is only content of static buffers, so one graph replays any mix. Rows that pad a bucket write to and read
from a page set aside for them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from veneer.engine.base import Base
from veneer.engine.scheduler import Scheduled
from veneer.kernels.attention import PagedBatch
from veneer.kernels.low_rank import choose_tile_rows, make_tiles, tile_capacity
from veneer.kernels.tables import RowTiles, Segment

logger = logging.getLogger(__name__)

_WARM_UPS = 2  # the first compiles the kernels
IDS, POSITIONS, SLOTS, LENGTHS = range(4)  # rows of the packed metadata


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    logits: torch.Tensor  # [bucket, vocabulary], overwritten by each replay


def buckets_up_to(max_batch: int) -> list[int]:
    """Batch sizes to capture: powers of two up to 16, then multiples of 16."""
    small = [size for size in (1, 2, 4, 8) if size < max_batch]
    return [*small, *range(16, max_batch, 16), max_batch]


class DecodeGraphs:
    """Captured once at start. `run` is a drop-in for an eager forward of decode rows."""

    def __init__(
        self, base: Base, *, page_size: int, scratch_page: int, max_pages: int, max_batch: int, slots: int
    ) -> None:
        """Allocate the static buffers. `scratch_page` is a page that no sequence ever has."""
        self._base = base
        self._page_size = page_size
        self._scratch = scratch_page
        self._buckets = buckets_up_to(max_batch)
        self._tile_rows = choose_tile_rows(max_batch)
        self._slots = slots
        self._captured: dict[tuple[int, bool], _Captured] = {}
        device = base.device
        # Ids, positions, slots and lengths go to the device in one copy, the block table in another.
        self._packed = torch.zeros(4, max_batch, dtype=torch.int64, device=device)
        self._block_table = torch.full((max_batch, max_pages), scratch_page, dtype=torch.int32, device=device)
        self._host_packed = torch.zeros(4, max_batch, dtype=torch.int64, pin_memory=True)
        self._host_table = torch.zeros(max_batch, max_pages, dtype=torch.int32, pin_memory=True)
        self._query_start = torch.arange(max_batch + 1, dtype=torch.int32, device=device)
        self._tiles = torch.zeros(max_batch, 3, dtype=torch.int32, device=device)
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
        self._fill([], self._buckets[-1])
        for bucket in reversed(self._buckets):
            for adapted in (False, True):
                self._captured[bucket, adapted] = self._capture(bucket, adapted, pool)
        torch.cuda.synchronize(self._base.device)
        logger.info("captured %d decode graphs in %.1f s", len(self._captured), time.monotonic() - started)

    @torch.inference_mode()
    def run(self, planned: Rows[Scheduled], segments: Rows[Segment]) -> torch.Tensor:
        """Logits [rows, vocabulary], valid until the next call. `planned` is sorted by slot."""
        bucket = next(size for size in self._buckets if size >= len(planned))
        self._fill(planned, bucket)
        make_tiles(
            segments, self._capacity(bucket), self._tile_rows, out=self._tiles[: self._capacity(bucket)]
        )
        captured = self._captured[bucket, bool(segments)]
        captured.graph.replay()
        return captured.logits[: len(planned)]

    def _fill(self, planned: Rows[Scheduled], bucket: int) -> None:
        size = self._page_size
        packed: np.ndarray[tuple[int, ...], np.dtype[np.int64]] = self._host_packed.numpy()
        packed[:, : len(planned)] = (
            np.array(
                [
                    (
                        item.sequence.tokens[item.start],
                        item.start,
                        item.sequence.pages[item.start // size] * size + item.start % size,
                        item.start + 1,
                    )
                    for item in planned
                ],
                dtype=np.int64,
            )
            .reshape(-1, 4)
            .T
        )
        packed[:, len(planned) : bucket] = np.array([[0], [0], [self._scratch * size], [1]])
        widest = max((len(item.sequence.pages) for item in planned), default=1)
        table = self._host_table.numpy()
        table[len(planned) : bucket, 0] = self._scratch
        for row, item in enumerate(planned):
            table[row, : len(item.sequence.pages)] = item.sequence.pages
        self._packed[:, :bucket].copy_(self._host_packed[:, :bucket], non_blocking=True)
        self._block_table[:bucket, :widest].copy_(self._host_table[:bucket, :widest], non_blocking=True)

    def _capacity(self, bucket: int) -> int:
        return tile_capacity(bucket, self._slots, self._tile_rows)

    def _capture(self, bucket: int, adapted: bool, pool: Any) -> _Captured:
        step = self._base.context
        capacity = self._capacity(bucket)
        rows = RowTiles((), self._tiles[:capacity], capacity if adapted else 0, self._tile_rows)
        step.rows = step.head_rows = rows
        step.batch = PagedBatch(
            query_start=self._query_start[: bucket + 1],
            kv_len=self._packed[LENGTHS, :bucket].int(),
            block_table=self._block_table[:bucket],
            slot_mapping=self._packed[SLOTS, :bucket],
            query_lens=[1] * bucket,
            kv_lens=[self._max_keys] * bucket,
        )
        stream = torch.cuda.Stream(self._base.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._base.device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                self._forward(bucket)
        torch.cuda.current_stream(self._base.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            step.batch.kv_len.copy_(self._packed[LENGTHS, :bucket])  # to int32, again in each replay
            logits = self._forward(bucket)
        return _Captured(graph, logits)

    def _forward(self, bucket: int) -> torch.Tensor:
        out = self._base.model(
            input_ids=self._packed[IDS : IDS + 1, :bucket],
            position_ids=self._packed[POSITIONS : POSITIONS + 1, :bucket],
            use_cache=False,
        )
        logits: torch.Tensor = out.logits[0]
        return logits
