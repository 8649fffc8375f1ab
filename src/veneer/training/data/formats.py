"""What a row of training data may be: its formats, their fields, and the example that it stands for.

    chat         `messages`, whose roles are system, developer, user, assistant; the last one answers   Row
    completion   `prompt` and `completion`, or prompt/response, question/answer, input/target, input/output   Row
    instruction  `instruction`, `output`, and perhaps `input`, which is put after a blank line   Row
    text         `text`   Text
    preference   `prompt`, `chosen`, `rejected` as in TRL, each text or a list of messages; or OpenAI's
                 `input` (with `messages`), `preferred_output`, `non_preferred_output`   Pair

An assistant's message may have `weight` 0 or 1: those of weight 0 are read, not learnt. What follows the last
message of weight 1 cannot change its loss and is left out. A null is as good as a missing field. This module knows
nothing of files and of tokens.
"""

from __future__ import annotations

import hashlib
import reprlib
import unicodedata
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal, NamedTuple

Format = Literal["chat", "completion", "instruction", "text", "preference"]

MAX_MESSAGES = 1000  # of a row; rendering every turn's prefix takes the square of their number
_ROLES = ("system", "developer", "user", "assistant")
_TOOLS = ("tools", "functions", "parallel_tool_calls", "tool_calls", "function_call")


class Message(NamedTuple):
    role: str
    content: str
    weight: int = 1  # 0: an assistant's turn that is not learnt


class Row(NamedTuple):
    """A conversation before an answer, and the answer."""

    prompt: tuple[Message, ...]
    answer: str
    where: str  # "file:line" or "file row N", for messages about it
    format: Format = "chat"

    @property
    def key(self) -> str:
        """Equal for rows that ask the same thing, whatever their case and spacing."""
        return self.learnt[-1]

    @property
    def learnt(self) -> list[str]:
        """The keys of everything that the row teaches an answer to: earlier questions and its last."""
        return _questions(self.prompt)


class Text(NamedTuple):
    """Plain text, all of which is learnt."""

    text: str
    where: str
    format: Format = "text"

    @property
    def key(self) -> str:
        return hashlib.sha256(_normalized(self.text)).hexdigest()

    @property
    def learnt(self) -> list[str]:
        return [self.key]


class Pair(NamedTuple):
    """One prompt with the answer that is preferred and one that is not."""

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    where: str
    format: Format = "preference"

    @property
    def key(self) -> str:
        return _questions(self.prompt)[-1]

    @property
    def learnt(self) -> list[str]:
        return [self.key]


Example = Row | Text | Pair


class BadRow(Exception):
    """Why a row cannot be used. `empty_answer`: because it teaches to say nothing."""

    def __init__(self, reason: str, *, empty_answer: bool = False) -> None:
        super().__init__(reason)
        self.empty_answer = empty_answer


class Form(NamedTuple):
    """One way to write a format: its fields, and how they become an example."""

    format: Format
    required: tuple[str, ...]
    build: Callable[[Mapping[str, Any], str], Example]
    optional: tuple[str, ...] = ()

    @property
    def fields(self) -> tuple[str, ...]:
        return self.required + self.optional

    def __str__(self) -> str:
        return " and ".join(f"`{field}`" for field in self.required)


def find_form(fields: Collection[str], format: Format | None = None) -> Form:
    """The form whose fields these are; `format` leaves only its own.

    Raises:
        BadRow: none fits; the reason says which field is missing or too much.
    """
    given = set(fields)
    forms = [form for form in _FORMS if format in (None, form.format)]
    for form in forms:
        if given.issuperset(form.required) and given.issubset(form.fields):
            return form
    raise BadRow(_advice(given, forms))


def _advice(given: set[str], forms: list[Form]) -> str:
    if tools := given.intersection(_TOOLS):
        return f"`{min(tools)}`: tool calls cannot be trained; leave them out"
    if "conversations" in given:
        return "`conversations` is not a field; write `messages` with `role` and `content`"
    nearest = max(forms, key=lambda form: (len(given.intersection(form.fields)), -len(form.required)))
    shared = given.intersection(nearest.required)
    if not shared:
        return f"has {_names(given)}; needs {', or '.join(str(form) for form in forms)}"
    missing = [field for field in nearest.required if field not in given]
    if missing:
        return f"has {_names(shared)} but no {_names(missing)}, which {nearest.format} rows need"
    return (
        f"{_names(given.difference(nearest.fields))} is no field of {nearest.format} rows, which have "
        f"{_names(nearest.fields)}; remove it, or list it in `ignore`"
    )


def _names(fields: Collection[str]) -> str:
    shown = sorted(fields) if isinstance(fields, set) else list(fields)
    names = [f"`{field:.40}`" for field in shown[:8]] + ["…"] * (len(shown) > 8)
    return ", ".join(names) or "no fields"


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"{place} must be text (got {reprlib.repr(value)})")
    return value


def _answer(value: Any, place: str) -> str:
    if not _text(value, place).strip():
        raise BadRow(f"{place} is empty, so there is no answer to learn; remove the row", empty_answer=True)
    return str(value)


def _asks(value: Any, place: str) -> tuple[Message, ...]:
    return (Message("user", _text(value, place)),)


def _completion(question: str, answer: str) -> Form:
    def build(fields: Mapping[str, Any], where: str) -> Row:
        return Row(_asks(fields[question], question), _answer(fields[answer], answer), where, "completion")

    return Form("completion", (question, answer), build)


def _instruction(fields: Mapping[str, Any], where: str) -> Row:
    instruction = _text(fields["instruction"], "instruction")
    given = _text(fields.get("input", ""), "input")
    asked = f"{instruction}\n\n{given}" if given.strip() else instruction
    return Row(_asks(asked, "instruction"), _answer(fields["output"], "output"), where, "instruction")


