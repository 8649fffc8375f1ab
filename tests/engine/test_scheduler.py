"""The scheduler with a simulated engine of integers.

The simulated model keeps one number per token in pages, made of the number before it and of the adapter where
it acts, as keys and values are;
its next token depends on every number that it reads through the block table. A page that is shared, reused or
overwritten wrongly changes the output, which must equal `expected`, whatever was batched, cut or preempted.
"""

from __future__ import annotations

import math
import random
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import count, pairwise
from typing import NamedTuple

import pytest

from veneer.adapters.reach import Reach, Span
from veneer.engine.batch import Batch, Scheduled
from veneer.engine.lookup import PromptLookup
from veneer.engine.messages import SamplingParams
from veneer.engine.pages import PagePool
from veneer.engine.scheduler import AdapterCounts, Scheduler
from veneer.engine.sequence import VIRTUAL, Change, Sequence
from veneer.errors import InvalidRequest, QueueFull

VOCABULARY = 50
KEPT = 3  # steps for which a loaded adapter is kept for whoever asked for it


def value(before: int, token: int, position: int, adapter: str | None) -> int:
    return hash((before, token, position, -1 if adapter is None else int.from_bytes(adapter.encode(), "big")))


def activation(prompt: list[int], invocation: Iterable[int]) -> float:
    """From where on an adapter with these invocation tokens acts."""
    wanted = list(invocation)
    found = [at for at in range(len(prompt)) if prompt[at : at + len(wanted)] == wanted]
    return (found[-1] if found else math.inf) if wanted else 0


def acting(adapter: str | None, prompt: int, span: Span | None, first: float, position: int) -> str | None:
    """What acts on a token behind or in a prompt of so many."""
    if adapter is None or position < first:
        return None
    if span is None:
        return adapter
    if prompt - span.last <= position < prompt:
        return f"{adapter}, tail" if span.has_tail else adapter
    return adapter if position < min(span.first, prompt) else None


def next_token(values: list[int]) -> int:
    return hash(tuple(values)) % VOCABULARY


def expected(
    adapter: str | None,
    prompt: list[int],
    max_tokens: int,
    stops: Iterable[int] = (),
    invocation: Iterable[int] = (),
    span: Span | None = None,
) -> list[int]:
    """What the model generates when nothing else is there, up to a stop token."""
    tokens, values = list(prompt), [0]
    first = activation(prompt, invocation)
    while len(tokens) < len(prompt) + max_tokens and not {*tokens[len(prompt) :]} & {*stops}:
        for position in range(len(values) - 1, len(tokens)):
            who = acting(adapter, len(prompt), span, first, position)
            values.append(value(values[-1], tokens[position], position, who))
        tokens.append(next_token(values[1:]))
    return tokens[len(prompt) :]


@dataclass
class Resident:
    slot: int
    ready: int  # step at which it is loaded
    users: int = 0
    used: bool = False


class Gate:
    """Adapters of given sizes (1 unless told) in `room`, loaded in `delay` steps, in the order asked for.

    One that is not `orderly` breaks its promises: it remembers no order and keeps nothing for who asked.
    """

    def __init__(
        self, room: int, delay: int, sizes: dict[str, int] | None = None, orderly: bool = True
    ) -> None:
        self.room, self.delay, self.sizes, self.orderly = room, delay, sizes or {}, orderly
        self.now = 0
        self.loads = 0
        self.pinned: set[str] = set()
        self.virtual: dict[str, int] = {}
        self.invocations: dict[str, tuple[int, ...]] = {}
        self.spans: dict[str, Span] = {}
        self.queue: list[str] = []
        self.resident: OrderedDict[str, Resident] = OrderedDict()  # least recently used first

    def prefetch(self, digest: str) -> None:
        if digest in self.resident:
            self.resident.move_to_end(digest)
        elif digest not in self.queue:
            self.queue.append(digest)
            self._load()
            if not self.orderly:
                self.queue.clear()

    def acquire(self, digest: str) -> int | None:
        self.prefetch(digest)
        entry = self.resident.get(digest)
        if entry is None or entry.ready > self.now:
            return None
        entry.users += 1
        entry.used = True
        return entry.slot

    def reach(self, digest: str) -> Reach:
        assert self.resident[digest].users
        return Reach(
            virtual=self.virtual.get(digest, 0),
            invocation=self.invocations.get(digest, ()),
            span=self.spans.get(digest),
        )

    def release(self, digest: str) -> None:
        self.resident[digest].users -= 1
        assert self.resident[digest].users >= 0
        self._load()

    def is_pinned(self, digest: str) -> bool:
        return digest in self.pinned

    def is_blocked(self, digest: str) -> bool:
        in_use = sum(self._size(other) for other, entry in self.resident.items() if entry.users)
        return digest not in self.resident and in_use + self._size(digest) > self.room

    def tick(self) -> None:
        self.now += 1
        self._load()

    def _size(self, digest: str) -> int:
        return self.sizes.get(digest, 1)

    def _evictable(self, entry: Resident) -> bool:
        loaded = entry.ready <= self.now
        kept = self.orderly and not entry.used and self.now < entry.ready + KEPT
        return loaded and not entry.users and not kept and entry not in self._pinned_entries()

    def _pinned_entries(self) -> list[Resident]:
        return [self.resident[digest] for digest in self.pinned if digest in self.resident]

    def _load(self) -> None:
        while self.queue:
            needed = self._size(self.queue[0]) + sum(map(self._size, self.resident)) - self.room
            victims = []
            for digest, entry in self.resident.items():
                if needed > 0 and self._evictable(entry):
                    victims.append(digest)
                    needed -= self._size(digest)
            if needed > 0:
                return
            for digest in victims:
                del self.resident[digest]
            free = set(range(0, 2 * self.room, 2)) - {entry.slot for entry in self.resident.values()}
            self.resident[self.queue.pop(0)] = Resident(min(free), self.now + self.delay)
            self.loads += 1


class Launch(NamedTuple):
    batch: Batch
    tokens: dict[str, list[int]]  # sampled, by id


