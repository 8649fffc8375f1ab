"""Residency: budgets, order, pins, users, failures, and that the step's thread never waits.

Time is a number the tests move. Slow loads are loads that wait for an event; nothing sleeps.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import TypeVar

import pytest
import torch

from veneer.adapters.arena import ALIGNMENT, align
from veneer.adapters.program import Program, Site, SiteProgram
from veneer.adapters.residency import GRACE, Residency
from veneer.errors import AdapterRefused, Conflict, EngineUnavailable, NotFound, VeneerError
from veneer.kernels.tables import (
    ABSENT,
    COLUMNS,
    RANK,
    RANK_SCALE,
    SLOTS_EACH,
    UPDATE_SCALE,
    AdapterTables,
    absent_entries,
)

SITES = {
    site.name: site
    for site in (Site("q", 16, 24), Site("k", 16, 8), Site("gate", 16, 40), Site("down", 40, 16))
}
EMBEDDING = Site("embedding", 50, 16)
TABLE = {**SITES, EMBEDDING.name: EMBEDDING}  # by rows of the tables
UNIT = 2 * ALIGNMENT * 4  # bytes of an adapter of rank 1 at one site: A and B, one alignment each
T = TypeVar("T")
PATIENCE = 30  # seconds until a test that waits fails


def one_site(rank: int, seed: int = 0) -> Program:
    """Low rank at one site. Up to rank 5 it takes one unit: A and B fit one alignment each."""
    chance = torch.Generator().manual_seed(seed)
    part = SiteProgram(torch.randn(rank, 16, generator=chance), torch.randn(rank, 24, generator=chance))
    return Program("lora", {"q": part})


def units(count: int) -> Program:
    """A program of `count` units, at most 4."""
    parts = {}
    for site in list(SITES.values())[:count]:
        parts[site.name] = SiteProgram(torch.ones(1, site.in_features), torch.ones(1, site.out_features))
    return Program("lora", parts)


def shared(family: int, scale: float, names: tuple[str, ...] = ("q", "k")) -> Program:
    """Like a VeRA of rank 20: factors of a family, and scales of its own. Each site's own takes one unit."""
    drawn = torch.Generator().manual_seed(family)
    factors = {width: torch.randn(20, width, generator=drawn) for width in (16, 40, 24, 8)}
    parts = {}
    for name in names:
        site = SITES[name]
        scales = torch.full((20,), float(scale)), torch.full((site.out_features,), scale + 1.0)
        factor = factors[site.in_features], factors[site.out_features]
        parts[name] = SiteProgram(*factor, rank_scale=scales[0], update_scale=scales[1])
    return Program("vera", parts)


FACTORS = align(20 * 16) + align(20 * 24) + align(20 * 8)  # elements of those of q and k


def random_program(chance: random.Random) -> Program:
    generator = torch.Generator().manual_seed(chance.getrandbits(32))
    if chance.random() < 0.4:
        names = ("q", "k") if chance.random() < 0.7 else ("q", "k", "gate")
        return shared(chance.randint(0, 1), chance.random(), names)
    parts = {}
    for site in chance.sample(list(SITES.values()), chance.randint(1, len(SITES))):
        rank = chance.choice([0, 1, 3, 8, 40])
        a = torch.randn(rank, site.in_features, generator=generator) if rank else None
        b = torch.randn(rank, site.out_features, generator=generator) if rank else None
        bias = None if rank and chance.random() < 0.5 else torch.randn(site.out_features, generator=generator)
        parts[site.name] = SiteProgram(a, b, bias)
    return Program("lora", parts)


class Bench:
    """A residency over folders whose programs are given by name; loads can be held and made to fail."""

    def __init__(self, root: Path, **options: object) -> None:
        self.blobs = root / "blobs"
        self.blobs.mkdir()
        self.programs: dict[str, Program] = {}
        self.loads: list[str] = []  # in the order in which the loader began them
        self.faults: dict[str, Exception] = {}
        self.held: dict[str, threading.Event] = {}
        self.reached = threading.Semaphore(0)  # released whenever a held load begins
        self.now = 0.0
        self._woken = threading.Event()
        settings = {
            "device": torch.device("cpu"),
            "dtype": torch.float32,
            "max_loras": 2,
            "max_lora_rank": 64,
            "arena_bytes": 64 * UNIT,
            "host_bytes": 1 << 30,
        }
        settings.update(options)
        self.failures: list[tuple[str, VeneerError]] = []
        self.residency = Residency(
            root,
            SimpleNamespace(sites=SITES, hidden_sites={}, embedding=EMBEDDING),
            wake=self._woken.set,
            load=self._load,
            clock=lambda: self.now,
            **settings,  # type: ignore[arg-type]
        )

    def _load(self, folder: Path, task: int) -> Program:
        self.loads.append(folder.name)
        if folder.name in self.held:
            self.reached.release()
            assert self.held[folder.name].wait(PATIENCE)
        if folder.name in self.faults:
            raise self.faults[folder.name]
        return self.programs[folder.name]

    def add(self, name: str, program: Program | None = None) -> str:
        self.programs[name] = program or units(1)
        (self.blobs / name).mkdir()
        return name

    def hold(self, name: str) -> threading.Event:
        """Loads of `name` wait until the event that is returned is set."""
        self.held[name] = threading.Event()
        return self.held[name]

    def until(self, condition: Callable[[], object]) -> None:
        """Poll as an idle step loop does, when woken only, until the condition holds."""
        while True:
            self._woken.clear()
            self.failures += self.residency.poll()
            if condition():
                return
            assert self._woken.wait(PATIENCE), "the residency did not wake the loop"

    def resident(self) -> set[str]:
        return {digest for digest, stats in self.residency.stats().items() if stats.device}

    def on_host(self) -> set[str]:
        return {digest for digest, stats in self.residency.stats().items() if stats.host}

    def use(self, digest: str) -> int:
        """Load and acquire."""
        self.residency.prefetch(digest)
        self.until(lambda: digest in self.resident() or self.failures)
        slot = self.residency.acquire(digest)
        assert slot is not None
        return slot

    def touch(self, *digests: str) -> None:
        """Load, use once and release, one after the other."""
        for digest in digests:
            self.use(digest)
            self.residency.release(digest)

    def finish(self, future: Future[T]) -> T:
        self.until(future.done)
        return future.result()


