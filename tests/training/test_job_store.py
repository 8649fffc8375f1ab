"""Files and jobs in the store: states, events told twice, restarts, a full disk (test_job_store_crash.py kills)."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.dialects import postgresql
from sqlalchemy.schema import CreateTable
from tests.training.job_files import ROWS, create, events, on_disk, opened, put, step

from veneer.errors import Conflict, InvalidRequest, NotFound, QueueFull, StorageFull, VeneerError
from veneer.training.jobs.job_schema import Base
from veneer.training.jobs.job_store import KEPT_FAILURES, MOST_DEATHS, JobStore
from veneer.training.recipe import Training


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[JobStore]:
    with opened(tmp_path) as store:
        yield store


def test_a_job_and_its_folder(jobs: JobStore, tmp_path: Path) -> None:
    file, other = put(jobs), put(jobs, b"x\n", "other.CSV")
    job = create(jobs, file.id, validation_file=other.id, suffix="poet", training=Training(steps=7, seed=5))
    folder = jobs.folder(job)
    assert json.loads((folder / "training.json").read_text()) == {"steps": 7, "seed": 5}  # what was set
    assert job.training == Training(steps=7, seed=5).model_dump(mode="json")
    assert (folder / "data" / "training.jsonl").read_bytes() == ROWS
    assert (folder / "data" / "validation.csv").read_bytes() == b"x\n"
    assert job.result_name == f"ft:base:poet:{job.id[-8:]}"
    assert (job.status, job.step, job.seed) == ("queued", 0, 5)
    assert on_disk(tmp_path)["jobs"] == [job.id]


def test_a_store_without_links_copies(jobs: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "no links here")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    job = create(jobs, put(jobs).id)
    assert (jobs.folder(job) / "data" / "training.jsonl").read_bytes() == ROWS


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"suffix": "a:b"}, "suffix"), ({"model": "ä"}, "model"), ({"model": "x" * 120}, "suffix")],
)
def test_a_name_that_cannot_be(jobs: JobStore, tmp_path: Path, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        create(jobs, put(jobs).id, **fields)
    assert refused.value.param == param
    assert on_disk(tmp_path)["jobs"] == []


def test_statuses(jobs: JobStore) -> None:
    file = put(jobs).id
    first, second = create(jobs, file), create(jobs, file)
    begun = jobs.begin()
    assert begun is not None
    assert (begun.id, begun.status) == (first.id, "validating_files")
    jobs.validated(first.id, {"rows": 1})
    assert jobs.get(first.id).status == "running"
    jobs.pause(first.id)
    assert jobs.begin().id == second.id  # type: ignore[union-attr]
    jobs.fail(second.id, VeneerError("it broke", code="broken"))
    jobs.fail(second.id, VeneerError("again"))
    assert jobs.get(second.id).error == {"code": "broken", "message": "it broke", "param": None}
    assert jobs.begin() is None
    jobs.resume(first.id)
    assert jobs.begin().id == first.id  # type: ignore[union-attr]
    assert jobs.begin().id == first.id  # type: ignore[union-attr]  # after a restart: it is with the engine still
    assert jobs.succeed(first.id, {"step": 3, "tokens": 30})
    assert not jobs.succeed(first.id, {"step": 3, "tokens": 30})
    assert jobs.counts() == {"succeeded": 1, "failed": 1}
    for change in (jobs.cancel, jobs.pause, jobs.resume):
        with pytest.raises(Conflict):
            change(first.id)
        with pytest.raises(NotFound):
            change("ftjob-nothing")


def test_what_is_told_twice_is_written_once(jobs: JobStore) -> None:
    job = create(jobs, put(jobs).id)
    for _ in range(2):
        jobs.begin()
        jobs.validated(job.id, {"rows": 1})
        jobs.progress(job.id, [step(1), step(2), step(3, valid_loss=0.5)])
        if not jobs.has_checkpoint(job, 2):
            assert jobs.checkpoint(job.id, 2, {"step": 2})
    told = events(jobs, job.id)
    assert len(told) == 8  # created, validating, validated, three steps, checkpoint, interrupted
    assert [each for each in told if each.startswith("Step")] == [
        "Step 1/3: training loss=1.0000",
        "Step 2/3: training loss=0.5000",
        "Step 3/3: training loss=0.3333, validation loss=0.5000",
    ]


def test_nothing_is_written_after_the_end(jobs: JobStore) -> None:
    job = create(jobs, put(jobs).id)
    jobs.begin()
    jobs.cancel(job.id)
    before = events(jobs, job.id)
    jobs.validated(job.id, {})
    jobs.progress(job.id, [step(1)])
    jobs.notice(job.id, "late")
    jobs.interrupted(job.id)
    jobs.fail(job.id, VeneerError("late"))
    assert not jobs.checkpoint(job.id, 1, {})
    assert not jobs.succeed(job.id, {})
    assert events(jobs, job.id) == before
    assert jobs.get(job.id).status == "cancelled"
    assert list(jobs.files.page(purpose="fine-tune-results", after=None, limit=9, order="asc")[0]) == []


def test_numbers_that_json_has_not(jobs: JobStore) -> None:
    job = create(jobs, put(jobs).id)
    jobs.begin()
    jobs.validated(job.id, {"lengths": [1, float("inf")], "deep": {"x": float("nan")}})
    jobs.progress(job.id, [step(1, train_loss=float("nan"))])
    assert jobs.get(job.id).report == {"lengths": [1, None], "deep": {"x": None}}
    data = jobs.events(job.id, after=None, limit=1)[0][0].data
    assert data["train_loss"] is None


def test_an_engine_that_dies_again_and_again(jobs: JobStore) -> None:
    job = create(jobs, put(jobs).id)
    for number in range(1, MOST_DEATHS):
        jobs.interrupted(job.id)
        jobs.progress(job.id, [step(number)])  # it gets on
    for _ in range(MOST_DEATHS):
        assert jobs.begin() is not None
        jobs.interrupted(job.id)
    assert jobs.get(job.id).error is not None
    assert jobs.begin() is None


def test_the_queue_is_bounded(jobs: JobStore) -> None:
    file = put(jobs).id
    with ThreadPoolExecutor(8) as pool:

        def attempt(_: int) -> bool:
            try:
                create(jobs, file, unfinished=3)
            except QueueFull:
                return False
            return True

        assert sum(pool.map(attempt, range(8))) == 3
    assert jobs.counts() == {"queued": 3}


def test_only_the_newest_failures_stay_whole(jobs: JobStore) -> None:
    file = put(jobs).id
    made = [create(jobs, file) for _ in range(KEPT_FAILURES + 1)]
    for job in made:
        jobs.fail(job.id, VeneerError("it broke"))
    jobs.tidy(but=made[0].id)
    assert (jobs.folder(made[0]) / "data").exists()
    jobs.tidy()
    assert [(jobs.folder(job) / "data").exists() for job in made] == [False] + [True] * KEPT_FAILURES


def test_what_is_kept_of_a_job(jobs: JobStore) -> None:
    job = create(jobs, put(jobs).id)
    for name in ("report.json", "state.bin"):
        (jobs.folder(job) / name).write_text("{}")
    jobs.succeed(job.id, {})
    jobs.tidy()
    assert sorted(path.name for path in jobs.folder(job).iterdir()) == ["report.json", "training.json"]


# ---- opening --------------------------------------------------------------------------------------


def test_everything_survives_a_restart(tmp_path: Path) -> None:
    with opened(tmp_path) as jobs:
        job = create(jobs, put(jobs).id, labels={"a": "b"})
        jobs.begin()
        jobs.progress(job.id, [step(1)])
        jobs.checkpoint(job.id, 1, {"step": 1})
        before = events(jobs, job.id)
    with opened(tmp_path) as jobs:
        found = jobs.get(job.id)
        assert (found.status, found.step, found.labels) == ("validating_files", 1, {"a": "b"})
        assert events(jobs, job.id) == before
        assert [each.step for each in jobs.checkpoints(job.id, after=None, limit=9)[0]] == [1]


def test_a_lost_database_does_not_delete_the_files(tmp_path: Path) -> None:
    with opened(tmp_path) as jobs:
        create(jobs, put(jobs).id)
    before = on_disk(tmp_path)
    for path in tmp_path.glob("store.db*"):
        path.unlink()
    with pytest.raises(Conflict, match="the database knows nothing of it"), opened(tmp_path):
        pass
    assert on_disk(tmp_path) == before


def test_the_schema_compiles_for_postgresql() -> None:
    for table in Base.metadata.sorted_tables:
        assert "CREATE TABLE" in str(CreateTable(table).compile(dialect=postgresql.dialect()))  # type: ignore[no-untyped-call]


# ---- a full disk ----------------------------------------------------------------------------------


def fill_up(jobs: JobStore) -> None:
    """No transaction finds room before the spare is given back."""
    spare = jobs._store.root / "spare"

    def full(_connection: object) -> None:
        if spare.exists():
            raise OSError(errno.ENOSPC, "No space left on device")

    event.listen(jobs._store.database, "commit", full)


def test_a_full_disk_leaves_the_old_state(jobs: JobStore, tmp_path: Path) -> None:
    file = put(jobs)
    job = create(jobs, file.id)
    before = on_disk(tmp_path), events(jobs, job.id)
    fill_up(jobs)
    for attempt in (
        lambda: put(jobs),
        lambda: create(jobs, file.id),
        lambda: jobs.progress(job.id, [step(1)]),
        lambda: jobs.checkpoint(job.id, 1, {}),
    ):
        with pytest.raises(StorageFull) as full:
            attempt()
        assert full.value.code == "storage_full"
    assert (on_disk(tmp_path), events(jobs, job.id)) == before


def test_a_full_disk_while_a_file_comes(
    jobs: JobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("veneer.adapters.staging.os.write", full)
    with pytest.raises(StorageFull):
        put(jobs)
    assert on_disk(tmp_path) == {"files": [], "jobs": [], "staging": []}


@pytest.mark.parametrize("what", ["fail", "cancel", "delete"])
def test_a_full_disk_still_allows_to_end_things(jobs: JobStore, what: str) -> None:
    file = put(jobs)
    job = create(jobs, file.id)
    fill_up(jobs)
    if what == "fail":
        jobs.fail(job.id, StorageFull("no room"))
        assert jobs.get(job.id).error == {"code": "storage_full", "message": "no room", "param": None}
    elif what == "cancel":
        assert jobs.cancel(job.id).status == "cancelled"
    else:
        jobs.files.delete(file.id)
        with pytest.raises(NotFound):
            jobs.files.get(file.id)
    jobs.tidy()
    assert (jobs._store.root / "spare").exists()
