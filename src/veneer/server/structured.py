"""From `response_format` and `structured_outputs` to the grammar of an answer."""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec

from veneer.engine.grammar_text import choice_body, given_grammar, json_body, lark, regex_body
from veneer.errors import InvalidRequest
from veneer.server.fields import ResponseFormat, StructuredOutputs

_KINDS = ("json", "json_object", "regex", "choice", "grammar")


class Grammar(NamedTuple):
    text: str  # for `Constraint.grammar`
    param: str  # the field that asked for it


def answer_grammar(form: ResponseFormat | None, outputs: StructuredOutputs | None) -> Grammar | None:
    """What the whole answer must follow; None: anything. Raises InvalidRequest."""
    body = response_body(form)
    if outputs is None:
        return None if body is None else Grammar(lark(body), "response_format")
    if body is not None:
        raise _fault(
            "structured_outputs", "it comes with response_format, which says the same; send one of them"
        )
    return _outputs_grammar(outputs)


def response_body(form: ResponseFormat | None) -> str | None:
    """The body of a grammar's rule for `response_format`."""
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return json_body({"type": "object"}, "response_format")
    if form.json_schema is None:
        raise _fault("response_format.json_schema", "it is required with the type json_schema")
    return json_body(form.json_schema.schema_, "response_format.json_schema.schema")


def _outputs_grammar(outputs: StructuredOutputs) -> Grammar:
    given = outputs.model_dump(by_alias=True)
    kinds = [kind for kind in _KINDS if given[kind] is not None and given[kind] is not False]
    if len(kinds) != 1:
        shown = ", ".join(kinds) or "none"
        raise _fault("structured_outputs", f"it must have exactly one of {', '.join(_KINDS)} (got {shown})")
    kind, param = kinds[0], f"structured_outputs.{kinds[0]}"
    compact = outputs.disable_any_whitespace
    if compact and not kind.startswith("json"):
        raise _fault("structured_outputs.disable_any_whitespace", "it belongs to json and json_object")
    if kind == "json":
        return Grammar(lark(json_body(_schema(given[kind], param), param, compact=compact)), param)
    if kind == "json_object":
        return Grammar(lark(json_body({"type": "object"}, param, compact=compact)), param)
    if kind == "regex":
        return Grammar(lark(regex_body(given[kind])), param)
    if kind == "choice":
        return Grammar(lark(choice_body(given[kind])), param)
    return Grammar(given_grammar(given[kind], param), param)


def _schema(value: Any, param: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return msgspec.json.decode(value)
    except (ValueError, RecursionError) as error:
        raise _fault(param, f"it must be a JSON schema, or its text: {error}") from None


def _fault(param: str, rule: str) -> InvalidRequest:
    return InvalidRequest(f"{param}: {rule}.", param=param)
