"""Training data: files in, checked examples out. Without torch, so that an upload can be checked where it arrives.

    validate(path, name="train.csv")   what a file holds and what is wrong with it, in bounded memory
    read_rows(path)                    conversations (chat, completion, instruction)
    read_texts(path), read_pairs(path) plain texts; preference pairs

All take `name` (what messages call the file, whose ending says its kind; the path's own by default), `format` (by
default what the first good row's fields say; all rows must be of one), `ignore` (fields to leave out) and `limits`.
Formats and fields: `formats.py`. Files: `files.py`. What comes next: `splitting.py`, `encoding.py`,
`truncation.py`, `report.py`, `batching.py`, `collation.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypedDict, TypeVar, Unpack, get_args

from veneer.errors import InvalidRequest
from veneer.training.data.files import records
from veneer.training.data.formats import BadRow, Example, Format, Pair, Row, Text, find_form
from veneer.training.data.records import Limits

FAULTS_SHOWN = 20

_Kind = TypeVar("_Kind", Row, Text, Pair)


class Fault(NamedTuple):
    """What is wrong with a row."""

    where: str
    reason: str
    empty_answer: bool = False

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


class Options(TypedDict, total=False):
    name: str
    format: Format | None
    ignore: Collection[str]
    limits: Limits


@dataclass
class Validation:
    """What a file holds. It may be trained on when there are no faults and there is a row."""

    name: str
    format: Format | None = None
    rows: int = 0  # good ones
    fault_count: int = 0
    empty_answers: int = 0  # of the faults
    faults: list[Fault] = field(default_factory=list)  # the first FAULTS_SHOWN

    def add(self, found: Example | Fault) -> None:
        if not isinstance(found, Fault):
            self.rows += 1
            self.format = found.format
            return
        self.fault_count += 1
        self.empty_answers += found.empty_answer
        if len(self.faults) < FAULTS_SHOWN:
            self.faults.append(found)

    def check(self) -> None:
        """Raise InvalidRequest, naming rows and reasons, unless the file may be trained on."""
        if self.fault_count == 1:
            raise InvalidRequest(str(self.faults[0]))
        if self.fault_count:
            shown = "; ".join(map(str, self.faults))
            rest = self.fault_count - len(self.faults)
            more = f"; and {rest} more" if rest else ""
            raise InvalidRequest(f"data file {self.name!r} has {self.fault_count} faults: {shown}{more}")
        if not self.rows:
            raise InvalidRequest(f"data file {self.name!r} has no rows; give at least one")


def scan(
    path: Path,
    *,
    name: str | None = None,
    format: Format | None = None,
    ignore: Collection[str] = (),
    limits: Limits = Limits(),  # noqa: B008 - frozen
) -> Iterator[Example | Fault]:
    """Every row of a file as an example or as what is wrong with it, one at a time.

    Raises:
        InvalidRequest: the file cannot be read at all, is too large, or of no known kind.
    """
    if format is not None and format not in get_args(Format):
        raise InvalidRequest(f"format {format!r} is none of {', '.join(get_args(Format))}")
    first = ""  # the row that decided the format
    for where, fields, unreadable in records(path, name or path.name, limits):
        if unreadable is not None:
            yield Fault(where, unreadable)
            continue
        given = {key: value for key, value in fields.items() if key not in ignore}
        try:
            form = find_form(given, None if first else format)
            if first and form.format != format:
                raise BadRow(
                    f"is a row of format {form.format}, but {first} is of {format}; give one format a file"
                )
            example = form.build(given, where)
        except BadRow as error:
            yield Fault(where, str(error), error.empty_answer)
            continue
        if not first:
            first, format = where, form.format
        yield example


def validate(path: Path, **options: Unpack[Options]) -> Validation:
    """Read a whole file, keeping only counts and the first faults.

    Raises:
        InvalidRequest: as `scan`; wrong rows do not raise, see `Validation.check`.
    """
    found = Validation(options.get("name", path.name))
    for item in scan(path, **options):
        found.add(item)
    return found


def read_rows(path: Path, **options: Unpack[Options]) -> list[Row]:
    """Read a file of conversations.

    Raises:
        InvalidRequest: the file cannot be read, holds no row or other examples, or rows are wrong; they are named.
    """
    return _read(path, Row, "conversations (chat, completion or instruction)", options)


def read_texts(path: Path, **options: Unpack[Options]) -> list[Text]:
    """Read a file of plain texts. Raises as `read_rows`."""
    return _read(path, Text, "plain text (`text`)", options)


def read_pairs(path: Path, **options: Unpack[Options]) -> list[Pair]:
    """Read a file of preference pairs. Raises as `read_rows`."""
    return _read(path, Pair, "preference pairs (`prompt`, `chosen`, `rejected`)", options)


def _read(path: Path, kind: type[_Kind], wanted: str, options: Options) -> list[_Kind]:
    report = Validation(options.get("name", path.name))
    rows: list[_Kind] = []
    for item in scan(path, **options):
        if not isinstance(item, Fault | kind):
            raise InvalidRequest(
                f"{item.where} is a row of format {item.format}; this training takes {wanted}"
            )
        report.add(item)
        if isinstance(item, kind):
            rows.append(item)
    report.check()
    return rows
