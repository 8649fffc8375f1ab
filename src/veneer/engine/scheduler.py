"""Decides what each step computes: continuous batching with chunked prefill over pages and adapter slots.

`schedule` plans a step, `commit` applies what it computed; nothing else moves a sequence forward. A step may be
planned ahead, before the one it follows is committed (`schedule_ahead`); `schedule`, and with it preemption,
comes only when all that was planned is committed. Imports no torch.

Virtual tokens of an adapter are tokens at the front of its sequences that need no computing: they take pages and
positions, and their keys and values are copied from the adapter (`Scheduled.lead`). An adapter may act on a part
of a sequence alone (`Sequence.changes`); other rows are the base's.

A sequence that asks for it gets a draft of what comes next (`lookup.py`) where a step has rows and pages to spare:
the draft is computed with the token before it, and as much of it as the model would have said is taken.

Sequences on a merged copy of their adapter (hot.py) read other weights than all others, so a step has either them
or the others; while there are both, they take turns.

Everything goes in order of arrival, which a preempted sequence keeps: the earliest sequence always gets on, and
each becomes the earliest in its turn. Only a lack of adapter slots lets others pass, and not for ever: after
`slot_patience` the adapter whose slot was held longest must yield. A sequence whose grammar is still being compiled
lets others pass, too.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Tokens
from dataclasses import replace
from itertools import count
from typing import NamedTuple

from veneer.engine.batch import Batch, Scheduled
from veneer.engine.pages import PagePool
from veneer.engine.sequence import Sequence
from veneer.engine.slots import AdapterGate, AdapterSlots
from veneer.errors import InvalidRequest, QueueFull


class AdapterCounts(NamedTuple):
    running: int
    waiting: int


class Scheduler:
    """All sequences in flight. Called from one thread."""

    def __init__(
        self,
        pool: PagePool,
        gate: AdapterGate,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_queue: int,
        slot_patience: float,
        max_model_len: int,
        clock: Callable[[], float],
    ) -> None:
        """`slot_patience` and `clock` are in seconds; deadlines are on the same clock."""
        self.pool = pool
        self.gate = gate
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_queue = max_queue
        self.max_model_len = max_model_len
        self.clock = clock
        self.waiting: list[Sequence] = []  # both in order of arrival
        self.running: list[Sequence] = []
        self.preemptions = 0
        self.refused: list[tuple[Sequence, InvalidRequest]] = []  # for the engine to take: `_prepare`
        self.has_copy = False  # set by the engine: there is a merged copy of some adapter
        self.joining: str | None = None  # likewise: the adapter whose sequences start on it
        self._merged_turn = False  # the last step was the copy's
        self._by_id: dict[str, Sequence] = {}
        self._orders = count()
        self._slots = AdapterSlots(gate, slot_patience, clock)

    # ---- in and out -----------------------------------------------------------------------------

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises QueueFull, or InvalidRequest when it can never run."""
        self._check(sequence)
        if len(self.waiting) >= self.max_queue:
            raise QueueFull(
                f"{len(self.waiting)} requests are waiting and the queue holds at most {self.max_queue}; "
                "try again later"
            )
        sequence.order = next(self._orders)
        self._by_id[sequence.id] = sequence
        self.waiting.append(sequence)
        if sequence.adapter is not None and sequence.adapter != self.joining:
            self.gate.prefetch(sequence.adapter)

    def finish(self, sequence: Sequence) -> None:
        """Take out a sequence that is complete."""
        self._remove(sequence)

    def cancel(self, identifier: str) -> bool:
        """Take out a sequence, if it is (still) here."""
        sequence = self._by_id.get(identifier)
        if sequence is not None:
            self._remove(sequence)
        return sequence is not None

    def fail_adapter(self, digest: str) -> list[Sequence]:
        """Take out all sequences of an adapter that cannot be loaded."""
        return self._remove_all(lambda sequence: sequence.adapter == digest and not sequence.merged)

    def unmatched(self) -> list[Sequence]:
        """Take out all sequences whose grammar was found wrong, or too costly."""
        return self._remove_all(lambda each: each.matcher is not None and each.matcher.error is not None)

    def expired(self) -> list[Sequence]:
        """Take out all sequences whose deadline has passed."""
        now = self.clock()
        return self._remove_all(lambda sequence: sequence.deadline is not None and sequence.deadline <= now)

    def adapter_counts(self) -> dict[str, AdapterCounts]:
        """Sequences in flight by adapter."""
        running = Counter(s.adapter for s in self.running if s.adapter is not None)
        waiting = Counter(s.adapter for s in self.waiting if s.adapter is not None)
        return {digest: AdapterCounts(running[digest], waiting[digest]) for digest in running | waiting}

    # ---- a step ---------------------------------------------------------------------------------

    def schedule(self) -> Batch:
        """Plan the next step, within `max_num_batched_tokens` and `max_num_seqs`. Moves nothing forward."""
        self._slots.make_room(self.waiting, self.max_num_seqs, self._preempt)
        for merged in (not self._merged_turn, self._merged_turn) if self.has_copy else (False,):
            if items := self._plan(merged):
                self._merged_turn = merged
                return Batch(items)
        return Batch()

    def _plan(self, merged: bool) -> list[Scheduled]:
        """A step of the sequences on the merged copy, or of the others."""
        items: list[Scheduled] = []
        budget = self.max_num_batched_tokens

        def plan(sequence: Sequence, lead: int = 0) -> None:
            nonlocal budget
            chunk = min(sequence.num_uncomputed, budget)
            budget -= chunk
            samples = chunk == sequence.num_uncomputed
            items.append(Scheduled(sequence, sequence.num_computed, chunk, samples, lead))

        # All that run fit in the budget: they did in the step before, and at most one of them in part.
        for sequence in [s for s in self.running if s.merged == merged and s.num_uncomputed == 1]:
            if self._make_room(sequence):
                plan(sequence)
        for sequence in [s for s in self.running if s.merged == merged and s.num_uncomputed > 1]:
            plan(sequence)
        if budget and len(self.running) < self.max_num_seqs:
            self._slots.start_over()
        for sequence in list(self.waiting):
            if not budget or len(self.running) == self.max_num_seqs:
                break
            if not self._may_start(sequence):
                continue  # others need not wait for an adapter that is not there, or a grammar
            if not self.pool.can_allocate(sequence):
                break  # smaller ones behind it would starve it; it keeps its slot meanwhile
            if sequence.merged != merged:
                break  # it has the next turn, and whoever passed it could take its room
            plan(sequence, self._start(sequence))
        return self._with_drafts(items, budget)

    def schedule_ahead(self, batch: Batch) -> Batch | None:
        """Plan the step after `batch`, which is not committed yet: the same sequences, one token further.

        Those that certainly end with `batch` are left out. Others may turn out to have ended, too: `commit` skips
        what was computed for them. None when there is more to decide than that, and `schedule` has to do it.
        """
        items = [item for item in batch.items if item.sequence.is_running]
        following = [item for item in items if not self._ends_with(item)]
        if not following or not all(item.samples for item in items):
            return None
        if any(item.draft or self._find_draft(item.sequence, 1) for item in items):
            return None  # how it fares decides on the next
        if self.waiting and (len(following) < len(items) or self._must_yield() or self._can_admit()):
            return None
        if not all(self._reach(item.sequence, item.start + item.count + 1) for item in following):
            return None
        return Batch([Scheduled(item.sequence, item.start + item.count, 1, True) for item in following])

    def commit(self, batch: Batch, chosen: Mapping[str, Tokens[int]]) -> dict[str, int]:
        """Apply a computed step. `chosen`: by sequence id the token that each row of an item that samples chose.

        Returns by sequence id how many of these are new tokens: the first ones, as far as its draft holds.
        """
        taken = {}
        for item in batch.items:
            sequence = item.sequence
            if not sequence.is_running:
                continue  # taken out since the step was planned
            new = item.accepted(chosen[sequence.id]) if item.samples else []
            if item.draft and sequence.lookup is not None:
                sequence.lookup.learn(len(item.draft), len(new) - 1)
            sequence.tokens += new
            taken[sequence.id] = len(new)
            sequence.num_computed = item.start + item.count - item.num_sampled + len(new)
            sequence.num_read = max(sequence.num_read, sequence.num_computed)
            self.pool.register(sequence, item.start - item.lead)
        return taken

    # ---- drafts ---------------------------------------------------------------------------------

    def _with_drafts(self, items: list[Scheduled], budget: int) -> list[Scheduled]:
        """The items with drafts as far as there is room for them: a step samples at most `max_num_seqs` rows."""
        drafting = sum(self._may_draft(item) for item in items)
        if not drafting:
            return items
        room = min(self.max_num_seqs - sum(item.samples for item in items), budget)
        for index, item in enumerate(items):
            if self._may_draft(item):
                draft = self._find_draft(item.sequence, room // drafting)
                if draft and self._reach(item.sequence, item.start + 1 + len(draft)):
                    items[index] = replace(item, count=1 + len(draft), draft=tuple(draft))
                    room -= len(draft)
                drafting -= 1
        return items

    def _may_draft(self, item: Scheduled) -> bool:
        return item.sequence.lookup is not None and item.samples and item.count == 1

    def _find_draft(self, sequence: Sequence, most: int) -> list[int]:
        """What may follow the sequence's tokens, at most so much, and one less than it may still get."""
        length = len(sequence.tokens)
        end = min(sequence.num_prompt_tokens + sequence.sampling.max_tokens, self.max_model_len)
        if sequence.lookup is None or (most := min(most, end - length - 1)) < 1:
            return []
        return sequence.lookup.find(sequence.tokens, most)

    # ---- pages ----------------------------------------------------------------------------------

    def _make_room(self, sequence: Sequence) -> bool:
        """Get the page for the next token, at the cost of the latest arrival, which may be itself."""
        while sequence.is_running and not self.pool.can_allocate(sequence):
            self._preempt(self.running[-1])
        if sequence.is_running:
            self.pool.allocate(sequence)
        return sequence.is_running

    def _reach(self, sequence: Sequence, length: int) -> bool:
        """Get the pages for `length` tokens, more than are known, if there are any."""
        if not self.pool.can_allocate(sequence, length):
            return False
        self.pool.allocate(sequence, length)
        return True

    def _ends_with(self, item: Scheduled) -> bool:
        """Whether the token that `item` samples is the last, whichever it is."""
        length = item.start + item.count + 1
        most = item.sequence.num_prompt_tokens + item.sequence.sampling.max_tokens
        return length >= min(most, self.max_model_len)

    def _must_yield(self) -> bool:
        return self._slots.must_yield(self.waiting, self.max_num_seqs)

    def _can_admit(self) -> bool:
        """Whether `schedule` would start a waiting sequence. It keeps its slot till then."""
        if len(self.running) >= self.max_num_seqs:
            return False
        with self._slots.probing():
            first = next((sequence for sequence in list(self.waiting) if self._may_start(sequence)), None)
        return first is not None and self.pool.can_allocate(first)

    def _start(self, sequence: Sequence) -> int:
        """Let a sequence run; returns how many of its virtual tokens are to be copied into its pages."""
        self.pool.allocate(sequence)
        self.waiting.remove(sequence)
        insort(self.running, sequence, key=lambda s: s.order)
        lead = max((sequence.num_virtual or 0) - sequence.num_computed, 0)
        sequence.num_computed += lead
        return lead

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the queue, to be recomputed from its tokens (from what the prefix cache keeps of them)."""
        self.running.remove(sequence)
        self.pool.free(sequence)
        self._slots.release(sequence)
        insort(self.waiting, sequence, key=lambda s: s.order)
        sequence.preemptions += 1
        self.preemptions += 1

    # ---- merged copy ----------------------------------------------------------------------------

    @property
    def uses_copy(self) -> bool:
        """Whether there are sequences on the merged copy, or waiting for it."""
        return any(sequence.merged for sequence in self._by_id.values())

    def leave_copy(self) -> None:
        """Nothing is on the merged copy from here on: its sequences go on with their adapter's slot."""
        self.has_copy, self.joining = False, None
        for sequence in [each for each in self._by_id.values() if each.merged]:
            if sequence.is_running:
                self._preempt(sequence)
            sequence.merged = False
            sequence.page_keys = []

    # ---- slots ----------------------------------------------------------------------------------

    def _may_start(self, sequence: Sequence) -> bool:
        """Whether the sequence has all that is not pages."""
        return (sequence.matcher is None or sequence.matcher.is_ready) and self._get_slot(sequence)

    def _get_slot(self, sequence: Sequence) -> bool:
        """Whether the sequence has what it needs of its adapter: a slot, its merged copy, or no adapter.

        Takes it out when it turns out to be too long with the adapter's virtual tokens.
        """
        digest = sequence.adapter
        if digest is None or sequence.slot >= 0 or sequence.merged:
            return True
        if digest == self.joining and not sequence.preemptions:  # what began with a slot ends with one
            sequence.merged = True
            return True
        if not self._slots.take(sequence):
            return False
        return sequence.num_virtual is not None or self._prepare(sequence, digest)

    def _prepare(self, sequence: Sequence, digest: str) -> bool:
        """Apply what only an adapter on the device tells. False when the sequence is refused for it."""
        sequence.apply(self.gate.reach(digest))
        try:
            self._check_length(sequence)
        except InvalidRequest as error:
            self.refused.append((sequence, error))
            self._remove(sequence)
            return False
        return True

    # ---- checks and removal ---------------------------------------------------------------------

    def _check(self, sequence: Sequence) -> None:
        """Refuse what can never run: alone on the device, a sequence must be able to reach its end."""
        if sequence.id in self._by_id:
            raise InvalidRequest(f"request id {sequence.id!r} is in use; choose another", param="id")
        if sequence.num_prompt_tokens == 0:
            raise InvalidRequest("the prompt has no tokens; send at least one", param="prompt")
        self._check_length(sequence)

    def _check_length(self, sequence: Sequence) -> None:
        prompt = sequence.num_prompt_tokens
        virtual = (
            f", {sequence.num_virtual} of them the adapter's virtual ones," if sequence.num_virtual else ""
        )
        max_tokens = sequence.sampling.max_tokens
        if prompt + min(max_tokens, 1) > self.max_model_len:
            generated = ", at least one of them generated" if max_tokens else ""
            raise InvalidRequest(
                f"the prompt has {prompt} tokens{virtual} and the context holds {self.max_model_len}{generated}; "
                "shorten the prompt",
                param="prompt",
                code="context_length_exceeded",
            )
        # The keys and values of the last token that is generated are never needed.
        needed = max(prompt, min(prompt + max_tokens, self.max_model_len) - 1)
        room = self.pool.num_pages * self.pool.page_size
        if needed > room:
            raise InvalidRequest(
                f"{prompt} prompt tokens{virtual} and max_tokens {max_tokens} need a KV cache of "
                f"{needed} tokens and it holds {room}; shorten the prompt or lower max_tokens",
                param="max_tokens",
                code="context_length_exceeded",
            )

    def _remove_all(self, doomed: Callable[[Sequence], bool]) -> list[Sequence]:
        found = [sequence for sequence in self._by_id.values() if doomed(sequence)]
        for sequence in found:
            self._remove(sequence)
        return found

    def _remove(self, sequence: Sequence) -> None:
        (self.running if sequence.is_running else self.waiting).remove(sequence)
        self.pool.free(sequence)
        self._slots.release(sequence)
        del self._by_id[sequence.id]
