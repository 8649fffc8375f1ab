"""Function calls and answers of a form through `/v1/responses`. How they work is tested with chat."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.server.conftest import BASE, MakeServer, Server
from tests.server.responses import conforms, create, post, refusal, stream

from veneer.server.state import ServerConfig

TOOL: dict[str, Any] = {
    "type": "function",
    "name": "add",
    "description": "Adds.",
    "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    "strict": False,
}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}},
    "required": ["a"],
    "additionalProperties": False,
}


@pytest.fixture
def hermes(make_server: MakeServer) -> Server:
    """The toy engine repeats the prompt, with it the call that a user writes."""
    config = ServerConfig(tool_call_parser="hermes")
    return make_server("--context", "4096", config=config).until_ready()


def test_calls_are_items(hermes: Server) -> None:
    asked: dict[str, Any] = {"input": CALL, "tools": [TOOL], "temperature": 0}
    conforms({"model": BASE, **asked}, "CreateResponse")
    found = create(hermes, **asked)
    call = found["output"][1]  # between the words around it
    assert (call["type"], call["name"], json.loads(call["arguments"])) == ("function_call", "add", {"a": 1})
    assert (found["tools"], found["tool_choice"]) == ([TOOL], "auto")
    events = stream(hermes, **asked)
    streamed = events[-1]["response"]["output"][1]
    assert streamed | {"id": call["id"], "call_id": call["call_id"]} == call
    deltas = [event["delta"] for event in events if event["type"].endswith("arguments.delta")]
    assert "".join(deltas) == call["arguments"]
    output = {"type": "function_call_output", "call_id": call["call_id"], "output": "2"}
    create(hermes, input=[output], previous_response_id=found["id"], max_output_tokens=1)
    assert refusal(post(hermes, input="a", tools=[TOOL, TOOL]))[1] == "tools"


def test_a_choice_and_a_form_are_held_by_grammars(hermes: Server) -> None:
    create(hermes, tools=[TOOL], tool_choice={"type": "function", "name": "add"}, max_output_tokens=4)
    form = {"type": "json_schema", "name": "sum", "schema": SCHEMA, "strict": True}
    found = create(hermes, text={"format": form}, max_output_tokens=4)
    assert found["text"]["format"] == form
    create(hermes, text={"format": {"type": "json_object"}}, max_output_tokens=4)
    grammars = [
        sent["sampling"].get("constraint", {}).get("grammar", "") for sent in hermes.received("Generate")
    ]
    some = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "add"}]}
    assert create(hermes, tools=[TOOL], tool_choice=some, max_output_tokens=4)["tool_choice"] == some
    assert len(grammars) == 3
    assert all(grammars)
    assert '"add"' in grammars[0].replace("\\", "")
    assert refusal(post(hermes, text={"format": {"type": "json_schema"}}))[:2] == (400, "text.format")