MakeBench = Callable[..., Bench]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[MakeBench]:
    made: list[Bench] = []

    def make(**options: object) -> Bench:
        root = tmp_path / str(len(made))
        root.mkdir()
        made.append(Bench(root, **options))
        return made[-1]

    yield make
    for each in made:
        for event in each.held.values():
            event.set()
        each.residency.close()


def assert_installed(tables: AdapterTables, slot: int, program: Program, sites: Mapping[str, Site]) -> None:
    """The arena holds the program bit for bit where the entries say."""
    assert torch.equal(tables.entries[slot].cpu(), tables.entries_host[slot])
    for row, name in zip(tables.entries_host[slot].tolist(), sites, strict=True):
        part = program.sites.get(name, SiteProgram())
        assert row[RANK] == part.rank
        tensors = (part.a, part.b, part.bias, part.rank_scale, part.update_scale)
        for offset, tensor in zip([*row[:RANK], row[RANK_SCALE], row[UPDATE_SCALE]], tensors, strict=True):
            if tensor is None:
                assert offset == ABSENT
            else:
                found = tables.arena[offset : offset + tensor.numel()].cpu()
                assert torch.equal(found.view(tensor.shape), tensor.to(found.dtype))


# ---- loading and order -------------------------------------------------------------------------


def test_acquire_asks_for_what_is_not_there(bench: MakeBench) -> None:
    b = bench()
    a = b.add("a", one_site(3))
    assert b.residency.acquire(a) is None
    b.until(lambda: a in b.resident())
    slot = b.residency.acquire(a)
    assert slot == 0
    assert_installed(b.residency.tables, slot, b.programs[a], TABLE)
    stats = b.residency.stats()[a]
    assert (stats.device, stats.host, stats.running, stats.loads, stats.evictions) == (True, True, 1, 1, 0)
    assert b.residency.device_bytes == UNIT


def test_tables_start_empty_and_never_move(bench: MakeBench) -> None:
    b = bench()
    tables = b.residency.tables
    before = [t.data_ptr() for t in (tables.arena, tables.entries, tables.entries_host)]
    assert tables.entries.tolist() == [absent_entries(len(TABLE)).tolist()] * 2 * SLOTS_EACH
    b.touch(*(b.add(name) for name in "abc"))
    assert [t.data_ptr() for t in (tables.arena, tables.entries, tables.entries_host)] == before
    assert b.residency.tables is tables


def test_the_least_recently_used_goes(bench: MakeBench) -> None:
    b = bench(max_loras=3)
    a, c, d, e = (b.add(name) for name in "acde")
    b.touch(a, c, d)
    b.residency.prefetch(a)  # asking for a resident one counts as use
    b.touch(e)
    assert b.resident() == {a, d, e}
    b.touch(c)
    assert b.resident() == {a, c, e}
    assert b.residency.stats()[d].evictions == 1
    assert b.loads == [a, c, d, e]  # c came back from the host


def test_the_end_of_a_use_counts_as_use(bench: MakeBench) -> None:
    b = bench(max_loras=2)
    a, c, d = (b.add(name) for name in "acd")
    b.use(a)
    b.touch(c)
    b.residency.release(a)
    b.touch(d)
    assert b.resident() == {a, d}


