"""What a conversation says about tools: functions, the form of calls, the grammar that holds an answer to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from veneer.errors import InvalidRequest
from veneer.server.fields import AllowedToolsChoice, Function, NamedTool, ToolChoice
from veneer.server.structured import Grammar, answer_grammar, response_body
from veneer.server.text import TextTokenizer
from veneer.server.tool_calls.family import Family
from veneer.server.tool_calls.grammar import calls_grammar
from veneer.server.tool_calls.plain_json import JSON
from veneer.server.tool_calls.registry import family_of, knows_tools
from veneer.server.wire import ChatRequest, Conversation


@dataclass(frozen=True)
class Tools:
    """The functions that an answer may call."""

    family: Family  # as which calls are read
    functions: tuple[Function, ...]
    described: list[dict[str, Any]]  # the request's tools, for a chat template
    rendered: bool  # by the template itself


def tools_of(body: Conversation, template: str, parser: str | None) -> Tools | None:
    """None when no call is wanted. `template` is its source, `parser` --tool-call-parser. Raises InvalidRequest."""
    _check(body)
    if not body.tools or body.tool_choice == "none":
        return None
    family = family_of(template, parser)
    if family.read is not None and _is_held(body):
        family = JSON
    described = [tool.model_dump(exclude_unset=True) for tool in body.tools]
    named = _named(body.tool_choice)
    functions = tuple(each.function for each in body.tools if named is None or each.function.name in named)
    return Tools(family, functions, described, knows_tools(template))


def grammar_of(body: ChatRequest, tools: Tools | None, tokenizer: TextTokenizer) -> Grammar | None:
    """The grammar of an answer. Raises InvalidRequest for what cannot be enforced."""
    if tools is None:
        return answer_grammar(body.response_format, body.structured_outputs)
    if body.structured_outputs is not None:
        raise _fault(
            "structured_outputs", "it cannot come with tools; use response_format, or tool_choice none"
        )
    answer = response_body(body.response_format)
    if not _is_held(body) and answer is None:
        return None
    text = calls_grammar(
        tools.family,
        tools.functions,
        lambda token: found if (found := tokenizer.token_id(token)) in tokenizer.special_ids else None,
        must=_must(body.tool_choice),
        several=body.parallel_tool_calls and not isinstance(body.tool_choice, NamedTool),
        answer=answer,
    )
    return Grammar(text, "tools" if answer is None else "response_format")


def _is_held(body: Conversation) -> bool:
    """Whether a grammar must hold the calls to their form."""
    strict = any(tool.function.strict for tool in body.tools or [])
    return _must(body.tool_choice) or strict or not body.parallel_tool_calls


def _must(choice: ToolChoice | None) -> bool:
    """Whether there must be a call."""
    if isinstance(choice, AllowedToolsChoice):
        return choice.allowed_tools.mode == "required"
    return choice not in (None, "none", "auto")


def _named(choice: ToolChoice | None) -> list[str] | None:
    """The functions that may be called; None for all."""
    if isinstance(choice, AllowedToolsChoice):
        return [tool.function.name for tool in choice.allowed_tools.tools]
    return [choice.function.name] if isinstance(choice, NamedTool) else None


def _check(body: Conversation) -> None:
    names = [tool.function.name for tool in body.tools or []]
    for name in names:
        if names.count(name) > 1:
            raise _fault("tools", f"two functions are called {name!r}; give each a name of its own")
    for index, tool in enumerate(body.tools or []):
        if (tool.function.parameters or {}).get("type", "object") != "object":
            raise _fault(f"tools[{index}].function.parameters", "its type must be object")
    choice = body.tool_choice
    if choice not in (None, "none", "auto") and not names:
        raise _fault("tool_choice", "it asks for a call and there are no tools; send them in tools")
    if unknown := next((name for name in _named(choice) or [] if name not in names), None):
        raise _fault("tool_choice", f"{unknown[:100]!r} is none of the tools: {', '.join(names)[:500]}")


def _fault(param: str, rule: str) -> InvalidRequest:
    return InvalidRequest(f"{param}: {rule}.", param=param)
