"""Events of a job as they are written, and the table of its metrics. Inside a transaction of job_store.py."""

from __future__ import annotations

import csv
import io
import math
import time
from collections.abc import Mapping
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from veneer.training.jobs.job_schema import Event, Job, Level

MOST_STEPS = 10_000  # of a job that become events; of more, every second, third, …
# OpenAI's columns of step_metrics.csv, with what the engine calls them
COLUMNS = {
    "step": "step",
    "train_loss": "train_loss",
    "train_accuracy": "train_mean_token_accuracy",
    "valid_loss": "valid_loss",
    "valid_mean_token_accuracy": "valid_mean_token_accuracy",
}


def add_event(
    session: Session,
    job: Job,
    message: str,
    level: Level = "info",
    *,
    data: Mapping[str, Any] | None = None,
    kind: str = "message",
) -> None:
    now = int(time.time())
    session.add(
        Event(
            job=job.number,
            created_at=now,
            level=level,
            kind=kind,
            message=message,
            data=finite(data or {}),
        )
    )


def step_event(session: Session, job: Job, data: Mapping[str, Any]) -> None:
    """Note how far the job is. A step that was told before, ahead of a restart, is no second event."""
    step, total = int(data["step"]), int(data["total_steps"])
    if step <= job.step:
        return
    job.step, job.total_steps, job.tokens = step, total, int(data.get("tokens", job.tokens))
    job.deaths = 0
    every = math.ceil(total / MOST_STEPS)
    if step % every and step != total and data.get("valid_loss") is None:
        return
    losses = [f"training loss={_shown(data.get('train_loss'))}"]
    if data.get("valid_loss") is not None:
        losses.append(f"validation loss={_shown(data['valid_loss'])}")
    add_event(session, job, f"Step {step}/{total}: {', '.join(losses)}", data=data, kind="metrics")


def metrics_csv(session: Session, job: Job) -> bytes:
    """`step_metrics.csv`: a line for each step, a column for each thing that was measured."""
    query = select(Event.data).where(Event.job == job.number, Event.kind == "metrics").order_by(Event.number)
    rows = list(session.scalars(query))
    measured = {name: key for name, key in COLUMNS.items() if any(row.get(key) is not None for row in rows)}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(measured)
    writer.writerows([row.get(key) for key in measured.values()] for row in rows)
    return text.getvalue().encode()


def finite(data: Mapping[str, Any]) -> dict[str, Any]:
    """With null for what JSON has no number for."""
    return {str(key): _finite(value) for key, value in data.items()}


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return finite(value)
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _shown(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float | int) else "none"