def test_the_victim_goes_when_the_copy_of_its_successor_starts(bench: MakeBench) -> None:
    b = bench(max_loras=1)
    a, c, slow = b.add("a"), b.add("c"), b.add("slow")
    b.touch(a)
    gate = b.hold(c)
    b.residency.prefetch(c)
    assert b.reached.acquire(timeout=PATIENCE)
    assert b.residency.poll() == []
    assert b.resident() == {a}  # c is still being read
    gate.set()
    b.until(lambda: c in b.resident())
    b.residency.acquire(c)
    b.residency.release(c)
    gate = b.hold(slow)
    b.residency.check(b.blobs / slow, slow)
    assert b.reached.acquire(timeout=PATIENCE)
    b.residency.prefetch(a)  # on the host, so its copy is asked for at once; the loader's thread is held
    assert b.resident() == set()
    assert b.residency.tables.entries.tolist() == absent_entries(SLOTS_EACH, len(TABLE)).tolist()
    assert torch.equal(b.residency.tables.entries, b.residency.tables.entries_host)
    assert b.residency.acquire(a) is None
    gate.set()
    b.until(lambda: a in b.resident())
    assert [b.residency.stats()[name].evictions for name in (a, c)] == [1, 1]
    assert [b.residency.stats()[name].loads for name in (a, c)] == [2, 1]


def test_loads_follow_the_order_of_requests(bench: MakeBench) -> None:
    b = bench(max_loras=2)
    first = b.add("first")
    gate = b.hold(first)
    names = [b.add(name) for name in "edcba"]
    for name in (first, *names):
        b.residency.prefetch(name)
    assert b.reached.acquire(timeout=PATIENCE)
    for name in (first, *reversed(names)):  # asking again changes nothing
        b.residency.prefetch(name)
    gate.set()
    order: list[str] = []

    def has_new() -> set[str]:
        return b.resident() - set(order)

    while len(order) < 6:
        b.until(has_new)
        order += sorted(has_new(), key=b.loads.index)
        b.now += 2 * GRACE
    assert order == b.loads == [first, *names]


def test_a_loaded_adapter_is_kept_for_who_asked_but_not_for_ever(bench: MakeBench) -> None:
    b = bench(max_loras=1)
    a, c = b.add("a"), b.add("c")
    b.residency.prefetch(a)
    b.residency.prefetch(c)
    b.until(lambda: a in b.resident())
    b.until(lambda: c in b.on_host())
    b.now = GRACE / 2
    b.until(lambda: True)
    assert b.resident() == {a}
    assert not b.residency.is_blocked(c)  # no adapter with users is in the way
    b.now = 2 * GRACE  # nobody came
    b.until(lambda: c in b.resident())
    assert b.resident() == {c}


def test_users_are_never_evicted_and_block(bench: MakeBench) -> None:
    b = bench(max_loras=2)
    a, c, d = (b.add(name) for name in "acd")
    slots = {b.use(a), b.use(c)}
    assert slots == {0, SLOTS_EACH}
    b.now += 10 * GRACE
    b.residency.prefetch(d)
    b.until(lambda: d in b.on_host())
    b.until(lambda: True)
    assert b.resident() == {a, c}
    assert b.residency.is_blocked(d)
    assert not b.residency.is_blocked(a)
    assert b.residency.acquire(a) is not None  # a second user
    b.residency.release(a)
    assert b.residency.is_blocked(d)
    b.residency.release(a)
    assert b.residency.acquire(a) is None  # the place is for d, which has waited longer
    assert not b.residency.is_blocked(d)
    b.until(lambda: d in b.resident())
    assert b.resident() == {c, d}


def test_release_needs_an_acquire(bench: MakeBench) -> None:
    b = bench()
    b.touch(b.add("a"))
    with pytest.raises(ValueError, match="a was released"):
        b.residency.release("a")


def test_more_adapters_than_slots_all_get_their_turn(bench: MakeBench) -> None:
    b = bench(max_loras=2)
    waiting = [b.add(f"adapter-{i}") for i in range(12)]
    for digest in waiting:
        b.residency.prefetch(digest)
    served: list[str] = []
    while len(served) < 12:
        b.until(lambda: b.resident() & set(waiting))
        for digest in sorted(b.resident() & set(waiting)):
            assert b.residency.acquire(digest) is not None
            b.residency.release(digest)
            waiting.remove(digest)
            served.append(digest)
    assert b.loads == [f"adapter-{i}" for i in range(12)]


# ---- bytes -------------------------------------------------------------------------------------


def test_arena_bytes_limit_what_is_resident(bench: MakeBench) -> None:
    b = bench(max_loras=8, arena_bytes=4 * UNIT)
    a, c, d = b.add("a", units(2)), b.add("c", units(1)), b.add("d", units(2))
    b.touch(a, c)
    assert b.residency.device_bytes == 3 * UNIT
    b.touch(d)
    assert b.resident() == {c, d}
    assert b.residency.device_bytes == 3 * UNIT
    b.touch(b.add("e"))
    assert b.residency.device_bytes == 4 * UNIT == b.residency.arena_bytes


def test_eviction_spares_what_is_not_in_the_way(bench: MakeBench) -> None:
    b = bench(max_loras=8, arena_bytes=7 * UNIT)
    small, large, other, new = (
        b.add("s", units(1)),
        b.add("l", units(3)),
        b.add("o", units(3)),
        b.add("n", units(3)),
    )
    b.touch(small, large, other)
    b.touch(new)  # evicting `small`, the oldest, alone makes no room; evicting `large` does
    assert b.resident() == {small, other, new}


