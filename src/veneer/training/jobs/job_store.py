"""Fine-tuning jobs, their events and checkpoints, durable in the adapter store's database. Imports no torch.

    <root>/jobs/<id>/training.json                    what to train: a `Training` of training/recipe.py
    <root>/jobs/<id>/data/training.*, validation.*    the rows: links to files, which may be deleted meanwhile
    <root>/jobs/<id>/…                                the engine's: state, checkpoints, report.json

A folder comes before its row and goes after it; opening removes what a crash left. A status says what is
wanted; server/jobs.py makes the engine follow. What the engine reports again after a restart changes nothing:
steps, checkpoints and ends are known by job and number. Methods block.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from veneer.adapters.names import checkpoint_name, job_name
from veneer.adapters.staging import discard, remove, storage_errors, sync, write_file
from veneer.adapters.store import AdapterStore
from veneer.errors import Conflict, NotFound, QueueFull, VeneerError
from veneer.training.jobs.file_store import RESULTS, FileStore, new_id
from veneer.training.jobs.job_events import add_event, finite, metrics_csv, step_event
from veneer.training.jobs.job_schema import OVER, WITH_ENGINE, Checkpoint, Event, Job, Status
from veneer.training.recipe import Training

# Of the folder of a job that is over
KEPT = ("training.json", "report.json", "report.html", "loss.csv", "loss.png", "data.png")
KEPT_FAILURES = 10  # newest failed jobs whose folders stay whole
MOST_DEATHS = 3  # of the engine, one after the other without a step between, until the job has failed
_NAME_LETTERS = 8  # of a job's id that are part of its result's name

_Row = TypeVar("_Row", Event, Checkpoint)


@dataclass(frozen=True, kw_only=True)
class NewJob:
    """What a client asked for, checked and with every value resolved."""

    model: str  # the base as it is served
    training_file: str
    validation_file: str | None
    suffix: str | None
    labels: Mapping[str, str]
    method: Mapping[str, Any]
    training: Training


class JobStore:
    """Opens (and repairs) the jobs of `store`."""

    def __init__(self, store: AdapterStore, files: FileStore) -> None:
        self.files = files
        self._store = store
        self._folder = store.root / "jobs"
        self._trash = store.root / "staging"
        self._folder.mkdir(mode=0o700, exist_ok=True)
        sync(store.root)
        self._remove_strays()
        self.tidy()

    def folder(self, job: Job) -> Path:
        return self._folder / job.id

    # ---- what clients do --------------------------------------------------------------------------

    def create(self, new: NewJob, *, most: int, unfinished: int) -> Job:
        """Queue a job; durable on return. At most `unfinished` of them wait or run; the oldest that are over
        are forgotten beyond `most`.

        Raises `InvalidRequest` for a file or a name that cannot be used, `QueueFull`, `StorageFull`.
        """
        id = new_id("ftjob-")
        name = job_name(new.model, new.suffix, id[-_NAME_LETTERS:])
        with self._store.stage() as staging:
            draft = staging.path / "job"
            try:
                with self._store.change("the job") as session:
                    _refuse_more(session, unfinished)
                    self._fill(session, draft, new)
                    draft.rename(self._folder / id)
                    sync(self._folder)
                    job = _add_job(session, id, name, new)
                    forgotten = _forget_oldest(session, most)
                    results = [file for old in forgotten for file in old.result_files]
                    self.files.forget(session, results)
            except BaseException:
                remove(self._folder / id)
                raise
        for old in forgotten:
            self._remove_folder(old.id)
        self.files.remove_contents(results)
        return job

    def _fill(self, session: Session, draft: Path, new: NewJob) -> None:
        data = draft / "data"
        data.mkdir(parents=True)
        self.files.link(session, new.training_file, data, "training", param="training_file")
        if new.validation_file is not None:
            self.files.link(session, new.validation_file, data, "validation", param="validation_file")
        # What was set alone: a field that the kind of adapter has no use for is refused when it is.
        training = new.training.model_dump_json(indent=2, exclude_unset=True).encode()
        write_file(draft / "training.json", [training], len(training))
        for folder in (data, draft):
            sync(folder)

    def get(self, id: str) -> Job:
        """Raises `NotFound`."""
        with self._store.read() as session:
            return _row(session, id)

    def page(
        self, *, after: str | None, limit: int, wanted: Callable[[Job], bool] = lambda job: True
    ) -> tuple[list[Job], bool]:
        """At most `limit` jobs older than the one with the id `after`, newest first, and whether more follow."""
        query = select(Job).order_by(Job.number.desc())
        with self._store.read() as session:
            if after is not None:
                query = query.where(Job.number < _row(session, after, param="after").number)
            found = [job for job in session.scalars(query) if wanted(job)][: limit + 1]
        return found[:limit], len(found) > limit

    def events(self, id: str, *, after: str | None, limit: int) -> tuple[list[Event], bool]:
        """Of a job, newest first, as `page`."""
        return self._listed(Event, "ftevent-", id, after, limit)

    def checkpoints(self, id: str, *, after: str | None, limit: int) -> tuple[list[Checkpoint], bool]:
        """Of a job, newest first, as `page`."""
        return self._listed(Checkpoint, "ftckpt_", id, after, limit)

    def _listed(
        self, table: type[_Row], prefix: str, id: str, after: str | None, limit: int
    ) -> tuple[list[_Row], bool]:
        query = select(table).order_by(table.number.desc()).limit(limit + 1)
        with self._store.read() as session:
            query = query.where(table.job == _row(session, id).number)
            if after is not None:
                query = query.where(table.number < _number(after, prefix))
            found = list(session.scalars(query))
        return found[:limit], len(found) > limit

    def cancel(self, id: str) -> Job:
        return self._turn(id, "cancelled", ("queued", *WITH_ENGINE, "paused"), "The job was cancelled")

    def pause(self, id: str) -> Job:
        return self._turn(id, "paused", ("queued", *WITH_ENGINE), "The job is paused")

    def resume(self, id: str) -> Job:
        return self._turn(id, "queued", ("paused",), "The job was resumed; it waits for its turn")

    def _turn(self, id: str, status: Status, allowed: Iterable[str], message: str) -> Job:
        """Change what is wanted of a job. Raises `NotFound`, `Conflict`."""

        def turn() -> Job:
            with self._store.change(f"job {id[:200]!r}") as session:
                job = _row(session, id)
                if job.status not in allowed:
                    raise Conflict(
                        f"job {id!r} is {job.status}; it would have to be {' or '.join(allowed)}",
                        param="fine_tuning_job_id",
                        code="invalid_job_status",
                    )
                job.status = status
                job.finished_at = int(time.time()) if status in OVER else None
                add_event(session, job, message)
                return job

        return self._store.with_spare(turn)

    # ---- what the engine reports ------------------------------------------------------------------

    def begin(self) -> Job | None:
        """The job that the engine is to train now: one that it had already, else the oldest in the queue."""
        with self._store.change("the next job") as session:
            interrupted = session.scalar(_OLDEST.where(Job.status.in_(WITH_ENGINE)))
            if interrupted is not None:
                add_event(
                    session,
                    interrupted,
                    "Training was interrupted and goes on from its last saved state",
                    "warn",
                )
                return interrupted
            job = session.scalar(_OLDEST.where(Job.status == "queued"))
            if job is not None:
                job.status = "validating_files"
                files = " and ".join(filter(None, (job.training_file, job.validation_file)))
                add_event(session, job, f"Validating {files}" if job.report is None else "Training goes on")
            return job

    def interrupted(self, id: str) -> None:
        """The engine died with the job. One that it dies with again and again is not started any more."""
        with self._store.change(f"job {id!r}") as session:
            job = _row(session, id)
            job.deaths += 1
            if job.deaths >= MOST_DEATHS and not job.over:
                message = f"the engine ended {job.deaths} times in a row while it trained this job"
                _fail(session, job, VeneerError(message, code="engine_died"))

    def validated(self, id: str, report: Mapping[str, Any]) -> None:
        with self._store.change(f"job {id!r}") as session:
            job = _row(session, id)
            if job.status == "validating_files":
                job.status = "running"
            if job.report is None and not job.over:
                job.report = finite(report)
                add_event(session, job, "Files validated, moving job to running state", data=report)

    def progress(self, id: str, steps: Iterable[Mapping[str, Any]]) -> None:
        with self._store.change(f"job {id!r}") as session:
            job = _row(session, id)
            for data in steps if not job.over else ():
                step_event(session, job, data)

    def notice(self, id: str, message: str, *, warn: bool = False) -> None:
        with self._store.change(f"job {id!r}") as session:
            job = _row(session, id)
            if not job.over:
                add_event(session, job, message, "warn" if warn else "info")

    def has_checkpoint(self, job: Job, step: int) -> bool:
        with self._store.read() as session:
            query = select(Checkpoint.number).where(Checkpoint.job == job.number, Checkpoint.step == step)
            return session.scalar(query) is not None

    def checkpoint(self, id: str, step: int, metrics: Mapping[str, Any]) -> bool:
        """The checkpoint of `step` is served from now on. False when the job was over before."""
        with self._store.change(f"job {id!r}") as session:
            job = _row(session, id)
            if job.over:
                return False
            name = checkpoint_name(job.result_name, step)
            now = int(time.time())
            session.add(
                Checkpoint(job=job.number, step=step, created_at=now, name=name, metrics=finite(metrics))
            )
            add_event(session, job, f"Checkpoint created at step {step}: {name}")
            return True

    def surplus_checkpoints(self, job: Job, most: int) -> list[Checkpoint]:
        """The oldest of a job beyond `most`; they are no longer listed."""
        with self._store.change(f"checkpoints of {job.id!r}") as session:
            newest = select(Checkpoint).where(Checkpoint.job == job.number).order_by(Checkpoint.number.desc())
            surplus = list(session.scalars(newest.offset(most)))
            for checkpoint in surplus:
                session.delete(checkpoint)
            return surplus

    def previous_result(self, job: Job) -> str | None:
        """What the last job before this one of the same base and suffix made."""
        stem = job.result_name.rpartition(":")[0]
        with self._store.read() as session:
            query = select(Job.fine_tuned_model).where(Job.status == "succeeded", Job.number < job.number)
            named = query.where(Job.fine_tuned_model.startswith(f"{stem}:", autoescape=True))
            found = session.scalar(named.order_by(Job.number.desc()).limit(1))
        if found is None:
            return None
        try:
            return self._store.resolve(found).served_name
        except (NotFound, Conflict):  # it was deleted since
            return None

    def succeed(self, id: str, data: Mapping[str, Any], files: Mapping[str, bytes] | None = None) -> bool:
        """The result is served under the job's `result_name`. False when the job was over before.

        `files` are kept as result files, behind the table of all steps.
        """
        with self._store.read() as session:
            table = metrics_csv(session, _row(session, id))
        with self._store.stage() as staging:
            drafts = _write(staging.path, {"step_metrics.csv": table, **(files or {})})
            with self._store.change(f"job {id!r}") as session:
                job = _row(session, id)
                if job.over:
                    return False
                job.result_files = self._keep(session, drafts)
                job.status, job.finished_at = "succeeded", int(time.time())
                job.fine_tuned_model = job.result_name
                job.tokens = data.get("tokens", job.tokens)
                add_event(session, job, f"New fine-tuned model created: {job.result_name}", data=data)
                add_event(session, job, "The job has successfully completed")
        return True

    def fail(self, id: str, error: VeneerError, files: Mapping[str, bytes] | None = None) -> None:
        """Also on a full disk, as far as the store's spare room reaches. A job that is over stays as it is."""

        def turn() -> None:
            with ExitStack() as stack:
                staged = stack.enter_context(self._store.stage()).path if files else Path()
                drafts = _write(staged, files or {})
                session = stack.enter_context(self._store.change(f"job {id!r}"))
                job = _row(session, id)
                if not job.over:
                    job.result_files = self._keep(session, drafts)
                    _fail(session, job, error)

        self._store.with_spare(turn)

    def _keep(self, session: Session, drafts: Mapping[Path, int]) -> list[str]:
        """Ids of the files that written ones have become."""
        return [self.files.keep(session, path, path.name, RESULTS, size).id for path, size in drafts.items()]

    def counts(self) -> dict[str, int]:
        """How many jobs have each status."""
        with self._store.read() as session:
            return dict(session.execute(_COUNTS).tuples().all())

    # ---- folders ----------------------------------------------------------------------------------

    def tidy(self, *, but: str | None = None) -> None:
        """Remove data and state of jobs that are over, apart from `but`, which the engine may still write to.

        The newest `KEPT_FAILURES` failed ones are kept whole: something may be saved from them.
        """
        with self._store.read() as session:
            over = list(session.scalars(select(Job).where(Job.status.in_(OVER)).order_by(Job.number.desc())))
        failures = [job.id for job in over if job.status == "failed"][:KEPT_FAILURES]
        for job in over:
            if job.id not in (*failures, but):
                with suppress(FileNotFoundError):  # the whole folder goes when the job is forgotten
                    for entry in self.folder(job).iterdir():
                        if entry.name not in KEPT:
                            remove(entry)
        self._store.keep_spare()

    def _remove_folder(self, id: str) -> None:
        if (self._folder / id).exists():
            with storage_errors(f"job {id!r}"):
                discard(self._folder / id, self._trash)

    def _remove_strays(self) -> None:
        with self._store.read() as session:
            known = set(session.scalars(select(Job.id)))
        for path in self._folder.iterdir():
            if path.name not in known:
                discard(path, self._trash)


