"""Blends that are saved under a name, in the store's database. Imports no torch.

A saved blend is an alias that is made of several versions: those that its adapters' names meant when it was saved,
so what it says never changes. It keeps its versions from being deleted, as an alias does.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import BigInteger, ForeignKey, ForeignKeyConstraint, String, delete, select
from sqlalchemy.orm import Mapped, Session, mapped_column

from veneer.adapters import catalog
from veneer.adapters.names import NAME_LIMIT, adapter_key
from veneer.adapters.recipes import Part, Recipe, recipe
from veneer.adapters.schema import AdapterVersion, Base, Name, Version
from veneer.errors import Conflict


class BlendRow(Base):
    """How a blend is made. Its name has a row among the names, too."""

    __tablename__ = "adapter_blends"

    name: Mapped[str] = mapped_column(ForeignKey("adapter_names.name"), primary_key=True)
    created_at: Mapped[int] = mapped_column(BigInteger)  # unix seconds
    method: Mapped[str] = mapped_column(String(32))
    density: Mapped[float]
    sign: Mapped[str] = mapped_column(String(32))
    seed: Mapped[int] = mapped_column(BigInteger)
    rank: Mapped[int | None]


class BlendPartRow(Base):
    """A part of a blend, in the order in which they were named."""

    __tablename__ = "adapter_blend_parts"
    __table_args__ = (
        ForeignKeyConstraint(["name", "version"], ["adapter_versions.name", "adapter_versions.version"]),
    )

    blend: Mapped[str] = mapped_column(ForeignKey("adapter_blends.name"), primary_key=True)
    position: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    name: Mapped[str] = mapped_column(String(NAME_LIMIT), index=True)
    version: Mapped[int]
    task: Mapped[int]
    weight: Mapped[float]


@dataclass(frozen=True, slots=True)
class Ingredient:
    """An adapter's version in a blend."""

    adapter: AdapterVersion
    task: int
    weight: float

    @property
    def part(self) -> Part:
        return Part(adapter_key(self.adapter.digest, self.task), self.weight)


@dataclass(frozen=True, slots=True)
class Blend:
    """Several versions of adapters as one: what a request made up, or saved under a name."""

    recipe: Recipe
    ingredients: tuple[Ingredient, ...]
    saved_as: str | None = None
    created_at: int = 0  # unix seconds

    @property
    def key(self) -> str | None:
        """The engine's name of it; None when it is the base."""
        return self.recipe.key

    @property
    def name(self) -> str:
        """For metrics: clients make up any number of blends. No adapter's name begins so."""
        return self.saved_as or "_blend"

    @property
    def label(self) -> str:
        """What it is made of, with versions."""
        return "+".join(
            f"{each.adapter.name}@{each.adapter.version}{f'/{each.task}' if each.task else ''}*{each.weight:g}"
            for each in self.ingredients
        )

    @property
    def adapters(self) -> tuple[AdapterVersion, ...]:
        return tuple(each.adapter for each in self.ingredients)

    @property
    def details(self) -> Mapping[str, Any]:
        """What is known of it before it is made: what adds tokens has no blend but itself."""
        return self.adapters[0].details if self.recipe.is_plain else {}


Served = AdapterVersion | Blend  # what a request runs with, if it is not the base


def digests_of(served: Served | None) -> tuple[str | None, ...]:
    """The adapters whose files must stay while it is used; None stands for the base."""
    if isinstance(served, Blend):
        return tuple(dict.fromkeys(each.digest for each in served.adapters))
    return (None if served is None else served.digest,)


def put(session: Session, name: str, ingredients: Sequence[Ingredient], made: Recipe) -> None:
    """Save a blend, in place of an alias or a blend of that name.

    Raises Conflict when `name` is an adapter's, and what `catalog` raises when a version is gone.
    """
    entry = session.get(Name, name, with_for_update=True) or Name(name=name)
    if entry.current is not None:
        raise Conflict(
            f"{name!r} is an adapter's name and cannot be a blend's; choose another name", param="alias"
        )
    entry.target = entry.target_version = None
    remove(session, name)
    session.add(entry)
    session.flush()
    session.add(
        BlendRow(
            name=name,
            created_at=int(time.time()),
            method=made.method,
            density=made.density,
            sign=made.sign,
            seed=made.seed,
            rank=made.rank,
        )
    )
    session.flush()
    for position, each in enumerate(ingredients):
        owner = catalog.adapter_row(session, each.adapter.name)
        row = catalog.version_row(session, owner, each.adapter.version)
        session.add(
            BlendPartRow(
                blend=name,
                position=position,
                name=row.name,
                version=row.version,
                task=each.task,
                weight=each.weight,
            )
        )


def remove(session: Session, name: str) -> bool:
    """Forget the blend of that name; False when there is none. The row of the name stays."""
    row = session.get(BlendRow, name)
    if row is None:
        return False
    session.execute(delete(BlendPartRow).where(BlendPartRow.blend == name))
    session.delete(row)
    session.flush()
    return True


def load(session: Session, name: str | None = None) -> list[Blend]:
    """The saved blends by name, or that of one name."""
    query = select(BlendRow).order_by(BlendRow.name)
    if name is not None:
        query = query.where(BlendRow.name == name)
    return [_read(session, row) for row in session.scalars(query)]


def of_versions(session: Session, name: str, version: int | None) -> list[str]:
    """The names of blends that have a version of an adapter, or any version, as a part."""
    query = select(BlendPartRow.blend).where(BlendPartRow.name == name)
    if version is not None:
        query = query.where(BlendPartRow.version == version)
    return sorted(set(session.scalars(query)))


def refuse(session: Session, name: str) -> None:
    """Refuse what would make an adapter of a blend's name."""
    if session.get(BlendRow, name) is not None:
        raise Conflict(
            f"{name!r} is a saved blend; use another name, or remove it first (DELETE /v1/aliases/{name})",
            param="name",
        )


def _read(session: Session, row: BlendRow) -> Blend:
    rows = session.execute(
        select(BlendPartRow, Version, Name)
        .join(Version, (Version.name == BlendPartRow.name) & (Version.version == BlendPartRow.version))
        .join(Name, Name.name == Version.name)
        .where(BlendPartRow.blend == row.name)
        .order_by(BlendPartRow.position)
    ).all()
    found = tuple(
        Ingredient(catalog.record(version, owner, owner), part.task, part.weight)
        for part, version, owner in rows
    )
    made = recipe(
        [each.part for each in found],
        row.method,
        density=row.density,
        sign=row.sign,
        seed=row.seed,
        rank=row.rank,
    )
    return Blend(made, found, row.name, row.created_at)