class Simulation:
    """Scheduler, pages, gate and model; time advances by one second per step.

    With `lookahead` a step is launched before the one before it is committed, as the engine does.
    """

    def __init__(
        self,
        *,
        pages: int = 64,
        page_size: int = 4,
        caching: bool = True,
        slots: int = 2,
        delay: int = 2,
        sizes: dict[str, int] | None = None,
        orderly: bool = True,
        seqs: int = 8,
        tokens: int = 16,
        queue: int = 1000,
        patience: float = 5,
        lookahead: bool = False,
        virtual: dict[str, int] | None = None,
        invocations: dict[str, tuple[int, ...]] | None = None,
        spans: dict[str, Span] | None = None,
    ) -> None:
        self.now = 0
        self.lookahead = lookahead
        self.ahead: Launch | None = None
        self.launched_ahead = self.wasted = 0
        self.drafted = self.accepted = 0
        self.copied = 0  # virtual tokens
        self.pool = PagePool(pages, page_size, caching)
        self.gate = Gate(slots, delay, sizes, orderly)
        self.gate.virtual = virtual or {}
        self.gate.invocations = invocations or {}
        self.gate.spans = spans or {}
        self.base_rows = 0  # computed as the base's for sequences with an adapter
        self.scheduler = Scheduler(
            self.pool,
            self.gate,
            max_num_seqs=seqs,
            max_num_batched_tokens=tokens,
            max_queue=queue,
            slot_patience=patience,
            max_model_len=200,
            clock=lambda: self.now,
        )
        self.values = [[0] * page_size for _ in range(pages)]
        self.first_token: dict[str, int] = {}  # id -> seconds from its arrival
        self.done: dict[str, Sequence] = {}
        self.expired: dict[str, Sequence] = {}
        self._names = count()

    def add(
        self,
        prompt: list[int],
        max_tokens: int = 4,
        adapter: str | None = None,
        deadline: float | None = None,
        stops: Iterable[int] = (),
        drafts: int = 0,
        prediction: Iterable[int] = (),
    ) -> Sequence:
        sequence = Sequence(
            id=f"request-{next(self._names)}",
            tokens=list(prompt),
            sampling=SamplingParams(max_tokens=max_tokens, stop_token_ids=list(stops)),
            adapter=adapter,
            arrival=self.now,
            deadline=deadline,
            lookup=PromptLookup(drafts, list(prediction), prompt) if drafts else None,
        )
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> Batch:
        self.now += 1
        self.gate.tick()
        self.expired |= {sequence.id: sequence for sequence in self.scheduler.expired()}
        current, self.ahead = self.ahead, None
        if current is None:
            current = self.launch(self.scheduler.schedule(), {})
        following = self.scheduler.schedule_ahead(current.batch) if self.lookahead else None
        if following is not None:
            self.ahead = self.launch(following, current.tokens)
            self.launched_ahead += 1
        self.scheduler.commit(current.batch, current.tokens)
        for item in current.batch.items:
            sequence = item.sequence
            self.wasted += not sequence.is_running
            if not item.samples or not sequence.is_running:
                continue
            self.first_token.setdefault(sequence.id, int(self.now - sequence.arrival))
            p = sequence.sampling
            new = item.accepted(current.tokens[sequence.id])
            self.drafted += len(item.draft)
            self.accepted += len(new) - 1
            stop = next((at for at, token in enumerate(new) if token in p.stop_token_ids), None)
            if stop is not None:
                del sequence.tokens[len(sequence.tokens) - len(new) + stop + 1 :]
            if sequence.num_output_tokens == p.max_tokens or stop is not None:
                self.scheduler.finish(sequence)
                self.done[sequence.id] = sequence
        self.check_state()
        return current.batch

    def launch(self, batch: Batch, before: Mapping[str, list[int]]) -> Launch:
        """Compute a step; `before` are the tokens of the step before, if that is not committed yet."""
        self.check_plan(batch, ahead=bool(before))
        tokens = {}
        for item in batch.items:
            sequence = item.sequence
            known = [*sequence.tokens, *(before[sequence.id] if before else item.draft)]
            if item.lead:
                self.compute(sequence, known, item.start - item.lead, item.lead, sequence.adapter)
                self.copied += item.lead
            assert item.slot == item.parts[-1][0]
            chosen, at = [], item.start
            for slot, rows in item.parts:
                who = {-1: None, sequence.slot: sequence.adapter}.get(slot, f"{sequence.adapter}, tail")
                chosen += [self.compute(sequence, known, at + row, 1, who) for row in range(rows)]
                at += rows
                self.base_rows += rows * (slot < 0 and sequence.adapter is not None)
            assert at == item.start + item.count == item.start + len(item.tokens) + bool(before)
            if item.samples:
                tokens[sequence.id] = chosen[-item.num_sampled :]
        return Launch(batch, tokens)

    def run(self, limit: int = 2000) -> None:
        """Until nothing is left."""
        while self.scheduler.waiting or self.scheduler.running or self.ahead:
            limit -= 1
            assert limit, f"{self.scheduler.waiting} and {self.scheduler.running} do not finish"
            self.step()
        for sequence in self.done.values():
            prompt = sequence.tokens[: sequence.num_prompt_tokens]
            output = sequence.tokens[sequence.num_prompt_tokens :]
            p = sequence.sampling
            invocation = self.gate.invocations.get(sequence.adapter or "", ())
            span = self.gate.spans.get(sequence.adapter or "")
            wanted = expected(sequence.adapter, prompt, p.max_tokens, p.stop_token_ids, invocation, span)
            assert output == wanted, sequence.id
        assert self.pool.used == 0
        assert all(entry.users == 0 for entry in self.gate.resident.values())
        assert self.scheduler.adapter_counts() == {}

    def compute(
        self, sequence: Sequence, tokens: list[int], start: int, chunk: int, adapter: str | None
    ) -> int:
        size = self.pool.page_size
        values = [self.values[sequence.pages[i // size]][i % size] for i in range(start)]
        for position in range(start, start + chunk):
            before = values[-1] if values else 0
            values.append(value(before, tokens[position], position, adapter))
            self.values[sequence.pages[position // size]][position % size] = values[-1]
        return next_token(values)

    def check_plan(self, batch: Batch, ahead: bool) -> None:
        scheduler = self.scheduler
        assert sum(item.count for item in batch.items) <= scheduler.max_num_batched_tokens
        assert len(scheduler.running) <= scheduler.max_num_seqs
        assert sum(item.num_sampled for item in batch.items) <= scheduler.max_num_seqs
        planned = [item.sequence for item in batch.items]
        assert len(set(planned)) == len(planned)
        writers = Counter[int]()
        for item in batch.items:
            sequence, stop = item.sequence, item.start + item.count
            assert sequence in scheduler.running
            assert item.count > 0
            if ahead:
                assert (item.start, stop) == (len(sequence.tokens), len(sequence.tokens) + 1)
            else:
                assert item.start == sequence.num_computed
            assert item.samples == (stop - len(item.draft) == len(sequence.tokens) + ahead)
            assert not item.draft or item.count == item.num_sampled
            virtual = self.gate.virtual.get(sequence.adapter or "", 0)
            assert sequence.tokens[:virtual] == [VIRTUAL] * virtual
            assert VIRTUAL not in sequence.tokens[sequence.num_virtual or 0 :]
            assert item.start >= virtual
            assert item.lead == 0 or (item.start == virtual and not ahead)
            first = (item.start - item.lead) // self.pool.page_size
            written = sequence.pages[first : self.pool.pages_for(stop)]
            assert len(written) == self.pool.pages_for(stop) - first
            writers.update(written)
            assert sequence.merged == batch.merged
            if sequence.adapter is None or sequence.merged:
                assert sequence.slot == -1
            else:
                entry = self.gate.resident[sequence.adapter]
                assert (sequence.slot, entry.ready <= self.gate.now) == (entry.slot, True)
        assert all(times == 1 for times in writers.values())
        users = Counter(page for sequence in scheduler.running for page in sequence.pages)
        assert all(users[page] == 1 for page in writers)  # a page that others read is never written

    def check_state(self) -> None:
        scheduler = self.scheduler
        for sequences in (scheduler.waiting, scheduler.running):
            assert all(a.order < b.order for a, b in pairwise(sequences))
        for sequence in scheduler.waiting:
            assert not sequence.pages
            assert sequence.num_computed == 0
        users = Counter(page for sequence in scheduler.running for page in sequence.pages)
        assert self.pool.used == len(users)
        assert [users[page] for page in range(self.pool.num_pages)] == self.pool._references
        for sequence in scheduler.running:
            assert 0 < self.pool.pages_for(sequence.num_computed) <= len(sequence.pages)
        slots = Counter(s.adapter for s in [*scheduler.waiting, *scheduler.running] if s.slot >= 0)
        assert {digest: entry.users for digest, entry in self.gate.resident.items() if entry.users} == slots


def planned(batch: Batch) -> list[tuple[str, int, int, bool]]:
    return [(item.sequence.id, item.start, item.count, item.samples) for item in batch.items]


# ---- the plan ---------------------------------------------------------------------------------------


def test_decodes_first_then_prefills_then_new_ones_within_the_token_budget() -> None:
    sim = Simulation(tokens=8)
    sim.add([1] * 20)
    assert planned(sim.step()) == [("request-0", 0, 8, False)]
    sim.add([2] * 3)
    sim.add([3] * 9)
    assert planned(sim.step()) == [("request-0", 8, 8, False)]
    assert planned(sim.step()) == [
        ("request-0", 16, 4, True),
        ("request-1", 0, 3, True),
        ("request-2", 0, 1, False),
    ]
    assert planned(sim.step()) == [
        ("request-0", 20, 1, True),
        ("request-1", 3, 1, True),
        ("request-2", 1, 6, False),
    ]
    sim.run()


def test_the_number_of_sequences_is_bounded() -> None:
    sim = Simulation(seqs=2)
    for token in range(5):
        sim.add([token])
    assert [len(sim.step().items) for _ in range(4)] == [2, 2, 2, 2]
    sim.run()
    assert list(sim.done) == [f"request-{i}" for i in range(5)]


def test_planning_twice_plans_the_same() -> None:
    sim = Simulation(tokens=6)
    for token in range(3):
        sim.add([token] * 5)
    for _ in range(4):
        assert planned(sim.scheduler.schedule()) == planned(sim.scheduler.schedule())
        sim.step()
    sim.run()


def test_a_sequence_taken_out_during_a_step_is_skipped_by_commit() -> None:
    sim = Simulation()
    gone, kept = sim.add([1] * 4), sim.add([2] * 4)
    batch = sim.scheduler.schedule()
    assert sim.scheduler.cancel(gone.id)
    sim.scheduler.commit(batch, {gone.id: [7], kept.id: [8]})
    assert (gone.tokens, kept.tokens) == ([1] * 4, [2] * 4 + [8])
    assert sim.pool.used == len(kept.pages)


# ---- pages ------------------------------------------------------------------------------------------


def test_the_latest_arrival_is_preempted_and_resumes_to_the_same_output() -> None:
    sim = Simulation(pages=6)
    first, second = sim.add([1] * 8, max_tokens=12), sim.add([2] * 8, max_tokens=12)
    while not sim.scheduler.preemptions:
        sim.step()
    assert (sim.scheduler.running, sim.scheduler.waiting) == ([first], [second])
    assert (first.preemptions, second.preemptions) == (0, 1)
    third = sim.add([3])
    assert sim.scheduler.waiting == [second, third]  # it keeps its place
    while not third.is_running:
        sim.step()
    assert second.is_running
    sim.run()
    assert next(iter(sim.done)) == first.id


def test_nothing_is_preempted_to_admit_a_newcomer() -> None:
    sim = Simulation(pages=4)
    sim.add([1] * 13, max_tokens=3)
    sim.step()
    newcomer = sim.add([2])
    for _ in range(2):
        assert not newcomer.is_running
        sim.step()
    sim.run()
    assert sim.scheduler.preemptions == 0


def test_smaller_requests_do_not_starve_one_that_waits_for_pages() -> None:
    sim = Simulation(pages=8, tokens=64)
    sim.add([1] * 16, max_tokens=8)
    sim.step()
    large = sim.add([2] * 28, max_tokens=2)
    while not large.is_running:
        sim.add([3], max_tokens=3)
        sim.step()
        assert large.is_running or all(other.order < large.order for other in sim.scheduler.running)
    sim.run()


def test_a_sequence_waiting_for_pages_keeps_its_slot() -> None:
    sim = Simulation(pages=8, tokens=64, slots=1, delay=1)
    sim.add([1] * 16, max_tokens=12)
    sim.step()
    large = sim.add([2] * 28, max_tokens=2, adapter="a")
    for other in "bcdefgh":
        sim.step()
        sim.add([3], adapter=other)
    assert large.slot == 0
    sim.run()
    assert list(sim.done)[:2] == ["request-0", large.id]


def test_a_prefix_is_reused_within_an_adapter_and_never_across() -> None:
    sim = Simulation()
    prompt = list(range(18))
    for adapter in (None, "a", "b"):
        for round in range(2):
            sequence = sim.add(prompt, adapter=adapter)
            sim.run()
            assert sequence.num_cached == (16 if round else 0)
    continued = sim.add([*prompt, *expected("a", prompt, 4), 1], adapter="a")
    sim.run()
    assert continued.num_cached == 20  # 18 + 3 output tokens were computed, which is 5 full pages
    assert (sim.pool.hit_tokens, sim.pool.query_tokens) == (3 * 16 + 20, 6 * 18 + 23)


# ---- slots ------------------------------------------------------------------------------------------


def test_a_loading_adapter_holds_nobody_up() -> None:
    sim = Simulation(slots=2, delay=10)
    slow = sim.add([1], adapter="a")
    base = sim.add([2])
    sim.step()
    assert base.num_output_tokens == 1
    sim.run()
    assert sim.first_token[slow.id] in (10, 11)


def test_the_base_needs_no_slot() -> None:
    sim = Simulation(slots=1)
    sim.add([1], max_tokens=50, adapter="a")
    for _ in range(10):
        sim.step()
    base = sim.add([2])
    sim.run()
    assert sim.first_token[base.id] == 1


@pytest.mark.parametrize("caching", [True, False])
def test_an_adapter_yields_after_the_patience_of_another(caching: bool) -> None:
    sim = Simulation(slots=1, delay=2, patience=5, caching=caching)
    long = sim.add([1] * 10, max_tokens=60, adapter="a")
    for _ in range(10):
        sim.step()
    short = sim.add([2], max_tokens=3, adapter="b")
    sim.run()
    assert 5 <= sim.first_token[short.id] <= 5 + 2 + 2
    assert list(sim.done) == [short.id, long.id]
    assert long.preemptions == 1


def test_a_pinned_adapter_is_not_preempted_for_a_slot() -> None:
    sim = Simulation(slots=2, delay=1, patience=5)
    sim.gate.pinned.add("pinned")
    kept = sim.add([1] * 4, max_tokens=60, adapter="pinned")
    for _ in range(3):
        sim.step()
    other = sim.add([2] * 4, max_tokens=60, adapter="a")
    for _ in range(10):
        sim.step()
    late = sim.add([3], max_tokens=3, adapter="b")
    sim.run()
    assert (kept.preemptions, other.preemptions) == (0, 1)
    assert sim.first_token[late.id] < 30


def test_the_slot_held_longest_yields() -> None:
    sim = Simulation(slots=3, patience=5)
    a, b, c = (sim.add([1], max_tokens=80, adapter=digest) for digest in "abc")
    b_again = sim.add([2], max_tokens=80, adapter="b")
    for _ in range(4):
        sim.step()
    sim.scheduler.cancel(a.id)
    a = sim.add([1], max_tokens=80, adapter="a")  # now the youngest hold
    for _ in range(10):
        sim.step()
    sim.add([3], max_tokens=80, adapter="d")
    while not sim.scheduler.preemptions:
        sim.step()
    assert [s.preemptions for s in (a, b, b_again, c)] == [0, 1, 1, 0]
    sim.run()


def test_a_slot_is_kept_for_as_long_as_the_patience() -> None:
    sim = Simulation(slots=1, delay=1, patience=8)
    sequences = [sim.add([i], max_tokens=30, adapter=f"adapter-{i}") for i in range(3)]
    holder, since = None, 0
    while sim.scheduler.waiting:
        held = {item.sequence.adapter for item in sim.step().items}
        if held and held != {holder}:
            assert holder is None or sim.now - since >= 8 or sim.done
            (holder,), since = held, sim.now
    sim.run()
    assert max(sim.first_token[s.id] for s in sequences) <= 2 * (8 + 1 + 2) + 2


def test_more_adapters_than_slots_each_get_on_in_time() -> None:
    sim = Simulation(slots=4, delay=1, patience=10, seqs=32, tokens=64, pages=400)
    sequences = [sim.add([i] * 5, max_tokens=100, adapter=f"adapter-{i}") for i in range(20)]
    sim.run(limit=1500)
    waits = sorted(sim.first_token[s.id] for s in sequences)
    assert waits[3] <= 2
    assert waits[-1] <= 20 / 4 * (10 + 1 + 2)


def test_an_adapter_in_demand_cannot_keep_its_slot_from_another() -> None:
    """A request for `a` is in the middle of its prefill at each step, and ends with its first token."""
    sim = Simulation(slots=1, delay=1, patience=5, tokens=16, pages=400, seqs=4)
    for step in range(30):
        sim.add([step] * 31, max_tokens=1, adapter="a")
        if step == 1:
            late = sim.add([1], adapter="b")
        sim.step()
    sim.run()
    assert sim.first_token[late.id] <= 5 + 2 * 3 + 1 + 1


def test_yielding_never_undoes_all_progress() -> None:
    """The prefill takes longer than the patience and nothing is cached: a slot is kept until it pays."""
    sim = Simulation(slots=1, delay=1, patience=2, tokens=4, caching=False)
    for digest in "abc":
        sim.add([1] * 40, max_tokens=3, adapter=digest)
    sim.run(limit=300)
    assert sim.scheduler.preemptions > 0


def test_a_large_adapter_gets_the_room_of_several() -> None:
    """Also when they must yield at different times: one that has yielded does not come back meanwhile."""
    sim = Simulation(slots=3, delay=1, sizes={"large": 3}, patience=5)
    small = [sim.add([1], max_tokens=80, adapter=digest) for digest in "ab"]
    sim.add([1], max_tokens=6, adapter="c")
    for _ in range(4):
        sim.step()
    large = sim.add([2], max_tokens=3, adapter="large")
    for _ in range(4):
        sim.step()
    assert [s.adapter for s in sim.scheduler.running] == ["a", "b"]
    small.append(
        sim.add([1], max_tokens=80, adapter="c")
    )  # resident still: gets its slot, and keeps it for 5
    sim.run()
    assert sim.first_token[large.id] <= 4 + 1 + 5 + 1 + 1
    assert [s.preemptions for s in small] == [1, 1, 1]


def test_no_slot_is_yielded_to_one_that_lacks_more_than_a_slot() -> None:
    """`b` waits behind a preempted sequence that waits for pages: the slot of `a` would not help it."""
    sim = Simulation(slots=1, delay=1, patience=5, pages=10, tokens=64)
    a, base = sim.add([1], max_tokens=30, adapter="a"), sim.add([2] * 24, max_tokens=12)
    for _ in range(5):
        sim.step()
    b = sim.add([3], adapter="b")
    sim.run()
    assert (a.preemptions, base.preemptions, b.preemptions) == (0, 1, 0)
    assert next(iter(sim.done)) == a.id


def test_patience_begins_anew_with_a_new_request() -> None:
    sim = Simulation(slots=1, delay=1, patience=5)
    sim.add([1], max_tokens=60, adapter="a")
    for _ in range(3):
        sim.step()
    gone = sim.add([2], adapter="b")
    for _ in range(4):
        sim.step()
    sim.scheduler.cancel(gone.id)
    for _ in range(4):
        sim.step()
    late = sim.add([2], adapter="b")
    sim.run()
    assert 5 <= sim.first_token[late.id] <= 5 + 1 + 2


def test_the_adapter_of_a_queued_request_is_loaded_meanwhile() -> None:
    sim = Simulation(seqs=1, delay=5)
    sim.add([1], max_tokens=6)
    queued = sim.add([2], adapter="a")
    sim.run()
    assert sim.first_token[queued.id] == 7


def test_no_slot_is_yielded_while_one_can_be_had() -> None:
    sim = Simulation(slots=3, delay=20, patience=2)
    for digest in "abc":
        sim.add([1], max_tokens=50, adapter=digest)
    sim.run()
    assert sim.scheduler.preemptions == 0


# ---- in and out -------------------------------------------------------------------------------------


def test_a_full_queue_refuses() -> None:
    sim = Simulation(queue=2)
    sim.add([1])
    sim.add([2])
    with pytest.raises(QueueFull, match="2 requests are waiting"):
        sim.add([3])
    sim.run()
    assert len(sim.done) == 2


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "param", "message"),
    [
        (0, 1, "prompt", "no tokens"),
        (200, 1, "prompt", "200 tokens and the context holds 200"),
        (30, 12, "max_tokens", "need a KV cache of 41 tokens and it holds 40"),
    ],
)
def test_what_can_never_run_is_refused(prompt: int, max_tokens: int, param: str, message: str) -> None:
    sim = Simulation(pages=10)
    with pytest.raises(InvalidRequest, match=message) as raised:
        sim.add([1] * prompt, max_tokens)
    assert raised.value.param == param
    assert not sim.scheduler.waiting


def test_what_just_fits_runs() -> None:
    sim = Simulation(pages=10)
    sim.add([1] * 30, max_tokens=11)
    sim.run()
    assert len(sim.done) == 1


# ---- virtual tokens ---------------------------------------------------------------------------------


def leads(batch: Batch) -> list[tuple[str, int, int, int]]:
    return [(item.sequence.id, item.lead, item.start, item.count) for item in batch.items]


@pytest.mark.parametrize("caching", [False, True])
def test_virtual_tokens_are_copied_once_and_their_full_pages_shared(caching: bool) -> None:
    sim = Simulation(slots=2, delay=0, virtual={"a": 10}, caching=caching)
    sim.add([1, 2, 3], adapter="a")
    sim.add([1, 2, 3])
    sim.add([1, 2, 3], adapter="b")
    assert leads(sim.step()) == [("request-0", 10, 10, 3), ("request-1", 0, 0, 3), ("request-2", 0, 0, 3)]
    sim.add([4] * 7, adapter="a")
    assert leads(sim.step())[-1] == ("request-3", 2, 10, 7)  # two pages of four are there
    first, last = sim.scheduler.running[0], sim.scheduler.running[-1]
    assert first.pages[:2] == last.pages[:2]
    assert first.pages[2] != last.pages[2]
    sim.run()
    assert (last.num_cached, first.num_output_tokens, last.num_output_tokens) == (0, 4, 4)
    again = sim.add([4] * 7, adapter="a")
    batch = sim.step()
    assert leads(batch) == [("request-4", 0, 16, 1) if caching else ("request-4", 2, 10, 7)]
    assert again.num_cached == (6 if caching else 0)
    assert sim.pool.hit_tokens == again.num_cached
    assert sim.pool.query_tokens == (3 + 3 + 3 + 7 + 7) * caching
    sim.run()


def test_virtual_tokens_that_fill_their_pages_are_copied_once() -> None:
    sim = Simulation(slots=1, delay=0, virtual={"a": 8}, caching=False)
    sim.add([1, 2, 3], adapter="a")
    sim.run()
    sim.add([4], adapter="a")
    assert leads(sim.step()) == [("request-1", 0, 8, 1)]
    sim.run()
    sim.pool.forget("a")
    sim.add([4], adapter="a")
    assert leads(sim.step()) == [("request-2", 8, 8, 1)]


def test_a_preempted_sequence_gets_its_virtual_tokens_again() -> None:
    sim = Simulation(pages=8, tokens=64, slots=1, delay=0, virtual={"a": 6}, caching=False)
    sim.add([1] * 6, max_tokens=10, adapter="a")
    sim.add([2] * 6, max_tokens=10, adapter="a")
    sim.run()
    assert sim.scheduler.preemptions > 0
    assert all(s.num_virtual == 6 and s.tokens[:7].count(VIRTUAL) == 6 for s in sim.done.values())
    assert sim.copied > 12 - 4  # the second time, too


@pytest.mark.parametrize(
    ("virtual", "prompt", "max_tokens", "message"),
    [
        (170, 30, 1, "the prompt has 200 tokens, 170 of them the adapter's virtual ones, and the context"),
        (30, 10, 2, "40 prompt tokens, 30 of them the adapter's virtual ones, and max_tokens 2 need a KV"),
    ],
)
def test_what_is_too_long_with_its_virtual_tokens_is_refused_once_they_are_known(
    virtual: int, prompt: int, max_tokens: int, message: str
) -> None:
    sim = Simulation(pages=10, slots=1, delay=2, virtual={"a": virtual})
    long = sim.add([1] * 10, adapter="b")
    sim.add([1] * prompt, max_tokens, adapter="a")
    sim.add([2] * 3)
    while not sim.scheduler.refused:
        sim.step()
    ((sequence, error),) = sim.scheduler.refused
    assert (sequence.id, error.code) == ("request-1", "context_length_exceeded")
    assert error.message.startswith(message)
    assert not sim.scheduler.cancel(sequence.id)
    sim.run()
    assert set(sim.done) == {long.id, "request-2"}


def test_the_longest_prompt_beside_virtual_tokens_runs() -> None:
    sim = Simulation(pages=10, slots=1, virtual={"a": 30})
    sim.add([1] * 9, max_tokens=2, adapter="a")
    sim.run()
    assert len(sim.done) == 1


# ---- invocation tokens ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "first"),
    [
        ([7, 8, 1, 1], 0),
        ([7, 8, 1, 7, 8], 3),
        ([1, 7, 8, 7], 1),
        ([7, 7, 8], 1),
        ([8, 7], None),
        ([7], None),
        ([7, 1, 8], None),
    ],
)
def test_an_adapter_acts_from_the_last_invocation_in_the_prompt_on(
    prompt: list[int], first: int | None
) -> None:
    sim = Simulation(delay=0, invocations={"a": (7, 8)})
    sequence = sim.add(prompt, adapter="a")
    (item,) = sim.step().items
    assert sequence.changes == (() if first is None else (Change(first, 0),))
    before = len(prompt) if first is None else first
    parts = [(-1, before), (sequence.slot, len(prompt) - before)]
    assert item.parts == [(slot, rows) for slot, rows in parts if rows]
    (decode,) = sim.step().items
    assert decode.parts == [(-1 if first is None else sequence.slot, 1)]
    sim.run()


def test_what_is_generated_invokes_nothing() -> None:
    prompt = [3] * 5
    output = expected(None, prompt, 8)
    assert output[1] not in prompt
    sim = Simulation(pages=8, invocations={"a": (output[1],)}, delay=0)
    sequence = sim.add(prompt, max_tokens=8, adapter="a")
    sim.run()
    assert sequence.tokens[5:] == output


@pytest.mark.parametrize("tokens", [3, 5, 64])
def test_pages_before_the_invocation_are_shared_with_the_base_and_others(tokens: int) -> None:
    sim = Simulation(delay=0, slots=3, tokens=tokens, invocations={"a": (7, 8), "b": (9,)})
    text = [1, 2, 3, 4, 5, 6, 1, 2, 3]
    base = sim.add([*text, 4], adapter=None)
    sim.run()
    asked = [
        (sim.add([*text, 7, 8, 4], adapter="a"), 8),
        (sim.add([*text, 9, 8, 4], adapter="b"), 8),
        (sim.add([*text, 7, 8, 4], adapter="plain"), 0),
        (sim.add([*text[:6], 7, 8, *text], adapter="a"), 4),  # the page with the invocation is no base page
    ]
    sim.run()
    assert [sequence.num_cached for sequence, _ in asked] == [cached for _, cached in asked]
    assert base.num_cached == 0
    again = sim.add([*text, 7, 8, 4, 5, 5], adapter="a")
    reverse = sim.add([*text, 7, 8, 4, 5, 5])
    sim.run()
    assert again.num_cached == 12  # its own page, too
    assert reverse.num_cached == 8  # not that one
    sim.pool.forget("a")
    after = [sim.add([*text, 7, 8, 4, 5, 5], adapter=adapter) for adapter in ("a", None)]
    sim.run()
    assert [sequence.num_cached for sequence in after] == [8, 12]
    sim.add([9, *text, 7, 8], adapter="a")
    sim.run()
    sim.pool.forget("a")
    base = sim.add([9, *text])
    sim.run()
    assert base.num_cached == 8  # also when it was the first to compute them


def test_pages_with_the_same_tokens_invoked_at_another_place_are_not_shared() -> None:
    """The second prompt has its last invocation over the end of the page."""
    sim = Simulation(delay=0, invocations={"a": (7, 8)})
    first = sim.add([7, 8, 1, 7, 1, 1], adapter="a")
    sim.run()
    second = sim.add([7, 8, 1, 7, 8, 1], adapter="a")
    third = sim.add([7, 8, 1, 7, 1, 7, 8], adapter="a")
    sim.run()
    assert [s.changes[0].start for s in (first, second, third)] == [0, 3, 5]
    assert (second.num_cached, third.num_cached) == (0, 0)


def test_a_preempted_sequence_is_active_from_the_same_place() -> None:
    sim = Simulation(pages=8, tokens=5, slots=1, delay=0, invocations={"a": (7, 8)})
    asked = [sim.add([i, 1, 1, 7, 8, 1], max_tokens=12, adapter="a") for i in range(2)]
    sim.run()
    assert sim.scheduler.preemptions > 0
    assert [sequence.changes for sequence in asked] == [(Change(3, 0),)] * 2


# ---- the ends of a prompt ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("span", "length", "changes"),
    [
        (Span(2, 0, False), 6, [(0, 0), (2, None)]),
        (Span(0, 2, False), 6, [(0, None), (4, 0), (6, None)]),
        (Span(2, 3, False), 6, [(0, 0), (2, None), (3, 0), (6, None)]),
        (Span(2, 3, True), 6, [(0, 0), (2, None), (3, 1), (6, None)]),
        (Span(3, 3, False), 6, [(0, 0), (6, None)]),
        (Span(3, 3, True), 6, [(0, 0), (3, 1), (6, None)]),
        (Span(3, 3, True), 5, [(0, 0), (2, 1), (5, None)]),  # both claim the third: it is of the last
        (Span(3, 3, True), 2, [(0, 1), (2, None)]),
        (Span(9, 0, True), 2, [(0, 0), (2, None)]),
    ],
)
def test_an_adapter_acts_on_the_ends_of_a_prompt(
    span: Span, length: int, changes: list[tuple[int, int | None]]
) -> None:
    sequence = Sequence(id="s", tokens=[1] * length, sampling=SamplingParams(max_tokens=1))
    sequence.apply(Reach(virtual=3, span=span))
    found = [(start - 3, offset) for start, offset in sequence.changes]
    assert [change for change in found if change != (0, None)] == [c for c in changes if c != (0, None)]
    sequence.slot = 4
    for start in range(length + 4):
        for rows in range(1, length + 5 - start):
            parts = Scheduled(sequence, start, rows, True).parts
            slots = [slot for slot, many in parts for _ in range(many)]
            who = [
                acting("a", length, span, 0, at - 3) if at >= 3 else None for at in range(start, start + rows)
            ]
            assert slots == [{None: -1, "a": 4}.get(each, 5) for each in who]
            assert all(one[0] != two[0] for one, two in pairwise(parts))


@pytest.mark.parametrize("lookahead", [False, True])
@pytest.mark.parametrize("tokens", [3, 5, 64])
def test_what_comes_before_the_end_of_the_prompt_is_shared(tokens: int, lookahead: bool) -> None:
    """Pages in which the adapter does not end to act are the same for all prompts that begin alike."""
    spans = {"a": Span(2, 3, True), "b": Span(0, 1, False)}
    sim = Simulation(delay=0, tokens=tokens, lookahead=lookahead, spans=spans)
    text = [1, 2, 3, 4, 5, 6, 1, 2, 3, 4, 5, 6]
    first = sim.add([*text, 7], adapter="a", max_tokens=6)
    sim.run()
    longer = sim.add([*text, 7, 8, 9, 9, 8, 7], adapter="a")
    again = sim.add([*text, 7], adapter="a")
    shorter = sim.add(text[:10], adapter="a")
    base = sim.add([*text, 7])
    sim.run()
    whole = sim.add(first.tokens[:17], adapter="a")
    sim.run()
    cached = [sequence.num_cached for sequence in (first, longer, again, shorter, base, whole)]
    assert cached == [0, 8, 12, 4, 0, 12]  # the last shares what the second made, not what the first did
    assert sim.base_rows > 0
    last = sim.add([*text, 7], adapter="b")
    sim.run()
    assert last.num_cached == 12  # the base's
    sim.pool.forget("a")
    forgotten = sim.add([*text, 7], adapter="a")
    sim.run()
    assert forgotten.num_cached == 0


def test_an_id_in_use_is_refused() -> None:
    sim = Simulation()
    with pytest.raises(InvalidRequest, match="'request-0' is in use"):
        sim.scheduler.add(sim.add([1]))


def test_cancel_waiting_running_and_gone() -> None:
    sim = Simulation(seqs=1)
    running, waiting = sim.add([1], adapter="a"), sim.add([2], adapter="b")
    for _ in range(4):
        sim.step()
    assert sim.scheduler.adapter_counts() == {"a": AdapterCounts(1, 0), "b": AdapterCounts(0, 1)}
    for sequence in (running, waiting):
        assert sim.scheduler.cancel(sequence.id)
        assert not sim.scheduler.cancel(sequence.id)
    sim.run(limit=1)
    assert not sim.done


def test_a_failed_adapter_takes_its_sequences_with_it() -> None:
    sim = Simulation(seqs=1)
    failing = [sim.add([i], adapter="a") for i in range(2)]
    other = sim.add([2], adapter="b")
    for _ in range(4):
        sim.step()
    assert failing[0].is_running
    assert sim.scheduler.fail_adapter("a") == failing
    sim.run()
    assert list(sim.done) == [other.id]


def test_deadlines_end_waiting_and_running_sequences() -> None:
    sim = Simulation(seqs=1)
    running, waiting = sim.add([1], max_tokens=20, deadline=5), sim.add([2], deadline=3)
    last = sim.add([3], deadline=100)
    sim.run()
    assert list(sim.expired) == [waiting.id, running.id]
    assert running.num_output_tokens == 4
    assert list(sim.done) == [last.id]


# ---- ahead ------------------------------------------------------------------------------------------


def test_a_step_is_planned_ahead_without_the_tokens_of_the_last() -> None:
    sim = Simulation()
    long, short = sim.add([1] * 5, max_tokens=9), sim.add([2] * 3, max_tokens=2)
    first = sim.scheduler.schedule()
    ahead = sim.scheduler.schedule_ahead(first)
    assert ahead is not None
    assert planned(ahead) == [(long.id, 5, 1, True), (short.id, 3, 1, True)]
    sim.scheduler.commit(first, {long.id: [7], short.id: [8]})
    further = sim.scheduler.schedule_ahead(ahead)  # the second token of `short` is its last
    assert further is not None
    assert planned(further) == [(long.id, 6, 1, True)]
    sim.scheduler.commit(ahead, {long.id: [9], short.id: [10]})
    assert (long.tokens[5:], short.tokens[3:]) == ([7, 9], [8, 10])
    assert (long.num_computed, short.num_computed) == (6, 4)


def test_nothing_is_planned_ahead_of_an_end_or_of_an_unfinished_prompt() -> None:
    sim = Simulation(tokens=4)
    one = sim.add([1] * 4, max_tokens=1)
    assert sim.scheduler.schedule_ahead(sim.scheduler.schedule()) is None
    sim.scheduler.cancel(one.id)
    limit = sim.add([1] * 199, max_tokens=1)  # ends at the context's 200 tokens
    assert sim.scheduler.schedule_ahead(sim.scheduler.schedule()) is None  # 4 of 199
    sim.run()
    assert sim.done[limit.id].num_output_tokens == 1


# ---- drafts -----------------------------------------------------------------------------------------


def damaged(tokens: list[int], every: int) -> list[int]:
    """With one token in so many replaced."""
    return [VOCABULARY if at % every == every - 1 else token for at, token in enumerate(tokens)]


@pytest.mark.parametrize("lookahead", [False, True])
def test_a_draft_that_holds_is_taken_whole(lookahead: bool) -> None:
    sim = Simulation(tokens=64, lookahead=lookahead)
    answer = expected(None, [1, 2, 3], 21)
    sim.add([1, 2, 3], max_tokens=21, drafts=4, prediction=answer)
    sim.run()
    assert sim.now == 1 + 4  # the prompt; then five tokens a step
    assert (sim.drafted, sim.accepted) == (16, 16)


@pytest.mark.parametrize("lookahead", [False, True])
def test_a_draft_is_taken_up_to_the_first_token_that_the_model_does_not_say(lookahead: bool) -> None:
    sim = Simulation(pages=200, tokens=64, lookahead=lookahead)
    answer = expected("a", [1, 2, 3], 60)
    sim.add([1, 2, 3], max_tokens=60, adapter="a", drafts=6, prediction=damaged(answer, 7))
    sim.run()
    assert 0 < sim.accepted < sim.drafted
    assert sim.now < 40


def test_what_was_said_before_is_drafted_again() -> None:
    sim = Simulation(pages=200, tokens=64)
    answer = expected(None, [1, 2, 3], 40)
    sim.add([*answer, 1, 2, 3], drafts=4)  # another prompt, so another answer
    sim.run()
    assert sim.drafted == 0
    again = sim.add([1, 2, 3], max_tokens=40, drafts=4, prediction=[*answer, *answer])
    sim.run()
    assert again.num_output_tokens == 40
    assert sim.accepted > 25


def test_drafts_in_vain_become_shorter_and_pause() -> None:
    sim = Simulation(pages=200, tokens=64)
    answer = expected(None, [1], 60)
    pairs = [token for pair in pairwise(answer) for token in (VOCABULARY, *pair)]
    sim.add([1], max_tokens=60, drafts=8, prediction=pairs)
    sim.run()
    assert sim.accepted == 0
    assert 8 + 4 + 2 + 1 < sim.drafted < 20


def test_drafts_take_what_rows_and_pages_are_left() -> None:
    sim = Simulation(pages=8, seqs=3, tokens=64)
    prompts = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    for prompt in prompts:
        sim.add(prompt, max_tokens=10, drafts=5, prediction=expected(None, prompt, 10))
    batch = sim.step()
    while batch.items:
        if len(batch.items) == 3:
            assert not any(item.draft for item in batch.items)  # rows for each, and none besides
        batch = sim.step()
    sim.run()
    assert sim.accepted > 0


def test_a_draft_ends_with_what_may_be_generated() -> None:
    sim = Simulation(tokens=300)
    answer = expected(None, [1], 50)
    sim.add([1], max_tokens=4, drafts=20, prediction=answer)
    sim.add([1], max_tokens=50, drafts=20, prediction=answer, stops=[answer[6]])
    sim.run()
    assert sim.accepted >= 4


@pytest.mark.parametrize("lookahead", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_any_mix_with_drafts(seed: int, lookahead: bool) -> None:
    """Short of pages, rows and slots, with drafts that hold in part, every answer is what it is alone."""
    rng = random.Random(seed)
    sim = Simulation(pages=24, slots=2, seqs=6, tokens=12, lookahead=lookahead, virtual={"b": 3})
    for _ in range(40):
        prompt = [rng.randrange(VOCABULARY) for _ in range(rng.randrange(1, 12))]
        adapter, most = rng.choice([None, "a", "b", "c"]), rng.randrange(1, 30)
        virtual = [VIRTUAL] * (3 if adapter == "b" else 0)
        answer = damaged(expected(adapter, [*virtual, *prompt], most), rng.randrange(2, 9))
        sim.add(
            prompt,
            max_tokens=most,
            adapter=adapter,
            stops=rng.sample(range(VOCABULARY), rng.randrange(3)),
            drafts=rng.choice([0, 1, 5]),
            prediction=answer,
        )
        if rng.random() < 0.3:
            sim.step()
        if rng.random() < 0.05:
            sim.scheduler.cancel(f"request-{rng.randrange(40)}")
    sim.run()
    assert sim.scheduler.preemptions > 0
    assert sim.accepted > 0


def test_a_context_that_is_full_ends_a_sequence_for_certain() -> None:
    sim = Simulation(tokens=300)
    sim.add([1] * 198, max_tokens=50)
    batch = sim.scheduler.schedule()
    ahead = sim.scheduler.schedule_ahead(batch)
    assert ahead is not None
    sim.scheduler.commit(batch, {"request-0": [1]})
    assert sim.scheduler.schedule_ahead(ahead) is None


def test_whoever_can_be_admitted_is_not_passed_by() -> None:
    sim = Simulation(seqs=2, pages=6, tokens=64)
    running = sim.add([1] * 4, max_tokens=20)
    batch = sim.step()
    assert sim.scheduler.schedule_ahead(sim.scheduler.schedule()) is not None
    newcomer = sim.add([2] * 4, max_tokens=3)
    assert sim.scheduler.schedule_ahead(batch) is None
    sim.step()
    assert newcomer.is_running
    sim.add([3])  # there is no place for a third
    assert sim.scheduler.schedule_ahead(sim.scheduler.schedule()) is not None
    sim.step()
    assert sim.scheduler.schedule_ahead(sim.scheduler.schedule()) is None  # the newcomer leaves its place
    assert running.is_running
    sim.run()


def test_one_that_waits_for_pages_does_not_keep_others_from_going_on() -> None:
    sim = Simulation(pages=8, tokens=64)
    sim.add([1] * 16, max_tokens=8)
    sim.step()
    large = sim.add([2] * 28, max_tokens=2)
    assert sim.scheduler.schedule_ahead(sim.scheduler.schedule()) is not None
    sim.run()
    assert list(sim.done)[-1] == large.id


def test_an_adapter_under_way_does_not_keep_others_from_going_on() -> None:
    sim = Simulation(delay=5, lookahead=True)
    sim.add([1], max_tokens=30)
    sim.step()
    late = sim.add([2], adapter="a")
    for _ in range(4):
        sim.step()
        assert sim.ahead is not None
    sim.run()
    assert sim.first_token[late.id] == 6  # loaded after 5, and the step that was launched goes first


def test_a_slot_is_yielded_although_steps_are_planned_ahead() -> None:
    sim = Simulation(slots=1, delay=2, patience=5, lookahead=True)
    long = sim.add([1] * 10, max_tokens=60, adapter="a")
    for _ in range(10):
        sim.step()
    short = sim.add([2], max_tokens=3, adapter="b")
    sim.run()
    assert 5 <= sim.first_token[short.id] <= 5 + 2 + 2 + 2
    assert list(sim.done) == [short.id, long.id]
    assert sim.launched_ahead > 40


def test_the_room_of_one_who_waits_no_more_is_free_again_while_steps_are_planned_ahead() -> None:
    sim = Simulation(slots=2, delay=1, patience=3, lookahead=True, sizes={"large": 2})
    sim.add([1], max_tokens=100)
    sim.add([2], max_tokens=90, adapter="a")
    for _ in range(6):
        sim.step()
    large = sim.add([3], adapter="large")
    while not sim.scheduler.preemptions:
        sim.step()
    sim.scheduler.cancel(large.id)
    (back,) = sim.scheduler.waiting
    for _ in range(6):
        sim.step()
    assert back.is_running
    sim.run()


def test_a_lack_of_pages_is_left_to_the_plan_that_may_preempt() -> None:
    sim = Simulation(pages=4)
    first, second = sim.add([1] * 4, max_tokens=12), sim.add([2] * 4, max_tokens=12)
    sim.step()
    batch = sim.scheduler.schedule()
    while (ahead := sim.scheduler.schedule_ahead(batch)) is not None:
        sim.scheduler.commit(batch, {first.id: [3], second.id: [3]})
        batch = ahead
    assert sim.scheduler.preemptions == 0
    assert sim.pool.available == 0
    sim.scheduler.commit(batch, {first.id: [3], second.id: [3]})
    assert planned(sim.scheduler.schedule()) == [(first.id, 8, 1, True)]
    assert sim.scheduler.preemptions == 1


def test_one_taken_out_while_a_step_is_ahead_leaves_nothing_behind() -> None:
    sim = Simulation(lookahead=True)
    gone, kept = sim.add([1] * 3, max_tokens=9), sim.add([2] * 7, max_tokens=9)
    sim.step()
    assert sim.ahead is not None
    assert sim.scheduler.cancel(gone.id)
    again = sim.add([1] * 3, max_tokens=2)
    tokens = list(gone.tokens)
    sim.run()
    assert gone.tokens == tokens
    assert list(sim.done) == [again.id, kept.id]
    assert sim.wasted == 1


def test_a_stop_token_wastes_one_row() -> None:
    prompt = [4] * 5
    output = expected(None, prompt, 12)
    sim = Simulation(lookahead=True)
    stopped = sim.add(prompt, 12, stops=[output[6]])
    sim.run()
    assert stopped.tokens[5:] == output[: output.index(output[6]) + 1]
    assert sim.wasted == 1


# ---- everything at once -----------------------------------------------------------------------------


@pytest.mark.parametrize("lookahead", [False, True])
@pytest.mark.parametrize("orderly", [True, False])
@pytest.mark.parametrize("seed", range(12))
def test_soak(seed: int, orderly: bool, lookahead: bool) -> None:
    """20 adapters over 4 slots with cancellations, deadlines, stops, shared prefixes and too few pages."""
    rng = random.Random(seed)
    sim = Simulation(
        pages=rng.choice([24, 40]),
        page_size=rng.choice([2, 4]),
        caching=bool(seed % 3),
        slots=4,
        delay=rng.randrange(1, 6),
        sizes={f"adapter-{i}": rng.randrange(1, 4) for i in range(20)} if seed % 2 else None,
        orderly=orderly,
        seqs=rng.choice([6, 16]),
        tokens=rng.choice([7, 16, 64]),
        patience=rng.choice([1, 5, 12]),
        lookahead=lookahead,
        virtual={f"adapter-{i}": rng.randrange(9) for i in range(0, 20, 3)},
        invocations={f"adapter-{i}": (i % 3, (i + 1) % 3)[: 1 + i % 2] for i in range(1, 20, 3)},
        spans={f"adapter-{i}": Span(i % 4, i % 5, i % 2 == 0) for i in range(2, 20, 6)},
    )
    room = sim.pool.num_pages * sim.pool.page_size
    prefixes = [[rng.randrange(VOCABULARY) for _ in range(12)] for _ in range(3)]
    doomed: dict[int, str] = {}  # step -> id
    cancelled = 0
    for step in range(400):
        if step < 300 and rng.random() < 0.5:
            prompt = rng.choice(prefixes)[: rng.randrange(13)] + [rng.randrange(3)] * rng.randrange(1, 12)
            adapter = rng.choice([None, *(f"adapter-{rng.randrange(20)}" for _ in range(5))])
            virtual = sim.gate.virtual.get(adapter or "", 0)
            max_tokens = rng.randrange(1, min(24, room - virtual - len(prompt)))
            deadline = step + rng.randrange(5, 100) if rng.random() < 0.1 else None
            stops = rng.sample(range(VOCABULARY), rng.choice([0, 0, 3]))
            sequence = sim.add(prompt, max_tokens, adapter, deadline, stops)
            if rng.random() < 0.1:
                doomed[step + rng.randrange(1, 40)] = sequence.id
        cancelled += step in doomed and sim.scheduler.cancel(doomed[step])
        if rng.random() < 0.01:
            sim.pool.forget(f"adapter-{rng.randrange(20)}")
        sim.step()
    sim.run(limit=10_000)  # a patience shorter than a load and a prefill is slow, but ends
    assert len(sim.done) + len(sim.expired) + cancelled == next(sim._names)
    assert len(sim.done) > 60
    assert sim.gate.loads > 20
    assert sim.copied > 50
    assert sim.base_rows > 50
    assert not sim.scheduler.refused
    assert sim.scheduler.preemptions > 10
    assert (sim.launched_ahead > 40) == lookahead
    assert lookahead or not sim.wasted
    assert (sim.pool.hit_tokens > 0) == sim.pool.prefix_caching


# ---- a merged copy ----------------------------------------------------------------------------------


def open_copy(sim: Simulation, adapter: str) -> None:
    sim.scheduler.has_copy, sim.scheduler.joining = True, adapter


def test_the_copy_and_the_others_take_turns_and_both_get_on() -> None:
    sim = Simulation()
    open_copy(sim, "a")
    for _ in range(3):
        sim.add([1, 2, 3], 8, "a")
        sim.add([1, 2, 3], 8, "b")
    batches = [sim.step() for _ in range(12)]
    lanes = [batch.merged for batch in batches if batch.items]
    assert all(one != other for one, other in pairwise(lanes[2:]))
    assert [s.merged for s in sim.scheduler.running] == [True, False] * 3
    sim.run()
    assert list(sim.gate.resident) == ["b"]  # the copy needs no slot


def test_without_others_every_step_is_the_copys() -> None:
    sim = Simulation()
    open_copy(sim, "a")
    sim.add([1, 2, 3], 8, "a")
    assert all(sim.step().merged for _ in range(8))
    sim.run()


def test_who_began_with_a_slot_keeps_it() -> None:
    sim = Simulation(pages=8)
    early = sim.add([1, 2, 3], 20, "a")
    while not early.num_output_tokens:
        sim.step()
    open_copy(sim, "a")
    sim.scheduler._preempt(early)
    late = sim.add([4, 5, 6], 4, "a")
    sim.run()
    assert (early.merged, late.merged) == (False, True)


def test_pages_of_the_copy_are_its_own() -> None:
    """The simulated copy computes something else than the adapter in its slot."""
    sim, prompt = Simulation(), list(range(12))
    plain = sim.compute
    sim.compute = lambda sequence, tokens, start, chunk, adapter: plain(  # type: ignore[method-assign]
        sequence, tokens, start, chunk, "rounded" if sequence.merged else adapter
    )
    slot = sim.add(prompt, 4, "a")
    while slot.is_running or not slot.num_output_tokens:
        sim.step()
    open_copy(sim, "a")
    for cached in (0, 8):
        sequence = sim.add(prompt, 4, "a")
        while sequence.id not in sim.done:
            sim.step()
        assert sequence.output == expected("rounded", prompt, 4)
        assert sequence.num_cached == cached
    sim.done.clear()
    sim.run()


def test_a_failed_load_leaves_the_copys_sequences() -> None:
    sim = Simulation()
    open_copy(sim, "a")
    sequence = sim.add([1, 2], 6, "a")
    sim.step()
    assert sim.scheduler.fail_adapter("a") == []
    sim.run()
    assert sequence.merged


@pytest.mark.parametrize("seed", range(20))
def test_copies_come_and_go_and_tokens_stay(seed: int) -> None:
    generator = random.Random(seed)
    sim = Simulation(pages=generator.choice([12, 20, 64]), seqs=generator.choice([2, 5, 8]), patience=3)
    for _ in range(60):
        for _ in range(generator.randrange(3)):
            adapter = generator.choice([None, "a", "a", "a", "b", "c"])
            prompt = [generator.randrange(3)] * generator.randrange(1, 12)
            sim.add(prompt, generator.randrange(1, 12), adapter)
        chance = generator.random()
        if not sim.scheduler.has_copy and chance < 0.3:
            open_copy(sim, "a")
        elif chance < 0.05:
            sim.scheduler.leave_copy()
        elif chance < 0.15:
            sim.scheduler.joining = None
        elif chance < 0.2 and sim.scheduler.running:
            sim.scheduler.cancel(generator.choice(sim.scheduler.running).id)
        sim.step()
    sim.run()
