"""A planned step: which tokens of which sequences. scheduler.py plans it, runner.py computes it.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field

from veneer.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Scheduled:
    """A sequence's part of a step: tokens [start, start + count), the last of which may be a draft."""

    sequence: Sequence
    start: int
    count: int
    samples: bool  # the last token is among them, so the next one is sampled
    lead: int = 0  # virtual tokens right before `start` whose keys and values must be copied first
    draft: tuple[int, ...] = ()  # behind the last token: `Scheduler.commit` tells how much of it holds

    @property
    def tokens(self) -> list[int]:
        """Those that are computed; not there yet in a step that was planned ahead."""
        return [*self.sequence.tokens[self.start : self.start + self.count - len(self.draft)], *self.draft]

    @property
    def num_sampled(self) -> int:
        """How many of its rows, the last ones, choose a token."""
        return len(self.draft) + 1 if self.samples else 0

    def accepted(self, chosen: Tokens[int]) -> list[int]:
        """The new tokens: of those that its rows chose the ones before which the draft holds."""
        right = 0
        while right < min(len(self.draft), len(chosen) - 1) and chosen[right] == self.draft[right]:
            right += 1
        return list(chosen[: right + 1])

    @property
    def parts(self) -> list[tuple[int, int]]:
        """Its rows in order, cut where another slot begins: (slot, rows). Slot -1 is the base."""
        parts, at, stop = [], self.start, self.start + self.count
        slot = -1
        for start, offset in self.sequence.changes:
            if start >= stop:
                break
            if start > at:
                parts.append((slot, start - at))
                at = start
            slot = self._slot(offset)
        return [*parts, (slot, stop - at)]

    @property
    def slot(self) -> int:
        """The slot that its last row uses; -1 = the base."""
        slot, last = -1, self.start + self.count - 1
        for start, offset in self.sequence.changes:
            if start > last:
                break
            slot = self._slot(offset)
        return slot

    @property
    def unread(self) -> range:
        """Those of its tokens whose hidden states are wanted."""
        wanted = self.sequence.unread
        if not wanted:
            return wanted
        return range(max(self.start, wanted.start), min(self.start + self.count, wanted.stop))

    def _slot(self, offset: int | None) -> int:
        slot = self.sequence.slot
        return -1 if offset is None or slot < 0 else slot + offset


@dataclass(frozen=True)
class Batch:
    """One planned step: decodes, then prefills that go on, then new sequences."""

    items: list[Scheduled] = field(default_factory=list)

    @property
    def merged(self) -> bool:
        """Whether it is a step of the merged copy."""
        return bool(self.items) and self.items[0].sequence.merged
