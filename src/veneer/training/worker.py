"""Training jobs in the engine's process: a queue, and a thread that runs one job at a time on the resident base."""

from __future__ import annotations

import errno
import gc
import logging
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError

from veneer.engine.messages import JobReport, StartJob, StopJob, WireError
from veneer.engine.view import Resident
from veneer.errors import Conflict, InvalidRequest, StorageFull, VeneerError
from veneer.training.control import Stopped
from veneer.training.governor import Governor
from veneer.training.recipe import Training
from veneer.training.report import versions

SWITCH_INTERVAL = 0.0005  # seconds
LOCK_SECONDS = 30.0  # an engine whose server was killed lives on for a moment

logger = logging.getLogger(__name__)


class TrainingWorker:
    """`handle` and `reports` belong to the steps' thread; nothing in them waits."""

    def __init__(self, resident: Resident, governor: Governor, wake: Callable[[], None]) -> None:
        self._resident = resident
        self._governor = governor
        self._wake = wake
        self._waiting: dict[str, StartJob] = {}
        self._running: str | None = None
        self._lock = threading.Lock()
        self._work = threading.Semaphore(0)
        self._reports: queue.SimpleQueue[JobReport] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="training", daemon=True).start()

    @property
    def running(self) -> str | None:
        """The job under way."""
        return self._running

    def handle(self, request: StartJob | StopJob) -> None:
        with self._lock:
            if isinstance(request, StartJob):
                if request.id != self._running and request.id not in self._waiting:
                    self._waiting[request.id] = request
                    self._work.release()
            elif request.id == self._running:
                self._governor.stop()
            elif self._waiting.pop(request.id, None) is not None:
                self._report(JobReport(id=request.id, kind="stopped", data={"step": 0}))

    def reports(self) -> list[JobReport]:
        """News since the last call."""
        found = []
        while not self._reports.empty():
            found.append(self._reports.get())
        return found

    def _report(self, report: JobReport) -> None:
        self._reports.put(report)
        self._wake()

    # ---- the training's thread --------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            self._work.acquire()
            with self._lock:
                if not self._waiting:
                    continue  # it was stopped while it waited
                job = self._waiting.pop(next(iter(self._waiting)))
                self._running = job.id
                self._governor.begin()
            control = _JobControl(job.id, self._governor, self._report)
            try:
                with FileLock(Path(job.folder) / "lock", timeout=LOCK_SECONDS), _quick_switches():
                    last = self._train(job, control)
            except Timeout:
                held = "another process trains this job; it is not started twice"
                last = JobReport(id=job.id, kind="failed", error=_wire(Conflict(held)))
            except Stopped:
                last = JobReport(id=job.id, kind="stopped", data={"step": control.step})
            except BaseException as error:  # the server serves on
                last = JobReport(id=job.id, kind="failed", error=_wire(error))
            with self._lock:
                self._running = None
            self._governor.end()
            _release(self._resident.base.device)
            self._report(last)

    def _train(self, job: StartJob, control: _JobControl) -> JobReport:
        # Here, in the training's thread: PEFT takes seconds to import, and most engines never train.
        from veneer.training.job import prepare, run, write_held_out, write_report

        folder = Path(job.folder)
        training = Training.model_validate_json((folder / "training.json").read_text("utf-8"))
        files = {path.stem: path for path in sorted((folder / "data").iterdir())}
        prepared = prepare(training, self._resident, files)
        write_held_out(folder, prepared.examples.validation)
        with on_own_stream(self._resident.base.device):
            result, report = run(training, self._resident, prepared, folder, control)
        whole: dict[str, Any] = {
            "base": self._resident.name,
            "training": training.model_dump(mode="json", exclude_unset=True),
            "data": prepared.report.to_dict(),
            "result": {**report, "step": result.step, "ended": result.why},
            "versions": versions(),
        }
        write_report(folder, whole)
        data = {"step": result.step, "tokens": result.tokens, "folder": str(result.folder), **whole["result"]}
        return JobReport(id=job.id, kind="succeeded", message=result.why, data=data)


class _JobControl:
    """See `veneer.training.control.Control`."""

    def __init__(self, job: str, governor: Governor, send: Callable[[JobReport], None]) -> None:
        self.step = 0
        self._job = job
        self._send = send
        self.turn = governor.turn

    def report(self, kind: str, message: str = "", **data: Any) -> None:
        self.step = data.get("step", self.step)
        self._send(JobReport(id=self._job, kind=kind, message=message, data=data))


@contextmanager
def _quick_switches() -> Iterator[None]:
    """Meanwhile a thread keeps the interpreter for less long when the other wants it."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_INTERVAL)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def on_own_stream(device: torch.device) -> Any:
    """Beside the steps' kernels instead of between them."""
    if device.type != "cuda":
        return nullcontext()
    return torch.cuda.stream(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _wire(error: BaseException) -> WireError:
    """A failure as plain values; one that nobody foresaw is logged, too."""
    known = _known(error)
    if known is None:
        logger.error("a training job failed", exc_info=error)
        known = VeneerError(f"the training failed: {type(error).__name__}: {error}")
    return WireError(known.status, known.code, known.message, known.param)


def _known(error: BaseException) -> VeneerError | None:
    if isinstance(error, VeneerError):
        return error
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or (isinstance(error, SafetensorError) and "No space left" in str(error)):
        return StorageFull("the disk is full, so the training could not go on; make room and resume the job")
    if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)):
        return InvalidRequest(
            "the training ran out of memory; lower batch_size or max_length, set gradient_checkpointing, or keep "
            "more memory free with --training-memory",
            code="out_of_memory",
        )
    return None
