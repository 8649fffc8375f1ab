"""Runs one planned batch through the base: builds the step's tables, one forward, samples.

Sequences are sorted by adapter slot, so that each adapter's rows are neighbours; those of the base come first, and
adapters that share their factors are neighbours, too.
On a GPU `Runner.launch` only queues the work, and a step can be launched on tokens that the one before has yet
to choose.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Rows
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import nn

from veneer.adapters.packing import AddedTokens
from veneer.adapters.residency import Residency
from veneer.engine.base import Base
from veneer.engine.batch import Batch, Scheduled
from veneer.engine.grammars import Grammars, Words
from veneer.engine.graphs import (
    MIXED_BUCKETS,
    DecodeGraphs,
    MixedGraphs,
    StepGraphs,
    Variant,
)
from veneer.engine.merged_copy import MergedCopy
from veneer.engine.messages import SamplingParams, TokenLogprobs
from veneer.engine.pooling import Pooled, pool
from veneer.engine.sampling import Choice, Sampled, SamplingRow, sample, top_logprobs
from veneer.engine.scores import Scored, pieces_of
from veneer.engine.sequence import Sequence
from veneer.engine.step_tables import head_segments_of, segments_of
from veneer.engine.virtual_tokens import VirtualTokens, slots_of
from veneer.kernels.attention import PagedBatch
from veneer.kernels.low_rank import Workspace, make_tiles
from veneer.kernels.tables import BASE_SLOT, SLOTS_EACH, Deltas, RowTiles, Segment, Transforms
from veneer.kernels.upload import upload

logger = logging.getLogger(__name__)

WARM_UP_ROWS = (1025, 2049)  # of steps that no graph holds; kernels/low_rank.py cuts them differently


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


@dataclass(frozen=True)
class Launched:
    """A step that the device is computing, or has computed."""

    batch: Batch
    rows: dict[str, int]  # sequence id -> place of its last token in the runner's token buffer
    sampled: list[
        tuple[list[str], Sampled]
    ]  # sequence ids of rows; what these choose, on the host, once `done`
    limits: dict[str, int]  # sequence id -> its rows that count, where a grammar knows nothing of the others
    scored: list[Scored]  # each sequence's in order
    pooled: list[Pooled]
    done: torch.cuda.Event | None  # None on the CPU

    def results(self) -> dict[str, list[Choice]]:
        """Wait for the step; what the rows of each sequence that sample chose, in order, by sequence id."""
        if self.done is not None:
            self.done.synchronize()
        found: dict[str, list[Choice]] = {}
        for names, sampled in self.sampled:
            for name, choice in zip(names, sampled.results(), strict=True):
                found.setdefault(name, []).append(choice)
        return {name: choices[: self.limits.get(name)] for name, choices in found.items()}

    def scores(self) -> dict[str, list[TokenLogprobs]]:
        """What the step tells of prompts, by sequence id. After `results`."""
        found: dict[str, list[TokenLogprobs]] = {}
        for scored in self.scored:
            found.setdefault(scored.sequence, []).extend(scored.results())
        return found


class SamplingPlace(NamedTuple):
    """A row that chooses a token."""

    item: Scheduled
    drafted: int  # tokens of its draft before the row, which chooses as if they were said


class Forward(NamedTuple):
    """What an eager step computed."""

    logits: torch.Tensor  # [sampling rows, vocabulary]
    last: torch.Tensor  # int64 [sampling rows], the token ids there
    hidden: torch.Tensor  # [rows, hidden], what the output head reads


class _Packed(NamedTuple):
    """What an eager step uploads, each int32 and flat."""

    ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    query_start: torch.Tensor
    kv_len: torch.Tensor
    last_rows: torch.Tensor
    previous: torch.Tensor
    block_table: torch.Tensor


class Runner:
    """The device side of a step."""

    def __init__(
        self,
        base: Base,
        residency: Residency,
        grammars: Grammars,
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
        shape = (max_rows, base.limits.added_tokens)
        self._step.added = torch.zeros(shape, dtype=base.dtype, device=base.device)
        # One page more than the pool knows of: rows that pad a captured graph use it.
        self._step.kv_cache = allocate_kv(base, num_pages + 1, page_size)
        self._scratch_page = num_pages
        self._residency = residency
        self._grammars = grammars
        self._virtual_tokens = VirtualTokens(base, residency, page_size, max_rows)
        self.graphs: DecodeGraphs | None = None
        self.mixed_graphs: MixedGraphs | None = None
        self.chores: deque[Callable[[], None]] = deque()  # see `prepare`
        self.eager_steps = 0
        self.copy: MergedCopy | None = None  # set by the engine, for steps of sequences on it
        self._slots = tables.entries.shape[0] // SLOTS_EACH
        self._max_rows = max_rows
        # The tokens that the last step sampled, in the order of its rows. Static, for graphs.
        self._tokens = torch.zeros(max_rows, dtype=torch.int64, device=base.device)

    def prepare(self, max_batch: int, max_model_len: int, graphs: str) -> None:
        """From here on steps replay CUDA graphs, and with "all" no request waits for a kernel to be compiled.

        graphs: "decode": those of decode steps, but for adapters that change weights, have activations or act at
        hidden states; "all": those too, and mixed steps of up to 1024 rows. The base and plain adapters are ready
        when this returns. What others need is left in `chores`, each some tenths of a second when its kernels are
        in Triton's cache; until then their steps run eagerly.
        """
        started = time.monotonic()
        self._make_graphs(max_batch, max_model_len, everything=graphs == "all")
        pool = torch.cuda.graph_pool_handle()
        for family in (self.mixed_graphs, self.graphs):  # those that need the most memory first
            for bucket, variant in [] if family is None else family.missing():
                assert family is not None
                chore = partial(family.capture, bucket, variant, pool)
                chore() if variant <= Variant.ADAPTED else self.chores.append(chore)
        for rows in (rows for rows in WARM_UP_ROWS if rows <= self._max_rows):
            for variant in Variant:
                chore = partial(self._warm_up, rows, variant, max_model_len)
                chore() if variant <= Variant.ADAPTED else self.chores.append(chore)
        torch.cuda.synchronize(self.base.device)
        logger.info(
            "kernels and graphs prepared in %.1f s; %d more when idle",
            time.monotonic() - started,
            len(self.chores),
        )

    def do_chore(self) -> bool:
        """Do one of `chores`, if there is one; returns whether there are more. No step may be under way.

        One that fails, for want of memory say, is logged: what it prepares runs eagerly, which is counted.
        """
        if self.chores:
            chore = self.chores.popleft()
            try:
                chore()
            except RuntimeError:
                logger.exception("%s failed; such steps run without it", chore)
        return bool(self.chores)

    @torch.inference_mode()
    def _warm_up(self, rows: int, variant: Variant, max_model_len: int) -> None:
        """Run an eager step of idle rows as if the adapter in the first slot could do all that `variant` does."""
        tables = self._step.tables
        assert tables is not None
        flags: tuple[dict[int, Any], ...] = (tables.transforms, tables.deltas, tables.hidden, tables.kin)
        kept = [dict(each) for each in flags]
        acting = set(tables.acting)
        tables.acting.add(0)
        for each in flags:
            each.pop(0, None)
        everywhere, nowhere = frozenset(range(tables.entries.shape[1])), frozenset[int]()
        if variant.is_shared:
            tables.kin[0] = b""
        variant = variant.does
        if variant >= Variant.SCALED:
            inputs = everywhere if variant >= Variant.TURNED else nowhere
            tables.transforms[0] = Transforms(inputs, everywhere)
        if variant >= Variant.CHANGED:
            tables.deltas[0] = Deltas(everywhere, everywhere)
        if variant >= Variant.HIDDEN:
            tables.hidden[0] = everywhere
        try:
            self.forward(self._idle(rows, BASE_SLOT if variant == Variant.BASE else 0, max_model_len))
        finally:
            tables.acting.intersection_update(acting)
            for each, before in zip(flags, kept, strict=True):
                each.clear()
                each.update(before)

    def _idle(self, rows: int, slot: int, max_model_len: int) -> list[Scheduled]:
        """So many rows of prompts, the last one of a decode step, on the page set aside."""
        most = max_model_len - 1
        lengths = [min(most, rows - 1 - at) for at in range(0, rows - 1, most)]
        planned = []
        for length, decodes in [*((length, False) for length in lengths), (1, True)]:
            sequence = Sequence(id="", tokens=[0] * length, sampling=SamplingParams(max_tokens=1), slot=slot)
            sequence.pages = [self._scratch_page] * -(-length // self.page_size)
            planned.append(Scheduled(sequence, 0, length, decodes))
        return planned

    def _make_graphs(self, max_batch: int, max_model_len: int, everything: bool) -> None:
        sizes: dict[str, int] = {
            "page_size": self.page_size,
            "scratch_page": self._scratch_page,
            "max_pages": -(-max_model_len // self.page_size),
            "max_batch": min(max_batch, self._max_rows),
            "slots": self._slots,
        }
        if everything and self._max_rows >= MIXED_BUCKETS[0]:
            self.mixed_graphs = MixedGraphs(self.base, self._tokens, max_rows=self._max_rows, **sizes)
        self.graphs = DecodeGraphs(self.base, self._tokens, **sizes, every_variant=everything)

    @torch.inference_mode()
    def launch(self, batch: Batch, previous: Launched | None = None) -> Launched:
        """Start one forward pass and the choice of its tokens; on the CPU, do it.

        With `previous`, the launch before this one, all rows go on from its tokens, which only the device knows.
        """
        self._step.copy = self._copy_for(batch)
        self._virtual_tokens.write(batch.items)
        planned = sorted(batch.items, key=self._place)
        pending = None if previous is None else [previous.rows[item.sequence.id] for item in planned]
        masks = self._start_masks([item for item in planned if item.samples], previous)
        graphs = self._graphs_for(planned)
        hidden = None
        if graphs is not None:
            logits, last = graphs.run(planned, pending)
        else:
            self.eager_steps += 1
            logits, last, hidden = self.forward(planned, pending)
            torch.argmax(logits, -1, out=self._tokens[: len(logits)])
        allowed = {} if masks is None else masks.result()
        sampling = [SamplingPlace(item, drafted) for item in planned for drafted in range(item.num_sampled)]
        result = self._choose(logits, sampling, last, allowed)
        scored = [] if hidden is None else self._score(planned, hidden)
        pooled = [] if hidden is None else pool(planned, hidden)
        done = None
        if self.base.device.type == "cuda":
            done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # its waiter sleeps
            done.record()
        rows = {item.sequence.id: row for row, (item, _) in enumerate(sampling)}
        limits = {name: len(masks) for name, masks in allowed.items()}
        return Launched(batch, rows, result, limits, scored, pooled, done)

    def _copy_for(self, batch: Batch) -> Mapping[int, nn.Module] | None:
        if not batch.merged:
            return None
        assert self.copy is not None  # the engine keeps it while it has sequences
        return self.copy.linears

    def _place(self, item: Scheduled) -> tuple[bytes, int]:
        """In the order of rows: those of the base first, those of one kin together."""
        assert self._step.tables is not None  # set at the start
        return self._step.tables.kin.get(item.slot, b""), item.slot

    def _start_masks(
        self, items: Rows[Scheduled], previous: Launched | None
    ) -> Future[dict[str, list[Words | None]]] | None:
        """By sequence id, which tokens the grammars of its rows allow; worked out while the forward runs.

        They hang on the tokens that `previous` chooses: those are waited for, not here, and the forward, which
        takes them on the device, is queued meanwhile.
        """
        if not (matched := [item for item in items if item.sequence.matcher is not None]):
            return None
        known = [item.sequence.output for item in matched]
        matchers = {each.sequence.id: each.sequence.matcher for each in matched if each.sequence.matcher}

        def outputs() -> list[list[int]]:
            if previous is None:
                return known
            chosen = previous.results()
            return [
                [*output, chosen[item.sequence.id][-1].token]
                for item, output in zip(matched, known, strict=True)
            ]

        return self._grammars.masks(matchers, outputs, [item.draft for item in matched])

    def _choose(
        self,
        logits: torch.Tensor,
        sampling: Rows[SamplingPlace],
        last: torch.Tensor,
        allowed: Mapping[str, list[Words | None]],
    ) -> list[tuple[list[str], Sampled]]:
        """Sample; the tokens are left in the token buffer, in the order of the rows.

        Rows whose adapter adds tokens have wider logits. They are chosen from by themselves, those of each width
        together, so that no other row's sums change.
        """
        names = [item.sequence.id for item, _ in sampling]
        rows = [self._sampling_row(place, allowed.get(place.item.sequence.id, ())) for place in sampling]
        widths = [self._added_tokens(item) for item, _ in sampling]
        if not any(width.embeddings for width in widths):
            return [(names, sample(logits, rows, self._tokens[: len(rows)], last).to_host())]
        parts = []
        for width in sorted(set(widths)):
            chosen = [index for index, each in enumerate(widths) if each == width]
            where = upload(chosen, np.int64, logits.device)
            tokens = None if width.embeddings else self._tokens[where]
            found = sample(
                self._with_added(logits, where, width), [rows[i] for i in chosen], tokens, last[where]
            )
            self._tokens[where] = found.tokens
            parts.append(([names[i] for i in chosen], found.to_host()))
        return parts

    def _score(self, planned: Rows[Scheduled], hidden: torch.Tensor) -> list[Scored]:
        """Put the rows that score a prompt's tokens through the head. Overwrites the logits of added tokens."""
        found = []
        for piece in pieces_of(planned):
            sequence, rows = piece.part.sequence, piece.part.count
            self._step.head_rows = self._tiles(segments_of([piece.part]), rows)
            logits = self.base.logits(hidden[piece.row : piece.row + rows])
            width = self._added_tokens(piece.part)
            if width.embeddings:
                logits = self._with_added(logits, torch.arange(rows, device=logits.device), width)
            most = sequence.sampling.prompt_logprobs or 0
            top = top_logprobs(logits, upload(piece.targets, np.int64, logits.device), most)
            found.append(Scored(sequence.id, most, top.to_host()))
        return found

    def _added_tokens(self, item: Scheduled) -> AddedTokens:
        sequence = item.sequence
        if sequence.adapter is None or sequence.merged:
            return AddedTokens()
        return self._residency.added_tokens(sequence.adapter)

    def _with_added(self, logits: torch.Tensor, where: torch.Tensor, width: AddedTokens) -> torch.Tensor:
        """The rows at `where` with the logits of added tokens behind the vocabulary: -inf for those without."""
        added = self._step.added
        assert added is not None
        wide = added[where, : width.embeddings]
        wide[:, width.logits :] = float("-inf")
        return torch.cat([logits[where], self.base.cap(wide)], 1)

    def _graphs_for(self, planned: Rows[Scheduled]) -> StepGraphs | None:
        if any(item.unread for item in planned):
            return None  # graphs keep the logits of last rows alone, and no hidden states
        families = (self.graphs, self.mixed_graphs)
        return next((family for family in families if family is not None and family.fits(planned)), None)

    @torch.inference_mode()
    def forward(self, planned: Rows[Scheduled], previous: Rows[int] | None = None) -> Forward:
        """An eager forward. `planned` is sorted by slot; rows of the forward follow its order.

        `previous` are the places of the rows' tokens in the token buffer, if they are there.
        """
        packed = self._pack(planned, previous)
        ids = packed.ids.long() if previous is None else self._tokens[packed.previous.long()]
        last_rows = packed.last_rows.long()
        step = self._step
        counts = [item.count for item in planned]
        step.batch = PagedBatch(
            query_start=packed.query_start,
            kv_len=packed.kv_len,
            block_table=packed.block_table.view(len(planned), -1),
            slot_mapping=packed.slots.long(),
            query_lens=counts,
            kv_lens=[item.start + item.count for item in planned],
        )
        step.rows = self._tiles(segments_of(planned), sum(counts))
        step.head_rows = self._tiles(head_segments_of(planned), len(last_rows))
        hidden = self.base.forward(ids, packed.positions.long())
        return Forward(self.base.logits(hidden[last_rows]), ids[last_rows], hidden)

    def _pack(self, planned: Rows[Scheduled], previous: Rows[int] | None) -> _Packed:
        """The step's tables, on the device by one copy."""
        size = self.page_size
        ids: list[int] = []
        last_rows: list[int] = []
        stops = [item.start + item.count for item in planned]
        starts = [0, *accumulate(item.count for item in planned)]
        indices = [np.arange(item.start, stop) for item, stop in zip(planned, stops, strict=True)]
        positions = [index - item.sequence.num_unplaced for item, index in zip(planned, indices, strict=True)]
        tables = [item.sequence.pages[: -(-stop // size)] for item, stop in zip(planned, stops, strict=True)]
        slots = [slots_of(table, index, size) for table, index in zip(tables, indices, strict=True)]
        for item, after in zip(planned, starts[1:], strict=True):
            ids += [0] if previous else item.tokens
            last_rows += range(after - item.num_sampled, after)
        widest = max(map(len, tables))
        pages = [page for table in tables for page in table + [0] * (widest - len(table))]
        parts: list[ArrayLike] = [
            ids,
            np.concatenate(positions),
            np.concatenate(slots),
            starts,
            stops,
            last_rows,
            previous or [],
            pages,
        ]
        arrays = [np.asarray(part, np.int32) for part in parts]
        packed = upload(np.concatenate(arrays), np.int32, self.base.device)
        return _Packed(*torch.split(packed, [array.size for array in arrays]))

    def _tiles(self, segments: Rows[Segment], rows: int) -> RowTiles:
        tables = self._step.tables
        assert tables is not None  # set at the start
        segments = tables.acting_in(segments)
        transforms = tables.transforms_of({segment.slot for segment in segments})
        flags = tables.delta(segments), tables.has_hidden(segments)
        return make_tiles(segments, rows, self._slots, self.base.device, transforms, *flags, tables.kin)

    def _sampling_row(self, place: SamplingPlace, allowed: Rows[Words | None]) -> SamplingRow:
        """`allowed`: of the item's rows, as far as its grammar follows the draft."""
        item, drafted = place
        sequence = item.sequence
        p, num_prompt = sequence.sampling, sequence.num_prompt_tokens
        position = item.start + item.count - len(item.draft) - num_prompt + drafted
        forbidden = [*self.base.eos_token_ids, *p.stop_token_ids] if position < p.min_tokens else []
        return SamplingRow(
            p,
            sequence.tokens,
            num_prompt,
            position,
            forbidden,
            allowed[drafted] if drafted < len(allowed) else None,
            num_virtual=sequence.num_virtual or 0,
            draft=item.draft[:drafted],
        )
