"""Items of the Responses API: from what a client sends to what is stored, and to the messages of a chat.

Read are messages of text, function calls and their outputs, and references to items of stored responses. An item
that is read is whole: it has an id and a status and its content is a list of parts, as OpenAI lists them.
"""

from __future__ import annotations

import re
import reprlib
import secrets
from collections.abc import Callable, Iterable
from typing import Any

from veneer.errors import InvalidRequest, NotFound
from veneer.server.response_store import Item, StoredResponse

ROLES = ("user", "assistant", "system", "developer")
MOST_ITEMS = 10_000
_FIELDS = {
    "message": {"role", "content", "phase"},
    "function_call": {"call_id", "name", "arguments", "namespace", "caller"},
    "function_call_output": {"call_id", "output", "name", "namespace", "caller"},
    "item_reference": set[str](),
}
_COMMON = {"id", "type", "status"}
_PARTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}
_OUTPUT_ID = re.compile(r"(?:msg|fc)_([0-9a-f]{48})[0-9a-f]{2,}")

Find = Callable[[str], StoredResponse]  # a stored response by its id; raises NotFound


def new_response_id() -> str:
    return f"resp_{secrets.token_hex(24)}"


def output_id(response_id: str, index: int, prefix: str) -> str:
    """Of an output item. It tells its response, so that a reference to it can be followed."""
    return f"{prefix}_{response_id.removeprefix('resp_')}{index:02x}"


def read_input(given: Any, find: Find, unknown: Callable[[str], None]) -> list[Item]:
    """Whole items. `unknown` is told of fields nobody documents. Raises InvalidRequest that names the place."""
    if isinstance(given, str):
        return [_message("input", {"role": "user", "content": given})]
    if not isinstance(given, list) or not 0 < len(given) <= MOST_ITEMS:
        raise _fault("input", f"must be text or a list of 1 to {MOST_ITEMS} items", given)
    return [_item(f"input[{index}]", each, find, unknown) for index, each in enumerate(given)]


def _item(place: str, given: Any, find: Find, unknown: Callable[[str], None]) -> Item:
    if not isinstance(given, dict):
        raise _fault(place, "must be an item, an object", given)
    given = {name: value for name, value in given.items() if value is not None}
    kind = given.get("type", "message" if "role" in given else "item_reference" if "id" in given else None)
    if not isinstance(kind, str) or kind not in _FIELDS:
        raise _fault(f"{place}.type", f"must be one of {', '.join(_FIELDS)}: others are not supported", kind)
    for name in given.keys() - _FIELDS[kind] - _COMMON:
        unknown(f"input.{name}")
    if not isinstance(given.get("id", ""), str):
        raise _fault(f"{place}.id", "must be text", given["id"])
    if kind == "message":
        return _message(place, given)
    if kind == "item_reference":
        return _referred(place, given, find)
    return _call(place, given) if kind == "function_call" else _output(place, given)


def _message(place: str, given: Item) -> Item:
    role = given.get("role")
    if role not in ROLES:
        raise _fault(f"{place}.role", f"must be one of {', '.join(ROLES)}", role)
    content = given.get("content")
    if isinstance(content, str):
        content = [{"type": "input_text", "text": content}]
    if not isinstance(content, list) or (not content and role != "assistant"):
        raise _fault(f"{place}.content", "must be text or a list of content parts, not empty", content)
    parts = [_part(f"{place}.content[{i}]", part, role) for i, part in enumerate(content)]
    id = given.get("id") or f"msg_{secrets.token_hex(24)}"
    return {"id": id, "type": "message", "status": "completed", "role": role, "content": parts}


def _part(place: str, given: Any, role: str) -> dict[str, Any]:
    kind = given.get("type") if isinstance(given, dict) else None
    field = _PARTS.get(kind) if isinstance(kind, str) else None
    if field is None:
        raise _fault(
            f"{place}.type", "must be 'input_text' or 'output_text': this server reads text only", kind
        )
    text = given.get(field)
    if not isinstance(text, str):
        raise _fault(f"{place}.{field}", "must be text", text)
    if kind == "refusal":
        return {"type": "refusal", "refusal": text}
    return text_part(text, []) if role == "assistant" else {"type": "input_text", "text": text}


def text_part(text: str, logprobs: list[Any]) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _call(place: str, given: Item) -> Item:
    for name in ("call_id", "name", "arguments"):
        if not isinstance(given.get(name), str):
            raise _fault(f"{place}.{name}", "must be text", given.get(name))
    id = given.get("id") or f"fc_{secrets.token_hex(24)}"
    fields = {name: given[name] for name in ("call_id", "name", "arguments")}
    return {"id": id, "type": "function_call", "status": "completed", **fields}


def _output(place: str, given: Item) -> Item:
    if not isinstance(given.get("call_id"), str):
        raise _fault(f"{place}.call_id", "must be text, the id of the call", given.get("call_id"))
    output = given.get("output")
    if isinstance(output, list):
        output = [_part(f"{place}.output[{i}]", part, "user") for i, part in enumerate(output)]
    elif not isinstance(output, str):
        raise _fault(f"{place}.output", "must be text or a list of text parts", output)
    id = given.get("id") or f"fco_{secrets.token_hex(24)}"
    return {
        "id": id,
        "type": "function_call_output",
        "status": "completed",
        "call_id": given["call_id"],
        "output": output,
    }


def _referred(place: str, given: Item, find: Find) -> Item:
    """The output item of a stored response that is meant."""
    id = given.get("id", "")
    if match := _OUTPUT_ID.fullmatch(id):
        try:
            output = find(f"resp_{match[1]}").response["output"]
        except NotFound:
            output = []
        for item in output:
            if item["id"] == id:
                return dict(item)
    rule = "must be the id of an output item of a stored response; send the item itself"
    raise _fault(f"{place}.id", rule, id)


def messages_of(items: Iterable[Item], instructions: str | None) -> list[dict[str, Any]]:
    """Messages of a chat. Calls that follow one another, or an assistant's words, are one message of it."""
    found: list[dict[str, Any]] = []
    if instructions is not None:
        found.append({"role": "system", "content": instructions})
    for item in items:
        if item["type"] == "message":
            found.append({"role": item["role"], "content": _text(item["content"])})
        elif item["type"] == "function_call":
            if not found or found[-1]["role"] != "assistant":
                found.append({"role": "assistant", "content": None})
            function = {"name": item["name"], "arguments": item["arguments"]}
            call = {"id": item["call_id"], "type": "function", "function": function}
            found[-1].setdefault("tool_calls", []).append(call)
        else:
            output = item["output"] if isinstance(item["output"], str) else _text(item["output"])
            found.append({"role": "tool", "tool_call_id": item["call_id"], "content": output})
    return found


def _text(parts: list[dict[str, Any]]) -> str:
    return "\n".join(str(part.get("text", part.get("refusal"))) for part in parts)


def _fault(place: str, rule: str, value: Any) -> InvalidRequest:
    return InvalidRequest(f"{place} {rule} (got {reprlib.repr(value)}).", param=place)
