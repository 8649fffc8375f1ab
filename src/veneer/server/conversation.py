"""From OpenAI's chat messages to what a chat template reads."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from veneer.errors import InvalidRequest
from veneer.server.tool_calls.family import Family
from veneer.server.tool_calls.plain_json import JSON
from veneer.server.tool_calls.prompt import without_calls

_FIELDS = {
    "system": {"name"},
    "developer": {"name"},
    "user": {"name"},
    "assistant": {
        "name",
        "refusal",
        "tool_calls",
        "function_call",
        "audio",
        "reasoning_content",
        "reasoning",
    },
    "tool": {"name", "tool_call_id"},
    "function": {"name"},
}
# Templates that never mention a role would print it as it is, which no model was trained on.
_FALLBACK = {"developer": "system", "tool": "user", "function": "user"}


def template_messages(
    messages: Sequence[dict[str, Any]],
    template_source: str,
    unknown: Callable[[str], None],
    family: Family = JSON,
) -> list[dict[str, Any]]:
    """Messages for `ChatTemplate.render`: text parts are joined by newlines, as vLLM does.

    Roles that the template does not mention are mapped (developer to system, tool results to user), and calls in
    one that knows none become text in the form of `family`. `unknown` is told of fields nobody documents. Raises
    InvalidRequest that names the place.
    """
    found = [
        _message(f"messages[{i}]", message, template_source, unknown) for i, message in enumerate(messages)
    ]
    return found if "tool_calls" in template_source else [without_calls(each, family) for each in found]


def _message(
    place: str, message: dict[str, Any], source: str, unknown: Callable[[str], None]
) -> dict[str, Any]:
    role = message.get("role")
    if not isinstance(role, str) or role not in _FIELDS:
        raise _fault(f"{place}.role", f"must be one of {', '.join(_FIELDS)}", role)
    given = {name: value for name, value in message.items() if value is not None}
    for name in given.keys() - _FIELDS[role] - {"role", "content"}:
        unknown(f"messages.{name}")
    for name in ("function_call", "audio"):
        if given.get(name):
            raise _fault(f"{place}.{name}", "is not supported; use tool_calls or text", given[name])
    for name in ("name", "refusal", "tool_call_id", "reasoning_content", "reasoning"):
        if not isinstance(given.get(name, ""), str):
            raise _fault(f"{place}.{name}", "must be text", given[name])
    calls = _tool_calls(f"{place}.tool_calls", given.get("tool_calls") or [])
    found: dict[str, Any] = {"role": _role(role, source), "content": _content(place, given, bool(calls))}
    if calls:
        found["tool_calls"] = calls
    if thoughts := given.get("reasoning_content", given.get("reasoning")):
        found |= {
            "reasoning_content": thoughts,
            "thinking": thoughts,
        }  # the names templates read, as transformers
    return found | {name: given[name] for name in ("name", "tool_call_id") if name in given}


def _role(role: str, source: str) -> str:
    if role == "function" and "function" not in source:
        role = "tool"
    return role if role in source else _FALLBACK.get(role, role)


def _content(place: str, message: dict[str, Any], has_calls: bool) -> str | None:
    content = message.get("content", message.get("refusal"))
    if content is None:
        if has_calls:
            return None
        raise InvalidRequest(f"{place}.content is required.", param=f"{place}.content")
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise _fault(f"{place}.content", "must be text or a list of content parts, not empty", content)
    return "\n".join(_part(f"{place}.content[{i}]", part) for i, part in enumerate(content))


def _part(place: str, part: Any) -> str:
    if isinstance(part, str):  # vLLM takes these
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in ("text", "refusal"):
        raise _fault(f"{place}.type", "must be 'text': this server reads text only", kind)
    if not isinstance(part.get(kind), str):
        raise _fault(f"{place}.{kind}", "must be text", part.get(kind))
    return str(part[kind])


def _tool_calls(place: str, calls: Any) -> list[dict[str, Any]]:
    """Calls the assistant made earlier. Templates want their arguments as data, not as JSON text."""
    try:
        return [
            {
                "id": call.get("id"),
                "type": "function",
                "function": {
                    "name": str(call["function"]["name"]),
                    "arguments": msgspec.json.decode(call["function"]["arguments"] or "{}"),
                },
            }
            for call in calls
        ]
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError):
        rule = "must be a list of function calls whose arguments are JSON text"
        raise _fault(place, rule, calls) from None


def _fault(place: str, rule: str, value: Any) -> InvalidRequest:
    return InvalidRequest(f"{place} {rule} (got {reprlib.repr(value)}).", param=place)
