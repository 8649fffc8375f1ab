"""A thread that does jobs in their order. Each job's future ends with a value or a `VeneerError`."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from itertools import count
from queue import Empty, PriorityQueue
from typing import Any, TypeVar

import torch

from veneer.errors import EngineUnavailable, VeneerError

logger = logging.getLogger(__name__)
T = TypeVar("T")

_STOP = -1


class Worker:
    """Jobs of a lower `priority` come first, and `wake` is called when one has ended. Submit from one thread."""

    def __init__(self, name: str, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._jobs: PriorityQueue[tuple[int, int, Callable[[], Any], Future[Any]]] = PriorityQueue()
        self._order = count()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, priority: int, work: Callable[[], T], future: Future[T]) -> Future[T]:
        """Have `work` done and its result put into `future`. Returns at once."""
        # A callback runs when the result is there to be seen, and one that raises is only logged.
        future.add_done_callback(lambda _: self._wake())
        if self._closed:
            future.set_exception(_closing())
        else:
            self._jobs.put((priority, next(self._order), work, future))
        return future

    def close(self) -> None:
        """End the thread. Jobs not begun fail; one that hangs is left to its thread, which is a daemon."""
        self._closed = True
        with suppress(Empty):
            while True:
                _, _, _, future = self._jobs.get_nowait()
                if future.set_running_or_notify_cancel():
                    future.set_exception(_closing())
        self._jobs.put((_STOP, next(self._order), lambda: None, Future()))
        self._thread.join(timeout=5)

    def _run(self) -> None:
        while True:
            priority, _, work, future = self._jobs.get()
            if priority == _STOP:
                return
            with torch.no_grad():
                _finish(future, work)


def _finish(future: Future[T], work: Callable[[], T]) -> None:
    """Do a job. Nothing it raises ends the thread."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(work())
    except VeneerError as error:
        future.set_exception(error)
    except Exception as error:
        logger.exception("an adapter could not be loaded")
        future.set_exception(
            VeneerError(f"the adapter could not be loaded: {type(error).__name__}; the server's log has more")
        )


def _closing() -> EngineUnavailable:
    return EngineUnavailable("the engine is shutting down; try again when it is back")
