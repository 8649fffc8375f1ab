"""When one adapter deserves a merged copy, and whether the copy is worth it. Decides by what steps took.

Time is busy time: the seconds that steps took, added up. What is compared is the time of rounds with equally many
tokens, before there was a copy and with it: with other traffic another batch would look faster or slower by itself.
A round is a step, or a step of the copy and one of all others that follow each other: these take the place of one
step without a copy. Rounds in which the adapter had rows off the copy, of sequences that began before it, count for
neither.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Mapping
from typing import NamedTuple

WINDOW = 10.0  # busy seconds that a decision is made on
DOMINANT = 0.9  # of the tokens: an adapter with as many gets a copy
MINOR = 0.5  # with fewer it loses the copy
COMMON = 0.25  # of the window: as much must be comparable
BACK_OFF = 60.0  # busy seconds until a copy that was no gain is tried again; each time twice as many
MOST_BACK_OFF = 3600.0


class Round(NamedTuple):
    """Tokens by adapter key (None: the base's) that were computed in so many seconds."""

    tokens: Mapping[str | None, int]
    seconds: float
    on_copy: bool  # the copy's adapter had all its rows on it, and at least one

    @property
    def total(self) -> int:
        return sum(self.tokens.values())


class Cost(NamedTuple):
    tokens: int
    seconds: float


class Speeds(NamedTuple):
    """Tokens a busy second, of the same rounds."""

    before: float  # without the copy
    now: float


class HotPolicy:
    """Told of every step; asked for an adapter to copy, or what speaks against the copy there is."""

    def __init__(self, window: float = WINDOW, back_off: float = BACK_OFF) -> None:
        self._window, self._back_off = window, back_off
        self._rounds: deque[Round] = deque()  # the last `window` busy seconds
        self._kept = 0.0  # their seconds
        self._open: tuple[bool, Round] | None = None  # a step that the next one may make a round with
        self._busy = 0.0  # seconds since the start
        self._since = 0.0  # seconds since `restart`
        self._before: Mapping[int, Cost] = {}
        self._waits: dict[str, tuple[float, float]] = {}  # adapter -> until when by `_busy`, and that wait

    def stepped(self, tokens: Mapping[str | None, int], seconds: float, merged: bool) -> None:
        """A step took so long; `merged`: it was the copy's."""
        self._busy += seconds
        step = Round(tokens, seconds, merged)
        if self._open is not None:
            was_merged, before = self._open
            if was_merged != merged:
                both = Counter(before.tokens) + Counter(tokens)
                apart = before.tokens.keys().isdisjoint(tokens)
                self._add(Round(both, before.seconds + seconds, apart))
                self._open = None
                return
            self._add(before)
        self._open = merged, step

    def candidate(self) -> str | None:
        """The adapter that dominated for a whole window, unless it is to wait."""
        if self._since < self._window or not self._rounds:
            return None
        shares = self._tokens()
        key, tokens = max(shares.items(), key=lambda item: item[1])
        waits = key is not None and self._waits.get(key, (0.0, 0.0))[0] > self._busy
        return None if waits or tokens < DOMINANT * sum(shares.values()) else key

    def remember(self) -> None:
        """Rounds so far are without a copy: a copy is made now."""
        self._before = _costs(self._rounds)

    def restart(self) -> None:
        """Look at what comes from here on."""
        self._rounds.clear()
        self._open, self._since, self._kept = None, 0.0, 0.0

    def speeds(self) -> Speeds | None:
        """Before the copy and now; None while too little is comparable."""
        now = _costs(each for each in self._rounds if each.on_copy)
        common = [(now[size], self._before[size]) for size in now if size in self._before]
        tokens, seconds = sum(cost.tokens for cost, _ in common), sum(cost.seconds for cost, _ in common)
        if seconds < COMMON * self._window:
            return None
        expected = sum(cost.tokens * before.seconds / before.tokens for cost, before in common)
        return Speeds(tokens / expected, tokens / seconds)

    def is_minor(self, key: str) -> bool:
        """Whether others had most of a whole window's tokens."""
        shares = self._tokens()
        return self._since >= self._window and shares[key] < MINOR * sum(shares.values())

    def back_off(self, key: str) -> None:
        """No copy of this adapter for a while."""
        _, before = self._waits.get(key, (0.0, self._back_off / 2))
        wait = min(2 * before, MOST_BACK_OFF)
        self._waits[key] = self._busy + wait, wait

    def _add(self, found: Round) -> None:
        self._rounds.append(found)
        self._since, self._kept = self._since + found.seconds, self._kept + found.seconds
        while self._kept - self._rounds[0].seconds >= self._window:
            self._kept -= self._rounds.popleft().seconds

    def _tokens(self) -> Counter[str | None]:
        found: Counter[str | None] = Counter()
        for each in self._rounds:
            found.update(each.tokens)
        return found


def _costs(rounds: Iterable[Round]) -> dict[int, Cost]:
    """By size: exact up to 15 tokens, above that within an eighth."""
    found: defaultdict[int, Cost] = defaultdict(lambda: Cost(0, 0.0))
    for each in rounds:
        shift = max(each.total.bit_length() - 4, 0)
        cost = found[each.total >> shift << shift]
        found[each.total >> shift << shift] = Cost(cost.tokens + each.total, cost.seconds + each.seconds)
    return dict(found)
