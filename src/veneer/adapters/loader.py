"""The threads that bring adapters from disk to host memory and from there into the arena.

They decide nothing about the device: residency.py, on the step's thread, says which adapter goes where.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch

from veneer.adapters.merging import follow
from veneer.adapters.methods.base import Base
from veneer.adapters.names import split_key
from veneer.adapters.packing import Layout, PackedAdapter, SharedFactors, pack, packed_size, shared_size
from veneer.adapters.program import Program, Site
from veneer.adapters.recipes import is_blend, parse
from veneer.adapters.slots import Place
from veneer.adapters.worker import Worker
from veneer.errors import AdapterRefused, NotFound

T = TypeVar("T")

# Copies first: one holds its slot already and is short, while lowering a large upload may take seconds.
COPY, READ = range(2)


@dataclass
class _Shared:
    factors: SharedFactors
    users: int = 0


class HostCache:
    """Packed adapters in host memory by their keys, least recently used out first. Safe to use from any thread.

    What adapters share is kept, and counted, once for all of them.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget  # bytes
        self.bytes = 0
        self._packed: OrderedDict[str, PackedAdapter] = OrderedDict()
        self._shared: dict[str, _Shared] = {}
        self._lock = threading.Lock()

    def get(self, key: str) -> PackedAdapter | None:
        with self._lock:
            if key in self._packed:
                self._packed.move_to_end(key)
            return self._packed.get(key)

    def put(self, key: str, packed: PackedAdapter) -> PackedAdapter:
        """Keep an adapter even when it alone is over the budget; `trim` lets go of it after its copy.

        Returns the one to use: what it shares is the copy that others have.
        """
        with self._lock:
            self._remove(key)
            self._packed[key] = self._intern(packed)
            self.bytes += packed.host_bytes
            self._trim(spare=1)
            return self._packed[key]

    def trim(self) -> None:
        """Return to the budget."""
        with self._lock:
            self._trim(spare=0)

    def remove(self, key: str) -> None:
        with self._lock:
            self._remove(key)

    def keys(self) -> frozenset[str]:
        with self._lock:
            return frozenset(self._packed)

    def _trim(self, spare: int) -> None:
        while self.bytes > self.budget and len(self._packed) > spare:
            self._remove(next(iter(self._packed)))

    def _remove(self, key: str) -> None:
        packed = self._packed.pop(key, None)
        if packed is None:
            return
        self.bytes -= packed.host_bytes
        if packed.shared is not None:
            known = self._shared[packed.shared.key]
            known.users -= 1
            if not known.users:
                del self._shared[packed.shared.key]
                self.bytes -= known.factors.host_bytes

    def _intern(self, packed: PackedAdapter) -> PackedAdapter:
        """The adapter with the copy of what it shares that is there already, if there is one."""
        if packed.shared is None:
            return packed
        known = self._shared.get(packed.shared.key)
        if known is None:
            known = self._shared[packed.shared.key] = _Shared(packed.shared)
            self.bytes += packed.shared.host_bytes
        known.users += 1
        return replace(packed, shared=known.factors)


