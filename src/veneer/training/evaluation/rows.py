"""Rows to evaluate on: questions with their answer, questions with choices, or plain texts.

| rows | fields |
| --- | --- |
| answers | those of training data: chat, completion, instruction (`data/formats.py`) |
| choices | `prompt`, `choices` (a list of texts), `answer` (the right one's place, from 0) |
| texts | `text` |

A file has rows of one kind. Read with the checks and limits of training data (`data/files.py`).
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from veneer.errors import InvalidRequest
from veneer.training.data.files import records
from veneer.training.data.formats import BadRow, Message, Row, Text, find_form
from veneer.training.data.records import Limits
from veneer.training.data.rows import FAULTS_SHOWN


class Turn(Protocol):
    """A message of a prompt."""

    @property
    def role(self) -> str: ...

    @property
    def content(self) -> str: ...


class Choices(NamedTuple):
    """A question and the answers to choose from."""

    prompt: tuple[Message, ...]
    choices: tuple[str, ...]
    right: int  # place of the right one
    where: str


EvaluationRow = Row | Text | Choices
_NAMES = {Row: "answers", Text: "texts", Choices: "choices"}


def read_evaluation_rows(path: Path, limit: int | None = None) -> list[EvaluationRow]:
    """The first `limit` rows of a file, all of one kind.

    Raises:
        InvalidRequest: the file cannot be read, or a row is wrong; the first faults are named, with their rows.
    """
    rows: list[EvaluationRow] = []
    faults: list[str] = []
    for record in records(path, path.name, Limits()):
        if len(rows) == limit or len(faults) == FAULTS_SHOWN:
            break
        try:
            row = _row(record.fields, record.where, record.fault)
            if rows and type(row) is not type(rows[0]):
                raise BadRow(
                    f"has {_NAMES[type(row)]}, {rows[0].where} {_NAMES[type(rows[0])]}; use two files"
                )
            rows.append(row)
        except BadRow as error:
            faults.append(f"{record.where}: {error}")
    if faults:
        raise InvalidRequest("; ".join(faults))
    if not rows:
        raise InvalidRequest(f"data file {path.name!r} has no rows; give at least one")
    return rows


def prompt_of(row: EvaluationRow) -> Sequence[Turn]:
    """What stands before the text to score or to generate; nothing before a plain text."""
    return () if isinstance(row, Text) else row.prompt


def expected_of(row: EvaluationRow) -> str:
    match row:
        case Choices():
            return row.choices[row.right]
        case Text():
            return row.text
        case _:
            return row.answer


def _row(fields: Mapping[str, Any], where: str, fault: str | None) -> EvaluationRow:
    if fault is not None:
        raise BadRow(fault)
    if "choices" in fields:
        return _choices(fields, where)
    example = find_form(fields).build(fields, where)
    if not isinstance(example, Row | Text):
        raise BadRow(f"is a row of format {example.format}, which has no one answer to compare with")
    return example


def _choices(fields: Mapping[str, Any], where: str) -> Choices:
    if fields.keys() != {"prompt", "choices", "answer"}:
        raise BadRow(
            f"a row with `choices` has `prompt`, `choices` and `answer` (got {', '.join(fields):.200})"
        )
    prompt, choices, right = fields["prompt"], fields["choices"], fields["answer"]
    if not isinstance(prompt, str) or not prompt.strip():
        raise BadRow(f"prompt must be text, not empty (got {reprlib.repr(prompt)})")
    if (
        not isinstance(choices, list)
        or len(choices) < 2
        or not all(isinstance(c, str) and c for c in choices)
    ):
        raise BadRow(f"choices must be a list of two texts or more, none empty (got {reprlib.repr(choices)})")
    if len(set(choices)) < len(choices):
        raise BadRow(f"choices has a text twice (got {reprlib.repr(choices)})")
    if type(right) is not int or not 0 <= right < len(choices):
        raise BadRow(f"answer must be the right choice's place, 0 to {len(choices) - 1} (got {right!r:.40})")
    return Choices((Message("user", prompt),), tuple(choices), right, where)
