"""A row of a file of training data before it means anything, and how much a file may hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Limits:
    """What a file may take. A file beyond them is refused before it is read, a row while it is."""

    file_bytes: int = 1 << 30  # also of what a Parquet file says it holds when it is unpacked
    row_bytes: int = 16 << 20
    rows: int = 10_000_000


class Record(NamedTuple):
    where: str
    fields: Mapping[str, Any]  # nulls left out
    fault: str | None = None  # why there are no fields


def given(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}