def _plain(fields: Mapping[str, Any], where: str) -> Text:
    return Text(_answer(fields["text"], "text"), where)


def _chat(fields: Mapping[str, Any], where: str) -> Row:
    turns = _messages(fields["messages"], "messages")
    if len(turns) < 2 or turns[-1].role != "assistant":
        raise BadRow("messages must end with an assistant's answer to a message")
    learnt = [at for at, turn in enumerate(turns) if turn.role == "assistant" and turn.weight]
    if not learnt or learnt[-1] == 0:
        raise BadRow("messages: no answer of the assistant has weight 1, so there is nothing to learn")
    for at in learnt:
        _answer(turns[at].content, f"messages[{at}].content")
    return Row(turns[: learnt[-1]], turns[learnt[-1]].content, where)


def _preference(fields: Mapping[str, Any], where: str) -> Pair:
    prompt = fields["prompt"]
    asked = _asks(prompt, "prompt") if isinstance(prompt, str) else _messages(prompt, "prompt", weights=False)
    return _pair(asked, fields, "chosen", "rejected", where)


def _openai_preference(fields: Mapping[str, Any], where: str) -> Pair:
    given = fields["input"]
    if not isinstance(given, dict) or "messages" not in given:
        raise BadRow(f"input must be an object with `messages` (got {reprlib.repr(given)})")
    for name, value in given.items():
        if name != "messages" and value:
            known = "tool calls cannot be trained" if name in _TOOLS else "it is not a field"
            raise BadRow(f"input.{name}: {known}; leave it out")
    asked = _messages(given["messages"], "input.messages", weights=False)
    return _pair(asked, fields, "preferred_output", "non_preferred_output", where)


def _pair(asked: tuple[Message, ...], fields: Mapping[str, Any], better: str, worse: str, where: str) -> Pair:
    chosen, rejected = (_one_answer(fields[name], name) for name in (better, worse))
    if chosen == rejected:
        raise BadRow(f"{better} and {worse} are the same, so there is no preference to learn")
    return Pair(asked, chosen, rejected, where)


def _one_answer(value: Any, place: str) -> str:
    """An answer as text, or as a list with the assistant's message."""
    if isinstance(value, str):
        return _answer(value, place)
    turns = _messages(value, place, weights=False)
    if len(turns) != 1 or turns[0].role != "assistant":
        raise BadRow(
            f"{place} must be one assistant's message (got the roles {[turn.role for turn in turns]!r:.80}); "
            "put what comes before it into the prompt"
        )
    return _answer(turns[0].content, f"{place}[0].content")


def _messages(value: Any, place: str, *, weights: bool = True) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise BadRow(f"{place} must be a list of messages, not empty (got {reprlib.repr(value)})")
    if len(value) > MAX_MESSAGES:
        raise BadRow(f"{place} has {len(value)} messages; at most {MAX_MESSAGES} are taken")
    return tuple(_message(turn, f"{place}[{at}]", weights) for at, turn in enumerate(value))


def _message(value: Any, place: str, weights: bool) -> Message:
    if not isinstance(value, dict):
        raise BadRow(f"{place} must be an object with `role` and `content` (got {reprlib.repr(value)})")
    given = {name: item for name, item in value.items() if item is not None}
    if tools := given.keys() & _TOOLS:
        raise BadRow(f"{place}.{min(tools)}: tool calls cannot be trained; leave them out")
    role = given.get("role")
    if role not in _ROLES:
        raise BadRow(f"{place}.role must be one of {', '.join(_ROLES)} (got {reprlib.repr(role)})")
    known = {"role", "content", "weight"} if role == "assistant" and weights else {"role", "content"}
    if extra := given.keys() - known:
        raise BadRow(f"{place}.{min(extra):.40} is no field of a message of role {role}; leave it out")
    weight = given.get("weight", 1)
    if type(weight) not in (int, float) or weight not in (0, 1):
        raise BadRow(f"{place}.weight must be 0 or 1 (got {reprlib.repr(weight)})")
    return Message(role, _content(given.get("content"), f"{place}.content"), int(weight))


def _content(value: Any, place: str) -> str:
    """Text, or text parts, which are joined by newlines as serving does."""
    if not isinstance(value, list) or not value:
        return _text(value, place)
    parts = []
    for at, part in enumerate(value):
        if not isinstance(part, dict) or part.get("type") != "text":
            raise BadRow(f"{place}[{at}] must be of type 'text' (got {reprlib.repr(part)})")
        parts.append(_text(part.get("text"), f"{place}[{at}].text"))
    return "\n".join(parts)


def _normalized(text: str) -> bytes:
    return " ".join(unicodedata.normalize("NFC", text).casefold().split()).encode()


def _questions(turns: tuple[Message, ...]) -> list[str]:
    """A digest of what comes before each learnt turn of the assistant, and of all."""
    digest = hashlib.sha256()
    found = []
    for turn in turns:
        if turn.role == "assistant" and turn.weight:
            found.append(digest.hexdigest())
        digest.update(f"{turn.role}:".encode() + _normalized(turn.content) + b"\0")
    return [*found, digest.hexdigest()]


_FORMS = (
    Form("chat", ("messages",), _chat),
    _completion("prompt", "completion"),
    _completion("prompt", "response"),
    _completion("question", "answer"),
    _completion("input", "target"),
    _completion("input", "output"),
    Form("instruction", ("instruction", "output"), _instruction, optional=("input",)),
    Form("text", ("text",), _plain),
    Form("preference", ("prompt", "chosen", "rejected"), _preference),
    Form("preference", ("input", "preferred_output", "non_preferred_output"), _openai_preference),
)
