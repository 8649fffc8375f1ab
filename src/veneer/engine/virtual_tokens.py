"""Virtual tokens: their keys and values go from the adapter's place in the arena into its sequences' pages.

An adapter that brings embeddings gets its keys and values from one forward of them, the first time they are needed
while it is resident. They depend on the base alone, so from then on they are copied as any others.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows

import numpy as np
import torch
from numpy.typing import NDArray

from veneer.adapters.residency import Residency, ResidentPrompt
from veneer.engine.base import Base
from veneer.engine.batch import Scheduled
from veneer.kernels.attention import PagedBatch, write_kv
from veneer.kernels.low_rank import make_tiles
from veneer.kernels.tables import BASE_SLOT, Segment
from veneer.kernels.upload import upload


def slots_of(pages: list[int], indices: NDArray[np.int64], page_size: int) -> NDArray[np.int64]:
    """Where the tokens at `indices` of a sequence stand in the cache seen as a row of slots."""
    return np.asarray(pages, np.int64)[indices // page_size] * page_size + indices % page_size


class VirtualTokens:
    """Prepares the pages of a step. Everything is queued on the current stream."""

    def __init__(self, base: Base, residency: Residency, page_size: int, max_rows: int) -> None:
        """`max_rows` is how many embeddings one forward takes."""
        self._base = base
        self._residency = residency
        self._page_size = page_size
        self._max_rows = max_rows

    def write(self, planned: Rows[Scheduled]) -> None:
        """Fill the pages of all virtual tokens that the items of a step lead with."""
        found, slots = [], []
        for item in planned:
            if item.lead:
                prompt = self._prompt(item)
                found.append(prompt.kv[:, :, item.start - item.lead : item.start])
                slots.append(self._slots(item.sequence.pages, item.start - item.lead, item.start))
        if not found:
            return
        # All sequences in one copy for each layer: many may start in one step.
        kv = found[0] if len(found) == 1 else torch.cat(found, 2)
        where = upload(np.concatenate(slots), np.int64, self._base.device)
        for (k_cache, v_cache), (keys, values) in zip(self._base.context.kv_cache, kv, strict=True):
            write_kv(keys, values, k_cache, v_cache, where)

    def _prompt(self, item: Scheduled) -> ResidentPrompt:
        adapter = item.sequence.adapter
        prompt = None if adapter is None else self._residency.prompt(adapter)
        if prompt is None:
            raise ValueError(f"{item.sequence.id} has virtual tokens and its adapter has none")
        if not prompt.computed:
            self._compute(prompt, item.sequence.pages)
            prompt.computed = True
        return prompt

    def _compute(self, prompt: ResidentPrompt, pages: list[int]) -> None:
        """Make keys and values of the embeddings, in pages whose first tokens they are."""
        assert prompt.embeddings is not None
        device, total = self._base.device, len(prompt.embeddings)
        for start in range(0, total, self._max_rows):
            self._forward(prompt.embeddings[start : start + self._max_rows], start, pages)
        slots = upload(self._slots(pages, 0, total), np.int64, device)
        for caches, kept in zip(self._base.context.kv_cache, prompt.kv, strict=True):
            for cache, side in zip(caches, kept, strict=True):
                side.copy_(cache.view(-1, *cache.shape[2:])[slots])

    def _forward(self, embeddings: torch.Tensor, start: int, pages: list[int]) -> None:
        """One pass of the decoder over embeddings [rows, hidden] at the positions from `start` on."""
        base, step = self._base, self._base.context
        assert step.tables is not None  # the runner sets them
        rows = len(embeddings)
        stop = start + rows
        table = upload(np.array(pages[: -(-stop // self._page_size)]), np.int32, base.device)
        step.batch = PagedBatch(
            query_start=torch.tensor([0, rows], dtype=torch.int32, device=base.device),
            kv_len=torch.tensor([stop], dtype=torch.int32, device=base.device),
            block_table=table.unsqueeze(0),
            slot_mapping=upload(self._slots(pages, start, stop), np.int64, base.device),
            query_lens=[rows],
            kv_lens=[stop],
        )
        slots = step.tables.entries.shape[0]
        step.rows = make_tiles([Segment(BASE_SLOT, 0, rows)], rows, slots, base.device)
        base.model.get_decoder()(
            inputs_embeds=embeddings.unsqueeze(0),
            position_ids=torch.arange(start, stop, device=base.device).unsqueeze(0),
            use_cache=False,
        )

    def _slots(self, pages: list[int], start: int, stop: int) -> NDArray[np.int64]:
        return slots_of(pages, np.arange(start, stop), self._page_size)
