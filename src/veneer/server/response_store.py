"""Answers of `/v1/responses` that clients may come back to, in the adapter store's database.

A row has the whole response and all items that led to it, those of earlier responses too: so what goes on from a
response needs nothing of the ones before it, which may be deleted or have expired. How many rows there are and how
old they may be is bounded. Methods block.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from sqlalchemy import JSON, Float, String, delete, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from veneer.adapters.store import AdapterStore
from veneer.errors import NotFound

Item = dict[str, Any]


class Base(DeclarativeBase):
    type_annotation_map = {dict[str, Any]: JSON, list[Item]: JSON}  # noqa: RUF012  (SQLAlchemy's declaration)


class StoredResponse(Base):
    __tablename__ = "responses"

    number: Mapped[int] = mapped_column(primary_key=True)  # also their order
    id: Mapped[str] = mapped_column(String(64), unique=True)
    stored_at: Mapped[float] = mapped_column(Float, index=True)  # unix seconds
    response: Mapped[dict[str, Any]]  # OpenAI's `Response`
    items: Mapped[list[Item]]  # the conversation before its output

    @property
    def conversation(self) -> list[Item]:
        """What a response that goes on from this one begins with."""
        return [*self.items, *self.response["output"]]


class ResponseStore:
    """Of the newest `most` responses, for `lifetime` seconds each; `most` 0 stores none."""

    def __init__(
        self, store: AdapterStore, *, most: int, lifetime: float, clock: Callable[[], float] = time.time
    ) -> None:
        self._store, self.most, self._lifetime, self._clock = store, most, lifetime, clock
        Base.metadata.create_all(store.database)
        with store.change("old responses") as session:
            self._forget(session)

    def add(self, response: dict[str, Any], items: list[Item]) -> None:
        """Durable on return. The oldest give way. Raises StorageFull."""
        row = StoredResponse(id=response["id"], stored_at=self._clock(), response=response, items=items)
        with self._store.change("a response") as session:
            session.add(row)
            session.flush()
            self._forget(session)

    def get(self, id: str) -> StoredResponse:
        """Raises NotFound."""
        with self._store.read() as session:
            found = session.scalar(select(StoredResponse).where(StoredResponse.id == id, self._alive()))
        if found is None:
            raise _unknown(id)
        return found

    def delete(self, id: str) -> None:
        """Raises NotFound."""
        alive = self._alive()

        def change() -> bool:
            with self._store.change("a delete") as session:
                gone = delete(StoredResponse).where(StoredResponse.id == id, alive)
                return session.scalar(gone.returning(StoredResponse.number)) is not None

        if not self._store.with_spare(change):
            raise _unknown(id)

    def _alive(self) -> Any:
        return StoredResponse.stored_at > self._clock() - self._lifetime

    def _forget(self, session: Session) -> None:
        """Remove what is too old, or one too many."""
        session.execute(delete(StoredResponse).where(~self._alive()))
        newest = select(StoredResponse.number).order_by(StoredResponse.number.desc())
        last = session.scalar(newest.offset(self.most).limit(1))
        if last is not None:
            session.execute(delete(StoredResponse).where(StoredResponse.number <= last))


def _unknown(id: str) -> NotFound:
    return NotFound(
        f"There is no response {id[:100]!r}: it was not stored, was deleted, or is too old.",
        param="response_id",
    )