def _write(folder: Path, files: Mapping[str, bytes]) -> dict[Path, int]:
    """Write files; their sizes by path."""
    return {
        folder / name: write_file(folder / name, [content], len(content)) for name, content in files.items()
    }


_COUNTS = select(Job.status, func.count()).group_by(Job.status)
_OLDEST = select(Job).order_by(Job.number).limit(1)


def _fail(session: Session, job: Job, error: VeneerError) -> None:
    job.status, job.finished_at = "failed", int(time.time())
    job.error = {"code": error.code, "message": error.message, "param": error.param}
    add_event(session, job, f"The job failed: {error.message}", "error")


def _row(session: Session, id: str, *, param: str = "fine_tuning_job_id") -> Job:
    job = session.scalar(select(Job).where(Job.id == id))
    if job is None:
        raise NotFound(
            f"there is no fine-tuning job {id[:200]!r}; GET /v1/fine_tuning/jobs lists them", param=param
        )
    return job


def _number(id: str, prefix: str) -> int:
    """The number in the id of an event or a checkpoint."""
    digits = id.removeprefix(prefix)
    if digits == id or not (digits.isascii() and digits.isdecimal()) or len(digits) > 18:
        raise NotFound(f"{id[:200]!r} is no id of this list", param="after")
    return int(digits)


