"""Files of clients and of jobs: OpenAI's Files, in the adapter store's root and database. Imports no torch.

    <root>/files/<id>   the content

As with adapters, a file comes before its row and goes after it: what a crash leaves without a row is removed at
the next opening. Ids are made here, so no path comes from a client. Methods block.
"""

from __future__ import annotations

import secrets
import shutil
import string
import time
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, Literal

from sqlalchemy import ColumnElement, delete, func, inspect, or_, select
from sqlalchemy.orm import Session

from veneer.adapters.staging import sync, write_file
from veneer.adapters.store import AdapterStore
from veneer.errors import Conflict, InvalidRequest, NotFound
from veneer.training.jobs.job_schema import Base, File

RESULTS = "fine-tune-results"
_ID_LETTERS = string.ascii_lowercase + string.digits


class FileStore:
    """Opens (and repairs) the files of `store`; that one owns the root."""

    def __init__(self, store: AdapterStore) -> None:
        self._store = store
        self._folder = store.root / "files"
        self._folder.mkdir(mode=0o700, exist_ok=True)
        self._require_tables()
        Base.metadata.create_all(store.database)
        sync(store.root)
        self._remove_strays()
        self.remove_expired()

    def add(
        self,
        chunks: Iterable[bytes],
        filename: str,
        purpose: str,
        *,
        limit: int,
        most: int,
        lifetime: int | None = None,
    ) -> File:
        """Store a file of at most `limit` bytes, when there are fewer than `most`; durable on return.

        `lifetime` is in seconds. Raises `TooLarge`, `StorageFull`, and `InvalidRequest` for an empty file or
        when there are too many.
        """
        self.remove_expired()
        with self._store.stage() as staging:
            draft = staging.path / "file"
            size = write_file(draft, chunks, limit, param="file")
            if not size:
                raise InvalidRequest(
                    f"the file {filename[:200]!r} is empty; send one with rows", param="file"
                )
            # Rows are checked by the job that uses them. Whoever wants them checked at the upload does it on
            # `draft`, here: nothing of the file is visible yet.
            return self._place(draft, filename, purpose, size, most=most, lifetime=lifetime)

    def _place(
        self, draft: Path, filename: str, purpose: str, size: int, *, most: int, lifetime: int | None
    ) -> File:
        number = new_id("file-")
        try:
            with self._store.change(f"the file {filename[:200]!r}") as session:
                found = session.scalar(select(func.count()).select_from(File)) or 0
                if found >= most:
                    raise InvalidRequest(
                        f"{found} files are stored and the limit is {most}; delete some with "
                        "DELETE /v1/files/ID",
                        param="file",
                        code="too_many_files",
                    )
                return self.keep(session, draft, filename, purpose, size, lifetime=lifetime, id=number)
        except BaseException:
            self._path(number).unlink(missing_ok=True)
            raise

    def keep(
        self,
        session: Session,
        draft: Path,
        filename: str,
        purpose: str,
        size: int,
        *,
        lifetime: int | None = None,
        id: str | None = None,
    ) -> File:
        """Move a written file to its place, in the transaction of `session` that lists it."""
        now = int(time.time())
        row = File(
            id=id or new_id("file-"),
            filename=filename,
            purpose=purpose,
            bytes=size,
            created_at=now,
            expires_at=None if lifetime is None else now + lifetime,
        )
        draft.rename(self._path(row.id))
        sync(self._folder)
        session.add(row)
        session.flush()
        return row

    def get(self, id: str) -> File:
        """Raises `NotFound`."""
        with self._store.read() as session:
            return self._row(session, id)

    def page(
        self, *, purpose: str | None, after: str | None, limit: int, order: Literal["asc", "desc"]
    ) -> tuple[list[File], bool]:
        """At most `limit` files behind the one with the id `after`, and whether more follow."""
        query = select(File).where(_lives()).order_by(File.number if order == "asc" else File.number.desc())
        if purpose is not None:
            query = query.where(File.purpose == purpose)
        with self._store.read() as session:
            if after is not None:
                number = self._row(session, after, param="after").number
                query = query.where(File.number > number if order == "asc" else File.number < number)
            found = list(session.scalars(query.limit(limit + 1)))
        return found[:limit], len(found) > limit

    def open(self, id: str) -> tuple[File, BinaryIO]:
        """The file and its content; a delete meanwhile does not end the reading."""
        row = self.get(id)
        try:
            return row, self._path(row.id).open("rb")
        except FileNotFoundError:
            raise _unknown(id, "file_id") from None

    def delete(self, id: str) -> None:
        """Raises `NotFound`. Jobs that use the file keep its content."""

        def remove() -> None:
            with self._store.change(f"a delete of {id[:200]!r}") as session:
                session.delete(self._row(session, id))

        self._store.with_spare(remove)
        self._path(id).unlink(missing_ok=True)
        self._store.keep_spare()

    def link(self, session: Session, id: str, folder: Path, name: str, *, param: str) -> None:
        """Give a job the content of a `fine-tune` file as `folder`/`name`.<suffix>.

        Raises `InvalidRequest` when there is no such file.
        """
        row = session.scalar(select(File).where(File.id == id, _lives()))
        if row is None:
            raise InvalidRequest(
                f"there is no file {id[:200]!r}; upload one with POST /v1/files, purpose 'fine-tune'",
                param=param,
                code="file_not_found",
            )
        if row.purpose != "fine-tune":
            raise InvalidRequest(
                f"the file {id!r} has the purpose {row.purpose!r}; a job takes files uploaded with 'fine-tune'",
                param=param,
            )
        suffix = Path(row.filename).suffix.lower()
        target = folder / f"{name}{suffix if suffix in ('.csv', '.parquet') else '.jsonl'}"
        try:
            target.hardlink_to(self._path(row.id))
        except FileNotFoundError:
            raise
        except OSError:  # a file system without links
            shutil.copyfile(self._path(row.id), target)

    def remove_expired(self) -> None:
        """Delete what has outlived its `expires_at`."""
        with self._store.read() as session:
            expired = list(session.scalars(select(File.id).where(~_lives())))
        if expired:
            with self._store.change("a delete of files") as session:
                self.forget(session, expired)
            self.remove_contents(expired)

    def forget(self, session: Session, ids: Iterable[str]) -> None:
        """Take files that may be gone already out of the lists; `remove_contents` follows."""
        session.execute(delete(File).where(File.id.in_(list(ids))))

    def remove_contents(self, ids: Iterable[str]) -> None:
        for id in ids:
            self._path(id).unlink(missing_ok=True)

    def _path(self, id: str) -> Path:
        return self._folder / id

    def _row(self, session: Session, id: str, *, param: str = "file_id") -> File:
        row = session.scalar(select(File).where(File.id == id, _lives()))
        if row is None:
            raise _unknown(id, param)
        return row

    def _require_tables(self) -> None:
        """Refuse to take everything for strays when the database was lost."""
        if inspect(self._store.database).has_table(File.__tablename__):
            return
        for folder in (self._folder, self._store.root / "jobs"):
            if folder.exists() and any(folder.iterdir()):
                raise Conflict(
                    f"{folder} is not empty but the database knows nothing of it; restore the database "
                    f"(store.db) or move the folder away: opening the store now would delete what is in it"
                )

    def _remove_strays(self) -> None:
        with self._store.read() as session:
            known = set(session.scalars(select(File.id)))
        for path in self._folder.iterdir():
            if path.name not in known:
                path.unlink()


def new_id(prefix: str) -> str:
    """An id that nobody has: 24 random letters and digits."""
    return prefix + "".join(secrets.choice(_ID_LETTERS) for _ in range(24))


def _lives() -> ColumnElement[bool]:
    return or_(File.expires_at.is_(None), File.expires_at > int(time.time()))


def _unknown(id: str, param: str) -> NotFound:
    return NotFound(f"there is no file {id[:200]!r}; GET /v1/files lists them", param=param)
