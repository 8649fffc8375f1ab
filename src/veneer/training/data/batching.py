"""Which rows make a step: shuffled batches and packs, known from seed and step alone. Integers in, integers out.

batches(count, batch_size, seed, start_step)                       endless; one Draw a step
packed_batches(lengths, capacity, batch_size, seed, start_step)    the same with several rows a sequence
pack(lengths, capacity, seed, epoch)                               the packs of an epoch
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import count as count_from
from typing import NamedTuple

from veneer.errors import InvalidRequest


class Draw(NamedTuple):
    step: int  # from 0
    epoch: int  # from 0
    rows: list[int]


class PackedDraw(NamedTuple):
    step: int
    epoch: int
    packs: list[list[int]]  # the rows of each sequence


def steps_per_epoch(count: int, batch_size: int) -> int:
    return -(-count // batch_size)


def batches(count: int, batch_size: int, seed: int, start_step: int = 0) -> Iterator[Draw]:
    """Batches of the rows 0 … count - 1, from `start_step` on, without end.

    Every epoch has each row once, in an order of its own; its last batch may be short.

    Raises:
        InvalidRequest: there are no rows, or a batch would have none.
    """
    if count < 1 or batch_size < 1:
        raise InvalidRequest(
            f"batches need rows: count is {count} and batch_size {batch_size}; both must be > 0"
        )
    in_epoch = steps_per_epoch(count, batch_size)
    order: list[int] = []
    for step in count_from(start_step):
        epoch, at = divmod(step, in_epoch)
        if not order or at == 0:
            order = list(range(count))
            random.Random(f"order/{seed}/{epoch}").shuffle(order)
        yield Draw(step, epoch, order[at * batch_size : (at + 1) * batch_size])


def packed_batches(
    lengths: Sequence[int], capacity: int, batch_size: int, seed: int, start_step: int = 0
) -> Iterator[PackedDraw]:
    """Batches of packs, `batch_size` sequences of at most `capacity` tokens each. Raises as `batches` and `pack`.

    Every epoch has the same number of packs: their lengths are the same, only rows of one length change places.
    """
    packs = pack(lengths, capacity, seed, epoch=0)
    packed = 0
    for step, epoch, places in batches(len(packs), batch_size, seed, start_step):
        if epoch != packed:
            packs, packed = pack(lengths, capacity, seed, epoch), epoch
        yield PackedDraw(step, epoch, [packs[place] for place in places])


def pack(lengths: Sequence[int], capacity: int, seed: int = 0, epoch: int = 0) -> list[list[int]]:
    """First-fit-decreasing: the longest row first, each into the first pack that has room for it.

    Uses at most 11/9 of the fewest packs possible, plus one. Takes O(n log n) steps.

    Raises:
        InvalidRequest: a row is longer than `capacity` tokens.
    """
    if lengths and max(lengths) > capacity:
        raise InvalidRequest(
            f"a row of {max(lengths)} tokens does not fit into a pack of {capacity}; cut or drop longer rows first"
        )
    order = list(range(len(lengths)))
    random.Random(f"pack/{seed}/{epoch}").shuffle(order)
    order.sort(key=lambda row: -lengths[row])
    rooms = _Rooms(len(lengths), capacity)
    packs: list[list[int]] = []
    for row in order:
        place = rooms.take(lengths[row])
        if place == len(packs):
            packs.append([])
        packs[place].append(row)
    return packs


class _Rooms:
    """The room in `count` packs, as a tree of maxima whose leaves are the packs."""

    def __init__(self, count: int, capacity: int) -> None:
        self._leaves = 1 << max(0, count - 1).bit_length()
        self._most = [capacity] * (2 * self._leaves)

    def take(self, size: int) -> int:
        """Take room from the first pack that has it, and say which it is."""
        node = 1
        while node < self._leaves:
            node = 2 * node if self._most[2 * node] >= size else 2 * node + 1
        place = node - self._leaves
        self._most[node] -= size
        while node > 1:
            node //= 2
            self._most[node] = max(self._most[2 * node], self._most[2 * node + 1])
        return place
