"""How much of the processor a training gets while requests run beside it: all of it when there are none.

The training calls `turn` between layers, so that it holds the processor for no longer than one. With requests under
way it waits there for as long as its share leaves to others. On the CPU the share is the one configured. On a GPU a
training's kernels slow the steps that run beside them rather than make them wait, so there the share follows the
time between tokens: it halves when the slowest steps take over `latency` times what a step takes without the
training, and creeps up while they do not.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from veneer.training.control import Stopped

LEAST_SHARE = 0.02
WINDOW = 100  # steps that a change of the share is decided on
_GAIN = 0.02


class Governor:
    """Shared by the thread of the steps, which reports them, and that of the training, which takes turns."""

    def __init__(
        self,
        share: float,
        latency: float | None = None,
        synchronize: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`latency`: bound of the slowest steps over the usual one alone; None keeps the share. `synchronize`
        waits for the device to have done what the training launched."""
        self.share = share
        self._latency = latency
        self._most = share if latency is None else 1.0
        self._synchronize = synchronize
        self._clock = clock
        self._changed = threading.Condition()
        self._serving = False
        self._stopping = False
        self._working = False  # the training is between two turns
        self._worked_in_step = False
        self._resumed = clock()
        self._alone: deque[float] = deque(maxlen=WINDOW)  # seconds of steps without the training
        self._beside: list[float] = []

    # ---- the steps' thread ------------------------------------------------------------------------

    def serving(self, active: bool) -> None:
        """Whether requests are under way."""
        if active != self._serving:
            with self._changed:
                self._serving = active
                self._changed.notify_all()

    def stepped(self, seconds: float) -> None:
        """A step took so long."""
        if self._latency is None:
            return
        beside, self._worked_in_step = self._worked_in_step or self._working, self._working
        if not beside:
            self._alone.append(seconds)
            return
        self._beside.append(seconds)
        if len(self._beside) >= WINDOW:
            self._decide()

    def _decide(self) -> None:
        assert self._latency is not None
        slow = sorted(self._beside)[-max(1, WINDOW // 100)]
        self._beside.clear()
        if not self._alone:
            self.share = max(LEAST_SHARE, self.share / 2)  # so that there are steps without it
            return
        usual = sorted(self._alone)[len(self._alone) // 2]
        if slow > self._latency * usual:
            self.share = max(LEAST_SHARE, self.share / 2)
        else:
            self.share = min(self._most, self.share + _GAIN)

    # ---- the training's thread --------------------------------------------------------------------

    def begin(self) -> None:
        """A training begins."""
        with self._changed:
            self._stopping = False
        self._resumed = self._clock()
        self._working = self._worked_in_step = True

    def end(self) -> None:
        self._working = False

    def stop(self) -> None:
        """Let the training's next turn raise Stopped. Called from any thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    def turn(self) -> None:
        """Wait until the training may go on. Raises Stopped."""
        if self._serving:
            self._synchronize()
            self._working = False
            worked = self._clock() - self._resumed
            self._wait(worked * (1 - self.share) / self.share)
            self._working = self._worked_in_step = True
        if self._stopping:
            raise Stopped
        self._resumed = self._clock()

    def _wait(self, seconds: float) -> None:
        """So long, but no longer than requests are under way."""
        ends = self._clock() + seconds
        with self._changed:
            while self._serving and not self._stopping and (left := ends - self._clock()) > 0:
                self._changed.wait(left)
