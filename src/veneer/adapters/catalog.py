"""What changes and reads the store's tables inside one transaction. Knows names and pointers, no files."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from veneer.adapters.names import CONFIG_FILE, TEXT_FILES, WEIGHTS_FILE
from veneer.adapters.schema import MAX_VERSION, AdapterVersion, Alias, Move, Name, Version
from veneer.errors import Conflict, NotFound


def add_version(
    session: Session, name: str, digest: str, sizes: Mapping[str, int], details: Mapping[str, Any]
) -> AdapterVersion:
    """Point the name to a new version, unless its current one has this content already."""
    owner = session.get(Name, name, with_for_update=True)
    refuse_alias(owner, name)
    if owner is None:
        owner = Name(name=name, last_version=0, pinned=False)
        session.add(owner)
    if owner.current is not None:
        current = version_row(session, owner, None)
        if current.digest == digest:
            return record(current, owner, owner)
    owner.last_version += 1
    owner.current = owner.last_version
    text_files = {filename: size for filename, size in sizes.items() if filename in TEXT_FILES}
    version = Version(
        name=name,
        version=owner.last_version,
        digest=digest,
        created_at=int(time.time()),
        config_bytes=sizes[CONFIG_FILE],
        weights_bytes=sizes[WEIGHTS_FILE],
        details=dict(details) | ({"text_files": text_files} if text_files else {}),
    )
    session.add(version)
    session.flush()
    session.add(Move(name=name, version=version.version))
    return record(version, owner, owner, created=True)


def pop_move(session: Session, owner: Name) -> int:
    """Take the newest move, and the moves to the same version below it, off the stack."""
    moves = session.scalars(select(Move).where(Move.name == owner.name).order_by(Move.id.desc()))
    for move in moves.all():
        if move.version != owner.current:
            return move.version
        session.delete(move)
    raise Conflict(
        f"adapter {owner.name!r} has nothing to roll back to: version {owner.current} is the only one it "
        f"pointed to; name a version",
        param="version",
    )


def delete_versions(session: Session, owner: Name, version: int | None) -> tuple[str, ...]:
    """Delete one version, or all and with them the adapter. Returns the digests no version refers to now."""
    doomed = [Version.name == owner.name]
    moves = [Move.name == owner.name]
    if version is None:
        owner.current, owner.pinned = None, False
    else:
        doomed.append(Version.version == version)
        moves.append(Move.version == version)
    digests = sorted(set(session.scalars(select(Version.digest).where(*doomed))))
    session.execute(delete(Move).where(*moves))
    session.execute(delete(Version).where(*doomed))
    return tuple(digest for digest in digests if not is_referenced(session, digest))


def is_referenced(session: Session, digest: str) -> bool:
    found = session.scalars(select(Version.version).where(Version.digest == digest).limit(1))
    return found.first() is not None


def refuse_aliased(session: Session, name: str, version: int | None, blends: Sequence[str] = ()) -> None:
    """Refuse when aliases point to the adapter or stay at `version` of it, or `blends` are made of it."""
    query = select(Name.name).where(Name.target == name)
    if version is not None:
        query = query.where(Name.target_version == version)
    aliases = sorted([*session.scalars(query), *blends])
    if aliases:
        raise Conflict(
            f"{'adapter' if version is None else f'version {version} of adapter'} {name!r} is the target of "
            f"{', '.join(map(repr, aliases))}; move or remove {'them' if aliases[1:] else 'it'} first",
            param="name",
        )


def adapter_row(session: Session, name: str) -> Name:
    """The row of an adapter, locked for a change."""
    row = session.get(Name, name, with_for_update=True)
    refuse_alias(row, name)
    if row is None or row.current is None:
        raise unknown(name)
    return row


def version_row(session: Session, owner: Name, version: int | None) -> Version:
    """The row of a version, by default the current one."""
    number = owner.current if version is None else version
    row = None
    if number is not None and 0 < number <= MAX_VERSION:
        row = session.get(Version, (owner.name, number))
    if row is None:
        known = session.scalars(select(Version.version).where(Version.name == owner.name))
        raise no_version(owner.name, version, sorted(known))
    return row


def record(
    version: Version, owner: Name, entry: Name, *, created: bool = False, damage: str | None = None
) -> AdapterVersion:
    return AdapterVersion(
        name=owner.name,
        version=version.version,
        digest=version.digest,
        created_at=version.created_at,
        current=version.version == owner.current,
        pinned=owner.pinned,
        config_bytes=version.config_bytes,
        weights_bytes=version.weights_bytes,
        details=version.details,
        alias=Alias(entry.name, entry.target, entry.target_version) if entry.target else None,
        created=created,
        damage=damage,
    )


def refuse_alias(row: Name | None, name: str) -> None:
    if row is not None and row.target is not None:
        raise Conflict(
            f"{name!r} is an alias of {row.target!r}; use {row.target!r}, or remove the alias first",
            param="name",
        )


def unknown(name: str) -> NotFound:
    return NotFound(
        f"the model {name[:200]!r} does not exist; GET /v1/models lists the names that are served",
        param="model",
        code="model_not_found",
    )


def no_version(name: str, version: int | None, known: list[int]) -> NotFound:
    return NotFound(
        f"adapter {name!r} has no version {version}; it has {', '.join(map(str, known))}",
        param="model",
        code="model_not_found",
    )
