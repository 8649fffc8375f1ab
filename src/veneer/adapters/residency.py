"""Which adapters are on the device, and which are to be: least recently used out, pins and users stay.

All decisions are made on the step's thread and none of them waits: reading, lowering and copying happen on
the loader's threads (loader.py), and `poll`, once per step, takes over what has finished. An adapter goes

    queued -> read to the host -> given a place, copied -> resident -> evicted, or dropped

Adapters are told apart by their keys (names.py, recipes.py): each task of an adapter with tasks is one by itself
here, and so is each blend.

Adapters are loaded in the order in which they were asked for. When the first one that is ready does not fit,
those behind it wait too: otherwise a stream of small adapters could keep a large one out for ever.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from veneer.adapters.loader import Loader
from veneer.adapters.methods.base import Base
from veneer.adapters.packing import AddedTokens, Layout
from veneer.adapters.program import Program
from veneer.adapters.reach import Reach
from veneer.adapters.recipes import digests_of, is_blend
from veneer.adapters.slots import Place, Slots
from veneer.engine.messages import AdapterStats
from veneer.errors import Conflict, EngineUnavailable, VeneerError

# How long a loaded adapter is kept for whoever asked for it. Without this, adapters that wait for room in the
# batch would push each other out; without an end, cancelled requests would hold slots.
GRACE = 0.5  # seconds
UNKNOWN = Layout(0, None)


@dataclass
class ResidentPrompt:
    """The virtual tokens of an adapter on the device, in its place of the arena."""

    kv: torch.Tensor  # [layers, 2 (keys, values), tokens, kv_heads, head_dim]
    embeddings: torch.Tensor | None  # [tokens, hidden]
    computed: bool  # keys and values are there; until then whoever needs them makes them of the embeddings


@dataclass
class _Adapter:
    """What is known of one adapter."""

    key: str  # of names.py
    layout: Layout = UNKNOWN
    ready: bool = False  # queued, and the read has been done
    place: Place | None = None
    prompt: ResidentPrompt | None = None  # when it is resident and has virtual tokens
    job: Future[Layout] | Future[torch.Tensor] | None = None  # its read, or its copy when it has a place
    users: int = 0
    pinned: bool = False
    kept_until: float = 0.0  # by the clock: loaded and not used yet
    drop: Future[None] | None = None  # to be forgotten
    loads: int = 0
    evictions: int = 0

    @property
    def size(self) -> int:
        """Elements in the arena."""
        return self.layout.size

    @property
    def is_resident(self) -> bool:
        return self.place is not None and self.job is None


class Residency:
    """The adapters on the device. Every method is for the step's thread, and returns at once."""

    def __init__(
        self,
        store_root: Path,
        base: Base,
        *,
        device: torch.device,
        dtype: torch.dtype,
        max_loras: int,
        max_lora_rank: int,
        arena_bytes: int,
        host_bytes: int,
        wake: Callable[[], None],
        load: Callable[[Path, int], Program],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Allocate the tables once. `load` lowers a folder; `wake` is called from the loader's thread."""
        sites = [*base.sites.values(), *base.hidden_sites.values(), base.embedding]
        self._slots = Slots(max_loras, len(sites), len(base.sites), arena_bytes, dtype, device)
        self.sites = sites  # by rows of the tables
        self.tables = self._slots.tables
        self.max_loras = max_loras
        self.arena_bytes = self.tables.arena.nbytes
        self.host_budget = host_bytes
        self._adapters: dict[str, _Adapter] = {}
        self._queue: OrderedDict[str, _Adapter] = OrderedDict()  # without a place; oldest request first
        self._placed: OrderedDict[str, _Adapter] = OrderedDict()  # least recently used first
        self._working: list[_Adapter] = []  # with a job
        self._stuck: _Adapter | None = None  # the first in the queue that is ready and does not fit
        self._failures: list[tuple[str, VeneerError]] = []
        self._clock = clock
        self._loader = Loader(
            store_root / "blobs",
            sites,
            self.tables.arena,
            max_lora_rank=max_lora_rank,
            host_budget=host_bytes,
            wake=wake,
            load=load,
            base=base,
        )

    # ---- for the scheduler ----------------------------------------------------------------------

    def prefetch(self, key: str) -> None:
        """Ask for an adapter. Asking again for one that is queued changes nothing."""
        adapter = self._adapters.setdefault(key, _Adapter(key))
        if adapter.place is not None:
            self._placed.move_to_end(key)
        elif key not in self._queue:
            self._queue[key] = adapter
            packed = self._loader.cache.get(key)
            adapter.ready = packed is not None
            if packed is not None:
                adapter.layout = packed.layout
            self._start_loads()

    def acquire(self, key: str) -> int | None:
        """Use an adapter: its slot, held until `release`. None while it is not loaded; it is asked for then."""
        self.prefetch(key)
        adapter = self._adapters.get(key)
        if adapter is None or adapter.place is None or not adapter.is_resident:
            return None
        adapter.users += 1
        adapter.kept_until = 0.0
        return adapter.place.slot

    def reach(self, key: str) -> Reach:
        """On which tokens an acquired adapter acts, and what it puts in front of them."""
        return self._adapters[key].layout.reach

    def added_tokens(self, key: str) -> AddedTokens:
        """How many tokens an acquired adapter adds to the vocabulary."""
        return self._adapters[key].layout.added

    def prompt(self, key: str) -> ResidentPrompt | None:
        """The virtual tokens of an acquired adapter, if it has some. Valid until its last `release`."""
        return self._adapters[key].prompt

    def release(self, key: str) -> None:
        """End one use. After the last, whoever waits longest may take the place at once."""
        adapter = self._adapters[key]
        if not adapter.users:
            raise ValueError(f"adapter {key} was released more often than acquired")
        adapter.users -= 1
        if not adapter.users:
            self._placed.move_to_end(key)
            self._finish_drop(adapter)
            self._start_loads()

    def is_blocked(self, key: str) -> bool:
        """Whether running or pinned adapters must go before this one, or the first in line, can be loaded."""
        adapter = self._adapters.get(key)
        if adapter is not None and adapter.place is not None:
            return False
        movable = [other for other in self._placed.values() if not other.users and not other.pinned]
        waiting = [each.layout for each in (self._stuck, adapter) if each is not None] or [UNKNOWN]
        return not all(self._fits(layout, movable) for layout in waiting)

    def is_pinned(self, key: str) -> bool:
        """Whether the adapter keeps its place whoever uses it."""
        adapter = self._adapters.get(key)
        return adapter is not None and adapter.pinned

    # ---- for the engine -------------------------------------------------------------------------

    def poll(self) -> list[tuple[str, VeneerError]]:
        """Once per step: take over finished reads and copies, start others, return the loads that failed."""
        working, self._working = self._working, []
        for adapter in working:
            if adapter.job is not None and adapter.job.done():
                self._take_over(adapter)
            else:
                self._working.append(adapter)
        self._start_loads()
        failures, self._failures = self._failures, []
        return failures

    def check(self, folder: Path, key: str) -> Future[Program]:
        """Lower the adapter in `folder` and keep it on the host under `key`. Fails with `VeneerError`s only.

        Until the store has the adapter, it is read from `folder` if it must be read again.
        """
        return self._loader.check(folder, key)

    def inspect(self, key: str) -> Future[Program]:
        """Make a stored adapter, or a blend of such, and keep it on the host. Fails with `VeneerError`s only."""
        return self._loader.check(None, key)

    def drop(self, key: str) -> Future[None]:
        """Forget an adapter on device and host once nobody uses it; done when that has happened."""
        adapter = self._adapters.setdefault(key, _Adapter(key))
        adapter.pinned = False
        if adapter.drop is None:
            adapter.drop = Future()
        future = adapter.drop
        self._queue.pop(key, None)
        self._finish_drop(adapter)
        self._start_loads()
        return future

    def pin(self, key: str, pinned: bool) -> None:
        """Load an adapter and keep it on the device, or stop keeping it. Raises `Conflict` at the limit."""
        others = sum(adapter.pinned for adapter in self._adapters.values() if adapter.key != key)
        if pinned and others >= self.max_loras - 1:
            raise Conflict(
                f"adapter {key} cannot be pinned: {others} are pinned and --max-loras {self.max_loras} "
                f"allows {self.max_loras - 1}, which leaves one slot to all others; unpin one or raise it"
            )
        if pinned:
            self._adapters.setdefault(key, _Adapter(key)).pinned = True
            self.prefetch(key)
        elif key in self._adapters:
            self._adapters[key].pinned = False

    def keys(self, digest: str) -> list[str]:
        """The keys of all tasks and blends of an adapter of which anything is known, the first's among them."""
        return [key for key in self.stats().keys() | {digest} if digest in digests_of(key)]

    def stats(self) -> dict[str, AdapterStats]:
        """Every adapter that is or was resident or asked for. `waiting` is for the scheduler to fill."""
        on_host = self._loader.cache.keys()
        return {
            key: AdapterStats(
                device=adapter.is_resident,
                host=key in on_host,
                pinned=adapter.pinned,
                running=adapter.users,
                loads=adapter.loads,
                evictions=adapter.evictions,
            )
            for key in {*self._adapters, *on_host}
            for adapter in (self._adapters.get(key, _Adapter(key)),)
        }

    @property
    def device_bytes(self) -> int:
        """Bytes of the arena that are taken."""
        return self._slots.used_bytes

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory that are taken: at most the budget, and the adapter being loaded."""
        return self._loader.cache.bytes

    def close(self) -> None:
        """End the loader's thread. Checks and drops that are not done fail with `EngineUnavailable`."""
        self._loader.close()
        for adapter in self._adapters.values():
            if adapter.drop is not None and not adapter.drop.done():
                adapter.drop.set_exception(
                    EngineUnavailable("the engine ended before the adapter was dropped")
                )

    # ---- loading --------------------------------------------------------------------------------

    def _start_loads(self) -> None:
        """Copy what is ready and fits, in order; read ahead as many adapters as there are slots."""
        self._stuck = None
        for adapter in list(islice(self._queue.values(), self.max_loras)):
            if adapter.job is None and not adapter.ready:
                self._start(adapter, self._loader.read(adapter.key))
            elif adapter.job is None and self._stuck is None and not self._place(adapter):
                self._stuck = adapter

    def _start(self, adapter: _Adapter, job: Future[Layout] | Future[torch.Tensor]) -> None:
        adapter.job = job
        self._working.append(adapter)

    def _place(self, adapter: _Adapter) -> bool:
        """Give the adapter a place and start its copy, or fail it. False when it has to wait."""
        victims = self._victims(adapter.layout)
        if victims is None:
            return self._fail_behind_pins(adapter)
        for victim in victims:
            self._evict(victim)
            victim.evictions += 1
        del self._queue[adapter.key]
        adapter.place = self._slots.take(adapter.layout)
        self._placed[adapter.key] = adapter
        self._start(adapter, self._loader.copy(adapter.key, adapter.place, self._slots.launched()))
        return True

    def _victims(self, layout: Layout) -> list[_Adapter] | None:
        """The adapters to evict so that another fits; None when evicting all of them is not enough."""
        now = self._clock()
        idle = [
            adapter
            for adapter in self._placed.values()
            if not adapter.users and not adapter.pinned and adapter.is_resident and adapter.kept_until <= now
        ]
        if not self._fits(layout, idle):
            return None
        victims: list[_Adapter] = []
        while not self._fits(layout, victims):
            victims.append(idle.pop(0))
        # The last one made room, perhaps in one piece with only some of the others: spare the rest.
        for victim in reversed(victims[:-1]):
            others = [other for other in victims if other is not victim]
            if self._fits(layout, others):
                victims = others
        return victims

    def _fits(self, layout: Layout, freed: Iterable[_Adapter]) -> bool:
        return self._slots.fits(layout, [adapter.place for adapter in freed if adapter.place is not None])

    def _fail_behind_pins(self, adapter: _Adapter) -> bool:
        """Fail the load if pinned adapters alone are in its way: that wait could last for ever."""
        if self._fits(adapter.layout, [other for other in self._placed.values() if not other.pinned]):
            return False
        item = self.tables.arena.itemsize
        pinned = self._slots.elements(
            [other.place for other in self._placed.values() if other.pinned and other.place is not None]
        )
        shared = adapter.layout.shared
        also = "" if shared is None else f" and {shared.size * item} of what it shares with others"
        self._fail(
            adapter,
            Conflict(
                f"adapter {adapter.key} needs {adapter.size * item} bytes in one piece{also} on the device, and "
                f"pinned adapters hold {pinned * item} of --adapter-memory {self.arena_bytes}; "
                "unpin some or restart the server with more"
            ),
        )
        return True

    def _take_over(self, adapter: _Adapter) -> None:
        """Apply a finished read or copy."""
        job, adapter.job = adapter.job, None
        assert job is not None
        try:
            result = job.result()
            if isinstance(result, Layout):
                adapter.layout, adapter.ready = result, True
            else:
                assert adapter.place is not None
                self._slots.install(adapter.place, result)
                adapter.prompt = self._resident_prompt(adapter.layout, adapter.place)
                adapter.loads += 1
                adapter.kept_until = self._clock() + GRACE
        except VeneerError as error:
            if adapter.place is not None:
                self._evict(adapter)
            self._fail(adapter, error)
        self._finish_drop(adapter)

    def _resident_prompt(self, layout: Layout, place: Place) -> ResidentPrompt | None:
        if layout.prompt is None:
            return None
        kv, embeddings = layout.prompt.views(self.tables.arena[place.start : place.start + place.size])
        return ResidentPrompt(kv, embeddings, computed=embeddings is None)

    def _fail(self, adapter: _Adapter, error: VeneerError) -> None:
        """Report a failed load, once; a later request tries again."""
        self._queue.pop(adapter.key, None)
        if adapter.drop is None:
            self._failures.append((adapter.key, error))
            if not adapter.loads and not adapter.pinned:
                self._adapters.pop(adapter.key, None)

    def _evict(self, adapter: _Adapter) -> None:
        assert adapter.place is not None
        self._slots.clear(adapter.place)
        adapter.place = adapter.prompt = None
        del self._placed[adapter.key]
        if is_blend(adapter.key) and adapter.drop is None:  # clients make up any number of them
            del self._adapters[adapter.key]

    def _finish_drop(self, adapter: _Adapter) -> None:
        """Forget a dropped adapter, unless somebody uses it or a job of it is under way."""
        if adapter.drop is None or adapter.users or adapter.job is not None:
            return
        if adapter.place is not None:
            self._evict(adapter)
        self._queue.pop(adapter.key, None)
        del self._adapters[adapter.key]
        self._loader.forget(adapter.key, adapter.drop)
