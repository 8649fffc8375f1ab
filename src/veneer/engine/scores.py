"""Scores of a prompt: the log probability of each of its tokens but the first, given those before it.

Here is which rows of a step give them and how they reach the host. The runner puts these rows through the
output head in pieces, because logits of a whole chunk may take gigabytes. A piece is of one sequence, so its
numbers do not depend on the batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from veneer.engine.batch import Scheduled
from veneer.engine.messages import TokenLogprobs
from veneer.engine.sampling import TopLogprobs

PIECE_ROWS = 256  # in float32 131 MB for a vocabulary of 128 k, a few times over


class Piece(NamedTuple):
    row: int  # of the step, where it begins
    part: Scheduled  # of the sequence: each token scores the one behind it

    @property
    def targets(self) -> list[int]:
        """The tokens that are scored."""
        first = self.part.start + 1
        return self.part.sequence.tokens[first : first + self.part.count]


def pieces_of(planned: Iterable[Scheduled], most: int = PIECE_ROWS) -> Iterator[Piece]:
    """The rows of a step that score something, in its order, at most so many in a piece."""
    row = 0
    for item in planned:
        wanted = range(0) if item.sequence.sampling.pooling else item.unread
        for start in wanted[::most]:
            count = min(most, wanted.stop - start)
            yield Piece(row + start - item.start, Scheduled(item.sequence, start, count, samples=False))
        row += item.count


@dataclass(frozen=True)
class Scored:
    """The scores of a piece, on the host once the step is done."""

    sequence: str  # id
    count: int  # of the likeliest tokens that are wanted
    top: TopLogprobs

    def results(self) -> list[TokenLogprobs]:
        return self.top.entries([self.count] * len(self.top.own))
