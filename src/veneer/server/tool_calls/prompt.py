"""Tools and earlier calls in the prompt of a model whose chat template knows none: words of the system message."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from veneer.server.tool_calls.family import Family

Message = dict[str, Any]


def with_tools(messages: Sequence[Message], tools: Sequence[dict[str, Any]], family: Family) -> list[Message]:
    """The messages with the tools described in the first, a system message."""
    described = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    words = (
        f"You can call these functions:\n{described}\n"
        f"To call one, answer with nothing but {family.example()} and you are told its result. "
        "Answer in plain words when you need none."
    )
    first = messages[0]
    if first["role"] == "system" and isinstance(first["content"], str):
        return [{**first, "content": f"{first['content']}\n\n{words}"}, *messages[1:]]
    return [{"role": "system", "content": words}, *messages]


def without_calls(message: Message, family: Family) -> Message:
    """A message whose calls are text, as the model would have written them."""
    calls = message.get("tool_calls")
    if not calls:
        return message
    written = family.opening + family.between.join(
        f"{family.before(call['function']['name'])}"
        f"{json.dumps(call['function']['arguments'], ensure_ascii=False)}{family.after}"
        for call in calls
    )
    words = f"{message['content']}\n" if message.get("content") else ""
    kept = {name: value for name, value in message.items() if name != "tool_calls"}
    return {**kept, "content": words + written + family.closing}
