"""The HTTP process's side of the engine: requests and their answers, and restarts when the engine dies.

Everything runs on one asyncio loop and nothing here blocks it. Every request has its own queue, so a slow
reader delays nobody else. Imports no torch.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import shutil
import sys
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, Self

import msgspec
import zmq.asyncio

from veneer.adapters.names import split_key
from veneer.engine.child import EngineChild
from veneer.engine.config import EngineConfig
from veneer.engine.messages import (
    AdapterChecked,
    AdapterInfo,
    Cancel,
    CancelMerge,
    CheckAdapter,
    CheckBlend,
    Done,
    DropAdapter,
    EngineInfo,
    Generate,
    JobReport,
    MergeAdapters,
    Merged,
    MergeProgress,
    Outputs,
    PinAdapter,
    Ready,
    Reply,
    Request,
    SamplingParams,
    SequenceOutput,
    StartJob,
    Stats,
    StopJob,
    WireError,
)
from veneer.errors import DeadlineExceeded, EngineUnavailable, VeneerError, from_wire

log = logging.getLogger(__name__)

Call = CheckAdapter | CheckBlend | MergeAdapters | DropAdapter | PinAdapter
Answer = AdapterChecked | Merged | Done
State = Literal["starting", "ready", "draining", "dead"]

DEADLINE_GRACE = 2.0  # seconds the engine may be late in reporting an expired deadline
MAX_PAUSE = 10.0  # seconds between two restarts


class RestartPolicy(NamedTuple):
    """More than `limit` deaths within `window` seconds are final. `pause` (seconds) doubles with each."""

    limit: int = 5
    window: float = 300.0
    pause: float = 0.5


class NewSequence(NamedTuple):
    prompt: list[int]
    sampling: SamplingParams


_News = tuple[int, SequenceOutput | VeneerError]  # of the sequence at a position


class Generation:
    """Sequences under way for one request: iterate for (position, output) as they come.

    What has come meanwhile from one sequence comes as one output, so that whoever takes long for an output gets
    fewer of them instead of falling behind.
    Use as a context manager: leaving it cancels in the engine what has not finished. Iteration ends when
    every sequence has finished or was cancelled, and raises the first error of any of them.
    """

    def __init__(self, client: EngineClient, deadline: float | None) -> None:
        self._client = client
        self._deadline = deadline
        self._expires = None if deadline is None else time.monotonic() + deadline
        self._inbox: asyncio.Queue[_News] = asyncio.Queue()
        self._held: _News | None = None  # taken from the inbox and not given out yet
        self._running: dict[int, str] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for position in list(self._running):
            self.cancel(position)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[int, SequenceOutput]:
        while self._running:
            position, output = await self._next()
            if position not in self._running:
                continue  # it was on its way when the sequence was cancelled
            if isinstance(output, VeneerError):
                raise output
            output = self._with_what_follows(position, output)
            if output.error or output.finish_reason:
                self._client._forget(self._running.pop(position))
            if output.error:
                raise _error(output.error)
            return position, output
        raise StopAsyncIteration

    def cancel(self, position: int) -> None:
        """Stop one sequence; nothing more comes from it."""
        if key := self._running.pop(position, None):
            self._client._cancel(key)

    def _with_what_follows(self, position: int, output: SequenceOutput) -> SequenceOutput:
        """The output joined with those of its sequence that came right after it."""
        while not (output.error or output.finish_reason or self._inbox.empty()):
            at, more = self._inbox.get_nowait()
            if at != position or isinstance(more, VeneerError) or more.error:
                self._held = at, more
                break
            output = msgspec.structs.replace(
                more,
                prompt_logprobs=output.prompt_logprobs + more.prompt_logprobs,
                tokens=output.tokens + more.tokens,
                logprobs=output.logprobs + more.logprobs,
            )
        return output

    async def _next(self) -> _News:
        if self._held is not None:
            news, self._held = self._held, None
            return news
        if self._expires is None or not self._inbox.empty():
            return await self._inbox.get()
        try:  # the engine reports deadlines itself; this holds when the engine hangs
            async with asyncio.timeout(self._expires + DEADLINE_GRACE - time.monotonic()):
                return await self._inbox.get()
        except TimeoutError:
            message = f"The request did not finish within its {self._deadline:g} seconds."
            raise DeadlineExceeded(message) from None


class JobListener(Protocol):
    """Who follows training jobs. Called in the order of events, on the loop: must not block."""

    def engine_ready(self) -> None:
        """An engine that knows of no job takes some."""

    def engine_lost(self) -> None:
        """It takes all jobs with it; their state stays in their folders."""

    def job_report(self, report: JobReport) -> None: ...


class EngineClient:
    """`start()` returns at once; `state` goes from "starting" to "ready" when the engine says so."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        command: Sequence[str] = (sys.executable, "-m", "veneer.engine.process"),
        restart: RestartPolicy = RestartPolicy(),  # noqa: B008 - immutable
    ) -> None:
        self.config = config
        self.state: State = "starting"
        self.info: EngineInfo | None = None
        self.stats: Stats | None = None
        self.restarts = 0
        self.last_error: str | None = None  # why the engine died last
        self._command = command
        self._restart = restart
        self._ids = itertools.count()
        self._sequences: dict[str, tuple[Generation, int]] = {}
        self._calls: dict[str, asyncio.Future[Answer]] = {}
        self._progress: dict[str, Callable[[int, int], None]] = {}  # by call
        self._pinned: set[str] = set()  # a restarted engine is told again
        self._jobs: set[str] = set()  # started and not over
        self.job_listener: JobListener | None = None
        self._changed = asyncio.Event()  # replaced at every change of `state`
        self._idle = asyncio.Event()
        self._idle.set()
        self._stopping = asyncio.Event()
        self._child: EngineChild | None = None
        self._supervisor: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """The engine's process id while it runs."""
        return self._child.pid if self._child else None

    # ---- life -------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Begin to spawn and supervise the engine. Call once."""
        self._supervisor = asyncio.create_task(self._supervise(), name="engine supervisor")

    async def wait_ready(self, timeout: float | None = None) -> None:
        """Return when requests can be served. Raises EngineUnavailable when that will not happen."""
        async with asyncio.timeout(timeout):
            while self.state == "starting":
                await self._changed.wait()
        self.require_ready()

    def drain(self) -> None:
        """Refuse new sequences from now on; the running ones continue, training saves its state and stops."""
        if self.state not in ("dead", "draining"):
            self._set_state("draining")
            for job in self._jobs:
                self._send(StopJob(id=job))

    async def stop(self, drain_timeout: float = 30.0) -> None:
        """Drain, end the engine process, release everything. Safe to call twice."""
        self.drain()
        if not await _happens(self._idle, drain_timeout):
            log.warning(
                "%d sequences and %d jobs did not end in %.0f s",
                len(self._sequences),
                len(self._jobs),
                drain_timeout,
            )
        self._stopping.set()
        if self._supervisor:
            await self._supervisor

    # ---- requests ---------------------------------------------------------------------------------

    def submit(
        self, sequences: Sequence[NewSequence], adapter: str | None, deadline: float | None
    ) -> Generation:
        """Queue sequences in the engine.

        `adapter` is a key of adapters/names.py (None: the base), `deadline` is in seconds from now.

        Iterating the result raises the engine's error, EngineUnavailable when the engine dies, or
        DeadlineExceeded; this call raises EngineUnavailable when the engine is not ready.
        """
        self.require_ready()
        generation = Generation(self, deadline)
        for position, (prompt, sampling) in enumerate(sequences):
            key = f"s{next(self._ids)}"
            generation._running[position] = key
            self._sequences[key] = (generation, position)
            self._send(Generate(id=key, prompt=prompt, sampling=sampling, adapter=adapter, deadline=deadline))
        self._idle.clear()
        return generation

    async def generate(
        self, prompt: list[int], sampling: SamplingParams, adapter: str | None, deadline: float | None
    ) -> AsyncIterator[SequenceOutput]:
        """The outputs of one sequence (see `submit`). Closing the iterator cancels it in the engine."""
        with self.submit([NewSequence(prompt, sampling)], adapter, deadline) as generation:
            async for _, output in generation:
                yield output

    async def check_adapter(
        self, folder: str, digest: str, *, allow_ineffective: bool = False
    ) -> AdapterInfo:
        """Lower the adapter in `folder`. Raises InvalidRequest that names what cannot be served.

        One that changes nothing is refused unless `allow_ineffective`.
        """
        reply = await self._call(CheckAdapter(self._call_id(), folder, digest, allow_ineffective))
        assert isinstance(reply, AdapterChecked)
        assert reply.info is not None
        return reply.info

    async def check_blend(self, key: str) -> AdapterInfo:
        """Put stored adapters together as a key of adapters/recipes.py says. Raises InvalidRequest."""
        reply = await self._call(CheckBlend(call=self._call_id(), key=key))
        assert isinstance(reply, AdapterChecked)
        assert reply.info is not None
        return reply.info

    async def merge_adapters(
        self, id: str, key: str, folder: str, *, keep_rows: bool, progress: Callable[[int, int], None]
    ) -> Merged:
        """Write what a recipe makes of stored adapters into a folder. `progress` gets sites done, and of how many.

        Raises InvalidRequest, Conflict when `cancel_merge` ends it, or EngineUnavailable when the engine dies.
        """
        self._progress[id] = progress
        try:
            reply = await self._call(MergeAdapters(id, key, folder, keep_rows))
        finally:
            del self._progress[id]
        assert isinstance(reply, Merged)
        return reply

    def cancel_merge(self, id: str) -> None:
        """End a merge at its next site; one that is over stays as it is."""
        if id in self._progress:
            self._send(CancelMerge(id))

    async def drop_adapter(self, digest: str) -> None:
        """Forget the adapter with all its tasks; returns once no sequence uses it."""
        self._pinned = {key for key in self._pinned if split_key(key)[0] != digest}
        await self._call(DropAdapter(call=self._call_id(), digest=digest))

    async def pin_adapter(self, key: str, pinned: bool = True) -> None:
        """Keep the adapter on the device, or stop keeping it. Survives a restart of the engine."""
        await self._call(PinAdapter(call=self._call_id(), key=key, pinned=pinned))
        (self._pinned.add if pinned else self._pinned.discard)(key)

    @property
    def pinned(self) -> frozenset[str]:
        """Keys of adapters that the engine was told to keep on the device."""
        return frozenset(self._pinned)

    def start_job(self, id: str, folder: str) -> None:
        """Train what is in `folder`; the `job_listener` gets its reports. Raises EngineUnavailable."""
        self.require_ready()
        self._jobs.add(id)
        self._idle.clear()
        self._send(StartJob(id=id, folder=folder))

    def stop_job(self, id: str) -> None:
        """End a job that was started. Its last report is "stopped", unless it was over before."""
        if id in self._jobs:
            self._send(StopJob(id=id))

    # ---- messages ---------------------------------------------------------------------------------

    def _call_id(self) -> str:
        return f"c{next(self._ids)}"

    async def _call(self, message: Call) -> Answer:
        if self.info is None:  # while draining, calls still work
            self.require_ready()
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._calls[message.call] = future
        try:
            self._send(message)
            reply = await future
        finally:
            del self._calls[message.call]
        if reply.error:
            raise _error(reply.error)
        return reply

    def _send(self, message: Request) -> None:
        if self._child:
            self._child.send(message)

    def _cancel(self, key: str) -> None:
        if key in self._sequences:
            self._forget(key)
            self._send(Cancel(id=key))

    def _forget(self, key: str) -> None:
        self._sequences.pop(key, None)
        self._note_idle()

    def _note_idle(self) -> None:
        if not self._sequences and not self._jobs:
            self._idle.set()

    def require_ready(self) -> EngineInfo:
        """What the engine is. Raises EngineUnavailable when it takes no requests."""
        if self.state == "starting":
            after = f" after {self.last_error}" if self.last_error else ""
            raise EngineUnavailable(f"The engine is starting{after}; try again when /ready answers 200.")
        if self.state == "draining":
            raise EngineUnavailable("The server is shutting down and takes no new requests.")
        if self.info is None:
            raise EngineUnavailable(f"The engine is dead and not restarted any more: {self.last_error}.")
        return self.info

    def _on_reply(self, message: Reply) -> None:
        match message:
            case Outputs():
                for item in message.items:
                    if entry := self._sequences.get(item.id):
                        generation, position = entry
                        generation._inbox.put_nowait((position, item))
            case Stats():
                self.stats = message
            case MergeProgress():
                if progress := self._progress.get(message.call):
                    progress(message.done, message.total)
            case AdapterChecked() | Merged() | Done():
                future = self._calls.get(message.call)
                if future and not future.done():
                    future.set_result(message)
            case JobReport():
                if message.kind in ("succeeded", "failed", "stopped"):
                    self._jobs.discard(message.id)
                    self._note_idle()
                if self.job_listener:
                    self.job_listener.job_report(message)
            case Ready():
                self.info = message.info
                for key in self._pinned:
                    self._send(PinAdapter(call=self._call_id(), key=key, pinned=True))
                if self.state == "starting":
                    self._set_state("ready")
                    if self.job_listener:
                        self.job_listener.engine_ready()

    # ---- supervision ------------------------------------------------------------------------------

    async def _supervise(self) -> None:
        folder = Path(tempfile.mkdtemp(prefix="veneer-"))  # mode 0700: nobody else can reach the socket
        context = zmq.asyncio.Context()
        try:
            await self._run_and_restart(context, folder)
        except Exception as error:  # must not die in silence: requests would hang
            log.exception("the engine's supervisor failed")
            self._lost(f"the engine's supervisor failed: {error!r}")
        finally:
            self._set_state("dead")
            context.term()
            shutil.rmtree(folder, ignore_errors=True)

    async def _run_and_restart(self, context: zmq.asyncio.Context, folder: Path) -> None:
        deaths: deque[float] = deque()
        for run in itertools.count():
            self._child = EngineChild(context, f"ipc://{folder}/engine-{run}.sock", self._command)
            reason = await self._child.run(self.config, self._on_reply, self._stopping)
            if self.state == "ready":
                self._set_state("starting")
            self._lost(reason)
            if self.state == "draining":  # nobody is left to restart it for
                return
            now = time.monotonic()
            deaths.append(now)
            while now - deaths[0] > self._restart.window:
                deaths.popleft()
            if len(deaths) > self._restart.limit:
                log.error("%s, %d times in %.0f s: not restarted", reason, len(deaths), now - deaths[0])
                return
            pause = min(self._restart.pause * 2 ** (len(deaths) - 1), MAX_PAUSE)
            log.error("%s; restarting it in %.1f s", reason, pause)
            if await _happens(self._stopping, pause):
                return
            self.restarts += 1

    def _lost(self, reason: str) -> None:
        """The engine is gone: answer everything that waits for it."""
        self._child = self.info = self.stats = None
        self.last_error = reason
        error = EngineUnavailable(f"The request was lost because {reason}; send it again.")
        for generation, position in self._sequences.values():
            generation._inbox.put_nowait((position, error))
        self._sequences.clear()
        self._jobs.clear()
        self._idle.set()
        if self.job_listener:
            self.job_listener.engine_lost()
        for future in self._calls.values():
            if not future.done():
                future.set_exception(error)

    def _set_state(self, state: State) -> None:
        self.state = state
        self._changed.set()
        self._changed = asyncio.Event()


async def _happens(event: asyncio.Event, timeout: float) -> bool:
    """Whether `event` is set within `timeout` seconds."""
    try:
        async with asyncio.timeout(timeout):
            await event.wait()
    except TimeoutError:
        return False
    return True


def _error(error: WireError) -> VeneerError:
    return from_wire(error.status, error.code, error.message, error.param)
