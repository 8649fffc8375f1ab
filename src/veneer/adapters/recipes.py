"""Recipes: which adapters are put together, with which weights, and how. Imports no torch.

A recipe has one canonical form and one key, so whoever asks for the same gets the same place on the device, the
same KV pages and the same prefix cache, in whatever order its parts were named:

    key    METHOD(PART*WEIGHT+PART*WEIGHT;option=value;…)      PART: a key of names.py
           linear(1f…*0.5+9c…/2*-0.25;rank=16)

A recipe that is one adapter as it is has that adapter's own key.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple, get_args

from veneer.adapters.names import split_key
from veneer.errors import InvalidRequest

Method = Literal["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
Sign = Literal["total", "frequency"]
METHODS: tuple[str, ...] = get_args(Method)
SIGNS: tuple[str, ...] = get_args(Sign)
ELECTS = frozenset({"ties", "dare_ties"})  # a sign for each entry, of which the others are left out
DRAWS = frozenset({"dare_linear", "dare_ties"})  # random entries, so that they need a seed
PARTS_LIMIT = 16
WEIGHT_LIMIT = 1000.0  # of either sign; more is a slip, and overflows 16 bits
SEED_LIMIT = 1 << 63


class Part(NamedTuple):
    """An adapter in a recipe."""

    key: str  # of names.py
    weight: float


class Recipe(NamedTuple):
    """What is made of several adapters. Make it with `recipe`, which checks it and brings it to its one form.

    Without density, sign and seed where the method does not use them: they are what they are here.
    """

    parts: tuple[Part, ...]
    method: str = "linear"  # of METHODS
    density: float = 1.0  # of the entries of a change, how many stay
    sign: str = "total"  # of SIGNS
    seed: int = 0
    rank: int | None = None  # products of a higher rank are cut to this one

    @property
    def key(self) -> str | None:
        """The engine's name of it; None when it is the base."""
        if not self.parts:
            return None
        if self.is_plain:
            return self.parts[0].key
        options = [("density", f"{self.density!r}")] if self.method != "linear" else []
        options += [("sign", self.sign)] if self.method in ELECTS else []
        options += [("seed", str(self.seed))] if self.method in DRAWS else []
        options += [("rank", str(self.rank))] if self.rank is not None else []
        parts = "+".join(f"{part.key}*{part.weight!r}" for part in self.parts)
        return f"{self.method}({';'.join([parts, *(f'{name}={value}' for name, value in options)])})"

    @property
    def is_plain(self) -> bool:
        """Whether it is one adapter as it is."""
        one = len(self.parts) == 1 and self.parts[0].weight == 1
        return one and self.method == "linear" and self.rank is None


def recipe(
    parts: Iterable[Part],
    method: str = "linear",
    *,
    density: float = 1.0,
    sign: str = "total",
    seed: int = 0,
    rank: int | None = None,
) -> Recipe:
    """The canonical recipe. In a sum the weights of one adapter that is there twice add up, and 0 leaves it out.

    Raises:
        InvalidRequest: a number is out of its range, or there are too many parts or none.
    """
    found = [Part(key, weight + 0.0) for key, weight in parts]  # + 0.0: no negative zero
    _check(found, method, density, sign, seed, rank)
    if density == 1 and (method not in ELECTS or len(found) == 1):
        method = "linear"  # everything stays, so that nothing is drawn, left out or elected
    if method == "linear":
        found = _added_up(found)
        _check_weights(found)
    return Recipe(
        tuple(sorted(found)),
        method,
        1.0 if method == "linear" else density,
        sign if method in ELECTS else "total",
        seed if method in DRAWS else 0,
        rank,
    )


@lru_cache(maxsize=4096)
def parse(key: str) -> Recipe | None:
    """The recipe of a key; None for the key of an adapter. Raises ValueError for what is no key."""
    method, bracket, rest = key.partition("(")
    if not bracket:
        return None
    parts, *options = rest.removesuffix(")").split(";")
    fields = dict(option.split("=") for option in options)
    found = [part.split("*") for part in parts.split("+")] if parts else []
    return recipe(
        [Part(name, float(weight)) for name, weight in found],
        method,
        density=float(fields.get("density", 1)),
        sign=fields.get("sign", "total"),
        seed=int(fields.get("seed", 0)),
        rank=int(fields["rank"]) if "rank" in fields else None,
    )


def digests_of(key: str) -> frozenset[str]:
    """The adapters that something with this key is made of."""
    found = parse(key)
    return (
        frozenset(split_key(part.key)[0] for part in found.parts) if found else frozenset({split_key(key)[0]})
    )


def is_blend(key: str) -> bool:
    """Whether a key is that of a recipe and not of an adapter."""
    return "(" in key


def _added_up(parts: Sequence[Part]) -> list[Part]:
    weights: dict[str, list[float]] = {}
    for key, weight in parts:
        weights.setdefault(key, []).append(weight)
    return [Part(key, total) for key, each in weights.items() if (total := math.fsum(each))]


def _check(
    parts: Sequence[Part], method: str, density: float, sign: str, seed: int, rank: int | None
) -> None:
    if method not in METHODS:
        raise InvalidRequest(
            f"{method!r} is no way to merge; there are {', '.join(METHODS)}.", param="method"
        )
    if sign not in SIGNS:
        raise InvalidRequest(
            f"{sign!r} is no way to elect a sign; there are {', '.join(SIGNS)}.", param="majority_sign_method"
        )
    if not 1 <= len(parts) <= PARTS_LIMIT:
        raise InvalidRequest(
            f"{len(parts)} adapters were named; a blend has 1 to {PARTS_LIMIT}. Merge some of them first.",
            param="adapters",
        )
    _check_weights(parts)
    if not 0 < density <= 1:
        raise InvalidRequest(f"density {density} must be above 0 and at most 1", param="density")
    if not 0 <= seed < SEED_LIMIT:
        raise InvalidRequest(f"seed {seed} must be from 0 to {SEED_LIMIT - 1}", param="seed")
    if rank is not None and rank < 1:
        raise InvalidRequest(f"max_rank {rank} must be at least 1", param="max_rank")


def _check_weights(parts: Sequence[Part]) -> None:
    for key, weight in parts:
        if not abs(weight) <= WEIGHT_LIMIT:
            rule = f"it must be from {-WEIGHT_LIMIT:g} to {WEIGHT_LIMIT:g}"
            raise InvalidRequest(f"weight {weight} of adapter {key[:12]}: {rule}.", param="adapters")
