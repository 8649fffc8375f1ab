"""Runs one planned batch through the base: builds the step's tables, one forward, samples.

Rows are sorted by adapter slot, so that each adapter's rows are neighbours; base rows come first.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from itertools import accumulate, groupby
from typing import Any

import torch

from veneer.adapters.residency import Residency
from veneer.engine.base import Base
from veneer.engine.graphs import DecodeGraphs
from veneer.engine.messages import TokenLogprobs
from veneer.engine.sampling import SamplingRow, sample
from veneer.engine.scheduler import Batch, Scheduled
from veneer.kernels.attention import PagedBatch
from veneer.kernels.low_rank import Workspace, choose_tile_rows, make_tiles, tile_capacity
from veneer.kernels.tables import RowTiles, Segment


def allocate_kv(base: Base, num_pages: int, page_size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The KV cache of each layer: two tensors [pages, page_size, kv_heads, head_dim], zeroed.

    Zeroed because attention multiplies masked positions by probability 0, and 0 x NaN is NaN.
    """
    shape = (num_pages, page_size, base.num_kv_heads, base.head_dim)
    return [
        (
            torch.zeros(shape, dtype=base.dtype, device=base.device),
            torch.zeros(shape, dtype=base.dtype, device=base.device),
        )
        for _ in range(base.num_layers)
    ]


def kv_page_bytes(base: Base, page_size: int) -> int:
    """Bytes of one page over all layers, keys and values."""
    item = torch.empty(0, dtype=base.dtype).element_size()
    return 2 * base.num_layers * page_size * base.num_kv_heads * base.head_dim * item


class Runner:
    """The device side of a step."""

    def __init__(
        self,
        base: Base,
        residency: Residency,
        *,
        num_pages: int,
        page_size: int,
        max_rows: int,
        max_rank: int,
    ) -> None:
        self.base = base
        self.page_size = page_size
        tables = residency.tables
        self._step = base.context
        self._step.tables = tables
        self._step.workspace = Workspace(tables, max_rows, max_rank)
        # One page more than the pool knows of: rows that pad a captured graph use it.
        self._step.kv_cache = allocate_kv(base, num_pages + 1, page_size)
        self._scratch_page = num_pages
        self.graphs: DecodeGraphs | None = None
        self._slots = tables.entries.shape[0]
        # Static, so that kernels always read the tiles at one address: of all rows, and of the head's rows.
        self._row_tiles, self._head_tiles = (
            torch.zeros(max_rows, 3, dtype=torch.int32, device=base.device) for _ in range(2)
        )

    def capture_graphs(self, max_batch: int, max_model_len: int) -> None:
        """From here on, steps of decode rows alone replay CUDA graphs."""
        graphs = DecodeGraphs(
            self.base,
            page_size=self.page_size,
            scratch_page=self._scratch_page,
            max_pages=-(-max_model_len // self.page_size),
            max_batch=max_batch,
            slots=self._slots,
        )
        graphs.capture()
        self.graphs = graphs

    @torch.inference_mode()
    def run(self, batch: Batch) -> dict[str, tuple[int, TokenLogprobs | None]]:
        """One forward pass. Returns the sampled token (and its log probabilities) by sequence id."""
        planned = sorted(batch.items, key=lambda item: item.sequence.slot)
        if self.graphs is not None and self.graphs.fits(planned):
            logits = self.graphs.run(planned, _segments(planned, [1] * len(planned)))
        else:
            logits = self.logits(planned)
        sampled = [item for item in planned if item.samples]
        if not sampled:
            return {}
        result = sample(logits, [self._sampling_row(item) for item in sampled])
        return {
            item.sequence.id: (token, logprobs)
            for item, token, logprobs in zip(sampled, result.tokens, result.logprobs, strict=True)
        }

    @torch.inference_mode()
    def logits(self, planned: Rows[Scheduled]) -> torch.Tensor:
        """Logits [sampling sequences, vocabulary] at the last row of each sequence that samples.

        `planned` is sorted by slot; rows of the forward follow its order.
        """
        tokens: list[int] = []
        positions: list[int] = []
        last_rows: list[int] = []
        for item in planned:
            tokens += item.sequence.tokens[item.start : item.start + item.count]
            positions += range(item.start, item.start + item.count)
            if item.samples:
                last_rows.append(len(tokens) - 1)
        step = self._step
        step.batch = self._paged_batch(planned)
        step.rows = self._tiles(planned, [item.count for item in planned], self._row_tiles)
        sampling = [item for item in planned if item.samples]
        step.head_rows = self._tiles(sampling, [1] * len(sampling), self._head_tiles)
        device = self.base.device
        out = self.base.model(
            input_ids=torch.tensor([tokens], device=device),
            position_ids=torch.tensor([positions], device=device),
            use_cache=False,
            logits_to_keep=torch.tensor(last_rows, dtype=torch.long, device=device),
        )
        logits: torch.Tensor = out.logits[0]
        return logits

    def _paged_batch(self, planned: Rows[Scheduled]) -> PagedBatch:
        size = self.page_size
        slots: list[int] = []
        for item in planned:
            pages = item.sequence.pages
            slots += [pages[p // size] * size + p % size for p in range(item.start, item.start + item.count)]
        tables = [item.sequence.pages[: -(-(item.start + item.count) // size)] for item in planned]
        widest = max(map(len, tables))
        query_lens = [item.count for item in planned]
        kv_lens = [item.start + item.count for item in planned]

        def int32(values: list[Any]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32, device=self.base.device)

        return PagedBatch(
            query_start=int32([0, *accumulate(query_lens)]),
            kv_len=int32(kv_lens),
            block_table=int32([table + [0] * (widest - len(table)) for table in tables]),
            slot_mapping=torch.tensor(slots, device=self.base.device),
            query_lens=query_lens,
            kv_lens=kv_lens,
        )

    def _tiles(self, planned: Rows[Scheduled], counts: Rows[int], out: torch.Tensor) -> RowTiles:
        rows = sum(counts)
        tile_rows = choose_tile_rows(rows)
        capacity = tile_capacity(rows, self._slots, tile_rows)
        return make_tiles(_segments(planned, counts), capacity, tile_rows, out=out[:capacity])

    def _sampling_row(self, item: Scheduled) -> SamplingRow:
        sequence = item.sequence
        p = sequence.sampling
        output = sequence.tokens[sequence.num_prompt_tokens :]
        forbidden = [*self.base.eos_token_ids, *p.stop_token_ids] if len(output) < p.min_tokens else []
        return SamplingRow(p, sequence.tokens[: sequence.num_prompt_tokens], output, forbidden)


def _segments(planned: Rows[Scheduled], counts: Rows[int]) -> list[Segment]:
    """Neighbouring rows of one adapter; `counts` are the rows of each item. Base rows are in no segment."""
    segments = []
    row = 0
    pairs = zip(planned, counts, strict=True)
    for slot, group in groupby(pairs, key=lambda pair: pair[0].sequence.slot):
        rows = sum(count for _, count in group)
        if slot >= 0:
            segments.append(Segment(slot, row, row + rows))
        row += rows
    return segments
