"""Grammars as text: what a request asks for, written in llguidance's Lark.

Texts made here always begin with options that forbid llguidance to tokenize forced text itself: that would cost
seconds for a hostile grammar, and the choice between tokens is the model's.

https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from llguidance import regex_to_lark
from llguidance.gbnf_to_lark import any_to_lark

from veneer.engine.json_schema import check_schema
from veneer.errors import InvalidRequest

_OPTIONS = '%llguidance {"no_forcing": true}'
# Between the parts of JSON: nothing, a space, or a new line with its indentation. Some models would go on for ever.
_WHITESPACE = r"(\n[ \t]{0,32}|[ \t])"
_GBNF_LIMIT = 64 << 10  # characters; their translation is Python
_NOT_ENFORCED = ("temperature", "stop", "max_tokens")  # options of a rule


def lark(start: str, *rules: str) -> str:
    """A whole grammar: the body of the rule `start`, and other rules."""
    return "\n".join([_OPTIONS, f"start: {start}", *rules])


def json_body(schema: Any, param: str, *, compact: bool = False) -> str:
    """The body of a rule for JSON text that is valid for a schema. Raises InvalidRequest; see json_schema.py."""
    check_schema(schema, param)
    spaces = {"whitespace_flexible": False} if compact else {"whitespace_pattern": _WHITESPACE}
    options = {"lenient": False, "coerce_one_of": False, **spaces}
    whole = {} if schema is True else schema
    return "%json " + json.dumps({"x-guidance": options, **whole})


def text_body(text: str) -> str:
    """The body of a rule for exactly this text."""
    return json.dumps(text)


def choice_body(choices: Sequence[str]) -> str:
    return " | ".join(map(text_body, choices))


def regex_body(regex: str) -> str:
    """The body of a rule for text that a regular expression (Rust's, as in llguidance) matches as a whole."""
    return f"/{regex_to_lark(regex, use_ascii='')}/" if regex else '""'


def given_grammar(text: str, param: str) -> str:
    """A grammar of a request, in llguidance's Lark, or in GBNF (`root ::= …`), which is translated.

    Raises InvalidRequest for what is not enforced, and for GBNF that cannot be translated.
    """
    if re.search(r"^\s*%llguidance\s*\{\s*[^}\s]", text, re.MULTILINE):
        raise InvalidRequest(f"{param}: options of %llguidance are not taken; leave them out.", param=param)
    for options in re.findall(r"^\s*[?!]?[A-Za-z_][\w-]*\[([^\]]*)\]\s*:", text, re.MULTILINE):
        for name in _NOT_ENFORCED:
            if re.search(rf"\b{name}\b", options):
                raise InvalidRequest(f"{param}: the option {name} of a rule is not supported.", param=param)
    if len(text) > _GBNF_LIMIT:
        raise InvalidRequest(
            f"{param} has {len(text):,} characters; at most {_GBNF_LIMIT:,} are taken.", param=param
        )
    try:
        return f"{any_to_lark(text)}\n{_OPTIONS}\n"
    except Exception as error:  # the translation raises whatever comes
        shown = str(error)[:300] or type(error).__name__
        raise InvalidRequest(
            f"{param}: it must be a Lark grammar with a rule start, or GBNF with a rule root: {shown}.",
            param=param,
        ) from None