def test_fragmentation_evicts_more_idle_ones_or_blocks(bench: MakeBench) -> None:
    b = bench(max_loras=8, arena_bytes=4 * UNIT)
    a, c, d, e = (b.add(name) for name in "acde")
    b.touch(a)
    b.use(c)
    b.touch(d, e)
    large = b.add("large", units(2))
    b.residency.prefetch(large)
    b.until(lambda: large in b.resident())
    assert b.resident() == {a, c, large}  # d and e are neighbours; a, the oldest, would not have helped
    three = b.add("three", units(3))
    b.residency.prefetch(three)
    b.now += 2 * GRACE
    b.until(lambda: three in b.on_host())
    b.until(lambda: True)
    assert b.residency.is_blocked(three)  # c lies in the middle
    assert b.resident() == {a, c, large}  # evicting them would not have helped
    b.residency.release(c)
    b.until(lambda: three in b.resident())


def test_a_large_one_is_not_passed_by_small_ones(bench: MakeBench) -> None:
    b = bench(max_loras=4, arena_bytes=4 * UNIT)
    a, large, small = b.add("a", units(2)), b.add("large", units(4)), b.add("small")
    b.use(a)
    b.residency.prefetch(large)
    b.residency.prefetch(small)
    b.until(lambda: {large, small} <= b.on_host())
    b.until(lambda: True)
    assert b.resident() == {a}
    assert b.residency.is_blocked(large)
    assert b.residency.is_blocked(small)  # it waits for `large`, and `large` for `a`
    b.residency.release(a)
    b.until(lambda: large in b.resident())
    b.now += 2 * GRACE
    b.until(lambda: small in b.resident())


def test_larger_than_the_arena_is_refused(bench: MakeBench) -> None:
    b = bench(arena_bytes=3 * UNIT)
    large = b.add("large", units(4))
    message = f"large needs {4 * UNIT} bytes .*--adapter-memory holds {3 * UNIT}"
    with pytest.raises(AdapterRefused, match=message):
        b.finish(b.residency.check(b.blobs / large, large))
    b.residency.prefetch(large)
    b.until(lambda: b.failures)
    assert [digest for digest, _ in b.failures] == [large]
    assert isinstance(b.failures[0][1], AdapterRefused)
    assert large not in b.residency.stats()


def test_host_memory_keeps_to_its_budget_least_recently_used_out(bench: MakeBench) -> None:
    bytes_each = UNIT + SLOTS_EACH * len(TABLE) * COLUMNS * 8
    b = bench(max_loras=1, host_bytes=2 * bytes_each)
    a, c, d = (b.add(name) for name in "acd")
    b.touch(a, c)
    assert b.residency.host_bytes == 2 * bytes_each
    b.touch(a)  # from the host, which makes c the oldest there
    b.touch(d)
    assert b.on_host() == {a, d}
    assert b.residency.host_bytes == 2 * bytes_each
    b.touch(c)
    assert b.loads == [a, c, d, c]


def test_larger_than_the_host_budget_streams_through(bench: MakeBench) -> None:
    b = bench(max_loras=1, host_bytes=2 * UNIT + SLOTS_EACH * len(TABLE) * COLUMNS * 8)
    a, large = b.add("a"), b.add("large", units(4))
    b.touch(a)
    assert b.on_host() == {a}
    b.touch(large)
    assert b.on_host() == set()
    assert b.residency.host_bytes == 0
    assert b.loads == [a, large]  # read once
    assert_installed(b.residency.tables, 0, b.programs[large], TABLE)


def test_an_arena_without_room_for_anything_is_no_configuration(bench: MakeBench) -> None:
    with pytest.raises(ValueError, match=r"--adapter-memory 100 bytes.* 512 "):
        bench(arena_bytes=100)


# ---- pins --------------------------------------------------------------------------------------


def test_a_pinned_adapter_loads_and_stays(bench: MakeBench) -> None:
    b = bench(max_loras=2)
    a, c, d = (b.add(name) for name in "acd")
    b.residency.pin(a, True)
    b.until(lambda: a in b.resident())
    b.now += 10 * GRACE
    b.touch(c, d)
    assert b.resident() == {a, d}
    assert b.residency.stats()[a].pinned
    b.residency.pin(a, False)
    b.touch(c)
    assert b.resident() == {c, d}


def test_pins_leave_a_slot(bench: MakeBench) -> None:
    b = bench(max_loras=2)
    a, c = b.add("a"), b.add("c")
    b.residency.pin(a, True)
    b.residency.pin(a, True)  # again is no second pin
    with pytest.raises(Conflict, match="c cannot be pinned: 1 are pinned and --max-loras 2 allows 1"):
        b.residency.pin(c, True)
    b.residency.pin(a, False)
    b.residency.pin(c, True)
    b.residency.pin("unknown", False)
    assert "unknown" not in b.residency.stats()


