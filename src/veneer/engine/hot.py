"""The hot adapter: while one adapter dominates, a merged copy of the weights it changes serves it.

    watching -> making (a thread beside the steps) -> checking (one prompt, with and without the copy) -> serving
             -> leaving (its sequences end on it; nobody joins) -> watching

hot_policy.py says when, merged_copy.py makes the copy, the scheduler gives its sequences steps of their own. The
base is only read. When memory runs short the copy goes at once, and its sequences go on with the adapter's slot.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from threading import Event

import msgspec
import torch

from veneer.adapters.program import Program
from veneer.adapters.recipes import digests_of
from veneer.adapters.residency import Residency
from veneer.engine import messages
from veneer.engine.base import Base
from veneer.engine.batch import Batch
from veneer.engine.config import EngineConfig
from veneer.engine.hot_policy import HotPolicy
from veneer.engine.memory import available_memory
from veneer.engine.merged_copy import MergedCopy, copy_bytes, make_copy
from veneer.engine.probe import EffectProbe
from veneer.engine.runner import Runner
from veneer.engine.scheduler import Scheduler
from veneer.errors import AdapterRefused, VeneerError

logger = logging.getLogger(__name__)

MARGIN = 512 << 20  # bytes of host memory that stay free; with less the copy goes
INTERVAL = 1.0  # seconds between two looks at memory and policy


class HotAdapter:
    """Every method is for the step's thread and returns at once. Call `poll` only when no step is under way."""

    def __init__(
        self,
        config: EngineConfig,
        base: Base,
        residency: Residency,
        scheduler: Scheduler,
        runner: Runner,
        probe: EffectProbe,
        *,
        wake: Callable[[], None],
    ) -> None:
        """`wake` is called from another thread when `poll` has news."""
        self._budget, self._format = config.hot_adapter_memory, config.hot_adapter_format
        self._base, self._residency, self._scheduler, self._runner = base, residency, scheduler, runner
        self._probe, self._wake = probe, wake
        self._available = available_memory
        self._policy = HotPolicy()
        self._threads = ThreadPoolExecutor(1, "merged-copy")
        self._calls = (f"hot/{number}" for number in count())
        self._call = ""  # of the probe
        self._job: Future[MergedCopy | None] | None = None
        self._ended = Event()  # the job is for nothing
        self._refused: set[str] = set()  # adapters that can have no copy
        self._freed: list[Future[None]] = []  # done when the copy is gone
        self._looked = -INTERVAL
        self._reason = ""  # why the copy is leaving
        self._steps = self._made = 0
        self._dropped: Counter[str] = Counter()
        self._shown = messages.HotAdapter(state="watching", format=self._format)

    @property
    def key(self) -> str | None:
        """The adapter whose copy is being made, or is there."""
        return self._shown.adapter

    def stepped(self, batch: Batch, seconds: float) -> None:
        """A step took so long."""
        tokens: Counter[str | None] = Counter()
        for item in batch.items:
            tokens[item.sequence.adapter] += item.count
        self._policy.stepped(tokens, seconds, batch.merged)
        self._steps += batch.merged

    def poll(self, submit: Callable[[messages.Generate, bool], None]) -> None:
        """Go on. `submit` queues a request, on the copy or not."""
        now = time.monotonic()
        looks = now - self._looked >= INTERVAL
        if looks:
            self._looked = now
        if self.key is not None and looks and self._available() < MARGIN:
            self._policy.back_off(self.key)
            self._drop_at_once("memory", f"less than {MARGIN} bytes of host memory were free")
        match self._shown.state:
            case "watching" if looks:
                self._watch()
            case "making" if self._job is not None and self._job.done():
                self._take_over(self._job, submit)
            case "checking" if self._probe.done(self._call):
                self._open()
            case "serving" if looks:
                self._judge()
            case "leaving" if not self._scheduler.uses_copy:
                self._free()

    def forget(self, digest: str) -> list[Future[None]]:
        """An adapter is deleted: nobody joins its copy any more. What must be waited for."""
        if self.key is None or digest not in digests_of(self.key):
            return []
        if self._shown.state not in ("serving", "leaving"):
            self._drop_at_once("deleted", "the adapter was deleted")
            return []
        self._leave("deleted", "the adapter was deleted")
        self._freed.append(Future())
        return self._freed[-1:]

    def stats(self) -> messages.HotAdapter:
        speeds = self._policy.speeds() if self._shown.state == "serving" else None
        return msgspec.structs.replace(
            self._shown,
            tokens_per_second_before=None if speeds is None else speeds.before,
            tokens_per_second=None if speeds is None else speeds.now,
            steps=self._steps,
            made=self._made,
            dropped=dict(self._dropped),
        )

    def close(self) -> None:
        """End the thread, at its next site."""
        self._ended.set()
        self._threads.shutdown(cancel_futures=True)

    # ---- states -----------------------------------------------------------------------------------

    def _watch(self) -> None:
        key = self._policy.candidate()
        if key is None or key in self._refused:
            return
        self._policy.remember()
        self._show("making", adapter=key)
        self._ended = Event()
        self._job = self._threads.submit(self._make, key, self._residency.inspect(key), self._ended)
        self._job.add_done_callback(lambda job: self._wake())

    def _take_over(
        self, job: Future[MergedCopy | None], submit: Callable[[messages.Generate, bool], None]
    ) -> None:
        """The copy is made, or was not possible."""
        key, self._job = self.key, None
        assert key is not None
        try:
            copy = job.result()
        except AdapterRefused as error:
            self._refused.add(key)
            self._fail("refused", error.message)
            return
        except Exception as error:
            logger.warning("a merged copy failed", exc_info=error)
            self._policy.back_off(key)
            self._fail("memory" if isinstance(error, MemoryError) else "failed", str(error))
            return
        assert copy is not None  # it ended early only if it is not waited for
        self._runner.copy, self._scheduler.has_copy = copy, True
        self._made += 1
        self._call = next(self._calls)
        self._probe.start(self._call)
        self._show("checking", adapter=key, bytes=copy.bytes, error=copy.error, lost=copy.lost)
        without, on_copy = self._probe.requests(self._call, key)
        try:
            submit(msgspec.structs.replace(without, adapter=key), False)
            submit(on_copy, True)
        except VeneerError as error:
            self._drop_back(error)

    def _open(self) -> None:
        """The copy has answered the probe: sequences may join it."""
        assert self.key is not None
        try:
            difference = self._probe.take(self._call)
        except VeneerError as error:
            self._drop_back(error)
            return
        self._shown = msgspec.structs.replace(self._shown, state="serving", logprob_difference=difference)
        self._scheduler.joining = self.key
        self._policy.restart()
        logger.info(
            "hot adapter %s: a copy of %d bytes in format %s; of its weights relative error %.3g, of the adapter's "
            "change %.3g; log probabilities differ by up to %.3g",
            self.key,
            self._shown.bytes,
            self._format,
            self._shown.error,
            self._shown.lost,
            difference,
        )

    def _judge(self) -> None:
        assert self.key is not None
        speeds = self._policy.speeds()
        if self._policy.is_minor(self.key):
            self._leave("minor", "others have most of the tokens")
        elif speeds is not None and speeds.now <= speeds.before:
            self._policy.back_off(self.key)
            self._leave(
                "slower",
                f"{speeds.now:.1f} tokens/s with the copy, {speeds.before:.1f} before, in equal rounds",
            )

    def _leave(self, reason: str, note: str) -> None:
        """Nobody joins the copy from here on; it is freed when its last sequence has ended."""
        self._scheduler.joining = None
        self._reason = reason
        self._shown = msgspec.structs.replace(self._shown, state="leaving", note=note)

    def _drop_back(self, error: VeneerError) -> None:
        """The probe failed."""
        assert self.key is not None
        self._policy.back_off(self.key)
        self._drop_at_once("failed", error.message)

    def _drop_at_once(self, reason: str, note: str) -> None:
        self._reason = reason
        self._shown = msgspec.structs.replace(self._shown, note=note)
        self._free()

    def _free(self) -> None:
        """Drop the copy. Sequences that are still on it go on without."""
        self._ended.set()
        self._probe.discard(self._call)
        self._scheduler.leave_copy()
        self._runner.copy = None
        self._fail(self._reason, self._shown.note)
        for future in self._freed:
            future.set_result(None)
        self._freed.clear()

    def _fail(self, reason: str, note: str) -> None:
        logger.info("hot adapter %s has no copy (any more): %s", self.key, note)
        self._dropped[reason] += 1
        self._policy.restart()
        self._show("watching", note=f"{self.key}: {note}")

    def _show(self, state: str, **fields: object) -> None:
        self._shown = messages.HotAdapter(state=state, format=self._format, **fields)  # type: ignore[arg-type]

    # ---- on the copy's thread -----------------------------------------------------------------------

    def _make(self, key: str, loaded: Future[Program], ended: Event) -> MergedCopy | None:
        program = loaded.result()
        size = copy_bytes(program, self._base, self._format)
        if size > self._budget:
            raise AdapterRefused(
                f"its copy in format {self._format} needs {size} bytes and --hot-adapter-memory is {self._budget}; "
                "restart the server with more"
            )
        if self._available() < size + MARGIN:
            raise MemoryError(
                f"its copy needs {size} bytes, and {MARGIN} bytes of host memory must stay free"
            )
        with torch.no_grad():
            return make_copy(key, program, self._base, self._format, ended.is_set)
