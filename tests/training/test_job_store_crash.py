"""Killed with SIGKILL before every step of a change: opening finds the old or the new state, and nothing else.

Run as a program, this file makes one change to a store and dies before the given step of it.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.adapters.test_store_crash import die_at_step
from tests.conftest import ROOT
from tests.training.job_files import ROWS, create, events, on_disk, opened, put, step

from veneer.errors import VeneerError
from veneer.training.jobs.job_store import JobStore


def ids(jobs: JobStore) -> list[str]:
    """Of the jobs, oldest first."""
    return [job.id for job in jobs.page(after=None, limit=9)[0]][::-1]


def newest_file(jobs: JobStore) -> str:
    return jobs.files.page(purpose="fine-tune", after=None, limit=1, order="desc")[0][0].id


def cancel_and_tidy(jobs: JobStore) -> None:
    jobs.cancel(ids(jobs)[1])
    jobs.tidy()


CHANGES: dict[str, Callable[[JobStore], Any]] = {
    "add a file": lambda jobs: put(jobs, b"new\n"),
    "delete a file": lambda jobs: jobs.files.delete(newest_file(jobs)),
    "create a job": lambda jobs: create(jobs, newest_file(jobs)),
    "create a job and forget one": lambda jobs: create(jobs, newest_file(jobs), most=2),
    "begin": lambda jobs: jobs.begin(),
    "steps": lambda jobs: jobs.progress(ids(jobs)[1], [step(2), step(3)]),
    "a checkpoint": lambda jobs: jobs.checkpoint(ids(jobs)[1], 2, {"step": 2}),
    "succeed": lambda jobs: jobs.succeed(ids(jobs)[1], {"step": 3, "tokens": 30}),
    "fail": lambda jobs: jobs.fail(ids(jobs)[1], VeneerError("it broke")),
    "cancel and tidy": cancel_and_tidy,
}


def prepare(root: Path) -> None:
    """A job that has succeeded, one that trains, and a file."""
    with opened(root) as jobs:
        done, running = (create(jobs, put(jobs).id) for _ in range(2))
        jobs.begin()
        jobs.succeed(done.id, {"step": 3, "tokens": 30})
        jobs.begin()
        jobs.progress(running.id, [step(1)])
        jobs.tidy()


def look(root: Path) -> tuple[Any, ...]:
    """Open it: everything that clients see, without the ids, and the content of all files."""
    with opened(root) as jobs:
        files = jobs.files.page(purpose=None, after=None, limit=99, order="asc")[0]
        contents = []
        for file in files:
            with jobs.files.open(file.id)[1] as content:
                contents.append((file.filename, content.read()))
        known = [jobs.get(id) for id in ids(jobs)]
        shown = [
            (
                job.status,
                job.step,
                len(job.result_files),
                [
                    message.replace(job.id, "ID").replace(job.id[-8:], "ID")
                    for message in events(jobs, job.id)
                ],
                [each.step for each in jobs.checkpoints(job.id, after=None, limit=9)[0]],
            )
            for job in known
        ]
        for job in known:
            rows = jobs.folder(job) / "data" / "training.jsonl"
            assert (jobs.folder(job) / "training.json").exists()
            assert job.status in ("succeeded", "cancelled") or rows.read_bytes() == ROWS
            assert set(job.result_files) <= {file.id for file in files}
    disk = on_disk(root)
    assert disk["files"] == sorted(file.id for file in files)
    assert disk["jobs"] == sorted(job.id for job in known)
    assert disk["staging"] == []
    return contents, [(status, *rest) for status, *rest in shown]


def without_file_ids(view: tuple[Any, ...]) -> str:
    return re.sub(r"file-[a-z0-9]{24}", "FILE", repr(view))


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("start") / "store"
    prepare(root)
    return root


@pytest.mark.parametrize("change", CHANGES)
def test_killed_before_every_step(start: Path, tmp_path: Path, change: str) -> None:
    before = without_file_ids(look(start))
    whole = tmp_path / "whole"
    shutil.copytree(start, whole)
    with opened(whole) as jobs:
        CHANGES[change](jobs)
    after = without_file_ids(look(whole))
    assert before != after
    program = [sys.executable, "-m", "tests.training.test_job_store_crash", change, str(tmp_path / "killed")]
    seen = set()
    with subprocess.Popen(
        program, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        for steps in range(1, 60):
            root = tmp_path / "killed" / str(steps)
            shutil.copytree(start, root)
            child.stdin.write(f"{steps}\n")
            child.stdin.flush()
            code = int(child.stdout.readline())
            found = without_file_ids(look(root))
            assert found in ((after,) if code == 0 else (before, after))
            seen.add(found)
            if code == 0:
                break
            assert code == -signal.SIGKILL
        else:
            pytest.fail("the change never ended")
        child.stdin.close()
    assert seen == {before, after}


def main() -> None:
    """For each line a number: the step before which a child that makes the change dies; says how it ended."""
    change, folder = sys.argv[1:]
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            status = 1
            try:
                with opened(Path(folder) / line.strip()) as jobs:
                    die_at_step(int(line))
                    CHANGES[change](jobs)
                    status = 0
            finally:
                os._exit(status)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
