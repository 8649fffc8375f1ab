"""Merges beside the steps: one thread that does them in order, and what it has to report."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Empty, SimpleQueue

import torch

from veneer.adapters.merge import merge
from veneer.adapters.methods.base import Base
from veneer.adapters.names import split_key
from veneer.adapters.program import Program
from veneer.adapters.recipes import Part, Recipe, parse
from veneer.adapters.registry import lower
from veneer.engine.messages import MergeAdapters, Merged, MergeProgress, WireError
from veneer.errors import MergeCancelled, VeneerError

logger = logging.getLogger(__name__)

INTERVAL = 0.2  # seconds between two reports of progress


class Merger:
    """Takes merges from the step's thread, and has their reports for it. Its own thread calls `wake`."""

    def __init__(self, base: Base, blobs: Path, max_rank: int, wake: Callable[[], None]) -> None:
        self._base, self._blobs, self._max_rank, self._wake = base, blobs, max_rank, wake
        self._reports: SimpleQueue[MergeProgress | Merged] = SimpleQueue()
        self._wanted: set[str] = set()  # calls that are not answered, closed or cancelled
        self._threads = ThreadPoolExecutor(1, "adapter-merge")

    def submit(self, request: MergeAdapters) -> None:
        self._wanted.add(request.call)
        self._threads.submit(self._answer, request)

    def cancel(self, call: str) -> None:
        """End a merge at its next site."""
        self._wanted.discard(call)

    def reports(self) -> list[MergeProgress | Merged]:
        """What there is to report since the last call."""
        found: list[MergeProgress | Merged] = []
        try:
            while True:
                found.append(self._reports.get_nowait())
        except Empty:
            return found

    def close(self) -> None:
        """End what is under way at its next site; merges that did not begin are not done."""
        self._wanted.clear()
        self._threads.shutdown(cancel_futures=True)

    # ---- on the merge's thread --------------------------------------------------------------------

    def _answer(self, request: MergeAdapters) -> None:
        """Do a merge. Nothing it raises ends the thread."""
        try:
            with torch.no_grad():
                report = self._merge(request)
        except VeneerError as error:
            self._report(_failed(request, WireError(error.status, error.code, error.message, error.param)))
        except Exception as error:
            logger.exception("a merge failed")
            message = f"the merge failed: {type(error).__name__}; the server's log has more"
            self._report(_failed(request, WireError(500, VeneerError.code, message)))
        else:
            self._report(report)
        finally:
            self._wanted.discard(request.call)

    def _merge(self, request: MergeAdapters) -> Merged:
        recipe = parse(request.key) or Recipe((Part(request.key, 1.0),))
        last = 0.0

        def progress(done: int, total: int) -> None:
            nonlocal last
            if request.call not in self._wanted:
                raise MergeCancelled
            if done == total or time.monotonic() - last >= INTERVAL:
                last = time.monotonic()
                self._report(MergeProgress(call=request.call, done=done, total=total))

        report = merge(
            recipe,
            [self._program(part.key) for part in recipe.parts],
            self._base,
            self._max_rank,
            Path(request.folder),
            keep_rows=request.keep_rows,
            progress=progress,
        )
        logger.info("merged %s: distance %s from the blend", request.key, report.distance)
        return Merged(call=request.call, distance=report.distance, warnings=list(report.warnings))

    def _program(self, key: str) -> Program:
        digest, task = split_key(key)
        return lower(self._blobs / digest, self._base, self._max_rank, task)

    def _report(self, report: MergeProgress | Merged) -> None:
        self._reports.put(report)
        self._wake()


def _failed(request: MergeAdapters, error: WireError) -> Merged:
    return Merged(call=request.call, error=error)
