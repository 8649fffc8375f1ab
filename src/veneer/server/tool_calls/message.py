"""An assistant's message as it comes: OpenAI's deltas of its words and calls, and at last the whole."""

from __future__ import annotations

from typing import Any

from veneer.server.tool_calls.reader import CallStart, Event, Reader, Words
from veneer.server.tool_calls.request import Tools


class Message:
    """The message of one choice. Without tools its text is its content."""

    def __init__(self, tools: Tools | None) -> None:
        self._tools = tools
        offered = {each.name: each.parameters for each in tools.functions} if tools else {}
        self._reader = Reader(tools.family, offered) if tools else None
        self._content = ""
        self._calls: list[dict[str, Any]] = []
        self._begun = False

    @property
    def has_calls(self) -> bool:
        return bool(self._calls)

    def take(self, text: str, *, final: bool) -> list[dict[str, Any]]:
        """Deltas of the new text, the first of all with the role."""
        if self._reader is None:
            events: list[Event] = [Words(text)] if text else []
        else:
            events = self._reader.push(text, final=final)
        deltas = [self._delta(event) for event in events]
        if not self._begun and (deltas or final or self._reader is None):
            self._begun = True
            content = None if deltas and "tool_calls" in deltas[0] else ""
            deltas.insert(0, {"role": "assistant", "content": content})
        return deltas

    def whole(self) -> dict[str, Any]:
        content = None if self._calls and not self._content else self._content
        message = {"role": "assistant", "content": content, "refusal": None}
        return message | {"tool_calls": self._calls} if self._calls else message

    def _delta(self, event: Event) -> dict[str, Any]:
        if isinstance(event, Words):
            self._content += event.text
            return {"content": event.text}
        if isinstance(event, CallStart):
            assert self._tools is not None
            function = {"name": event.name, "arguments": ""}
            call = {"id": self._tools.family.call_id(), "type": "function", "function": function}
            self._calls.append(call)
            return {"tool_calls": [{"index": len(self._calls) - 1, **call, "function": dict(function)}]}
        self._calls[-1]["function"]["arguments"] += event.text
        return {"tool_calls": [{"index": len(self._calls) - 1, "function": {"arguments": event.text}}]}
