"""Drafts of what a sequence says next, looked up in what it has read and said.

Prompt lookup decoding (Saxena, 2023).

A draft is checked by the step that computes it: each of its tokens is a row, and what that row would have chosen
decides whether the draft goes on. So a draft never changes an answer, only how many steps it takes. Imports no
torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import cycle, islice

SIZES = (3, 2)  # of the n-grams that are looked up, the longest first
PAUSE = 16  # tokens without drafts after too many in vain


class PromptLookup:
    """What followed the last place where a sequence's last few tokens stood before."""

    def __init__(self, most: int, prediction: Sequence[int] = (), prompt: Sequence[int] = ()) -> None:
        """most: tokens of a draft. prediction: text that the answer may repeat, before that of the sequence.

        `prompt`, the sequence's, lets the prediction be found from the first tokens of the answer on.
        """
        self._most = self._limit = most
        self._text = [*prompt[1 - SIZES[0] :], *prediction] if prediction else []
        self._offset = len(self._text)  # of the sequence's first token in the text
        self._indexed = 0  # places in the text
        self._places: dict[tuple[int, ...], int] = {}  # n-gram -> the place behind its last occurrence
        self._from = self._next = 0  # the places where the last draft begins, and where it goes on
        self._paused_until = 0  # tokens of the sequence

    def find(self, tokens: Sequence[int], most: int) -> list[int]:
        """At most so many tokens that may follow these, which are all of the sequence."""
        if len(tokens) < self._paused_until:
            return []
        self._index(tokens)
        self._from = place = next(self._candidates(), 0)
        most = min(most, self._limit) if place else 0
        if place < self._offset:  # the prediction does not go on with the prompt
            return self._text[place : min(place + most, self._offset)]
        # a text that has come round to its own end goes round again
        return list(islice(cycle(self._text[place : place + most]), most))

    def learn(self, drafted: int, accepted: int) -> None:
        """How the last draft fared: the next may be longer, or must be shorter, down to a pause."""
        self._next = self._from + accepted + 1
        if accepted == drafted:
            self._limit = min(2 * self._limit, self._most)
        elif accepted:
            self._limit = min(accepted + 1, self._most)
        elif self._limit > 1:
            self._limit //= 2
        else:
            self._paused_until = len(self._text) - self._offset + PAUSE

    def _index(self, tokens: Sequence[int]) -> None:
        """Take in the tokens that are new; the last n-gram of each size, which nothing follows, waits."""
        self._text += tokens[len(self._text) - self._offset :]
        text, start, stop = self._text, self._indexed, len(self._text) - 1
        for size in SIZES:
            first = max(start - size, 0)
            grams = zip(*(text[first + i : stop] for i in range(size)), strict=False)
            self._places.update(zip(grams, range(first + size, stop + 1), strict=False))
        self._indexed = max(stop, start)

    def _candidates(self) -> Iterator[int]:
        """Places where the text may go on as the sequence does; the prediction's end is none."""
        text, at, least = self._text, self._next, SIZES[-1]
        followed = least <= at < len(text) and text[at - least : at] == text[-least:]
        places = [at if followed else 0, *(self._places.get(tuple(text[-size:]), 0) for size in SIZES)]
        return (place for place in places if place not in (0, self._offset))
