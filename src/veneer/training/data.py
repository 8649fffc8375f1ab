"""Training data: JSON lines in, rows of token ids out, with the answer marked.

A line is `{"prompt": …, "completion": …}`, or `{"messages": [{"role": …, "content": …}, …]}` whose last
message is the assistant's answer. The loss, and exact match, look at that answer alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from veneer.errors import InvalidRequest


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    role: Literal["system", "user", "assistant"]
    content: str


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    prompt: str | None = None
    completion: str | None = None
    messages: list[Message] | None = None


class Row(NamedTuple):
    """One example: the conversation before the answer, and the answer."""

    prompt: tuple[Message, ...]
    answer: str
    where: str  # "file:line", for messages about it

    @property
    def key(self) -> str:
        """Equal for rows that ask the same thing, whatever their case and spacing."""
        return "\0".join(f"{turn.role}:{' '.join(turn.content.casefold().split())}" for turn in self.prompt)


class Encoded(NamedTuple):
    prompt: list[int]
    answer: list[int]  # ends with the token that ends the model's turn


def read_rows(path: Path) -> list[Row]:
    """Read a JSON-lines file; blank lines are skipped.

    Raises:
        InvalidRequest: the file cannot be read, holds no row, or a row is wrong; the line is named.
    """
    try:
        lines = path.read_text("utf-8").split("\n")  # splitlines() would also cut at U+2028 inside a string
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"data file {str(path)!r} cannot be read: {error}") from error
    rows = [_row(line, f"{path.name}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise InvalidRequest(f"data file {str(path)!r} has no rows; give one JSON object per line")
    return rows


def _row(line: str, where: str) -> Row:
    try:
        parsed = _Line.model_validate(json.loads(line))
    except json.JSONDecodeError as error:
        raise InvalidRequest(f"{where}: not JSON: {error.msg} at column {error.colno}") from error
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "the row"
        raise InvalidRequest(f"{where}: {field}: {first['msg']}") from error
    if parsed.messages is not None:
        if parsed.prompt is not None or parsed.completion is not None:
            raise InvalidRequest(f"{where}: has `messages` and `prompt` or `completion`; give one form")
        turns = parsed.messages
        if len(turns) < 2 or turns[-1].role != "assistant":
            raise InvalidRequest(f"{where}: `messages` must end with an assistant's answer to a message")
    elif parsed.prompt is not None and parsed.completion is not None:
        turns = [Message(role="user", content=parsed.prompt)]
        turns.append(Message(role="assistant", content=parsed.completion))
    else:
        raise InvalidRequest(f"{where}: needs `prompt` and `completion`, or `messages`")
    if not turns[-1].content.strip():
        raise InvalidRequest(f"{where}: the answer is empty")
    return Row(tuple(turns[:-1]), turns[-1].content, where)


def split_rows(rows: Sequence[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Split into training and held-out rows; rows that ask the same thing stay on one side.

    The choice depends on each question and the seed alone, not on the order of the rows.

    Raises:
        InvalidRequest: fewer than two different questions, so that one side would be empty.
    """
    keys = sorted(
        {row.key for row in rows}, key=lambda key: hashlib.sha256(f"{seed}\0{key}".encode()).digest()
    )
    if len(keys) < 2:
        raise InvalidRequest("the data asks only one question, so none can be held out; add rows")
    held_out = set(keys[: min(len(keys) - 1, max(1, round(len(keys) * fraction)))])
    return [row for row in rows if row.key not in held_out], [row for row in rows if row.key in held_out]


def check_apart(training: Sequence[Row], held_out: Sequence[Row]) -> None:
    """Refuse held-out rows that are also trained on."""
    seen = {row.key: row.where for row in training}
    for row in held_out:
        if row.key in seen:
            raise InvalidRequest(
                f"{row.where} asks the same as {seen[row.key]}, which is trained on, so it would measure "
                "memory; remove it from one of the files"
            )


def encode(row: Row, tokenizer: Any, template: str, stops: Sequence[int]) -> Encoded:
    """Tokenize a row exactly as serving does: the prompt's ids are what the server would send.

    The answer ends with the first of the stop tokens that the chat template puts after it.

    Raises:
        InvalidRequest: the base has no chat template, or one that does not fit this row.
    """
    if template == "none":
        if len(row.prompt) != 1:
            raise InvalidRequest(f"{row.where}: conversations need `template: chat`")
        text, special = row.prompt[0].content, True
        answer = row.answer + tokenizer.eos_token
    else:
        text, answer, special = *_render(row, tokenizer), False
    prompt = list(tokenizer(text, add_special_tokens=special)["input_ids"])
    both = list(tokenizer(text + answer, add_special_tokens=special)["input_ids"])
    # Where a token would span the border, the answer is cut apart from the prompt, as in serving.
    fits = both[: len(prompt)] == prompt
    ids = both[len(prompt) :] if fits else list(tokenizer(answer, add_special_tokens=False)["input_ids"])
    end = next((place for place, token in enumerate(ids) if token in stops), None)
    return Encoded(prompt, ids[: end + 1] if end is not None else [*ids, stops[0]])


def _render(row: Row, tokenizer: Any) -> tuple[str, str]:
    """The prompt as the chat template writes it, and what the template writes for the answer."""
    if not tokenizer.chat_template:
        raise InvalidRequest("the base has no chat template; set `template: none` in the recipe")
    turns = [turn.model_dump() for turn in row.prompt]
    whole = [*turns, {"role": "assistant", "content": row.answer}]
    try:
        prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        full = tokenizer.apply_chat_template(whole, tokenize=False)
    except Exception as error:  # a template raises whatever it likes
        raise InvalidRequest(f"{row.where}: the base's chat template refuses it: {error}") from error
    if not full.startswith(prompt):
        raise InvalidRequest(
            f"{row.where}: the base's chat template does not put the answer after the prompt"
        )
    return prompt, full[len(prompt) :]


def encode_all(
    rows: Sequence[Row], tokenizer: Any, template: str, stops: Sequence[int], max_length: int
) -> list[Encoded]:
    """Encode rows, refusing those that are longer than `max_length` tokens."""
    encoded = [encode(row, tokenizer, template, stops) for row in rows]
    lengths = [len(item.prompt) + len(item.answer) for item in encoded]
    long = [(row.where, length) for row, length in zip(rows, lengths, strict=True) if length > max_length]
    if long:
        raise InvalidRequest(
            f"{len(long)} rows are longer than max_length {max_length}, first {long[0][0]} with {long[0][1]} "
            "tokens; raise max_length or shorten them"
        )
    return encoded