class Loader:
    """Two threads: one loads adapters, the other makes blends, which may take longer than anybody should wait."""

    def __init__(
        self,
        blobs: Path,
        sites: Sequence[Site],
        arena: torch.Tensor,
        *,
        max_lora_rank: int,
        host_budget: int,
        wake: Callable[[], None],
        load: Callable[[Path, int], Program],
        base: Base,
    ) -> None:
        self.cache = HostCache(host_budget)
        self._blobs = blobs
        self._sites = sites
        self._arena = arena
        self._max_lora_rank = max_lora_rank
        self._load = load
        self._base = base
        self._staged: dict[str, Path] = {}  # where a checked adapter lies until the store commits it
        self._stream = torch.cuda.Stream(arena.device) if arena.is_cuda else None  # type: ignore[no-untyped-call]
        self._loads, self._blends = Worker("adapter-loader", wake), Worker("adapter-blender", wake)

    # ---- called from the step's thread: each returns at once -------------------------------------

    def check(self, folder: Path | None, key: str) -> Future[Program]:
        """Lower a folder, for the task of the key, and keep the result under the key. None: what is stored."""
        return self._reader(key).submit(READ, lambda: self._check(folder, key), Future())

    def read(self, key: str) -> Future[Layout]:
        """Bring an adapter into host memory."""
        return self._reader(key).submit(READ, lambda: self._packed(key).layout, Future())

    def copy(self, key: str, place: Place, after: torch.cuda.Event | None) -> Future[torch.Tensor]:
        """Write an adapter into its range of the arena, once `after` has passed on the compute stream.

        The result is the adapter's entries, int64 [SLOTS_EACH, sites, COLUMNS]; when it is there the copy has
        completed.
        """
        return self._loads.submit(COPY, lambda: self._copy(key, place, after), Future())

    def forget(self, key: str, future: Future[None]) -> None:
        """Let go of an adapter, after the checks and reads that were asked for before; then end `future`."""
        self._reader(key).submit(READ, lambda: self._forget(key), future)

    def close(self) -> None:
        """End the threads. Jobs not begun fail."""
        self._loads.close()
        self._blends.close()

    def _reader(self, key: str) -> Worker:
        return self._blends if is_blend(key) else self._loads

    # ---- on its threads -------------------------------------------------------------------------

    def _check(self, folder: Path | None, key: str) -> Program:
        if folder is None:
            program = self._program(key)
        else:
            digest, task = split_key(key)
            program = self._load(folder, task)
        self.cache.put(key, self._pack(program, key))
        if folder is not None:
            self._staged[digest] = folder
        self.cache.trim()
        return program

    def _packed(self, key: str) -> PackedAdapter:
        packed = self.cache.get(key)
        if packed is None:
            packed = self.cache.put(key, self._pack(self._program(key), key))
        return packed

    def _program(self, key: str) -> Program:
        """An adapter of the store, or what a recipe makes of several."""
        recipe = parse(key)
        if recipe is None:
            digest, task = split_key(key)
            return self._load(self._folder(digest), task)
        programs = [self._program(part.key) for part in recipe.parts]
        return follow(recipe, programs, self._base, self._max_lora_rank, self._arena.numel())

    def _folder(self, digest: str) -> Path:
        stored = self._blobs / digest
        if stored.is_dir():
            self._staged.pop(digest, None)
            return stored
        staged = self._staged.get(digest)
        if staged is None or not staged.is_dir():
            raise NotFound(f"adapter {digest} is not in the store; upload it again")
        return staged

    def _pack(self, program: Program, key: str) -> PackedAdapter:
        if program.rank > self._max_lora_rank:
            raise AdapterRefused(
                f"adapter {key} has rank {program.rank} and --max-lora-rank is {self._max_lora_rank}; "
                "restart the server with a higher limit to serve it"
            )
        item = self._arena.dtype.itemsize
        size = packed_size(program, item) + shared_size(program, item)
        if size > self._arena.numel():
            raise AdapterRefused(
                f"adapter {key} needs {size * item} bytes on the device and --adapter-memory holds "
                f"{self._arena.numel() * item}; restart the server with more to serve it"
            )
        return pack(program, self._sites, self._arena.dtype, pin=self._arena.is_cuda)

    def _copy(self, key: str, place: Place, after: torch.cuda.Event | None) -> torch.Tensor:
        packed, shared = self._packed(key), place.shared
        parts = [(packed.blob, place.start)]
        if shared is not None and not shared.written:
            assert packed.shared is not None  # the place was made for it
            parts.append((packed.shared.blob, shared.start))
        copies = [(blob, self._arena[start : start + blob.numel()]) for blob, start in parts]
        if self._stream is None:
            for blob, target in copies:
                target.copy_(blob)
        else:
            # A blocking event lets this thread sleep; spinning would take the interpreter from the steps.
            copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            with torch.cuda.stream(self._stream):
                if after is not None:
                    self._stream.wait_event(after)
                # What steps need of the host does not go through the copy engine, so nothing waits for this.
                for blob, target in copies:
                    target.copy_(blob, non_blocking=True)
                copied.record(self._stream)
            copied.synchronize()
        self.cache.trim()
        if shared is None:
            return packed.entries_at(place.start)
        shared.written = True
        return packed.entries_at(place.start, shared.start)

    def _forget(self, key: str) -> None:
        self.cache.remove(key)
        self._staged.pop(split_key(key)[0], None)
