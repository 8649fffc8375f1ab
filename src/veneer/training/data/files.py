"""Files of training data as records: JSON lines, CSV and Parquet, read row by row within limits.

The kind follows the name's ending. A record is a row's fields, or why there are none; what the fields mean is
`formats.py`'s. Files are hostile input: a wrong row is a faulty record and the next one is read; what makes the
rest unreadable is a faulty record and the end. Memory is bounded by some times `Limits.row_bytes`.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec

from veneer.errors import InvalidRequest
from veneer.training.data.parquet import parquet
from veneer.training.data.records import Limits, Record, given


def records(path: Path, name: str, limits: Limits) -> Iterator[Record]:
    """The records of a file that its sender calls `name`.

    Raises:
        InvalidRequest: the file cannot be opened, is too large, or of no known kind.
    """
    kinds: dict[str, Callable[[Path, str, Limits], Iterator[Record]]]
    kinds = {".jsonl": _json_lines, ".ndjson": _json_lines, ".csv": _csv, ".parquet": parquet}
    kind = kinds.get(Path(name).suffix.lower())
    if kind is None:
        raise InvalidRequest(
            f"data file {name!r} must end in {', '.join(kinds)}; a list in a .json file becomes JSON lines with "
            "one object on each line"
        )
    try:
        size = path.stat().st_size
        if size > limits.file_bytes:
            raise InvalidRequest(
                f"data file {name!r} has {size} bytes; at most {limits.file_bytes} are taken"
            )
        for number, record in enumerate(kind(path, name, limits)):
            if number == limits.rows:
                yield Record(name, {}, f"has more than {limits.rows} rows; split the file")
                return
            yield record
    except OSError as error:
        raise InvalidRequest(
            f"data file {name!r} cannot be read: {error.strerror or type(error).__name__}"
        ) from error


def _json_lines(path: Path, name: str, limits: Limits) -> Iterator[Record]:
    number = 0
    with path.open("rb") as file:
        while line := file.readline(limits.row_bytes + 1):
            number += 1
            where = f"{name}:{number}"
            if len(line) > limits.row_bytes and not line.endswith(b"\n"):
                while line and not line.endswith(b"\n"):
                    line = file.readline(1 << 20)
                yield Record(where, {}, f"is longer than {limits.row_bytes} bytes; shorten the row")
                continue
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if line.strip():
                yield _parsed(line, where)


def _parsed(line: bytes, where: str) -> Record:
    try:
        found = msgspec.json.decode(line)
    except RecursionError:
        return Record(where, {}, "is nested too deeply")
    except UnicodeDecodeError as error:
        return Record(where, {}, f"is not UTF-8 ({error.reason}); save the file as UTF-8")
    except msgspec.DecodeError as error:
        return Record(where, {}, f"is not JSON: {str(error).removeprefix('JSON is malformed: ')}")
    if not isinstance(found, dict):
        kind = {"list": "a list", "str": "text"}.get(type(found).__name__, type(found).__name__)
        return Record(where, {}, f"must be a JSON object, not {kind}; write one object on each line")
    return Record(where, given(found))


def _csv(path: Path, name: str, limits: Limits) -> Iterator[Record]:
    csv.field_size_limit(limits.row_bytes)  # of the process: the module has no other
    # Bytes that are not UTF-8 become surrogates, so that the row is named and the next one is read.
    with path.open("r", newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        lines = _Lines(file, limits.row_bytes)
        reader = csv.reader(lines, strict=True)
        header: list[str] = []
        number = 0
        while True:
            lines.of_row = 0
            try:
                cells = next(reader, None)
            except csv.Error as error:
                number += bool(header)
                yield Record(f"{name} row {number}", {}, f"is not CSV: {error}")
                if not header:
                    return
                continue
            if cells is None:
                return
            if not header:
                header = cells
                if fault := _header_fault(header):
                    yield Record(f"{name} header", {}, fault)
                    return
            elif cells:
                number += 1
                yield _row(header, cells, f"{name} row {number}")


class _Lines:
    """The lines of a file, for as long as those of one row are within the limit."""

    def __init__(self, file: io.TextIOWrapper, longest: int) -> None:
        self._file = file
        self._longest = longest
        self.of_row = 0  # characters

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._file.readline(self._longest + 1)
        self.of_row += len(line)
        if self.of_row > self._longest:
            self._file.seek(0, io.SEEK_END)
            raise csv.Error(f"is longer than {self._longest} characters, so the rest of the file is not read")
        if not line:
            raise StopIteration
        return line


def _header_fault(header: Sequence[str]) -> str | None:
    if len(set(header)) < len(header):
        return f"names a column twice: {header!r:.200}"
    return _text_fault("".join(header))


def _row(header: Sequence[str], cells: Sequence[str], where: str) -> Record:
    if len(cells) != len(header):
        fault = (
            f"has {len(cells)} cells, the header {len(header)}; quote cells that have commas or line breaks"
        )
        return Record(where, {}, fault)
    wrong = _text_fault("".join(cells))
    return Record(where, {} if wrong else dict(zip(header, cells, strict=True)), wrong)


def _text_fault(text: str) -> str | None:
    if "\0" in text:
        return "has a NUL character; if the file is UTF-16, save it as UTF-8"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "is not UTF-8; save the file as UTF-8"
    return None
