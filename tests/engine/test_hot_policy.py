"""When an adapter gets a merged copy and when it loses it, by made-up times of steps."""

from __future__ import annotations

import pytest

from veneer.engine.hot_policy import HotPolicy


def run(
    policy: HotPolicy, tokens: dict[str | None, int], seconds: float, steps: int, merged: bool = False
) -> None:
    for _ in range(steps):
        policy.stepped(tokens, seconds, merged)


@pytest.fixture
def policy() -> HotPolicy:
    return HotPolicy(window=10, back_off=20)


def test_one_that_dominates_for_a_whole_window_is_a_candidate(policy: HotPolicy) -> None:
    run(policy, {"a": 9, "b": 1}, 1.0, 10)
    assert policy.candidate() is None  # the last step is not counted yet
    run(policy, {"a": 9, "b": 1}, 1.0, 1)
    assert policy.candidate() == "a"


def test_only_the_last_window_counts(policy: HotPolicy) -> None:
    run(policy, {"b": 10}, 1.0, 50)
    run(policy, {"a": 10}, 1.0, 9)
    assert policy.candidate() is None
    run(policy, {"a": 10}, 1.0, 2)
    assert policy.candidate() == "a"


@pytest.mark.parametrize("tokens", [{"a": 8, "b": 2}, {None: 10}, {"a": 5, None: 5}])
def test_without_a_dominant_adapter_there_is_none(policy: HotPolicy, tokens: dict[str | None, int]) -> None:
    run(policy, tokens, 1.0, 30)
    assert policy.candidate() is None


def test_equal_rounds_are_compared_whatever_the_load(policy: HotPolicy) -> None:
    """Four sequences take 1 s a step, sixteen 2 s; the load is higher with the copy, which changes nothing."""
    run(policy, {"a": 4}, 1.0, 7)
    run(policy, {"a": 16}, 2.0, 2)
    policy.remember()
    policy.restart()
    run(policy, {"a": 4}, 1.0, 1, merged=True)
    run(policy, {"a": 16}, 2.0, 10, merged=True)
    speeds = policy.speeds()
    assert speeds is not None
    assert speeds.now == pytest.approx(speeds.before)


def test_two_steps_that_take_the_place_of_one_are_one_round(policy: HotPolicy) -> None:
    run(policy, {"a": 15, "b": 1}, 2.0, 11)
    policy.remember()
    policy.restart()
    for _ in range(20):
        policy.stepped({"a": 15}, 1.0, True)
        policy.stepped({"b": 1}, 0.5, False)
    speeds = policy.speeds()
    assert speeds is not None
    assert (speeds.before, speeds.now) == pytest.approx((8.0, 16 / 1.5))


def test_nothing_comparable_is_no_verdict(policy: HotPolicy) -> None:
    run(policy, {"a": 4}, 1.0, 11)
    policy.remember()
    policy.restart()
    run(policy, {"a": 4}, 1.0, 2, merged=True)
    assert policy.speeds() is None  # too few
    run(policy, {"a": 9}, 1.0, 12, merged=True)
    assert policy.speeds() is None  # others


def test_sequences_that_began_before_the_copy_are_left_out(policy: HotPolicy) -> None:
    run(policy, {"a": 16}, 2.0, 11)
    policy.remember()
    policy.restart()
    for _ in range(20):
        policy.stepped({"a": 8}, 1.0, True)
        policy.stepped({"a": 8, "b": 1}, 1.5, False)
    run(policy, {"a": 16}, 2.0, 10)
    assert policy.speeds() is None


def test_one_that_is_overtaken_is_minor(policy: HotPolicy) -> None:
    policy.restart()
    run(policy, {"a": 4, "b": 6}, 1.0, 9)
    assert not policy.is_minor("a")
    run(policy, {"a": 4, "b": 6}, 1.0, 3)
    assert policy.is_minor("a")
    assert not policy.is_minor("b")


def test_back_off_doubles(policy: HotPolicy) -> None:
    for wait in (20, 40, 80):
        run(policy, {"a": 10}, 1.0, 12)
        assert policy.candidate() == "a"
        policy.back_off("a")
        run(policy, {"a": 10}, 1.0, wait - 1)
        assert policy.candidate() is None
        run(policy, {"a": 10}, 1.0, 2)
        assert policy.candidate() == "a"
