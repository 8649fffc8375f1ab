"""The adapter store: immutable, content-addressed versions under names that move atomically.

    <root>/blobs/<digest>/   adapter_config.json, adapter_model.safetensors, a tokenizer's files if it has some
    <root>/staging/<random>/ uploads on their way in, folders on their way out; emptied on opening
    <root>/store.db          names, versions, pointer moves (SQLite, unless another database is given)
    <root>/lock              held by the one process that owns the root
    <root>/spare             room for the transaction of a delete when the disk is full
    <root>/files/, jobs/     of training/jobs/file_store.py and training/jobs/job_store.py

Files come before the row that lists them, and go after it: a crash can leave a folder without a row, which
opening removes, never a row without its folder. Names never become paths. Methods block (they sync to disk)
and may be called from any thread.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from sqlalchemy import URL, Engine, inspect, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session, sessionmaker

from veneer.adapters import catalog, saved_blends
from veneer.adapters.names import check_name, is_name
from veneer.adapters.recipes import Recipe
from veneer.adapters.saved_blends import Blend, Ingredient
from veneer.adapters.schema import (
    MAX_VERSION,
    AdapterVersion,
    Base,
    Entry,
    Move,
    Name,
    Version,
    open_database,
    served,
)
from veneer.adapters.staging import (
    Staging,
    discard,
    fault,
    is_digest,
    keep_spare,
    lock_root,
    remove,
    storage_errors,
    sync,
)
from veneer.errors import Conflict, InvalidRequest, NotFound, StorageFull

_T = TypeVar("_T")


class AdapterStore:
    """Opens (and repairs) the store at `root`. Raises `Conflict` while another process has it open."""

    def __init__(self, root: Path, url: str | None = None) -> None:
        self.root = root.absolute()
        self._blobs = self.root / "blobs"
        self._staging = self.root / "staging"
        self._spare = self.root / "spare"
        for folder in (self.root, self._blobs, self._staging):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._write = threading.Lock()  # one change at a time: a file move and its row belong together
        self._uploading: set[str] = set()
        self._damage: dict[str, str] = {}  # by digest
        self._engine = open_database(url or URL.create("sqlite", database=str(self.root / "store.db")))
        self._lock_file = lock_root(self.root)
        self._sessions = sessionmaker(self._engine, expire_on_commit=False)
        try:
            self._recover()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._engine.dispose()
        self._lock_file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def database(self) -> Engine:
        """For tables of others; they change only within `change`."""
        return self._engine

    def blob(self, digest: str) -> Path:
        """The folder of an adapter's files."""
        if not is_digest(digest):
            raise ValueError(f"{digest!r} is not a sha256 digest in lower-case hexadecimal")
        return self._blobs / digest

    # ---- uploads ----------------------------------------------------------------------------------

    @contextmanager
    def reserve(self, name: str) -> Iterator[None]:
        """Hold a name during an upload; a second upload of it meanwhile is refused."""
        check_name(name)
        with self._write:
            if name in self._uploading:
                raise InvalidRequest(
                    f"an upload of {name!r} is in progress; wait until it is done, then try again",
                    param="name",
                    code="upload_in_progress",
                )
            with self._sessions() as session:
                catalog.refuse_alias(session.get(Name, name), name)
                saved_blends.refuse(session, name)
            self._uploading.add(name)
        try:
            yield
        finally:
            with self._write:
                self._uploading.discard(name)

    @contextmanager
    def stage(self) -> Iterator[Staging]:
        """A private folder to fill and `commit`. Whatever was not committed is gone afterwards."""
        with storage_errors("an upload"):
            path = Path(tempfile.mkdtemp(dir=self._staging))
        try:
            yield Staging(path)
        finally:
            remove(path)

    def commit(self, staging: Staging, name: str, details: Mapping[str, Any]) -> AdapterVersion:
        """Make the staged files the next version of `name` and point the name to it; durable on return.

        Content equal to the name's current version changes nothing and returns that version, with
        `created` False. Raises `AdapterRefused` unless exactly an adapter's files are there.
        """
        check_name(name)
        digest, sizes = staging.digest(), staging.sizes()
        staging.sync()
        with self._write, storage_errors(f"adapter {name!r}"):
            placed = self._place(staging, digest, sizes)
            try:
                with self._sessions.begin() as session:
                    saved_blends.refuse(session, name)
                    return catalog.add_version(session, name, digest, sizes, details)
            except BaseException:
                if placed:
                    with suppress(SQLAlchemyError, OSError):  # opening the store does it otherwise
                        self._discard_unreferenced([digest])
                raise

    def _place(self, staging: Staging, digest: str, sizes: Mapping[str, int]) -> bool:
        """Move the staged folder to its place, unless the same content is there. True when it was moved."""
        blob = self.blob(digest)
        if fault(blob, sizes) is None:
            return False
        if blob.exists():
            discard(blob, self._staging)  # damaged: the new files take its place
        staging.path.rename(blob)
        sync(self._blobs)
        self._damage.pop(digest, None)
        return True

    # ---- reading ----------------------------------------------------------------------------------

    def resolve(self, name: str, version: int | None = None) -> AdapterVersion:
        """The version that a name, `name@version` or an alias selects now.

        A version given with an alias is a version of the adapter behind it. Raises `NotFound`
        (`model_not_found`), or `Conflict` (`adapter_damaged`) when its files are not as they were stored.
        """
        if not is_name(name):
            raise catalog.unknown(name)
        found = None
        with self._sessions() as session:
            if version is None or 0 < version <= MAX_VERSION:
                found = session.execute(served(version).where(Entry.name == name)).one_or_none()
        if found is None and version is None:
            raise catalog.unknown(name)
        if found is None:
            known = self.versions(name)
            raise catalog.no_version(known[0].name, version, [each.version for each in known])
        record = self._record(*found)
        if record.damage:
            raise Conflict(
                f"adapter {record.name!r} version {record.version} cannot be served: {record.damage}; "
                f"upload the same files again or delete it",
                param="model",
                code="adapter_damaged",
            )
        return record

    def versions(self, name: str) -> tuple[AdapterVersion, ...]:
        """All versions of an adapter (of the adapter behind it, for an alias), oldest first."""
        if not is_name(name):
            raise catalog.unknown(name)
        with self._sessions() as session:
            found = session.execute(
                served(Version.version).where(Entry.name == name).order_by(Version.version)
            ).all()
        if not found:
            raise catalog.unknown(name)
        return tuple(self._record(*row) for row in found)

    def blends(self, name: str | None = None) -> tuple[Blend, ...]:
        """The saved blends, or the one of that name."""
        with self._sessions() as session:
            return tuple(saved_blends.load(session, name))

    def list(self) -> tuple[AdapterVersion, ...]:
        """What each served name, adapters and aliases alike, selects now; sorted by served name."""
        with self._sessions() as session:
            found = session.execute(served()).all()
        return tuple(sorted((self._record(*row) for row in found), key=lambda each: each.served_name))

    def _record(self, version: Version, owner: Name, entry: Name) -> AdapterVersion:
        return catalog.record(version, owner, entry, damage=self._damage.get(version.digest))

    # ---- changes ----------------------------------------------------------------------------------

    @contextmanager
    def change(self, what: str) -> Iterator[Session]:
        """A transaction that changes the database; one runs at a time. Raises `StorageFull`, which names `what`.

        Also for tables of others in the same database (training/jobs/job_store.py): SQLite has one writer.
        """
        with self._write, storage_errors(what), self._sessions.begin() as session:
            yield session

    def read(self) -> Session:
        """A session that only reads, as a context manager."""
        return self._sessions()

    def with_spare(self, change: Callable[[], _T]) -> _T:
        """Make a change that frees room or ends something, on a full disk with what was kept for this."""
        try:
            return change()
        except StorageFull:
            if not self._spare.exists():
                raise
            self._spare.unlink()  # it was kept for this: a delete needs a little room to make any
            return change()

    def keep_spare(self) -> None:
        """Keep room for `with_spare` again, if there is some."""
        with self._write:
            keep_spare(self._spare, self._staging)

    def alias(self, alias: str, target: str, version: int | None = None) -> AdapterVersion:
        """Create an alias or move it, atomically. With a version it stays there; without, it follows.

        Raises `Conflict` when `alias` is an adapter's name or `target` is itself an alias.
        """
        check_name(alias)
        check_name(target)
        with self.change(f"alias {alias!r}") as session:
            owner = catalog.adapter_row(session, target)
            selected = catalog.version_row(session, owner, version)
            entry = session.get(Name, alias, with_for_update=True) or Name(name=alias)
            if entry.current is not None:
                raise Conflict(
                    f"{alias!r} is an adapter's name and cannot be an alias; choose another alias",
                    param="alias",
                )
            saved_blends.remove(session, alias)
            entry.target, entry.target_version = target, version
            session.add(entry)
            return self._record(selected, owner, entry)

    def remove_alias(self, alias: str) -> None:
        """Remove an alias or a saved blend; adapters stay. Raises `NotFound` when there is none."""
        check_name(alias)
        with self.change(f"alias {alias!r}") as session:
            entry = session.get(Name, alias, with_for_update=True)
            if entry is None or (not saved_blends.remove(session, alias) and entry.target is None):
                raise NotFound(f"there is no alias {alias!r}", param="alias")
            entry.target = entry.target_version = None
            if not entry.last_version:  # it was never an adapter: no counter to keep
                session.delete(entry)

    def save_blend(self, name: str, ingredients: Sequence[Ingredient], made: Recipe) -> Blend:
        """Save a blend under a name, in place of an alias or a blend that has it; durable on return.

        Raises `Conflict` when it is an adapter's name, `NotFound` when a version is gone.
        """
        check_name(name)
        with self.change(f"the blend {name!r}") as session:
            saved_blends.put(session, name, ingredients, made)
            return saved_blends.load(session, name)[0]

    def rollback(self, name: str, version: int | None = None) -> AdapterVersion:
        """Point a name to `version`, or to where it pointed before its last move (again and again).

        Raises `NotFound` for an unknown version and `Conflict` when there is nothing to go back to.
        """
        check_name(name)
        with self.change(f"a rollback of {name!r}") as session:
            owner = catalog.adapter_row(session, name)
            if version is None:
                owner.current = catalog.pop_move(session, owner)
            elif catalog.version_row(session, owner, version).version != owner.current:
                session.add(Move(name=name, version=version))
                owner.current = version
            return self._record(catalog.version_row(session, owner, None), owner, owner)

    def set_pinned(self, name: str, pinned: bool) -> AdapterVersion:
        """Record whether the adapter is to stay on the device; this outlives restarts."""
        check_name(name)
        with self.change(f"a pin of {name!r}") as session:
            owner = catalog.adapter_row(session, name)
            owner.pinned = pinned
            return self._record(catalog.version_row(session, owner, None), owner, owner)

    def begin_delete(self, name: str, version: int | None = None) -> tuple[str, ...]:
        """Delete an adapter or one version of it: it is not found from now on. Its files stay.

        Returns the digests that no version refers to any more. Pass them to `finish_delete` once nobody
        reads their files; opening the store does so after a crash. Deleting the only version deletes the
        adapter. Raises `Conflict` for the current version among several (which one is served next is the
        caller's choice: roll back first) and for what an alias points to.
        """
        check_name(name)
        return self.with_spare(lambda: self._delete_rows(name, version))

    def _delete_rows(self, name: str, version: int | None) -> tuple[str, ...]:
        with self.change(f"a delete of {name!r}") as session:
            owner = catalog.adapter_row(session, name)
            numbers = session.scalars(select(Version.version).where(Version.name == name)).all()
            if version is not None and version not in numbers:
                raise catalog.no_version(name, version, sorted(numbers))
            if len(numbers) == 1:
                version = None
            if version is not None and version == owner.current:
                raise Conflict(
                    f"version {version} of adapter {name!r} is its current one; "
                    f"roll back to another version first, or delete the whole adapter",
                    param="version",
                )
            catalog.refuse_aliased(session, name, version, saved_blends.of_versions(session, name, version))
            return catalog.delete_versions(session, owner, version)

    def finish_delete(self, digests: Iterable[str]) -> None:
        """Remove the files of deleted versions. Content that was uploaded again meanwhile stays."""
        with self._write:
            self._discard_unreferenced(digests)
            keep_spare(self._spare, self._staging)

    def _discard_unreferenced(self, digests: Iterable[str]) -> None:
        with self._sessions() as session:
            for digest in digests:
                blob = self.blob(digest)
                if blob.exists() and not catalog.is_referenced(session, digest):
                    discard(blob, self._staging)

    # ---- opening ----------------------------------------------------------------------------------

    def _recover(self) -> None:
        """Finish what a crash interrupted, and note which versions have lost their files."""
        for entry in self._staging.iterdir():
            remove(entry)
        stored = [entry.name for entry in self._blobs.iterdir() if is_digest(entry.name)]
        if stored and not inspect(self._engine).has_table(Version.__tablename__):
            raise Conflict(
                f"{self._blobs} holds {len(stored)} adapters but the database lists none; restore the "
                f"database (store.db) or move the folder away: opening the store now would delete them"
            )
        Base.metadata.create_all(self._engine)
        for folder in (self._blobs, self._staging, self.root, self.root.parent):
            sync(folder)
        self._discard_unreferenced(stored)
        keep_spare(self._spare, self._staging)
        with self._sessions() as session:
            for version in session.scalars(select(Version)):
                if problem := fault(self.blob(version.digest), version.sizes):
                    self._damage[version.digest] = problem
