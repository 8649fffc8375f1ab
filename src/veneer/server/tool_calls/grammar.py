"""Grammars of answers that must, or may, call functions."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from veneer.engine.grammar_text import json_body, lark, text_body
from veneer.errors import InvalidRequest
from veneer.server.fields import Function
from veneer.server.tool_calls.family import Family

TokenId = Callable[[str], int | None]  # of a special token


def calls_grammar(
    family: Family,
    functions: Sequence[Function],
    special: TokenId,
    *,
    must: bool,
    several: bool,
    answer: str | None = None,
) -> str:
    """One call or more of `functions` (`must`), or else any text, or the `answer` of a rule's body.

    Arguments follow the function's parameters when the call must be made, or the function is strict; else they are
    any object. Raises InvalidRequest that names the function whose parameters cannot be enforced.
    """
    if answer is not None and not must and not family.begin:
        raise InvalidRequest(
            f"response_format with tools: as {family.name!r} writes calls, an answer "
            "in JSON without a mark could be taken for one; leave one of them out, or set tool_choice to required.",
            param="response_format",
        )
    begin = family.opening or family.before("")
    triggered = bool(family.begin) and special(family.begin) is None and not must and answer is None
    prefix = family.begin if triggered else ""
    first = _alternatives("first", family, functions, special, family.opening, prefix)
    again = _alternatives("again", family, functions, special, family.between, "")
    closing = _literal(family.closing, special)
    calls = f"calls: first_call {'(again_call)*' if several else ''} {closing}"
    rules = [calls, *first, *again, *_arguments(functions, must)]
    if must:
        return lark("calls", *rules)
    if answer is not None:
        return lark("answer | calls", f"answer: {answer}", *rules)
    if triggered:  # from the mark on, nothing but calls
        assert begin.startswith(prefix)
        rules += [f"head[lazy]: TEXT {text_body(prefix)}", r"TEXT: /(.|\n)*/"]
        return lark("words | head calls", "words: TEXT", *rules)
    if family.begin:  # a special token, which no text has in it
        return lark(r"TEXT calls | TEXT", r"TEXT: /(.|\n)*/", *rules)
    return lark("TEXT | calls", r"TEXT: /([^{\[\s](.|\n)*)?/", *rules)


def _alternatives(
    rule: str, family: Family, functions: Sequence[Function], special: TokenId, leading: str, known: str
) -> list[str]:
    """A rule for a call of any function, after `leading`; `known` is what of it was said already."""
    bodies = []
    for index, function in enumerate(functions):
        before = (leading + family.before(function.name)).removeprefix(known)
        bodies.append(f"{_literal(before, special)} arguments_{index} {_literal(family.after, special)}")
    return [f"{rule}_call: " + " | ".join(bodies)]


def _arguments(functions: Sequence[Function], must: bool) -> list[str]:
    rules = []
    for index, function in enumerate(functions):
        schema: dict[str, Any] = {"type": "object"}
        if must or function.strict:
            schema |= function.parameters or {"properties": {}, "additionalProperties": False}
        rules.append(f"arguments_{index}: {json_body(schema, f'tools.{function.name}.parameters')}")
    return rules


def _literal(text: str, special: TokenId) -> str:
    """Text in which special tokens are written as those."""
    parts = []
    for part in re.split(r"(<[^<>\s]+>|\[[A-Z_]+\])", text):
        if part:
            token = special(part)
            parts.append(text_body(part) if token is None else f"<[{token}]>")
    return " ".join(parts) or '""'
