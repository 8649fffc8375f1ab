"""Which parts of one arena are taken: a best-fit allocator of element ranges. Holds numbers, no tensors.

A few hundred ranges at most are held at once, so the gaps between them are found anew for each question:
there is no free list that could disagree with the ranges, and freed neighbours coalesce by themselves.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

ALIGNMENT = 128  # elements: the start of every tensor, so that kernels can load whole vectors


def align(elements: int) -> int:
    """Round up to whole alignments."""
    return -(-elements // ALIGNMENT) * ALIGNMENT


class Arena:
    """Ranges [start, start + size) below `capacity`, in elements, none overlapping another."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity // ALIGNMENT * ALIGNMENT
        self._held: dict[int, int] = {}  # start -> size

    @property
    def used(self) -> int:
        """Elements held."""
        return sum(self._held.values())

    def find(self, size: int, freed: Collection[int] = ()) -> int | None:
        """Start of the smallest gap for `size` elements, None when there is none.

        `freed` are starts of held ranges to be looked at as if they were free: ask before evicting.
        """
        size = _room(size)
        fitting = [(room, start) for start, room in self._gaps(freed) if room >= size]
        return min(fitting)[1] if fitting else None

    def fits(self, sizes: Collection[int], freed: Collection[int] = ()) -> bool:
        """Whether all of several ranges can be allocated, the largest first, with `freed` as for `find`.

        For two that order finds a way if there is one.
        """
        gaps = [room for _, room in self._gaps(freed)]
        for size in sorted(map(_room, sizes), reverse=True):
            fitting = [room for room in gaps if room >= size]
            if not fitting:
                return False
            gaps.remove(best := min(fitting))
            gaps.append(best - size)
        return True

    def allocate(self, size: int) -> int | None:
        """Hold `size` elements (rounded up to the alignment, at least one); None when no gap is large enough."""
        start = self.find(size)
        if start is not None:
            self._held[start] = _room(size)
        return start

    def free(self, start: int) -> None:
        """Give back the range that `allocate` returned. KeyError when none starts there."""
        del self._held[start]

    def _gaps(self, freed: Collection[int]) -> Iterator[tuple[int, int]]:
        """(start, size) of every maximal gap, in order."""
        end = 0
        for start, size in sorted(self._held.items()):
            if start in freed:
                continue
            if start > end:
                yield end, start - end
            end = start + size
        if self.capacity > end:
            yield end, self.capacity - end


def _room(size: int) -> int:
    return max(align(size), ALIGNMENT)
