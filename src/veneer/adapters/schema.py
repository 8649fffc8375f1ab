"""The store's tables, and the plain values it hands out.

Three tables. A `Name` row is a served name: an adapter (it has a `current` version), an alias (it has a
`target`), or neither, when it was deleted and only its version counter is kept. A `Version` row is one
immutable upload. A `Move` row is one step of an adapter's pointer; the newest is where it points now.

Nothing here is particular to SQLite but the connection pragmas, so a PostgreSQL URL works as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import (
    JSON,
    URL,
    BigInteger,
    Engine,
    ForeignKey,
    ForeignKeyConstraint,
    Select,
    String,
    create_engine,
    event,
    func,
    select,
)
from sqlalchemy.orm import DeclarativeBase, InstrumentedAttribute, Mapped, aliased, mapped_column

from veneer.adapters.names import CONFIG_FILE, NAME_LIMIT, WEIGHTS_FILE

MAX_VERSION = 2**31 - 1  # what an INTEGER column holds


class Base(DeclarativeBase):
    type_annotation_map = {dict[str, Any]: JSON}  # noqa: RUF012  (SQLAlchemy's own declaration)


class Name(Base):
    """A served name. Its row outlives a delete, so that no version number is ever used twice."""

    __tablename__ = "adapter_names"

    name: Mapped[str] = mapped_column(String(NAME_LIMIT), primary_key=True)
    last_version: Mapped[int] = mapped_column(default=0)  # the highest number ever given out
    current: Mapped[int | None]  # an adapter's current version
    pinned: Mapped[bool] = mapped_column(default=False)
    target: Mapped[str | None] = mapped_column(ForeignKey("adapter_names.name"), index=True)  # of an alias
    target_version: Mapped[int | None]  # None: follow the target's current version


class Version(Base):
    """One upload: immutable, its files are at blobs/<digest>/."""

    __tablename__ = "adapter_versions"

    name: Mapped[str] = mapped_column(ForeignKey("adapter_names.name"), primary_key=True)
    version: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    digest: Mapped[str] = mapped_column(String(64), index=True)
    created_at: Mapped[int] = mapped_column(BigInteger)  # unix seconds
    config_bytes: Mapped[int] = mapped_column(BigInteger)
    weights_bytes: Mapped[int] = mapped_column(BigInteger)
    details: Mapped[dict[str, Any]]

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file."""
        text_files: dict[str, int] = self.details.get("text_files", {})
        return {CONFIG_FILE: self.config_bytes, WEIGHTS_FILE: self.weights_bytes, **text_files}


class Move(Base):
    """The stack of an adapter's pointer: uploads and rollbacks to a version push, a plain rollback pops."""

    __tablename__ = "adapter_moves"
    __table_args__ = (
        ForeignKeyConstraint(["name", "version"], ["adapter_versions.name", "adapter_versions.version"]),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(NAME_LIMIT), index=True)
    version: Mapped[int]


@dataclass(frozen=True, slots=True)
class Alias:
    """A name for an adapter's name. `version` None: it follows the adapter's current version."""

    name: str
    target: str
    version: int | None


@dataclass(frozen=True, slots=True)
class AdapterVersion:
    """One version of an adapter as the store knows it."""

    name: str  # the adapter's own name, also when it was found through an alias
    version: int
    digest: str
    created_at: int  # unix seconds
    current: bool  # the name points here
    pinned: bool  # of the name
    config_bytes: int
    weights_bytes: int
    details: Mapping[str, Any] = field(hash=False)  # what the upload's check found out
    alias: Alias | None = None  # the alias it was found through
    created: bool = False  # True only from the `commit` that made it
    damage: str | None = None  # what is wrong with its files; such a version is listed, not served

    @property
    def file_bytes(self) -> int:
        return self.config_bytes + self.weights_bytes + sum(self.text_files.values())

    @property
    def text_files(self) -> Mapping[str, int]:
        """The files it has of `TEXT_FILES`, with their bytes."""
        found: Mapping[str, int] = self.details.get("text_files", {})
        return found

    @property
    def tasks(self) -> int:
        """How many tasks it has, of which a request names one; 0 when it knows none."""
        return int(self.details.get("tasks", 0))

    @property
    def served_name(self) -> str:
        """The name a request uses for it."""
        return self.alias.name if self.alias else self.name


Entry = aliased(Name)  # the name that was asked for: an adapter or an alias
Owner = aliased(Name)  # the adapter behind it


def served(version: int | InstrumentedAttribute[int] | None = None) -> Select[Version, Name, Name]:
    """Every served name (as version, adapter, entry) with the version it selects, or with `version` of its
    adapter.

    One statement, so that a reader sees each name before or after a move, on every database.
    """
    chosen = func.coalesce(Entry.target_version, Owner.current) if version is None else version
    return (
        select(Version, Owner, Entry)
        .join(Owner, Owner.name == Version.name)
        .join(Entry, func.coalesce(Entry.target, Entry.name) == Owner.name)
        .where(Version.version == chosen)
    )


def open_database(url: str | URL) -> Engine:
    """Connect. SQLite gets a write-ahead log, a sync on every commit, and real transactions."""
    engine = create_engine(url)
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))
    return engine


def _prepare_sqlite(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # else the driver begins late, and reads are in no transaction
    for pragma in ("busy_timeout=30000", "journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")
