"""Recipes: one form and one key for what is the same, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from veneer.adapters.recipes import Part, digests_of, is_blend, parse, recipe
from veneer.errors import InvalidRequest

A, B = Part("a" * 64, 0.5), Part(f"{'b' * 64}/2", -1.25)


def test_the_order_of_parts_does_not_matter() -> None:
    assert recipe([A, B]).key == recipe([B, A]).key == f"linear({'a' * 64}*0.5+{'b' * 64}/2*-1.25)"


def test_an_adapter_named_twice_has_the_sum_of_its_weights() -> None:
    assert recipe([A, B, A]) == recipe([B, A._replace(weight=1.0)])
    assert recipe([A, A]).key == A.key  # 0.5 + 0.5: the adapter as it is
    assert recipe([A, A._replace(weight=-0.5)]).key is None  # the base
    tenth = [A._replace(weight=0.1)] * 10
    assert recipe(tenth).key == A.key  # rounding does not make another adapter of it


def test_one_adapter_as_it_is_has_its_own_key() -> None:
    one = A._replace(weight=1.0)
    assert recipe([one]).is_plain
    for method in (
        "ties",
        "dare_linear",
        "dare_ties",
        "magnitude_prune",
    ):  # everything stays, nothing to elect
        assert recipe([one], method, density=1.0).key == A.key
    assert recipe([one], rank=4).key == f"linear({A.key}*1.0;rank=4)"
    assert not is_blend(A.key)
    assert parse(A.key) is None


@pytest.mark.parametrize(
    "made",
    [
        recipe([A, B]),
        recipe([A], rank=3),
        recipe([A, B, A], "ties", density=0.2, sign="frequency", seed=7),
        recipe([A, B], "dare_linear", density=1 / 3, seed=2**62),
        recipe([A, B], "dare_ties", density=0.25, rank=9),
        recipe([A, B], "magnitude_prune", density=1e-5),
        recipe([A._replace(weight=1e-300), B._replace(weight=1000.0)]),
    ],
    ids=lambda made: f"{made.method}, {len(made.parts)}",
)
def test_a_key_says_all_of_its_recipe(made: Any) -> None:
    assert made.key is not None
    assert is_blend(made.key)
    assert parse(made.key) == made
    assert digests_of(made.key) == {part.key.partition("/")[0] for part in made.parts}


def test_what_a_method_does_not_use_makes_no_other_key() -> None:
    assert recipe([A, B], seed=5, sign="frequency") == recipe([A, B])
    assert recipe([A, B], "magnitude_prune", density=0.5, seed=5) == recipe(
        [A, B], "magnitude_prune", density=0.5
    )
    ties = recipe([A, B], "ties", density=0.5)
    assert ties.key != recipe([A, B], "ties", density=0.5, sign="frequency").key
    dare = recipe([A, B], "dare_linear", density=0.5)
    assert dare.key != recipe([A, B], "dare_linear", density=0.5, seed=1).key


def test_the_sign_of_a_zero_makes_no_other_key() -> None:
    zero = [A._replace(weight=-0.0), B]
    assert (
        recipe(zero, "ties", density=0.5).key == recipe([A._replace(weight=0.0), B], "ties", density=0.5).key
    )
    assert recipe(zero) == recipe([B])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"method": "slerp"}, "method"),
        ({"sign": "loudest"}, "majority_sign_method"),
        ({"method": "ties", "density": 0.0}, "density"),
        ({"method": "ties", "density": 1.5}, "density"),
        ({"method": "ties", "density": float("nan")}, "density"),
        ({"seed": -1}, "seed"),
        ({"rank": 0}, "max_rank"),
    ],
)
def test_numbers_out_of_range_are_refused(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        recipe([A, B], **fields)
    assert refused.value.param == param


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), 1001.0, -1001.0])
def test_weights_out_of_range_are_refused(weight: float) -> None:
    with pytest.raises(InvalidRequest, match="from -1000 to 1000"):
        recipe([A._replace(weight=weight)])


def test_weights_that_add_up_to_too_much_are_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"weight 1200\.0"):
        recipe([A._replace(weight=600.0)] * 2)


@pytest.mark.parametrize("count", [0, 17])
def test_how_many_parts_there_may_be(count: int) -> None:
    with pytest.raises(InvalidRequest, match="1 to 16"):
        recipe([A] * count)
