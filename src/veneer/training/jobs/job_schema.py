"""The tables of files and fine-tuning jobs, beside the adapters' in the same database. Imports no torch.

Each table counts its rows with `number`, which is also their order: lists, pages and the queue go by it. Rows
are handed out detached from their session: values to read, no way to change the database.
"""

from __future__ import annotations

from typing import Any, Literal

from sqlalchemy import JSON, BigInteger, ForeignKey, String, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from veneer.adapters.names import NAME_LIMIT

Status = Literal["queued", "validating_files", "running", "paused", "succeeded", "failed", "cancelled"]
Level = Literal["info", "warn", "error"]
WITH_ENGINE: tuple[Status, ...] = ("validating_files", "running")  # the engine was told to train it
OVER: tuple[Status, ...] = ("succeeded", "failed", "cancelled")

_ID = String(40)
_OPTIONAL = JSON(none_as_null=True)


class Base(DeclarativeBase):
    type_annotation_map = {  # noqa: RUF012  (SQLAlchemy's own declaration)
        dict[str, Any]: JSON,
        dict[str, str]: JSON,
        list[str]: JSON,
    }


class File(Base):
    """A stored file: its content is at files/<id>."""

    __tablename__ = "files"

    number: Mapped[int] = mapped_column(primary_key=True)
    id: Mapped[str] = mapped_column(_ID, unique=True)
    filename: Mapped[str]  # what the client called it; never a path here
    purpose: Mapped[str] = mapped_column(String(32))
    bytes: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[int] = mapped_column(BigInteger)  # unix seconds
    expires_at: Mapped[int | None] = mapped_column(BigInteger)


class Job(Base):
    """A fine-tuning job: its folder is jobs/<id>/."""

    __tablename__ = "fine_tuning_jobs"

    number: Mapped[int] = mapped_column(primary_key=True)
    id: Mapped[str] = mapped_column(_ID, unique=True)
    status: Mapped[str] = mapped_column(String(20), index=True)
    created_at: Mapped[int] = mapped_column(BigInteger)
    finished_at: Mapped[int | None] = mapped_column(BigInteger)
    model: Mapped[str]  # the base, as it was served
    result_name: Mapped[str] = mapped_column(String(NAME_LIMIT))  # what the result will be called
    fine_tuned_model: Mapped[str | None] = mapped_column(String(NAME_LIMIT))  # the same, once it is served
    training_file: Mapped[str] = mapped_column(_ID)
    validation_file: Mapped[str | None] = mapped_column(_ID)
    seed: Mapped[int]
    labels: Mapped[dict[str, str]]  # OpenAI's metadata
    method: Mapped[dict[str, Any]]  # with all hyperparameters resolved
    training: Mapped[dict[str, Any]]  # the `Training` in training.json
    error: Mapped[dict[str, Any] | None] = mapped_column(_OPTIONAL)
    report: Mapped[dict[str, Any] | None] = mapped_column(_OPTIONAL)  # of the data, once they are validated
    result_files: Mapped[list[str]]
    # How far the engine has told that it is
    step: Mapped[int] = mapped_column(default=0)
    total_steps: Mapped[int | None]
    tokens: Mapped[int] = mapped_column(BigInteger, default=0)
    deaths: Mapped[int] = mapped_column(default=0)  # of the engine since it told of a new step

    @property
    def over(self) -> bool:
        return self.status in OVER


class Event(Base):
    __tablename__ = "fine_tuning_events"

    number: Mapped[int] = mapped_column(primary_key=True)
    job: Mapped[int] = mapped_column(ForeignKey(Job.number), index=True)
    created_at: Mapped[int] = mapped_column(BigInteger)
    level: Mapped[str] = mapped_column(String(8))
    kind: Mapped[str] = mapped_column(String(8))  # "message" | "metrics"
    message: Mapped[str]
    data: Mapped[dict[str, Any]]

    @property
    def id(self) -> str:
        return f"ftevent-{self.number:016d}"


class Checkpoint(Base):
    """A checkpoint that is served under `name`."""

    __tablename__ = "fine_tuning_checkpoints"
    __table_args__ = (UniqueConstraint("job", "step"),)

    number: Mapped[int] = mapped_column(primary_key=True)
    job: Mapped[int] = mapped_column(ForeignKey(Job.number), index=True)
    step: Mapped[int]
    created_at: Mapped[int] = mapped_column(BigInteger)
    name: Mapped[str] = mapped_column(String(NAME_LIMIT))
    metrics: Mapped[dict[str, Any]]

    @property
    def id(self) -> str:
        return f"ftckpt_{self.number:016d}"
