"""`veneer conformance`: run the checks and show their table."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from veneer.errors import InvalidRequest
from veneer.training.conformance.run import Row, run

BEGIN = "<!-- veneer conformance --markdown: begin -->"
END = "<!-- veneer conformance --markdown: end -->"
_HEADER = (
    *("METHOD", "PRIMITIVES", "PORTABILITY", "RANK", "BYTES"),
    *("ALONE", "BATCH", "CACHE", "NF4", "GRAPHED", "1% NOISE", "VERDICT"),
)


def main(arguments: argparse.Namespace) -> int:
    """Exit status 0 only if every method is served as its library serves it, or is refused as it must be."""
    base = None if arguments.base == "tiny" else Path(arguments.base)
    if base is not None and not (base / "config.json").is_file():
        raise InvalidRequest(
            f"--base {arguments.base}: no model folder; give a folder with config.json or 'tiny'"
        )
    rows = run(base, arguments.only, arguments.device)
    if arguments.json:
        print(msgspec.json.format(msgspec.json.encode(rows)).decode())
    elif arguments.markdown == "-":
        print(markdown(rows))
    elif arguments.markdown is not None:
        write(Path(arguments.markdown), rows)
    else:
        print(terminal(rows))
    failed = [row for row in rows if row.verdict == "fail"]
    for row in failed:
        print(f"veneer: {row.method}: {row.reason}", file=sys.stderr)
    return 1 if failed else 0


def terminal(rows: Sequence[Row]) -> str:
    """Aligned columns; why something is refused comes below."""
    cells = [_HEADER, *map(_cells, rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]
    refused = [f"{row.method}: {row.reason}" for row in rows if row.verdict == "refused"]
    counts = ", ".join(f"{sum(row.verdict == v for row in rows)} {v}" for v in ("pass", "fail", "refused"))
    return "\n".join([*lines, "", *refused, *[""] * bool(refused), counts])


def markdown(rows: Sequence[Row]) -> str:
    """The tables of docs/adapters.md, between their markers: what is served, then what is refused."""
    served = [_HEADER, ["---"] * len(_HEADER), *(_cells(row) for row in rows if row.verdict != "refused")]
    refused = [
        ["METHOD", "REFUSED BECAUSE"],
        ["---", "---"],
        *([row.method, (row.reason or "").replace("|", "\\|")] for row in rows if row.verdict == "refused"),
    ]
    tables = ["\n".join(f"| {' | '.join(line)} |" for line in table) for table in (served, refused)]
    return "\n\n".join([BEGIN, *tables, END])


def write(file: Path, rows: Sequence[Row]) -> None:
    """Put the tables where `file` has the markers."""
    before, found, rest = file.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (found and end):
        raise InvalidRequest(f"{file} has no lines {BEGIN} and {END}, between which the tables go")
    file.write_text(before + markdown(rows) + after)


def _cells(row: Row) -> list[str]:
    errors = (row.alone, row.batch, row.cache, row.nf4, row.graphed, row.control)
    return [
        row.method,
        " ".join(row.primitives) or "-",
        row.portability or "-",
        *("-" if number is None else str(number) for number in (row.rank, row.bytes)),
        *("-" if error is None else f"{error:.1e}" for error in errors),
        row.verdict,
    ]
