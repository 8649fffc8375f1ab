"""A chat's chunks as a response's events: words and calls in turns. What a server sends is in test_responses.py."""

from __future__ import annotations

from typing import Any, cast

from tests.server.responses import conforms

from veneer.errors import EngineUnavailable, QueueFull
from veneer.server.generation import Delta, Usage
from veneer.server.response_events import ResponseWriter
from veneer.server.response_items import messages_of, new_response_id, output_id
from veneer.server.streaming import Format

FRAME: dict[str, Any] = {
    "id": new_response_id(),
    "object": "response",
    "created_at": 1,
    "status": "in_progress",
    "error": None,
    "incomplete_details": None,
    "instructions": None,
    "model": "tiny",
    "tools": [],
    "output": [],
    "parallel_tool_calls": True,
    "metadata": {},
    "tool_choice": "auto",
    "temperature": 1,
    "top_p": 1,
}
USAGE = Usage(prompt_tokens=7, completion_tokens=5, cached_tokens=4)


class Chat:
    """A chat whose chunks are given."""

    def __init__(self, *deltas: dict[str, Any], finish: str | None = "stop") -> None:
        self._deltas, self._finish = deltas, finish

    def chunks(self, delta: Delta) -> list[dict[str, Any]]:
        def chunk(delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
            return {"choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}]}

        return [*map(chunk, self._deltas), chunk({}, self._finish)]


def begun(index: int, id: str, name: str) -> dict[str, Any]:
    function = {"name": name, "arguments": ""}
    return {"tool_calls": [{"index": index, "id": id, "type": "function", "function": function}]}


def more(index: int, arguments: str) -> dict[str, Any]:
    return {"tool_calls": [{"index": index, "function": {"arguments": arguments}}]}


def written(chat: Chat) -> tuple[ResponseWriter, list[dict[str, Any]]]:
    writer = ResponseWriter(FRAME, cast(Format, chat))
    events = writer.events(Delta(0, "", [], None, None, None, []))
    return writer, events


def test_words_and_calls_are_items_in_turn() -> None:
    calls = [begun(0, "c1", "add"), more(0, '{"a": '), more(0, "1}"), begun(1, "c2", "now"), more(1, "{}")]
    chat = Chat({"role": "assistant", "content": ""}, {"content": "Look"}, {"content": ":"}, *calls)
    writer, events = written(chat)
    events += writer.end(USAGE)
    for event in events:
        conforms(event, "ResponseStreamEvent")
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    call = (
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
    )
    assert [event["type"].removeprefix("response.") for event in events] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        *call[:2],
        *call[1:],
        *call,
        "completed",
    ]
    response = events[-1]["response"]
    said, *called = response["output"]
    assert said["content"][0]["text"] == "Look:"
    assert [(each["call_id"], each["name"], each["arguments"]) for each in called] == [
        ("c1", "add", '{"a": 1}'),
        ("c2", "now", "{}"),
    ]
    assert [each["id"] for each in response["output"]] == [
        output_id(FRAME["id"], index, prefix) for index, prefix in enumerate(("msg", "fc", "fc"))
    ]
    assert [event["output_index"] for event in events if "output_index" in event] == [0] * 7 + [1] * 5 + [
        2
    ] * 4
    assert response["usage"]["input_tokens_details"]["cached_tokens"] == 4
    (message,) = messages_of(response["output"], None)  # and back into a chat
    assert (message["content"], [each["id"] for each in message["tool_calls"]]) == ("Look:", ["c1", "c2"])


def test_what_was_sent_does_not_change() -> None:
    """Events are whole when they are made; the items go on."""
    writer, events = written(Chat({"content": "one"}, {"content": "two"}, finish=None))
    added = [event for event in events if event["type"].endswith(".added")]
    assert (added[0]["item"]["status"], added[0]["item"]["content"]) == ("in_progress", [])
    assert added[1]["part"]["text"] == ""
    writer.end(USAGE)
    assert (added[0]["item"]["status"], added[0]["item"]["content"]) == ("in_progress", [])
    assert FRAME["output"] == []


def test_the_item_that_was_cut_is_incomplete() -> None:
    writer, _ = written(Chat({"content": "one"}, begun(0, "c1", "add"), more(0, '{"a'), finish="length"))
    last = writer.end(USAGE)[-1]
    assert last["type"] == "response.incomplete"
    assert [item["status"] for item in last["response"]["output"]] == ["completed", "incomplete"]


def test_failures_have_openais_codes() -> None:
    writer, _ = written(Chat({"content": "one"}))
    for error, code in (
        (EngineUnavailable("lost"), "server_error"),
        (QueueFull("full"), "rate_limit_exceeded"),
    ):
        event = writer.failed(error)
        conforms(event, "ResponseStreamEvent")
        assert event["response"]["error"] == {"code": code, "message": error.message}
