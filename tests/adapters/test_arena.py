"""The best-fit allocator of the arena."""

from __future__ import annotations

import random

import pytest

from veneer.adapters.arena import ALIGNMENT, Arena, align

K = ALIGNMENT


def test_sizes_round_up_to_the_alignment() -> None:
    assert [align(n) for n in (0, 1, K, K + 1)] == [0, K, K, 2 * K]
    arena = Arena(4 * K + K // 2)
    assert arena.capacity == 4 * K
    assert [arena.allocate(n) for n in (1, 0, K + 1)] == [0, K, 2 * K]
    assert arena.used == 4 * K
    assert arena.allocate(1) is None


def test_the_smallest_gap_that_fits_is_taken() -> None:
    arena = Arena(16 * K)
    starts = [arena.allocate(size * K) for size in (3, 1, 2, 1, 4, 1)]
    assert starts == [0, 3 * K, 4 * K, 6 * K, 7 * K, 11 * K]
    for start in (0, 4 * K, 7 * K):  # gaps of 3, 2, 4 and the 4 at the end
        arena.free(start)
    assert arena.allocate(2 * K) == 4 * K
    assert arena.allocate(K) == 0
    assert arena.allocate(3 * K) == 7 * K


def test_freed_neighbours_coalesce() -> None:
    arena = Arena(6 * K)
    first, second, third = (arena.allocate(2 * K) for _ in range(3))
    assert (first, second, third) == (0, 2 * K, 4 * K)
    arena.free(0)
    arena.free(4 * K)
    assert arena.find(3 * K) is None
    arena.free(2 * K)
    assert arena.find(6 * K) == 0
    assert arena.used == 0


def test_find_looks_at_ranges_as_if_they_were_free() -> None:
    arena = Arena(6 * K)
    for _ in range(3):
        arena.allocate(2 * K)
    assert arena.find(4 * K, {0}) is None
    assert arena.find(4 * K, {0, 4 * K}) is None
    assert arena.find(4 * K, {2 * K, 4 * K}) == 2 * K
    assert arena.used == 6 * K


def test_several_ranges_fit_when_the_largest_is_placed_first() -> None:
    arena = Arena(12 * K)
    for size in (3, 1, 5, 3):
        arena.allocate(size * K)
    assert arena.fits([3 * K, 5 * K], {0, 4 * K})
    assert arena.fits([5 * K, 3 * K], {0, 4 * K})
    assert arena.fits([4 * K, 4 * K, 2], {0, 3 * K, 4 * K})
    assert not arena.fits([4 * K, 4 * K, 2 * K], {0, 3 * K, 4 * K})
    assert not arena.fits([3 * K, 6 * K], {0, 4 * K})
    assert not arena.fits([1])
    assert arena.fits([])
    assert arena.used == 12 * K


def test_a_range_is_freed_once() -> None:
    arena = Arena(2 * K)
    arena.allocate(K)
    arena.free(0)
    with pytest.raises(KeyError):
        arena.free(0)


@pytest.mark.parametrize("seed", range(4))
def test_soak_against_a_map_of_cells(seed: int) -> None:
    chance = random.Random(seed)
    cells = [False] * 64  # one for each alignment
    arena = Arena(len(cells) * K)
    held: dict[int, int] = {}

    def gaps() -> list[tuple[int, int]]:
        """(size, first cell) of each maximal run of free cells."""
        text = "".join("x" if cell else "." for cell in cells)
        runs, at = [], 0
        for part in text.replace("x.", "x|.").replace(".x", ".|x").split("|"):
            if part.startswith("."):
                runs.append((len(part), at))
            at += len(part)
        return runs

    refused = 0
    for _ in range(2000):
        if held and chance.random() < 0.48:
            start = chance.choice(sorted(held))
            arena.free(start)
            count = held.pop(start)
            cells[start // K : start // K + count] = [False] * count
        else:
            size = chance.randint(1, 12 * K)
            count = align(size) // K
            fitting = sorted(gap for gap in gaps() if gap[0] >= count)
            start_or_none = arena.allocate(size)
            if not fitting:
                assert start_or_none is None
                refused += 1
                continue
            assert start_or_none == fitting[0][1] * K
            held[start_or_none] = count
            cells[fitting[0][1] : fitting[0][1] + count] = [True] * count
        assert arena.used == sum(cells) * K
    assert refused > 50  # the soak was tight enough to mean something
