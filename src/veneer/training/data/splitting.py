"""Training, validation and test rows, and that none is asked in one part and learnt in another.

    split(rows, seed=0, validation=0.1, test=0.1)      one file into three parts
    split_rows(rows, 0.1, seed=0)                      one file into two
    check_apart(training, held_out)                    refuses rows of given files that are in both
    drop_leaks(training, held_out)                     leaves them out of training, and says which

Rows belong together when one asks what the other learns (`Row.learnt`): the same question, whatever its case and
spacing, or one that is an earlier turn of a longer conversation. Texts belong together when they are equal.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

from veneer.errors import InvalidRequest
from veneer.training.data.formats import Pair, Row, Text

_Example = TypeVar("_Example", Row, Text, Pair)


class Split(NamedTuple, Generic[_Example]):
    training: list[_Example]
    validation: list[_Example]
    test: list[_Example]


def split(
    rows: Sequence[_Example], *, seed: int, validation: float = 0.0, test: float = 0.0
) -> Split[_Example]:
    """Split into parts; `validation` and `test` are the shares of the groups of rows that belong together.

    The choice depends on what the rows ask and the seed alone, not on their order. A part that is asked for is
    not empty, nor is training. More validation rows do not change which rows are the test.

    Raises:
        InvalidRequest: the shares leave nothing to train on, or there are fewer groups than parts.
    """
    if min(validation, test) < 0 or validation + test >= 1:
        raise InvalidRequest(
            f"the shares for validation ({validation}) and test ({test}) must be at least 0 and together below 1"
        )
    groups = _groups(rows)
    names = sorted(set(groups), key=lambda key: hashlib.sha256(f"{seed}\0{key}".encode()).digest())
    parts = 1 + (validation > 0) + (test > 0)
    if len(names) < parts:
        raise InvalidRequest(
            f"the data asks only {len(names)} different question{'s' * (len(names) != 1)}, too few for {parts} "
            "parts that share none; add rows"
        )
    tests = _count(test, len(names), parts - 1)
    checks = _count(validation, len(names) - tests, 1, of=len(names))
    part_of = {name: 2 if at < tests else 1 if at < tests + checks else 0 for at, name in enumerate(names)}
    found: Split[_Example] = Split([], [], [])
    for row, group in zip(rows, groups, strict=True):
        found[part_of[group]].append(row)
    return found


def _count(share: float, groups: int, left_over: int, of: int | None = None) -> int:
    """At least one, and `left_over` groups remain for the other parts."""
    return min(groups - left_over, max(1, round((of or groups) * share))) if share > 0 else 0


def _groups(rows: Sequence[_Example]) -> list[str]:
    """For every row the least question of its group."""
    learnt = [row.learnt for row in rows]
    keys = [questions[-1] for questions in learnt]
    parent = {key: key for key in keys}

    def root(key: str) -> str:
        while parent[key] != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    for key, questions in zip(keys, learnt, strict=True):
        for question in questions:
            if question in parent:  # otherwise no row asks it
                least, other = sorted((root(key), root(question)))
                parent[other] = least
    return [root(key) for key in keys]


def split_rows(rows: Sequence[_Example], fraction: float, seed: int) -> tuple[list[_Example], list[_Example]]:
    """Training and held-out rows; as `split`."""
    parts = split(rows, seed=seed, test=fraction)
    return parts.training, parts.test


def check_apart(training: Sequence[_Example], held_out: Sequence[_Example]) -> None:
    """Refuse held-out rows that are also trained on.

    Raises:
        InvalidRequest: how many there are, and the first.
    """
    leaks = _leaks(training, held_out)
    if leaks:
        where, trained = leaks[0]
        others = f" (and {len(leaks) - 1} more rows)" if len(leaks) > 1 else ""
        raise InvalidRequest(
            f"{where} asks the same as {trained}, which is trained on, so it would measure memory{others}; remove "
            "it from one of the files"
        )


def _leaks(training: Sequence[_Example], held_out: Sequence[_Example]) -> list[tuple[str, str]]:
    seen = {key: row.where for row in training for key in row.learnt}
    return [(row.where, seen[key]) for row in held_out if (key := row.key) in seen]


class Kept(NamedTuple, Generic[_Example]):
    rows: list[_Example]
    dropped: list[str]  # where the others were


def drop_leaks(training: Sequence[_Example], held_out: Sequence[_Example]) -> Kept[_Example]:
    """The training rows that learn nothing of what held-out rows ask; those stay comparable between runs.

    Raises:
        InvalidRequest: no row is left.
    """
    asked = {row.key for row in held_out}
    leaking = [not asked.isdisjoint(row.learnt) for row in training]
    kept = [row for row, leaks in zip(training, leaking, strict=True) if not leaks]
    if not kept and training:
        raise InvalidRequest("every training row is also held out; give other rows to train on")
    return Kept(kept, [row.where for row, leaks in zip(training, leaking, strict=True) if leaks])
