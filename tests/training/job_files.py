"""What the tests of the job store share: a store with files, jobs in it, and what is left on the disk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from veneer.adapters.store import AdapterStore
from veneer.training.jobs.file_store import FileStore
from veneer.training.jobs.job_schema import File, Job
from veneer.training.jobs.job_store import JobStore, NewJob
from veneer.training.recipe import Training

ROWS = b'{"prompt": "one", "completion": "two"}\n'


@contextmanager
def opened(root: Path) -> Iterator[JobStore]:
    with AdapterStore(root) as store:
        yield JobStore(store, FileStore(store))


def put(jobs: JobStore, content: bytes = ROWS, name: str = "rows.jsonl") -> File:
    return jobs.files.add([content], name, "fine-tune", limit=1 << 20, most=100)


def create(jobs: JobStore, file: str, *, most: int = 100, unfinished: int = 100, **fields: Any) -> Job:
    new: dict[str, Any] = {
        "model": "base",
        "training_file": file,
        "validation_file": None,
        "suffix": None,
        "labels": {},
        "method": {"type": "supervised"},
        "training": Training(steps=3),
    }
    return jobs.create(NewJob(**new | fields), most=most, unfinished=unfinished)


def step(number: int, total: int = 3, **fields: Any) -> dict[str, Any]:
    numbers = {"step": number, "total_steps": total, "tokens": 10 * number, "seconds": 1.0 * number}
    return numbers | {"train_loss": 1 / number} | fields


def events(jobs: JobStore, id: str) -> list[str]:
    """Messages, oldest first."""
    return [event.message for event in jobs.events(id, after=None, limit=1000)[0]][::-1]


def on_disk(root: Path) -> dict[str, list[str]]:
    return {
        name: sorted(path.name for path in (root / name).iterdir()) for name in ("files", "jobs", "staging")
    }
