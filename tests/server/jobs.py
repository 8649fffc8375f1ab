"""What the tests of files and fine-tuning jobs share: uploads, jobs, waits, and OpenAI's own schemas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator
from openai.types import FileObject
from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent
from tests.server.conftest import BASE, Server

ROWS = 4
SCHEMAS = json.loads((Path(__file__).parent / "openai_fine_tuning.json").read_text())
OVER = ("succeeded", "failed", "cancelled")


def conforms(body: Any, schema: str) -> None:
    """Check an answer against OpenAI's specification."""
    validator = Draft202012Validator({"$ref": f"#/$defs/{schema}", "$defs": SCHEMAS["$defs"]})
    assert [error.message for error in validator.iter_errors(body)] == []


def rows(count: int = ROWS) -> bytes:
    row = {"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]}
    return b"".join(json.dumps(row).encode() + b"\n" for _ in range(count))


def put(server: Server, content: bytes | None = None, name: str = "rows.jsonl") -> FileObject:
    content = rows() if content is None else content
    return server.openai.files.create(file=(name, content), purpose="fine-tune")


def create(server: Server, *, options: dict[str, Any] | None = None, **fields: Any) -> FineTuningJob:
    """A job of one epoch; `options` steer the toy engine."""
    file = fields.pop("training_file", None) or put(server).id
    fields.setdefault("hyperparameters", {"n_epochs": 1})
    extra = {"adapter": {"options": options or {}}, "training": fields.pop("training", {})}
    return server.openai.fine_tuning.jobs.create(
        model=BASE, training_file=file, seed=7, extra_body=extra, **fields
    )


def get(server: Server, id: str) -> FineTuningJob:
    return server.openai.fine_tuning.jobs.retrieve(id)


def until_over(server: Server, id: str) -> FineTuningJob:
    job = server.until(lambda: found if (found := get(server, id)).status in OVER else None)
    assert job is not None
    return job


def until_status(server: Server, id: str, status: str) -> None:
    server.until(lambda: get(server, id).status == status)


def events(server: Server, id: str) -> list[FineTuningJobEvent]:
    """Of a job, oldest first."""
    return list(server.openai.fine_tuning.jobs.list_events(id, limit=7))[::-1]


def messages(server: Server, id: str) -> list[str]:
    return [event.message for event in events(server, id)]


def steps(server: Server, id: str) -> list[int]:
    """The steps that became events, in their order."""
    found: list[Any] = [event.data for event in events(server, id) if event.type == "metrics"]
    return [each["step"] for each in found]


def waiting(tmp_path: Path, step: int = 2) -> tuple[dict[str, Any], Path]:
    """Options of a job that stops before a step until the file is there."""
    gate = tmp_path / "go on"
    return {"wait_at": step, "wait_for": str(gate)}, gate
