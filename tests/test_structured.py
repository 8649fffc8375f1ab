"""Structured output and tools with the official client, against a server with a tiny random model: nothing that it
writes is right by chance."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import jsonschema
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel, Field
from tests.conftest import LiveServer
from tests.engine.adapters import save_lora
from tests.text_model import write_tokenizer

MODEL = "text-model"
HELLO: list[Any] = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def server(
    live_server: Callable[..., LiveServer], text_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> LiveServer:
    """With an adapter that brings a tokenizer with one token more, and a template without tools."""
    adapter = tmp_path_factory.mktemp("adapter")
    save_lora(adapter, text_model, 4, target_modules="all-linear")
    write_tokenizer(adapter / "tokenizer.json", added=("zzyx",))
    (adapter / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    (adapter / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    )
    options = ["--store", str(tmp_path_factory.mktemp("store")), "--quantization", "none", "--threads", "1"]
    options += ["--dtype", "float32", "--kv-cache-memory", "64MiB", "--lora-modules", f"own={adapter}"]
    return live_server(str(text_model), *options)


@pytest.fixture(scope="module")
def client(server: LiveServer) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Part(BaseModel, extra="forbid"):
    kind: Literal["wheel", "door"]
    count: int = Field(ge=0, le=50)


class Car(BaseModel, extra="forbid"):
    """No field may grow for ever: a random model would not stop."""

    colour: Colour
    parts: list[Part] = Field(max_length=3)
    used: bool
    code: str = Field(pattern="^[A-Z]{2}[0-9]{3}$")
    owner: str | None = Field(max_length=8)


@pytest.mark.parametrize("model", [MODEL, "own"])
def test_parse_gives_the_pydantic_model(client: OpenAI, model: str) -> None:
    for seed in range(4):
        reply = client.chat.completions.parse(
            model=model, messages=HELLO, response_format=Car, seed=seed, max_tokens=400
        )
        assert reply.choices[0].finish_reason == "stop"
        car = reply.choices[0].message.parsed
        assert isinstance(car, Car)
        assert json.loads(reply.choices[0].message.content or "") == car.model_dump(mode="json")


def test_a_stream_is_parsed_at_its_end(client: OpenAI) -> None:
    with client.chat.completions.stream(
        model=MODEL, messages=HELLO, response_format=Car, seed=1, max_tokens=400
    ) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert isinstance(final.choices[0].message.parsed, Car)
    assert kinds.count("content.delta") > 10


def create(client: OpenAI, **fields: Any) -> Any:
    make: Any = client.chat.completions.create
    return make(**{"model": MODEL, "messages": HELLO, "max_tokens": 300} | fields)


def test_every_choice_follows_the_schema(client: OpenAI) -> None:
    schema = {"type": "array", "items": {"enum": [1, "two", None]}, "minItems": 1, "maxItems": 4}
    form = {"type": "json_schema", "json_schema": {"name": "list", "schema": schema, "strict": True}}
    reply = create(client, response_format=form, n=6, temperature=1.5)
    for choice in reply.choices:
        jsonschema.validate(json.loads(choice.message.content), schema)
    assert len({choice.message.content for choice in reply.choices}) > 1


def test_json_objects(client: OpenAI) -> None:
    reply = create(client, response_format={"type": "json_object"}, n=8, max_tokens=150)
    ended = [choice.message.content for choice in reply.choices if choice.finish_reason == "stop"]
    assert all(isinstance(json.loads(text), dict) for text in ended)
    assert all(choice.message.content.startswith("{") for choice in reply.choices)
    assert {choice.finish_reason for choice in reply.choices} <= {"stop", "length"}


OUTPUTS: list[tuple[dict[str, Any], str]] = [
    ({"regex": "[ab]{3}-\\d"}, "[ab]{3}-\\d"),
    ({"choice": ["yes", "no"]}, "yes|no"),
    ({"grammar": 'root ::= "(" [0-9] ")" | "none"'}, "\\(\\d\\)|none"),
    ({"grammar": 'start: "x" /[yz]{2}/'}, "x[yz]{2}"),
    ({"json": {"enum": [True, 12]}}, "true|12"),
    ({"json": '{"const": {"a": [1, 2]}}', "disable_any_whitespace": True}, re.escape('{"a":[1,2]}')),
]


@pytest.mark.parametrize(("outputs", "pattern"), OUTPUTS, ids=[next(iter(given)) for given, _ in OUTPUTS])
def test_structured_outputs_on_both_routes(client: OpenAI, outputs: Any, pattern: str) -> None:
    body = {"structured_outputs": outputs}
    for seed in range(3):
        text = client.completions.create(model="own", prompt="abc", seed=seed, max_tokens=60, extra_body=body)
        chat = create(client, seed=seed, extra_body=body, max_tokens=60)
        for found in (text.choices[0].text, chat.choices[0].message.content):
            assert re.fullmatch(pattern, found), found


def test_free_and_constrained_requests_share_steps_and_may_be_cancelled(server: LiveServer) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "car", "schema": Car.model_json_schema()}}

    async def ask() -> tuple[list[Any], list[Any]]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            make: Any = client.chat.completions.create
            free = {"model": MODEL, "messages": HELLO, "max_tokens": 60, "temperature": 0}
            car = {"max_tokens": 400, "response_format": form, "temperature": 1}
            alone = await make(**free)
            endless = await make(
                model=MODEL, messages=HELLO, stream=True, extra_body={"structured_outputs": {"regex": "a+"}}
            )
            await anext(aiter(endless))
            together = await asyncio.gather(
                *(make(**free | car | {"seed": seed}) for seed in range(8)),
                *(make(**free) for _ in range(4)),
            )
            await endless.close()
            return [alone, *together[8:]], together[:8]

    free, constrained = asyncio.run(ask())
    assert len({reply.choices[0].message.content for reply in free}) == 1
    for reply in constrained:
        Car.model_validate_json(reply.choices[0].message.content)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "named"),
    [
        (
            {"json": {"type": "object", "properties": {"a": {"not": {}}}}},
            "structured_outputs.json.properties.a",
        ),
        ({"json": {"type": "string", "format": "color"}}, "color"),
        ({"regex": "(?=a)b"}, "structured_outputs.regex"),
        ({"regex": "("}, "structured_outputs.regex"),
        ({"grammar": "start: missing"}, "missing"),
        ({"choice": ["a" * 300_000]}, "262,144"),
        ({"json": {"enum": [str(i) * 3 for i in range(40_000)]}}, "structured_outputs.json"),
        ({"grammar": "start: " + "(" * 9000 + '"a"' + ")" * 9000}, "structured_outputs.grammar"),
    ],
)
def test_what_cannot_be_enforced_is_a_400(server: LiveServer, fields: Any, named: str, stream: bool) -> None:
    body = {
        "model": MODEL,
        "messages": HELLO,
        "stream": stream,
        "structured_outputs": fields,
        "max_tokens": 9,
    }
    reply = server.http.post("/v1/chat/completions", json=body)
    assert reply.status_code == 400, reply.text
    assert named in reply.json()["error"]["message"]
    assert reply.json()["error"]["param"].startswith("structured_outputs")


@pytest.mark.parametrize("field", ["ignore_eos", "min_tokens"])
def test_what_denies_the_end_is_refused(client: OpenAI, field: str) -> None:
    with pytest.raises(openai.BadRequestError, match=field):
        create(
            client, response_format={"type": "json_object"}, extra_body={field: 1 if "min" in field else True}
        )


# ---- tools ---------------------------------------------------------------------------------------

PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Paris", "Rome"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS, "strict": True}}
TIME = {"type": "function", "function": {"name": "time", "description": "What time is it?"}}


def check_call(call: Any) -> None:
    arguments = json.loads(call.function.arguments)
    jsonschema.validate(arguments, PARAMETERS if call.function.name == "weather" else {"const": {}})


@pytest.mark.parametrize("model", [MODEL, "own"])
def test_a_required_call_is_made(client: OpenAI, model: str) -> None:
    seen = set()
    for seed in range(5):
        reply = create(
            client,
            model=model,
            tools=[WEATHER, TIME],
            tool_choice="required",
            parallel_tool_calls=False,
            seed=seed,
        )
        (choice,) = reply.choices
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
        (call,) = choice.message.tool_calls
        check_call(call)
        seen.add(call.function.name)
    assert seen <= {"weather", "time"}


@pytest.mark.parametrize("model", [MODEL, "own"])
def test_the_named_function_is_called(client: OpenAI, model: str) -> None:
    named = {"type": "function", "function": {"name": "time"}}
    reply = create(client, model=model, tools=[WEATHER, TIME], tool_choice=named)
    assert [call.function.name for call in reply.choices[0].message.tool_calls] == ["time"]


@pytest.mark.parametrize("model", [MODEL, "own"])
def test_streamed_calls_are_those_of_the_whole_answer(client: OpenAI, model: str) -> None:
    fields = {
        "model": model,
        "tools": [WEATHER, TIME],
        "tool_choice": "required",
        "seed": 3,
        "max_tokens": 500,
    }
    whole = create(client, **fields)
    chunks = list(create(client, **fields, stream=True))
    calls: list[dict[str, str]] = []
    for delta in (chunk.choices[0].delta for chunk in chunks):
        for piece in delta.tool_calls or []:
            if piece.index == len(calls):
                assert piece.id
                assert piece.type == "function"
                calls.append({"name": piece.function.name, "arguments": ""})
            else:
                assert (piece.id, piece.function.name) == (None, None)
            calls[piece.index]["arguments"] += piece.function.arguments
    assert calls == [
        {"name": call.function.name, "arguments": call.function.arguments}
        for call in whole.choices[0].message.tool_calls
    ]
    assert (chunks[0].choices[0].delta.role, chunks[0].choices[0].delta.content) == ("assistant", None)
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def test_the_clients_own_stream_helper_understands_calls(client: OpenAI) -> None:
    tools: Any = [openai.pydantic_function_tool(Car, name="car")]
    with client.chat.completions.stream(
        model=MODEL,
        messages=HELLO,
        tools=tools,
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=400,
    ) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    (call,) = final.choices[0].message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, Car)


def test_auto_holds_strict_functions_alone(client: OpenAI) -> None:
    """Free words come out as they are; a call, when there is one, is right."""
    for seed in range(6):
        reply = create(client, tools=[WEATHER], seed=seed, max_tokens=60, temperature=1.3)
        message = reply.choices[0].message
        assert "<tool_call>" not in (message.content or "")
        for call in message.tool_calls or []:
            if reply.choices[0].finish_reason == "tool_calls":
                check_call(call)


@pytest.mark.parametrize("model", [MODEL, "own"])
def test_results_go_back_into_the_conversation(client: OpenAI, model: str) -> None:
    """With the base's template, and with one that knows no tools: both see calls and results."""
    named = {"type": "function", "function": {"name": "weather"}}
    first = create(client, model=model, tools=[WEATHER], tool_choice=named, seed=1)
    answer = first.choices[0].message
    result = {"role": "tool", "tool_call_id": answer.tool_calls[0].id, "content": "sunny"}
    second = create(client, model=model, tools=[WEATHER], messages=[*HELLO, answer, result], max_tokens=5)
    without = create(client, model=model, messages=[*HELLO, answer, result], max_tokens=5)
    assert second.usage.prompt_tokens > without.usage.prompt_tokens > first.usage.completion_tokens


def test_tool_choice_none_leaves_tools_out(client: OpenAI) -> None:
    plain = create(client, max_tokens=8, temperature=0)
    none = create(client, max_tokens=8, temperature=0, tools=[WEATHER], tool_choice="none")
    assert none.usage.prompt_tokens == plain.usage.prompt_tokens
    assert none.choices[0].message == plain.choices[0].message
