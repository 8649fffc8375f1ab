"""Metrics of rows, how they add up, their intervals, and the tests of differences, against published values."""

from __future__ import annotations

import itertools
import math

import pytest

from veneer.training.evaluation.confidence import agresti_min, compare, mcnemar, measure, sign_flip, wilson
from veneer.training.evaluation.metrics import (
    Score,
    exact_match,
    most_likely,
    normalize,
    normalized_match,
    perplexity,
    shown,
    token_f1,
    total,
)


def shares(*hits: int) -> list[Score]:
    return [Score(hit) for hit in hits]


# ---- metrics -------------------------------------------------------------------------------------


def test_exact_match_ignores_surrounding_white_space_only() -> None:
    assert exact_match(" Yes.\n", "Yes.")
    assert not exact_match("yes.", "Yes.")
    assert not exact_match("Yes", "Yes.")


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Cat, an\tAnimal!", "cat animal"),
        ("theatre anthem a-b", "theatre anthem ab"),
        ("a the an", ""),
        ("1.5", "15"),
        ("Éa “x”", "éa “x”"),
    ],
)
def test_normalize_is_squads(text: str, normal: str) -> None:
    assert normalize(text) == normal
    assert normalized_match(text, normal)


@pytest.mark.parametrize(
    ("answer", "expected", "f1"),
    [
        ("the cat sat", "cat sat", 1.0),
        ("cat cat dog", "cat dog dog", 2 / 3),  # one cat and one dog are shared
        ("one two three four", "one", 0.4),
        ("red", "blue", 0.0),
        ("", "blue", 0.0),
        ("the", "a", 1.0),
    ],
)
def test_token_f1(answer: str, expected: str, f1: float) -> None:
    assert token_f1(answer, expected) == pytest.approx(f1)


def test_perplexity_of_rows_is_that_of_their_tokens() -> None:
    certain, even = Score(0.0, 3), Score(math.log(0.5) * 2, 2)
    assert total("perplexity", [even]) == pytest.approx(2)
    assert total("perplexity", [certain, even]) == pytest.approx(2 ** (2 / 5))
    assert perplexity(-1e9, 1) == math.exp(700)


def test_the_most_likely_choice_raw_and_by_length() -> None:
    assert most_likely([-3.0, -2.0, -2.0]) == 1
    assert most_likely([-3.0, -2.0], [6, 2]) == 0


def test_values_for_people() -> None:
    assert shown("exact_match", 0.9549) == "95.5 %"
    assert shown("perplexity", 12.345) == "12.35"


# ---- intervals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hits", "rows", "low", "high"),
    [  # Newcombe (1998), Statistics in Medicine 17, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson(hits: int, rows: int, low: float, high: float) -> None:
    assert wilson(hits, rows) == pytest.approx((low, high), abs=5e-5)
    assert wilson(rows - hits, rows) == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_mcnemar_is_the_binomial_test() -> None:
    assert mcnemar(0, 0) == 1
    assert mcnemar(0, 5) == 2 / 32
    assert mcnemar(5, 0) == 2 / 32
    assert mcnemar(3, 3) == 1
    assert mcnemar(1, 7) == pytest.approx(2 * (1 + 8) / 256)
    assert mcnemar(400, 600) == pytest.approx(2.7e-10, rel=0.05)  # sums to 2 ** 1000


def test_agresti_min_holds_and_is_never_a_point() -> None:
    low, high = agresti_min(0, 0, 10)
    assert low == -high < 0
    # by hand: 12 better, 3 worse of 50, each cell plus a half
    value = (12.5 - 3.5) / 52
    spread = 1.959964 * math.sqrt(16 - 81 / 52) / 52
    assert agresti_min(12, 3, 50) == pytest.approx((value - spread, value + spread))
    assert agresti_min(50, 0, 50)[1] == 1


def test_sign_flip_agrees_with_all_flips() -> None:
    gains = [0.5, 0.1, -0.2, 0.4, 0.3, 0.0, 0.25]
    flips = [
        sum(s * g for s, g in zip(signs, gains, strict=True))
        for signs in itertools.product((1, -1), repeat=7)
    ]
    exact = sum(abs(flip) >= sum(gains) - 1e-12 for flip in flips) / len(flips)
    assert sign_flip(gains) == pytest.approx(exact, abs=0.01)
    assert sign_flip([0.0, 0.0]) == 1
    assert sign_flip([1.0] * 40) == 1 / 10_000
    assert sign_flip(gains) == sign_flip(gains)


def test_the_bootstrap_is_near_the_normal_interval_of_a_mean() -> None:
    values = [((7 * place) % 100) / 100 for place in range(100)]
    found = measure("token_f1", [Score(value) for value in values])
    spread = 1.96 * math.sqrt(sum((value - 0.495) ** 2 for value in values) / 100) / 10
    assert found.value == pytest.approx(0.495)
    assert (found.low, found.high) == pytest.approx((0.495 - spread, 0.495 + spread), abs=0.005)
    assert found == measure("token_f1", [Score(value) for value in values])


def test_measure_of_shares_is_wilsons() -> None:
    assert measure("exact_match", shares(1, 0, 1, 1)) == (0.75, *wilson(3, 4), 4)


def test_perplexity_has_an_interval() -> None:
    scores = [Score(-0.5 * tokens - place % 3, tokens) for place, tokens in enumerate(range(5, 45))]
    found = measure("perplexity", scores)
    assert found.low < found.value < found.high
    assert measure("perplexity", [Score(-1e9, 1)] * 3)[:3] == pytest.approx((math.exp(700),) * 3)


# ---- differences ---------------------------------------------------------------------------------


def test_shares_are_compared_by_rows() -> None:
    found = compare("exact_match", shares(0, 0, 0, 1, 1), shares(1, 1, 0, 1, 0))
    assert found.value == pytest.approx(0.2)
    assert (found.better, found.worse, found.test) == (2, 1, "McNemar exact")
    assert found.p_value == mcnemar(2, 1) == 1
    assert not found.significant
    assert compare("exact_match", shares(*[0] * 8), shares(*[1] * 8)).significant


def test_a_small_steady_gain_is_found_in_pairs_though_the_intervals_overlap() -> None:
    first = [Score(place / 50) for place in range(50)]
    second = [Score(min(1.0, score.value + 0.02)) for score in first]
    a, b = measure("token_f1", first), measure("token_f1", second)
    assert a.high > b.low
    found = compare("token_f1", first, second)
    assert found.significant
    assert 0 < found.low < found.value < found.high


def test_less_perplexity_is_better_for_rows() -> None:
    first = [Score(-2.0 * tokens, tokens) for tokens in range(4, 24)]
    second = [Score(score.value + 1, score.weight) for score in first]
    found = compare("perplexity", first, second)
    assert found.value < 0
    assert found.high < 0
    assert (found.better, found.worse) == (20, 0)
    assert found.significant


def test_equal_models_do_not_differ() -> None:
    for metric in ("exact_match", "token_f1"):
        found = compare(metric, shares(1, 0, 1), shares(1, 0, 1))
        assert (found.value, found.p_value, found.better, found.worse) == (0, 1, 0, 0)