def _refuse_more(session: Session, unfinished: int) -> None:
    found = session.scalar(select(func.count()).select_from(Job).where(Job.status.not_in(OVER))) or 0
    if found >= unfinished:
        raise QueueFull(
            f"{found} fine-tuning jobs wait or run and the limit is {unfinished}; "
            "try again when one has ended, or cancel one",
            retry_after=60,
        )


def _add_job(session: Session, id: str, name: str, new: NewJob) -> Job:
    job = Job(
        id=id,
        status="queued",
        created_at=int(time.time()),
        model=new.model,
        result_name=name,
        training_file=new.training_file,
        validation_file=new.validation_file,
        seed=new.training.seed,
        labels=dict(new.labels),
        method=dict(new.method),
        training=new.training.model_dump(mode="json"),
        result_files=[],
    )
    session.add(job)
    session.flush()
    add_event(session, job, f"Created fine-tuning job: {id}")
    return job


def _forget_oldest(session: Session, most: int) -> list[Job]:
    """Take the rows of the oldest jobs that are over out of the database, so that `most` jobs stay."""
    excess = (session.scalar(select(func.count()).select_from(Job)) or 0) - most
    query = select(Job).where(Job.status.in_(OVER)).order_by(Job.number).limit(max(excess, 0))
    doomed = list(session.scalars(query))
    numbers = [job.number for job in doomed]
    for table in (Event, Checkpoint):
        session.execute(delete(table).where(table.job.in_(numbers)))
    session.execute(delete(Job).where(Job.number.in_(numbers)))
    return doomed
