"""Who holds a device slot of an adapter, who waits for one, and who must give one up. Imports no torch.

With more adapters in flight than slots, the one that held its slot longest yields to one that has waited for
`patience`; without that rule a long generation could starve an adapter for as long as it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from veneer.adapters.reach import Reach
from veneer.engine.sequence import Sequence


class AdapterGate(Protocol):
    """Which adapters are on the device. Nothing here waits: loads go on in the background.

    Adapters are loaded in the order in which they were asked for, as soon as there is room beside those with
    users. One that is loaded is kept for a while for whoever asked for it.
    """

    def prefetch(self, digest: str) -> None:
        """Ask for the adapter; asking again changes nothing."""

    def acquire(self, digest: str) -> int | None:
        """Ask for the adapter, and when it is resident count a user and return its slot."""

    def reach(self, digest: str) -> Reach:
        """On which tokens an adapter that was acquired acts, and what it puts in front of them."""

    def release(self, digest: str) -> None:
        """One user less."""

    def is_blocked(self, digest: str) -> bool:
        """Whether the adapter could be loaded now but for adapters with users."""

    def is_pinned(self, digest: str) -> bool:
        """Whether the adapter keeps its place whoever uses it, so that preempting its users frees nothing."""


@dataclass
class _Hold:
    """An adapter whose slot sequences are using."""

    since: float
    users: dict[Sequence, int] = field(default_factory=dict)  # -> its output tokens when it got the slot

    @property
    def has_advanced(self) -> bool:
        """Whether each user got a token for its time in the slot: if none did, yielding could go on for ever."""
        return all(sequence.num_output_tokens > before for sequence, before in self.users.items())


class AdapterSlots:
    """The slots that sequences hold."""

    def __init__(self, gate: AdapterGate, patience: float, clock: Callable[[], float]) -> None:
        """`patience` and `clock` are in seconds."""
        self._gate, self._patience, self._clock = gate, patience, clock
        self._holds: dict[str, _Hold] = {}  # longest held first
        self._turned_away: dict[str, float] = {}  # adapter -> since when it lacks a slot; longest first
        self._absent: set[str] = set()  # adapters asked for in vain when sequences were last admitted
        self._closing: set[str] = set()  # adapters that yield their slot once their users have advanced
        self._yielded: dict[str, str] = {}  # adapter -> the one for which it gave up its slot

    def start_over(self) -> None:
        """Sequences are admitted anew: what was asked for in vain may be asked for again."""
        self._absent.clear()

    @contextmanager
    def probing(self) -> Iterator[None]:
        """Ask anew, and leave what a `start_over` goes by as it was."""
        before, self._absent = self._absent, set()
        try:
            yield
        finally:
            self._absent |= before

    def take(self, sequence: Sequence) -> bool:
        """Give a sequence with an adapter its slot, if there is one."""
        digest = sequence.adapter
        assert digest is not None
        slot = self._gate.acquire(digest) if self._may_acquire(digest) else None
        if slot is None:
            self._absent.add(digest)
            self._turned_away.setdefault(digest, self._clock())
            return False
        sequence.slot = slot
        self._holds.setdefault(digest, _Hold(self._clock())).users[sequence] = sequence.num_output_tokens
        self._turned_away.pop(digest, None)
        return True

    def release(self, sequence: Sequence) -> None:
        """Take the slot back that a sequence may have."""
        if sequence.adapter is None or sequence.slot < 0:
            return
        sequence.slot = -1
        hold = self._holds[sequence.adapter]
        del hold.users[sequence]
        if not hold.users:
            del self._holds[sequence.adapter]
        self._gate.release(sequence.adapter)

    def must_yield(self, waiting: Iterable[Sequence], most: int) -> bool:
        """Whether `make_room` would have something to do."""
        self._forget_waits(waiting)
        impatient = self._impatient()[:most] if self._overdue() else []
        return any(self._gate.is_blocked(digest) for digest in impatient)

    def make_room(self, waiting: Iterable[Sequence], most: int, preempt: Callable[[Sequence], None]) -> None:
        """While an adapter that waited too long lacks room, the one that held its slot longest yields it.

        Only those held for `patience` must yield, and only when their users have advanced; where some have not, the
        adapter closes: no sequence joins it until they have. At most so many of those that wait could run at once.
        """
        self._forget_waits(waiting)
        for digest in self._impatient()[:most]:
            while self._gate.is_blocked(digest):
                overdue = self._overdue()
                held = next((held for held, hold in overdue.items() if hold.has_advanced), None)
                if held is None:
                    self._closing.update(overdue)
                    return
                self._yielded[held] = digest
                for sequence in list(overdue[held].users):
                    preempt(sequence)

    def _may_acquire(self, digest: str) -> bool:
        yielded = self._yielded.get(digest) in self._turned_away  # its room is for another that still waits
        return not yielded and digest not in self._closing and digest not in self._absent

    def _forget_waits(self, waiting: Iterable[Sequence]) -> None:
        """Let go of what was noted for requests that wait no more, and of who was to yield."""
        wanted = {sequence.adapter for sequence in waiting}
        self._turned_away = {digest: since for digest, since in self._turned_away.items() if digest in wanted}
        self._yielded = {held: by for held, by in self._yielded.items() if by in self._turned_away}
        self._closing.clear()

    def _impatient(self) -> list[str]:
        """Adapters that waited too long for a slot and lack nothing else; longest first."""
        latest = self._clock() - self._patience
        return [d for d, since in self._turned_away.items() if since <= latest and d in self._absent]

    def _overdue(self) -> dict[str, _Hold]:
        """Adapters that have held a slot too long, longest first."""
        latest = self._clock() - self._patience
        return {
            held: hold
            for held, hold in self._holds.items()
            if hold.since <= latest and not self._gate.is_pinned(held)
        }
