"""The places that adapters take on the device: a slot of the tables and a range of the arena.

Changes to the tables are queued on the current CUDA stream, which is the one that steps run on: a step that
was launched before still sees the adapters it was launched with.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from veneer.adapters.arena import ALIGNMENT, Arena
from veneer.adapters.packing import Layout, SharedLayout
from veneer.kernels.tables import (
    ABSENT,
    OFFSETS,
    SLOTS_EACH,
    AdapterTables,
    absent_entries,
    find_deltas,
    find_hidden,
    find_kin,
    find_transforms,
)
from veneer.kernels.upload import copy_by_kernel, upload_into


@dataclass
class SharedPlace:
    """Where factors lie that several adapters share. The range is free when none of these has a place any more."""

    key: str  # of their content
    start: int  # elements from the start of the arena
    size: int  # elements
    users: int = 0
    written: bool = False  # for the loader's thread alone, which copies them with the first adapter


class Place(NamedTuple):
    """Where one adapter lies."""

    slot: int  # the first of its `SLOTS_EACH`
    start: int  # elements from the start of the arena
    size: int  # elements
    shared: SharedPlace | None = None  # of the factors that it shares


class Slots:
    """The tables, allocated once, and which parts of them are taken."""

    def __init__(
        self,
        count: int,
        sites: int,
        linear_sites: int,
        arena_bytes: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """`sites` in all; the first `linear_sites` are linear layers, the last is the embedding, others are
        hidden states."""
        self._linear_sites = linear_sites
        self._arena = Arena(arena_bytes // dtype.itemsize)
        if count < 1 or not self._arena.capacity:
            raise ValueError(
                f"--max-loras {count} and --adapter-memory {arena_bytes} bytes have room for no adapter; "
                f"at least 1 and {ALIGNMENT * dtype.itemsize} are needed"
            )
        self._shared: dict[str, SharedPlace] = {}
        self._free = set(range(0, SLOTS_EACH * count, SLOTS_EACH))
        self._absent = absent_entries(SLOTS_EACH, sites, device=device)
        self.tables = AdapterTables(
            # Zeroed: padding that a kernel loads beside a tensor is never NaN.
            arena=torch.zeros(self._arena.capacity, dtype=dtype, device=device),
            entries=absent_entries(SLOTS_EACH * count, sites, device=device),
            entries_host=absent_entries(SLOTS_EACH * count, sites),
        )

    @property
    def used_bytes(self) -> int:
        return self._arena.used * self.tables.arena.itemsize

    def fits(self, layout: Layout, freed: Iterable[Place] = ()) -> bool:
        """Whether an adapter would fit if the places in `freed` were free."""
        places = list(freed)
        leaving = Counter(place.shared.key for place in places if place.shared is not None)
        gone = {key for key, users in leaving.items() if users == self._shared[key].users}
        starts = {place.start for place in places} | {self._shared[key].start for key in gone}
        sizes = [layout.size]
        if layout.shared is not None and layout.shared.key not in self._shared.keys() - gone:
            sizes.append(layout.shared.size)
        return bool(self._free or places) and self._arena.fits(sizes, starts)

    def elements(self, places: Iterable[Place]) -> int:
        """What these places take, shared factors once."""
        found = list(places)
        shared = {place.shared.key: place.shared.size for place in found if place.shared is not None}
        return sum(place.size for place in found) + sum(shared.values())

    def take(self, layout: Layout) -> Place:
        """A free slot and a range, one more if it has shared factors that are not there. Ask `fits` first:
        RuntimeError when there is no room."""
        if not self._free or not self.fits(layout):
            raise RuntimeError(f"no slot or no range for {layout.size} elements; ask fits first")
        wanted, shared = layout.shared, None
        if wanted is not None and wanted.size > layout.size:  # the larger first, as `fits` looks
            shared = self._share(wanted)
        start = self._allocate(layout.size)
        if wanted is not None and shared is None:
            shared = self._share(wanted)
        slot = min(self._free)
        self._free.remove(slot)
        return Place(slot, start, layout.size, shared)

    def _allocate(self, size: int) -> int:
        start = self._arena.allocate(size)
        assert start is not None  # `fits` said so
        return start

    def _share(self, layout: SharedLayout) -> SharedPlace:
        """One more user of these factors."""
        if layout.key not in self._shared:
            self._shared[layout.key] = SharedPlace(layout.key, self._allocate(layout.size), layout.size)
        shared = self._shared[layout.key]
        shared.users += 1
        return shared

    def install(self, place: Place, entries: torch.Tensor) -> None:
        """From the next launch on, kernels find the adapter with these entries.

        They are int64 [SLOTS_EACH, sites, COLUMNS].
        """
        slots = slice(place.slot, place.slot + SLOTS_EACH)
        self.tables.entries_host[slots] = entries
        upload_into(entries, self.tables.entries[slots])
        for slot, each in enumerate(entries, place.slot):
            if bool((each[:, OFFSETS] != ABSENT).any()):
                self.tables.acting.add(slot)
            if kin := find_kin(each):
                self.tables.kin[slot] = kin
            if any(transforms := find_transforms(each)):
                self.tables.transforms[slot] = transforms
            if any(deltas := find_deltas(each)):
                self.tables.deltas[slot] = deltas
            if hidden := find_hidden(each, self._linear_sites):
                self.tables.hidden[slot] = hidden

    def clear(self, place: Place) -> None:
        """Give a place back. Steps launched so far still read it: see `launched`."""
        slots = slice(place.slot, place.slot + SLOTS_EACH)
        copy_by_kernel(self._absent.view(-1), self.tables.entries[slots].view(-1))
        self.tables.entries_host[slots] = absent_entries(*self._absent.shape[:-1])
        for slot in range(slots.start, slots.stop):
            self.tables.acting.discard(slot)
            self.tables.transforms.pop(slot, None)
            self.tables.deltas.pop(slot, None)
            self.tables.hidden.pop(slot, None)
            self.tables.kin.pop(slot, None)
        self._arena.free(place.start)
        if (shared := place.shared) is not None:
            shared.users -= 1
            if not shared.users:
                self._arena.free(shared.start)
                del self._shared[shared.key]
        self._free.add(place.slot)

    def launched(self) -> torch.cuda.Event | None:
        """An event after all that has been launched so far. Writes to a freed range must wait for it."""
        if not self.tables.arena.is_cuda:
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.tables.arena.device))
        return event
