"""Batches and packs are known from seed and step, whole in every epoch, and packs are tight."""

from __future__ import annotations

import random
import time
from itertools import islice

import pytest

from veneer.errors import InvalidRequest
from veneer.training.data.batching import batches, pack, packed_batches, steps_per_epoch


@pytest.mark.parametrize(("count", "size"), [(1, 1), (1, 4), (7, 3), (8, 4), (5, 1)])
def test_every_epoch_has_each_row_once_in_an_order_of_its_own(count: int, size: int) -> None:
    steps = steps_per_epoch(count, size)
    drawn = list(islice(batches(count, size, seed=3), 3 * steps))
    assert [draw.step for draw in drawn] == list(range(3 * steps))
    epochs = [[row for draw in drawn if draw.epoch == epoch for row in draw.rows] for epoch in range(3)]
    assert all(sorted(rows) == list(range(count)) for rows in epochs)
    assert all(len(draw.rows) == size for draw in drawn if (draw.step + 1) % steps)
    if count > 4:
        assert epochs[0] != epochs[1]


@pytest.mark.parametrize("start", range(12))
def test_a_run_resumes_at_any_step(start: int) -> None:
    assert list(islice(batches(7, 3, 5, start), 6)) == list(islice(batches(7, 3, 5), start, start + 6))
    lengths = [3, 3, 2, 5, 1, 4, 3]
    resumed = islice(packed_batches(lengths, 6, 2, 5, start), 6)
    assert list(resumed) == list(islice(packed_batches(lengths, 6, 2, 5), start, start + 6))


def test_the_seed_decides() -> None:
    assert next(batches(50, 50, seed=1)) != next(batches(50, 50, seed=2))
    assert next(batches(50, 50, seed=1)) == next(batches(50, 50, seed=1))
    assert pack([2] * 20, 6, seed=1) != pack([2] * 20, 6, seed=2)
    assert pack([2] * 20, 6, seed=1, epoch=1) != pack([2] * 20, 6, seed=1, epoch=2)


def test_no_rows_are_refused() -> None:
    for count, size in [(0, 1), (1, 0)]:
        with pytest.raises(InvalidRequest, match="batches need rows"):
            next(batches(count, size, 0))
    assert pack([], 5) == []


@pytest.mark.parametrize("seed", range(40))
def test_packs_are_first_fit_decreasing(seed: int) -> None:
    """Against the definition, pack by pack."""
    draw = random.Random(seed)
    capacity = draw.randint(5, 50)
    lengths = [draw.randint(1, capacity) for _ in range(draw.randint(1, 80))]
    packs = pack(lengths, capacity, seed)
    assert sorted(row for rows in packs for row in rows) == list(range(len(lengths)))
    naive: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        naive += [] if any(sum(rows) + length <= capacity for rows in naive) else [[]]
        next(rows for rows in naive if sum(rows) + length <= capacity).append(length)
    assert [[lengths[row] for row in rows] for rows in packs] == naive


def test_packing_many_rows_takes_no_square() -> None:
    lengths = [random.Random(n).randint(1, 500) for n in range(20_000)]
    begin = time.process_time()
    packs = pack(lengths, 1000)
    assert time.process_time() - begin < 5  # a fifth of a second; the square takes minutes
    assert len(packs) <= 1.01 * sum(lengths) / 1000 + 1


def test_a_row_beyond_the_capacity_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="a row of 7 tokens does not fit into a pack of 6"):
        pack([1, 7], 6)


def test_packed_epochs_have_each_row_once() -> None:
    lengths = [random.Random(n).randint(1, 9) for n in range(30)]
    steps = steps_per_epoch(len(pack(lengths, 10)), 4)
    drawn = list(islice(packed_batches(lengths, 10, 4, seed=0), 2 * steps))
    for epoch in range(2):
        rows = [row for draw in drawn if draw.epoch == epoch for rows in draw.packs for row in rows]
        assert sorted(rows) == list(range(30))