def test_a_load_that_only_pins_prevent_fails(bench: MakeBench) -> None:
    b = bench(max_loras=3, arena_bytes=4 * UNIT)
    a, large = b.add("a", units(2)), b.add("large", units(3))
    b.residency.pin(a, True)
    b.until(lambda: a in b.resident())
    b.residency.prefetch(large)
    b.until(lambda: b.failures)
    ((digest, error),) = b.failures
    assert digest == large
    assert isinstance(error, Conflict)
    assert f"needs {3 * UNIT} bytes" in error.message
    assert f"hold {2 * UNIT} of --adapter-memory {4 * UNIT}" in error.message
    assert b.residency.acquire(large) is None  # it is on the host: fails again, at the next poll
    assert [name for name, _ in b.residency.poll()] == [large]
    b.residency.pin(a, False)
    b.now += 2 * GRACE
    b.failures.clear()
    b.touch(large)


# ---- checks, drops, failures -------------------------------------------------------------------


def test_check_returns_the_program_and_keeps_it_on_the_host(bench: MakeBench, tmp_path: Path) -> None:
    b = bench()
    staged = tmp_path / "staged"
    staged.mkdir()
    b.programs["staged"] = units(2)
    program = b.finish(b.residency.check(staged, "digest"))
    assert program is b.programs["staged"]
    assert b.on_host() == {"digest"}
    b.touch("digest")  # the store does not have it yet
    assert b.loads == ["staged"]


def test_a_checked_adapter_is_read_from_its_stage_until_it_is_stored(
    bench: MakeBench, tmp_path: Path
) -> None:
    b = bench(host_bytes=0)
    staged = tmp_path / "staged"
    staged.mkdir()
    b.programs["staged"] = units(2)
    b.finish(b.residency.check(staged, "digest"))
    assert b.residency.host_bytes == 0
    b.touch("digest")
    assert b.loads == ["staged", "staged"]
    b.finish(b.residency.drop("digest"))
    b.add("digest")
    b.touch("digest")
    assert b.loads[2:] == ["digest"]


def test_refusals_of_check_reach_the_caller_and_leave_nothing(bench: MakeBench) -> None:
    b = bench(max_lora_rank=4)
    a, steep = b.add("a"), b.add("steep", one_site(5))
    b.faults[a] = AdapterRefused("field use_dora is true")
    with pytest.raises(AdapterRefused, match="use_dora"):
        b.finish(b.residency.check(b.blobs / a, a))
    with pytest.raises(AdapterRefused, match="rank 5 and --max-lora-rank is 4"):
        b.finish(b.residency.check(b.blobs / steep, steep))
    assert b.residency.stats() == {}
    assert b.residency.host_bytes == 0


def test_failed_loads_are_reported_once_and_tried_again(bench: MakeBench) -> None:
    b = bench()
    a, c = b.add("a"), b.add("c")
    b.faults[a] = AdapterRefused("truncated")
    b.residency.prefetch(a)
    b.residency.prefetch("missing")
    b.until(lambda: len(b.failures) == 2)
    assert dict(b.failures)[a] is b.faults[a]
    assert isinstance(dict(b.failures)["missing"], NotFound)
    assert b.residency.poll() == []
    del b.faults[a]
    b.failures.clear()
    b.touch(a, c)
    assert b.failures == []


def test_an_unexpected_error_is_logged_and_the_loader_lives(
    bench: MakeBench, caplog: pytest.LogCaptureFixture
) -> None:
    b = bench()
    a, c = b.add("a"), b.add("c")
    b.faults[a] = ZeroDivisionError("oops")
    b.residency.prefetch(a)
    b.until(lambda: b.failures)
    ((digest, error),) = b.failures
    assert (digest, type(error), error.status) == (a, VeneerError, 500)
    assert "ZeroDivisionError" in error.message
    assert "ZeroDivisionError: oops" in caplog.text
    b.failures.clear()
    b.touch(c)


def test_a_failed_copy_gives_its_place_back(bench: MakeBench, monkeypatch: pytest.MonkeyPatch) -> None:
    b = bench(host_bytes=0, max_loras=1)
    a, c = b.add("a"), b.add("c")
    b.finish(b.residency.check(b.blobs / a, a))
    monkeypatch.setattr(
        "veneer.adapters.packing.PackedAdapter.entries_at",
        lambda *_: (_ for _ in ()).throw(RuntimeError("no memory")),
    )
    b.residency.prefetch(a)
    b.until(lambda: b.failures)
    assert "RuntimeError" in b.failures[0][1].message
    assert b.residency.device_bytes == 0
    monkeypatch.undo()
    b.failures.clear()
    b.touch(c)


