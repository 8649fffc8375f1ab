"""What the tests of `/v1/responses` share: requests, events, and OpenAI's own schemas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
from jsonschema import Draft202012Validator
from tests.server.conftest import BASE, Server

ROUTE = "/v1/responses"
SCHEMAS = json.loads((Path(__file__).parent / "openai_responses.json").read_text())


def conforms(body: Any, schema: str) -> None:
    """Check a body against OpenAI's specification."""
    validator = Draft202012Validator({"$ref": f"#/$defs/{schema}", "$defs": SCHEMAS["$defs"]})
    assert [error.message for error in validator.iter_errors(body)] == []


def post(server: Server, **fields: Any) -> httpx.Response:
    return server.post(ROUTE, {"model": BASE, "input": "one two", **fields})


def create(server: Server, **fields: Any) -> dict[str, Any]:
    reply = post(server, **fields)
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    conforms(found, "Response")
    return found


def stream(server: Server, **fields: Any) -> list[dict[str, Any]]:
    """The events of a response, each named and numbered as OpenAI's are."""
    reply = post(server, stream=True, **fields)
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"].startswith("text/event-stream")
    events = []
    for block in reply.text.split("\n\n")[:-1]:
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        conforms(event, "ResponseStreamEvent")
        events.append(event)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def text_of(response: dict[str, Any]) -> str:
    (item,) = response["output"]
    (part,) = item["content"]
    assert (item["type"], item["role"], part["type"]) == ("message", "assistant", "output_text")
    return str(part["text"])


def refusal(reply: httpx.Response) -> tuple[int, str | None, str]:
    error = reply.json()["error"]
    return reply.status_code, error["param"], error["message"]


def prompt_of(server: Server) -> str:
    """The text of the last prompt that the engine was sent."""
    tokens = server.received("Generate")[-1]["prompt"]
    return str(server.post("/detokenize", {"tokens": tokens}).json()["prompt"])
