"""What becomes of encoded rows that are longer than max_length. No torch here.

    fitted = fit(encoded, max_length, "keep_end", header=encoder.header)
    fitted.rows, fitted.places, fitted.cut, fitted.dropped

Pairs are cut by `fit_pairs`, plain texts by `pieces`. The policies: `refuse` says which rows are too long; `drop`
leaves them out; `keep_end` and `keep_start` keep that part of the prompt.

The rule for these: the prompt gives way to the answer, but not below half of max_length. What of the answer has no
room then is cut off at its end, and its end-of-turn token with it; so an answer is never cut away wholly.
`keep_start` also keeps the prompt's last `header` tokens, which close the question and open the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, Literal, NamedTuple, TypeVar

from veneer.errors import InvalidRequest
from veneer.training.data.encoding import Encoded, EncodedPair

Policy = Literal["refuse", "drop", "keep_start", "keep_end"]

_Item = TypeVar("_Item", Encoded, EncodedPair)


class Fitted(NamedTuple, Generic[_Item]):
    """What is trained on. `places` says for each of `rows` which of the given ones it was."""

    rows: list[_Item]
    places: list[int]
    cut: int
    dropped: list[str]  # where they were


def fit(rows: Sequence[Encoded], max_length: int, policy: Policy, *, header: int = 0) -> Fitted[Encoded]:
    """Rows of at most `max_length` tokens, by the rule above.

    Raises:
        InvalidRequest: rows are longer and the policy is `refuse`; or no row is left, or max_length leaves the
            prompt no room for its header.
    """

    def shorten(row: Encoded) -> Encoded:
        return _shorten(row, _room(row, max_length), max_length, policy, header)

    return _fit(rows, max_length, policy, shorten)


def fit_pairs(
    pairs: Sequence[EncodedPair], max_length: int, policy: Policy, *, header: int = 0
) -> Fitted[EncodedPair]:
    """As `fit`; both answers keep the same prompt, which gives way to the longer one."""

    def shorten(pair: EncodedPair) -> EncodedPair:
        room = min(_room(row, max_length) for row in pair)
        chosen, rejected = (_shorten(row, room, max_length, policy, header) for row in pair)
        if chosen.ids == rejected.ids:
            raise InvalidRequest(
                f"{chosen.where}: both answers are the same after cutting to max_length {max_length}; raise it, or "
                "use `drop`"
            )
        return EncodedPair(chosen, rejected)

    return _fit(pairs, max_length, policy, shorten)


def _fit(
    rows: Sequence[_Item], max_length: int, policy: Policy, shorten: Callable[[_Item], _Item]
) -> Fitted[_Item]:
    long = [place for place, row in enumerate(rows) if row.length > max_length]
    if long and policy == "refuse":
        first = rows[long[0]]
        raise InvalidRequest(
            f"{len(long)} rows are longer than max_length {max_length}, first {_where(first)} with "
            f"{first.length} tokens; raise max_length, shorten them, or choose what else to do with `overlong`"
        )
    if policy == "drop":
        if rows and len(long) == len(rows):
            raise InvalidRequest(f"all {len(rows)} rows are longer than max_length {max_length}; raise it")
        left_out = set(long)
        places = [place for place in range(len(rows)) if place not in left_out]
        return Fitted([rows[at] for at in places], places, 0, [_where(rows[at]) for at in long])
    fitted = [shorten(row) if row.length > max_length else row for row in rows]
    return Fitted(fitted, list(range(len(rows))), len(long), [])


def _where(row: Encoded | EncodedPair) -> str:
    return row.where if isinstance(row, Encoded) else row.chosen.where


def _room(row: Encoded, max_length: int) -> int:
    """How many tokens of the prompt stay."""
    return min(len(row.prompt), max(max_length - len(row.answer), max_length // 2))


def _shorten(row: Encoded, room: int, max_length: int, policy: Policy, header: int) -> Encoded:
    if room <= header < len(row.prompt):
        raise InvalidRequest(
            f"{row.where}: max_length {max_length} leaves {room} tokens for the prompt, whose last {header} open "
            "the answer; raise max_length"
        )
    last = min(header, room) if policy == "keep_start" else room
    gap = slice(room - last, len(row.prompt) - last)  # what is cut out
    prompt = row.prompt[: gap.start] + row.prompt[gap.stop :]
    mask = row.mask[: gap.start] + row.mask[gap.stop :]
    return Encoded(prompt, row.answer[: max_length - room], mask if any(mask) else b"", row.where)


def pieces(texts: Sequence[Encoded], max_length: int) -> Fitted[Encoded]:
    """Plain texts as pieces of at most `max_length` tokens; `cut` counts the texts that have several.

    Each piece begins with the last token of the one before, so every token but the text's first is learnt once.

    Raises:
        InvalidRequest: max_length is less than two.
    """
    if max_length < 2:
        raise InvalidRequest(f"max_length is {max_length}; plain text needs at least 2 tokens a piece")
    found: list[Encoded] = []
    places: list[int] = []
    for place, text in enumerate(texts):
        for start in range(0, max(1, len(text.answer) - 1), max_length - 1):
            found.append(Encoded([], text.answer[start : start + max_length], b"", text.where))
            places.append(place)
    return Fitted(found, places, sum(text.length > max_length for text in texts), [])
