"""The supervisor of fine-tuning jobs: makes the engine do what the job store says, and notes what it reports.

    queued ── StartJob ──→ validating_files ── "validated" ──→ running ── "succeeded" ──→ published ──→ succeeded
    cancel, pause: the status changes at once, StopJob follows; the next job starts when the engine has stopped

One job is with the engine at a time. Everything that happens goes through one inbox in its order, so an event is
written once and the next report is handled when the last one is durable. When the engine or this process ends,
jobs stay what they are in the store and are started again; the engine goes on from the state in their folders.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from fastapi import Request

from veneer.adapters.names import checkpoint_name
from veneer.adapters.sources import from_folder
from veneer.engine.messages import JobReport
from veneer.errors import EngineUnavailable, InvalidRequest, NotFound, VeneerError, from_wire
from veneer.server.job_evaluation import Evaluated, MakeModels, evaluate_job, wanted_evaluation
from veneer.server.publish import Fill, delete, publish
from veneer.server.state import ServerState
from veneer.training.jobs.job_events import COLUMNS
from veneer.training.jobs.job_schema import Checkpoint, Job

log = logging.getLogger(__name__)

_ENDS = ("succeeded", "failed", "stopped")
_METRICS = {*COLUMNS.values(), "step", "full_valid_loss", "full_valid_mean_token_accuracy"}


@dataclass
class Progress:
    """How the job that the engine has is getting on, since it was started last."""

    job: str
    step: int = 0
    total_steps: int = 0
    tokens: int = 0
    tokens_per_second: float | None = None
    seconds_left: float | None = None
    _first: tuple[int, float] | None = None  # step and seconds
    _last: tuple[int, float] | None = None  # tokens and seconds

    def note(self, data: dict[str, Any]) -> None:
        self.step, self.total_steps = int(data["step"]), int(data["total_steps"])
        tokens, seconds = int(data.get("tokens", 0)), float(data.get("seconds", 0.0))
        self.tokens = tokens
        if self._last and seconds > self._last[1]:
            self.tokens_per_second = (tokens - self._last[0]) / (seconds - self._last[1])
        self._last = tokens, seconds
        self._first = self._first or (self.step, seconds)
        step, since = self._first
        if self.step > step:
            self.seconds_left = (seconds - since) / (self.step - step) * (self.total_steps - self.step)


class JobSupervisor:
    """Follows the engine of `state` as its `job_listener`; `run` does the work."""

    def __init__(self, state: ServerState, make_models: MakeModels) -> None:
        """`make_models` are this server's models, for evaluations."""
        self.progress: Progress | None = None
        self._state = state
        self._make_models = make_models
        self._jobs = state.jobs
        self._inbox: deque[JobReport | str] = deque()  # "ready", "lost", "look"
        self._news = asyncio.Event()
        self._turn = asyncio.Lock()  # what is wanted of a job does not change while it is started
        self._drops: set[asyncio.Task[None]] = set()
        state.engine.job_listener = self

    # ---- the engine's news ------------------------------------------------------------------------

    def engine_ready(self) -> None:
        self._put("ready")

    def engine_lost(self) -> None:
        self._put("lost")

    def job_report(self, report: JobReport) -> None:
        self._put(report)

    def _put(self, news: JobReport | str) -> None:
        self._inbox.append(news)
        self._news.set()

    # ---- what clients want ------------------------------------------------------------------------

    def look(self) -> None:
        """A job was added."""
        self._put("look")

    async def turn(self, change: Callable[[str], Job], id: str) -> Job:
        """Cancel, pause or resume a job by the store's method for it."""
        async with self._turn:
            job = await asyncio.to_thread(change, id)
            if self.progress and self.progress.job == id and job.status in ("cancelled", "paused"):
                self._state.engine.stop_job(id)
        self._put("look")
        return job

    # ---- the loop ---------------------------------------------------------------------------------

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            while self._inbox:
                news = self._inbox.popleft()
                if isinstance(news, JobReport):
                    await self._take(news)
                elif news == "lost":
                    await self._lost()
                elif not self.progress:
                    await self._guarded(None, self._tidy)
            await self._guarded(None, self._start_next)
            if not self._inbox:
                self._news.clear()
                await self._news.wait()

    async def _start_next(self) -> None:
        async with self._turn:
            if self.progress or self._state.engine.state != "ready":
                return
            job = await asyncio.to_thread(self._jobs.begin)
            if job is not None:
                self._state.engine.start_job(job.id, str(self._jobs.folder(job)))
                self.progress = Progress(job.id)

    async def _take(self, report: JobReport) -> None:
        """Note a report, and for steps also those that came right after it."""
        reports = [report]
        while report.kind == "progress" and self._inbox and _is_step(self._inbox[0], report.id):
            more = self._inbox.popleft()
            assert isinstance(more, JobReport)
            reports.append(more)
        ours = self.progress is not None and self.progress.job == report.id
        noted = await self._guarded(report.id, lambda: self._note(reports))
        if report.kind in _ENDS and ours and noted:
            self.progress = None
            await self._guarded(None, self._tidy)

    async def _lost(self) -> None:
        lost, self.progress = self.progress, None
        if lost and self._state.engine.state != "draining":
            await self._guarded(None, lambda: asyncio.to_thread(self._jobs.interrupted, lost.job))

    async def _guarded(self, id: str | None, work: Callable[[], Any]) -> bool:
        """Do one thing. What fails ends the job that it was for, never the supervisor.

        False when the engine went away meanwhile: then the job is started again, and the thing reported again.
        """
        try:
            await work()
        except EngineUnavailable as error:
            log.info("job %s: %s", id, error.message)
            return False
        except VeneerError as error:
            await self._give_up(id, error)
        except Exception as error:
            log.exception("job %s: the supervisor failed", id)
            await self._give_up(id, VeneerError(f"the server failed on this job: {type(error).__name__}"))
        return True

    async def _give_up(self, id: str | None, error: VeneerError) -> None:
        log.error("job %s: %s", id, error.message)
        if id is None:
            return
        self._state.engine.stop_job(id)
        try:
            await asyncio.to_thread(self._jobs.fail, id, error)
        except Exception:  # it goes on at the next start
            log.exception("job %s could not be marked as failed", id)

    # ---- reports ----------------------------------------------------------------------------------

    async def _note(self, reports: list[JobReport]) -> None:
        report = reports[0]
        try:
            job = await asyncio.to_thread(self._jobs.get, report.id)
        except NotFound:
            return  # cancelled, and forgotten since
        if job.over:
            return
        match report.kind:
            case "validated":
                await asyncio.to_thread(self._jobs.validated, job.id, report.data)
            case "progress":
                for each in reports:
                    if self.progress and self.progress.job == job.id:
                        self.progress.note(each.data)
                await asyncio.to_thread(self._jobs.progress, job.id, [each.data for each in reports])
            case "checkpoint":
                await self._checkpoint(job, report.data)
            case "notice":
                await asyncio.to_thread(self._jobs.notice, job.id, report.message)
            case "succeeded":
                await self._finish(job, report.data)
            case "failed":
                await asyncio.to_thread(self._jobs.fail, job.id, _error(report))

    async def _checkpoint(self, job: Job, data: dict[str, Any]) -> None:
        """Serve a checkpoint. One that cannot be served ends nothing: training goes on to the next."""
        step = int(data["step"])
        if await asyncio.to_thread(self._jobs.has_checkpoint, job, step):
            return
        name = checkpoint_name(job.result_name, step)
        try:
            await publish(self._state, name, self._fill(job, data), trained=True)
        except InvalidRequest as error:
            message = f"The checkpoint at step {step} is not served: {error.message}"
            await asyncio.to_thread(self._jobs.notice, job.id, message, warn=True)
            return
        metrics = {key: value for key, value in data.items() if key in _METRICS}
        if not await asyncio.to_thread(self._jobs.checkpoint, job.id, step, metrics):
            await self._drop(name)
        for old in await asyncio.to_thread(
            self._jobs.surplus_checkpoints, job, self._state.config.max_checkpoints
        ):
            self._drop_later(old)

    async def _finish(self, job: Job, data: dict[str, Any]) -> None:
        evaluated = await self._evaluate(job, data)
        shown = {key: value for key, value in data.items() if key != "folder"}
        files: dict[str, bytes] = {}
        if evaluated is not None:
            files, shown = evaluated.files, shown | evaluated.shown()
            decision = evaluated.decision
            if decision is not None and not decision.passed:
                error = InvalidRequest(
                    f"the trained adapter did not pass its gate ({decision.reason}), so it is not published; "
                    "the job's checkpoints are served",
                    code="gate_not_passed",
                )
                await asyncio.to_thread(self._jobs.fail, job.id, error, files)
                return
        await publish(self._state, job.result_name, self._fill(job, data), trained=True)
        if not await asyncio.to_thread(self._jobs.succeed, job.id, shown, files):
            await self._drop(job.result_name)  # it was cancelled meanwhile

    async def _evaluate(self, job: Job, data: dict[str, Any]) -> Evaluated | None:
        """Evaluate the result, if the job asks for that, under the name of the checkpoint that it is."""
        folder = self._jobs.folder(job)
        training = await asyncio.to_thread(wanted_evaluation, folder)
        if training is None:
            if job.training["evaluation"]["gate"] is not None:
                raise VeneerError(
                    "the training left no held-out rows to measure its gate on, so the trained adapter is not "
                    "published",
                    code="gate_not_evaluated",
                )
            return None
        await self._checkpoint(job, data)
        await asyncio.to_thread(self._jobs.notice, job.id, "Evaluating the result")
        previous = await asyncio.to_thread(self._jobs.previous_result, job)
        name = checkpoint_name(job.result_name, int(data["step"]))
        return await evaluate_job(job, training, folder, self._make_models, name, previous)

    def _fill(self, job: Job, data: dict[str, Any]) -> Fill:
        """An adapter that the engine has left in the job's folder, and nowhere else."""
        folder, limit = self._jobs.folder(job), self._state.config.max_upload_bytes
        path = str(Path(data["folder"]).absolute())
        return lambda staging: from_folder(path, [folder], staging, limit)

    # ---- leaving nothing behind -------------------------------------------------------------------

    async def _tidy(self) -> None:
        but = self.progress.job if self.progress else None
        await asyncio.to_thread(self._jobs.tidy, but=but)

    def _drop_later(self, checkpoint: Checkpoint) -> None:
        """Requests may still run on it, and training does not wait for them."""
        task = asyncio.create_task(self._drop(checkpoint.name))
        self._drops.add(task)
        task.add_done_callback(self._drops.discard)

    async def _drop(self, name: str) -> None:
        try:
            await delete(self._state, name)
        except VeneerError as error:  # an alias points to it, or it is deleted already
            log.info("%s stays: %s", name, error.message)


def supervisor_of(request: Request) -> JobSupervisor:
    """The supervisor that `create_app` made."""
    return cast(JobSupervisor, request.app.state.jobs)


def _is_step(news: JobReport | str, id: str) -> bool:
    return isinstance(news, JobReport) and news.kind == "progress" and news.id == id


def _error(report: JobReport) -> VeneerError:
    error = report.error
    if error is None:
        return VeneerError(report.message or "the engine gave no reason", code="training_failed")
    return from_wire(error.status, error.code, error.message, error.param)