def test_drop_forgets_on_device_and_host(bench: MakeBench) -> None:
    b = bench()
    a, c = b.add("a"), b.add("c")
    b.touch(a, c)
    b.finish(b.residency.drop(a))
    assert set(b.residency.stats()) == {c}
    assert b.residency.device_bytes == UNIT
    assert b.residency.tables.entries[0].tolist() == absent_entries(len(TABLE)).tolist()
    b.finish(b.residency.drop("unknown"))
    b.touch(a)
    assert b.loads == [a, c, a]


def test_drop_waits_for_users(bench: MakeBench) -> None:
    b = bench()
    a = b.add("a")
    b.use(a)
    b.residency.pin(a, True)
    future = b.residency.drop(a)
    assert b.residency.drop(a) is future
    b.until(lambda: True)
    assert not future.done()
    assert b.resident() == {a}
    b.residency.release(a)
    b.finish(future)
    assert b.residency.stats() == {}


def test_drop_while_it_is_read(bench: MakeBench) -> None:
    b = bench()
    a, c = b.add("a"), b.add("c")
    gate = b.hold(a)
    b.residency.prefetch(a)
    assert b.reached.acquire(timeout=PATIENCE)
    future = b.residency.drop(a)
    assert not future.done()
    gate.set()
    b.finish(future)
    assert b.residency.stats() == {}
    assert b.failures == []
    b.touch(c)


def test_drop_of_a_failing_load_reports_nothing(bench: MakeBench) -> None:
    b = bench()
    a = b.add("a")
    b.faults[a] = AdapterRefused("truncated")
    gate = b.hold(a)
    b.residency.prefetch(a)
    assert b.reached.acquire(timeout=PATIENCE)
    future = b.residency.drop(a)
    gate.set()
    b.finish(future)
    assert b.failures == []
    assert b.residency.stats() == {}


def test_drop_while_it_is_copied(bench: MakeBench) -> None:
    b = bench(max_loras=1)
    a, c = b.add("a"), b.add("c")
    b.finish(b.residency.check(b.blobs / a, a))
    gate = b.hold(c)
    check = b.residency.check(b.blobs / c, c)
    assert b.reached.acquire(timeout=PATIENCE)
    b.residency.prefetch(a)  # on the host: its copy is queued behind the check that is held
    assert b.residency.device_bytes == UNIT
    future = b.residency.drop(a)
    b.residency.poll()
    assert not future.done()
    assert b.residency.device_bytes == UNIT
    gate.set()
    b.finish(future)
    b.finish(check)
    assert b.residency.device_bytes == 0
    assert set(b.residency.stats()) == {c}


def test_a_check_that_a_drop_follows_leaves_nothing(bench: MakeBench) -> None:
    b = bench()
    a = b.add("a")
    gate = b.hold(a)
    check = b.residency.check(b.blobs / a, a)
    drop = b.residency.drop(a)
    gate.set()
    b.finish(drop)
    assert check.done()
    assert b.residency.stats() == {}
    assert b.residency.host_bytes == 0


# ---- factors that adapters share ---------------------------------------------------------------


def test_shared_factors_lie_once_while_somebody_has_them(bench: MakeBench) -> None:
    b = bench(max_loras=4)
    tables, item = b.residency.tables, 4
    vera = [b.add(f"vera {i}", shared(0, i)) for i in range(3)]
    other = b.add("other", shared(1, 0))
    b.touch(vera[0])
    first, on_host = b.residency.device_bytes, b.residency.host_bytes
    assert first == 2 * UNIT + FACTORS * item
    b.touch(vera[1])
    assert b.residency.device_bytes == first + 2 * UNIT
    assert b.residency.host_bytes == 2 * on_host - FACTORS * item
    b.touch(other)
    assert b.residency.device_bytes == 2 * first + 2 * UNIT
    assert tables.kin.keys() == {0, 2, 4}
    assert tables.kin[0] == tables.kin[2] != tables.kin[4]
    for name, slot in zip([*vera[:2], other], (0, 2, 4), strict=True):
        assert_installed(tables, slot, b.programs[name], TABLE)
    b.finish(b.residency.drop(vera[0]))  # the other goes on with what the first brought
    assert_installed(tables, 2, b.programs[vera[1]], TABLE)
    assert b.residency.device_bytes == 2 * first
    b.touch(vera[2])
    assert_installed(tables, 0, b.programs[vera[2]], TABLE)
    for name in vera:
        b.finish(b.residency.drop(name))
    assert (b.residency.device_bytes, b.residency.host_bytes) == (first, on_host)
    assert tables.kin.keys() == {4}


def test_adapters_of_other_sites_share_no_tiles(bench: MakeBench) -> None:
    b = bench(max_loras=3)
    both, gate = b.add("both", shared(0, 1)), b.add("gate", shared(0, 1, ("q", "k", "gate")))
    b.touch(both, gate)
    kin = b.residency.tables.kin
    assert kin[0] != kin[2]


