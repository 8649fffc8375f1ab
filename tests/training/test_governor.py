"""A training's share of the processor: on a clock of the test's own, and between two real threads."""

from __future__ import annotations

import threading

import pytest

from veneer.training.control import Stopped
from veneer.training.governor import LEAST_SHARE, WINDOW, Governor


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Watched(Governor):
    """Notes how long it would wait, and waits on the test's clock."""

    def __init__(self, clock: Clock, share: float, latency: float | None = None) -> None:
        super().__init__(share, latency, clock=clock)
        self.waits: list[float] = []
        self._test_clock = clock

    def _wait(self, seconds: float) -> None:
        self.waits.append(seconds)
        self._test_clock.now += seconds


@pytest.mark.parametrize(("share", "wait"), [(0.5, 2.0), (0.25, 6.0), (1.0, 0.0)])
def test_beside_requests_the_training_works_for_its_share_of_the_time(share: float, wait: float) -> None:
    clock = Clock()
    governor = Watched(clock, share)
    governor.begin()
    governor.serving(True)
    for _ in range(3):
        clock.now += 2.0
        governor.turn()
    assert governor.waits == pytest.approx([wait] * 3)


def test_without_requests_it_never_waits() -> None:
    clock = Clock()
    governor = Watched(clock, 0.1)
    governor.begin()
    clock.now += 5.0
    governor.turn()
    governor.serving(True)
    governor.serving(False)
    governor.turn()
    assert governor.waits == []


def test_the_wait_ends_with_the_requests_and_with_a_stop() -> None:
    governor = Governor(1e-6)  # it would wait for hours
    governor.begin()
    governor.serving(True)
    ended = threading.Event()
    errors: list[BaseException] = []

    def train() -> None:
        try:
            governor.turn()
            ended.set()
            while True:
                governor.turn()
        except Stopped as error:
            errors.append(error)

    thread = threading.Thread(target=train)
    thread.start()
    governor.serving(False)
    assert ended.wait(10)
    governor.serving(True)
    governor.stop()
    thread.join(10)
    assert not thread.is_alive()
    assert len(errors) == 1


def test_a_stop_does_not_reach_the_next_training() -> None:
    governor = Governor(0.5)
    governor.begin()
    governor.stop()
    with pytest.raises(Stopped):
        governor.turn()
    governor.begin()
    governor.turn()


def steps(governor: Watched, clock: Clock, alone: float, beside: float) -> None:
    """A window of steps beside the training, and some without it."""
    for _ in range(WINDOW):
        governor._working = False
        governor._worked_in_step = False
        governor.stepped(alone)
        governor._working = True
        governor.stepped(beside)


def test_the_share_follows_the_time_between_tokens() -> None:
    clock = Clock()
    governor = Watched(clock, 0.5, latency=1.5)
    governor.begin()
    steps(governor, clock, alone=0.010, beside=0.020)
    assert governor.share == 0.25
    for _ in range(20):
        steps(governor, clock, alone=0.010, beside=0.020)
    assert governor.share == LEAST_SHARE
    for _ in range(100):
        steps(governor, clock, alone=0.010, beside=0.012)
    assert governor.share == 1.0
