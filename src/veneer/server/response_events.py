"""A response as it comes: OpenAI's events, made of the chunks of the chat that answers it, and the whole."""

from __future__ import annotations

import time
from typing import Any

from veneer.errors import QueueFull, VeneerError
from veneer.server.generation import Delta, Usage
from veneer.server.response_items import output_id, text_part
from veneer.server.response_store import Item
from veneer.server.streaming import Format

Event = dict[str, Any]


class ResponseWriter:
    """One response. `frame` has the fields of OpenAI's `Response` that do not change."""

    def __init__(self, frame: dict[str, Any], chat: Format) -> None:
        self._frame, self._chat = frame, chat
        self._output: list[Item] = []  # complete but for the last, which may be open
        self._open = False
        self._begun = False
        self._reason: str | None = None
        self._events = 0

    # ---- events -----------------------------------------------------------------------------------

    def events(self, delta: Delta) -> list[Event]:
        """What a piece of the answer means: the beginning of the response, of its items, their news and ends."""
        found = [] if self._begun else self._begin()
        for chunk in self._chat.chunks(delta):
            choice = chunk["choices"][0]
            logprobs = (choice["logprobs"] or {}).get("content") or []
            words = choice["delta"].get("content") or ""
            if words or logprobs:
                found += self._words(words, logprobs)
            for call in choice["delta"].get("tool_calls") or []:
                found += self._call(call)
            self._reason = choice["finish_reason"] or self._reason
        return found

    def end(self, usage: Usage) -> list[Event]:
        """The last events, of which the very last has the whole response."""
        found = []
        if not self._output:  # an answer of no token is a message, too
            found += self._words("", [])
        found += self._close("incomplete" if self._reason == "length" else "completed")
        response = self.response(usage)
        return [*found, self._event(f"response.{response['status']}", response=response)]

    def failed(self, error: VeneerError) -> Event:
        code = "rate_limit_exceeded" if isinstance(error, QueueFull) else "server_error"
        fields = {"status": "failed", "error": {"code": code, "message": error.message}}
        return self._event("response.failed", response=self._frame | fields | {"output": self._output})

    def response(self, usage: Usage) -> dict[str, Any]:
        """OpenAI's `Response`, when all has come."""
        cut = self._reason == "length"
        return self._frame | {
            "status": "incomplete" if cut else "completed",
            "completed_at": None if cut else int(time.time()),
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": self._output,
            "usage": _usage(usage),
        }

    def _begin(self) -> list[Event]:
        self._begun = True
        return [self._event(f"response.{kind}", response=self._frame) for kind in ("created", "in_progress")]

    def _event(self, kind: str, **fields: Any) -> Event:
        self._events += 1
        return {"type": kind, "sequence_number": self._events - 1, **fields}

    # ---- items ------------------------------------------------------------------------------------

    def _words(self, words: str, logprobs: list[Any]) -> list[Event]:
        found = []
        if not self._open or self._output[-1]["type"] != "message":
            found += self._begin_item("msg", {"type": "message", "role": "assistant", "content": []})
            part = text_part("", [])
            found.append(self._about("response.content_part.added", part=part, content_index=0))
            self._output[-1]["content"] = [text_part("", [])]
        (part,) = self._output[-1]["content"]
        part["text"] += words
        part["logprobs"] += logprobs
        if words or logprobs:
            fields = {"content_index": 0, "delta": words, "logprobs": logprobs}
            found.append(self._about("response.output_text.delta", **fields))
        return found

    def _call(self, call: dict[str, Any]) -> list[Event]:
        """`call` is a delta of a chat's tool call; the first of each has its id."""
        found, function = [], call["function"]
        if "id" in call:
            fields = {"call_id": call["id"], "name": function["name"], "arguments": ""}
            found += self._begin_item("fc", {"type": "function_call", **fields})
        if arguments := function.get("arguments"):
            self._output[-1]["arguments"] += arguments
            found.append(self._about("response.function_call_arguments.delta", delta=arguments))
        return found

    def _begin_item(self, prefix: str, fields: dict[str, Any]) -> list[Event]:
        found = self._close("completed")
        item = {
            "id": output_id(self._frame["id"], len(self._output), prefix),
            "status": "in_progress",
        } | fields
        self._output.append(item)
        self._open = True
        index = len(self._output) - 1
        return [*found, self._event("response.output_item.added", output_index=index, item=dict(item))]

    def _close(self, status: str) -> list[Event]:
        """End the open item, if there is one."""
        if not self._open:
            return []
        item, self._open = self._output[-1], False
        item["status"] = status
        if item["type"] == "message":
            (part,) = item["content"]
            said = {"content_index": 0, "text": part["text"], "logprobs": part["logprobs"]}
            found = [
                self._about("response.output_text.done", **said),
                self._about("response.content_part.done", part=part, content_index=0),
            ]
        else:
            said = {"name": item["name"], "arguments": item["arguments"]}
            found = [self._about("response.function_call_arguments.done", **said)]
        index = len(self._output) - 1
        return [*found, self._event("response.output_item.done", output_index=index, item=item)]

    def _about(self, kind: str, **fields: Any) -> Event:
        """An event of the last item."""
        where = {"item_id": self._output[-1]["id"], "output_index": len(self._output) - 1}
        return self._event(kind, **where, **fields)


def _usage(usage: Usage) -> dict[str, Any]:
    """OpenAI's `ResponseUsage`. Writing to the prefix cache is not counted."""
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