def test_room_for_shared_factors_is_made_and_counted_once(bench: MakeBench) -> None:
    room = 6 * UNIT + FACTORS * 4
    b = bench(max_loras=8, arena_bytes=room)
    vera = [b.add(f"vera {i}", shared(0, i)) for i in range(4)]
    b.touch(*vera[:3])
    assert b.residency.device_bytes == room
    b.touch(vera[3])  # one goes, and the factors stay
    assert b.resident() == set(vera[1:])
    large = b.add("large", one_site(40))
    b.touch(large)  # its room is where the factors lie, so all must go
    assert b.resident() == {large}
    b.touch(vera[0])
    assert_installed(b.residency.tables, b.use(vera[0]), b.programs[vera[0]], TABLE)


def test_what_pins_leave_no_room_for_is_refused_with_both_sizes(bench: MakeBench) -> None:
    b = bench(max_loras=4, arena_bytes=4 * UNIT + FACTORS * 4)
    first, pinned = b.add("first", shared(0, 0)), b.add("pinned", shared(0, 1))
    for name in (first, pinned):
        b.residency.pin(name, True)
        b.touch(name)
    assert b.residency.acquire(b.add("other", shared(1, 1))) is None
    b.until(lambda: b.failures)
    ((_, error),) = b.failures
    assert isinstance(error, Conflict)
    assert (
        f"needs {2 * UNIT} bytes in one piece and {FACTORS * 4} of what it shares with others"
        in error.message
    )
    assert f"pinned adapters hold {b.residency.arena_bytes} of" in error.message


def test_an_adapter_that_is_too_large_with_what_it_shares_is_refused(bench: MakeBench) -> None:
    b = bench(arena_bytes=FACTORS * 4)
    check = b.residency.check(b.blobs / b.add("a", shared(0, 0)), "a")
    with pytest.raises(AdapterRefused, match=f"needs {2 * UNIT + FACTORS * 4} bytes"):
        b.finish(check)


def test_factors_are_written_by_whoever_comes_first_to_succeed(bench: MakeBench) -> None:
    b = bench(max_loras=3, host_bytes=0)
    a, c = b.add("a", shared(0, 1)), b.add("c", shared(0, 2))
    for name in (a, c):
        b.residency.prefetch(name)
        job = b.residency._adapters[name].job
        assert job is not None
        job.result(PATIENCE)
    b.faults[a] = AdapterRefused("gone")  # no longer in host memory, it is read again for its copy
    b.until(lambda: c in b.resident())
    assert [name for name, _ in b.failures] == [a]
    assert_installed(b.residency.tables, 2, b.programs[c], TABLE)
    assert b.residency.device_bytes == 2 * UNIT + FACTORS * 4


# ---- the step's thread -------------------------------------------------------------------------


def test_nothing_waits_while_a_load_is_stuck(bench: MakeBench) -> None:
    b = bench(max_loras=3)
    a, c, d, stuck = (b.add(name) for name in ("a", "c", "d", "stuck"))
    b.touch(a, c)
    gate = b.hold(stuck)
    b.residency.prefetch(stuck)
    assert b.reached.acquire(timeout=PATIENCE)
    check = b.residency.check(b.blobs / d, d)
    b.residency.prefetch(d)
    assert b.residency.acquire(stuck) is None
    assert b.residency.acquire(d) is None
    assert b.residency.acquire(a) is not None
    assert not b.residency.is_blocked(stuck)
    b.residency.pin(c, True)
    assert b.residency.poll() == []
    drop = b.residency.drop(c)
    assert b.residency.stats()[a].running == 1
    assert b.residency.device_bytes == UNIT
    assert b.residency.host_bytes > 0
    b.residency.release(a)
    assert not check.done()
    assert not drop.done()
    assert not gate.is_set()  # all of the above while the loader was held
    gate.set()
    b.finish(check)
    b.finish(drop)
    b.until(lambda: b.resident() == {a, d, stuck})


def test_a_copy_passes_reads_that_wait(bench: MakeBench) -> None:
    b = bench(max_loras=4)
    a, slow, c, d = (b.add(name) for name in ("a", "slow", "c", "d"))
    b.finish(b.residency.check(b.blobs / a, a))
    gates = [b.hold(slow), b.hold(c)]
    b.residency.check(b.blobs / slow, slow)
    assert b.reached.acquire(timeout=PATIENCE)
    b.residency.prefetch(c)
    b.residency.prefetch(d)
    b.residency.prefetch(a)
    gates[0].set()
    b.until(lambda: a in b.resident())
    assert not gates[1].is_set()  # c was still to be read
    assert b.resident() == {a}
    gates[1].set()
    b.until(lambda: {c, d} <= b.resident())


def test_close_fails_what_is_not_done(bench: MakeBench) -> None:
    b = bench()
    a, c = b.add("a"), b.add("c")
    b.use(a)
    gate = b.hold(c)
    checks = [b.residency.check(b.blobs / c, c) for _ in range(2)]
    assert b.reached.acquire(timeout=PATIENCE)
    drop = b.residency.drop(a)
    closing = threading.Thread(target=b.residency.close)
    closing.start()
    with pytest.raises(EngineUnavailable):
        checks[1].result(PATIENCE)
    gate.set()
    closing.join(PATIENCE)
    assert not closing.is_alive()
    assert checks[0].result(PATIENCE) is b.programs[c]
    with pytest.raises(EngineUnavailable):
        drop.result(PATIENCE)
    with pytest.raises(EngineUnavailable):
        b.residency.check(b.blobs / c, c).result(PATIENCE)


# ---- churn -------------------------------------------------------------------------------------


def churn(b: Bench, seed: int, steps: int) -> None:
    """Random use as a scheduler makes it; every acquired adapter is compared with its program, always."""
    chance = random.Random(seed)
    names = [b.add(f"adapter-{i}", random_program(chance)) for i in range(14)]
    running: list[tuple[str, int]] = []
    waiting: list[str] = []
    served = step = 0
    while step < steps or served < steps / 8:  # steps go on while the loader is slower than they are
        step += 1
        assert step < 1000 * steps, f"only {served} served"
        b.now += GRACE / 4
        b.failures += b.residency.poll()
        if len(waiting) < 6:
            waiting.append(chance.choice(names))
            b.residency.prefetch(waiting[-1])
        for digest in list(waiting):
            slot = b.residency.acquire(digest)
            if slot is not None:
                waiting.remove(digest)
                running.append((digest, slot))
                served += 1
        for digest, slot in running:
            assert_installed(b.residency.tables, slot, b.programs[digest], TABLE)
        assert b.residency.device_bytes <= b.residency.arena_bytes
        if running and chance.random() < 0.6:
            b.residency.release(running.pop(chance.randrange(len(running)))[0])
        if chance.random() < 0.05:
            b.residency.drop(chance.choice(names))
        if chance.random() < 0.05:
            with suppress(Conflict):
                b.residency.pin(chance.choice(names), chance.random() < 0.3)
        if not running and waiting:
            b.until(lambda: any(d in b.resident() for d in waiting) or b.failures)
    assert {type(error) for _, error in b.failures} <= {Conflict}
    for digest, _ in running:
        b.residency.release(digest)
    for digest in names:
        b.finish(b.residency.drop(digest))
    assert (b.residency.device_bytes, b.residency.host_bytes) == (0, 0)
    assert b.residency.stats() == {}
    b.failures.clear()
    b.touch(*names)  # whatever happened, everything can still be served


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_churn_soak(bench: MakeBench, seed: int, dtype: torch.dtype) -> None:
    arena = 4 * max(align(40 * 40), ALIGNMENT) * 6
    churn(bench(max_loras=4, arena_bytes=arena, host_bytes=2 * arena, dtype=dtype), seed, 400)


# ---- CUDA --------------------------------------------------------------------------------------

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.gpu
@needs_cuda
def test_a_launched_step_reads_its_adapter_to_the_end(bench: MakeBench) -> None:
    b = bench(max_loras=1, arena_bytes=4096, device=torch.device("cuda"), dtype=torch.bfloat16)
    a, c = b.add("a", one_site(5, seed=1)), b.add("c", one_site(5, seed=2))
    b.use(a)
    b.finish(b.residency.check(b.blobs / c, c))
    tables = b.residency.tables
    copies = [torch.empty_like(t) for t in (tables.arena, tables.entries, tables.entries_host)]
    seen = AdapterTables(copies[0], copies[1], copies[2])
    seen.entries_host.copy_(tables.entries_host)
    passed = torch.cuda.Event()  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    # About half a second of a step that has been launched.
    torch.cuda._sleep(1_000_000_000)  # type: ignore[no-untyped-call]
    seen.arena.copy_(tables.arena)
    seen.entries.copy_(tables.entries)
    passed.record()
    b.residency.release(a)
    b.residency.prefetch(c)  # takes the place of a
    assert b.residency.poll() == []
    assert b.resident() == set()
    assert not passed.query(), "something waited for the device"  # type: ignore[no-untyped-call]
    b.until(lambda: c in b.resident())
    assert passed.query()  # type: ignore[no-untyped-call]
    assert_installed(seen, 0, b.programs[a], TABLE)
    assert_installed(tables, 0, b.programs[c], TABLE)


@pytest.mark.gpu
@needs_cuda
def test_churn_soak_on_cuda(bench: MakeBench) -> None:
    arena = 4 * align(40 * 40) * 6
    b = bench(
        max_loras=4,
        arena_bytes=arena,
        host_bytes=2 * arena,
        device=torch.device("cuda"),
        dtype=torch.bfloat16,
    )
    churn(b, 5, 400)


@pytest.mark.gpu
@needs_cuda
def test_pinned_memory_is_counted_as_it_is_taken(bench: MakeBench) -> None:
    b = bench(device=torch.device("cuda"))
    before = torch.cuda.host_memory_stats()["allocated_bytes.current"]
    b.finish(b.residency.check(b.blobs / b.add("a", units(3)), "a"))
    taken = torch.cuda.host_memory_stats()["allocated_bytes.current"] - before
    assert b.residency.host_bytes == taken + SLOTS_EACH * len(TABLE) * COLUMNS * 8
