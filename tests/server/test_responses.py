"""`/v1/responses`: answers, events, items, refusals. What is stored is in test_response_store.py."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from tests.server.conftest import BASE, MakeServer, Server
from tests.server.fake_engine import CONTEXT
from tests.server.responses import ROUTE, conforms, create, post, prompt_of, refusal, stream, text_of

USER = {"role": "user", "content": "one"}


def test_an_answer_is_that_of_the_chat(server: Server) -> None:
    body: dict[str, Any] = {"instructions": "seven", "temperature": 0, "max_output_tokens": 20}
    conforms({"model": BASE, "input": "one two", **body}, "CreateResponse")
    found = create(server, **body, metadata={"team": "a"}, user="me", top_p=0.5)
    messages = [{"role": "system", "content": "seven"}, {"role": "user", "content": "one two"}]
    chat = server.post(
        "/v1/chat/completions", {"model": BASE, "messages": messages, "temperature": 0, "max_tokens": 20}
    ).json()
    assert text_of(found) == chat["choices"][0]["message"]["content"]
    usage = chat["usage"]
    assert found["usage"]["input_tokens"] == usage["prompt_tokens"]
    assert found["usage"]["output_tokens"] == usage["completion_tokens"] == 20
    assert (found["status"], found["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    same = ("instructions", "temperature", "max_output_tokens", "metadata", "user", "top_p", "model")
    assert [found[name] for name in same] == ["seven", 0, 20, {"team": "a"}, "me", 0.5, BASE]


def test_the_tokens_of_a_prompt_are_counted(server: Server) -> None:
    first = create(server, temperature=0, max_output_tokens=4)
    count = server.openai.responses.input_tokens.count
    told: list[dict[str, Any]] = [{"instructions": "seven"}, {"previous_response_id": first["id"]}]
    for fields in told:
        asked: Any = {"model": BASE, "input": [USER], **fields}
        found = count(**asked).input_tokens
        assert found == create(server, **asked)["usage"]["input_tokens"] > 0
    reply = server.post(f"{ROUTE}/input_tokens", {"model": "nobody", "input": "one"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "model_not_found")


def test_a_whole_answer_is_completed(server: Server) -> None:
    found = create(server)
    assert (found["status"], found["error"], found["incomplete_details"]) == ("completed", None, None)
    assert found["completed_at"] >= found["created_at"]
    assert found["output"][0]["status"] == "completed"


def test_events_come_in_openais_order(server: Server) -> None:
    *events, last = stream(server, temperature=0)
    kinds = [event["type"] for event in events]
    deltas = kinds.count("response.output_text.delta")
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * deltas,
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
    ]
    assert last["type"] == "response.completed"
    whole = create(server, temperature=0)
    text = "".join(event["delta"] for event in events if event["type"].endswith("text.delta"))
    done = {event["type"]: event for event in events}
    assert text == done["response.output_text.done"]["text"] == text_of(last["response"]) == text_of(whole)
    item = last["response"]["output"][0]
    assert done["response.output_item.done"]["item"] == item
    assert {event["item_id"] for event in events if "item_id" in event} == {item["id"]}
    assert (events[0]["response"]["status"], events[0]["response"]["output"]) == ("in_progress", [])
    assert last["response"]["usage"] == whole["usage"]


def test_an_incomplete_stream_says_so(server: Server) -> None:
    last = stream(server, max_output_tokens=3)[-1]
    assert last["type"] == "response.incomplete"
    assert last["response"]["output"][0]["status"] == "incomplete"


def test_an_answer_of_no_token_is_a_message(make_server: MakeServer) -> None:
    server = make_server("--repeats", "0").until_ready()
    assert text_of(create(server)) == ""
    kinds = [event["type"] for event in stream(server)]
    assert kinds[2:4] == ["response.output_item.added", "response.content_part.added"]
    assert "response.output_text.delta" not in kinds


def test_log_probabilities_come_when_they_are_included(server: Server) -> None:
    asked = {"include": ["message.output_text.logprobs"], "top_logprobs": 2, "max_output_tokens": 4}
    events = stream(server, **asked)
    (item,) = events[-1]["response"]["output"]
    logprobs = item["content"][0]["logprobs"]
    assert [len(each["top_logprobs"]) for each in logprobs] == [2] * 4
    told = [each for event in events if event["type"].endswith("text.delta") for each in event["logprobs"]]
    assert told == logprobs
    assert create(server, max_output_tokens=4)["output"][0]["content"][0]["logprobs"] == []


def test_openais_client_reads_whole_and_streamed(server: Server) -> None:
    client = server.openai.responses
    whole = client.create(model="sql", input="one two", temperature=0)
    assert whole.output_text
    with client.stream(model="sql", input="one two", temperature=0) as events:
        kinds = [event.type for event in events]
        final = events.get_final_response()
    assert final.output_text == whole.output_text
    assert kinds[-1] == "response.completed"


def test_the_adapter_is_named(server: Server) -> None:
    assert post(server, model="sql").headers["x-veneer-adapter"] == "sql@1"
    reply = post(server, model="sql", stream=True)
    assert reply.headers["x-veneer-adapter"] == "sql@1"
    assert reply.headers["x-veneer-adapter-digest"] == server.received("Generate")[-1]["adapter"]


def test_blends_answer(server: Server) -> None:
    both = [{"id": "sql", "weight": 0.5}, {"id": "team/poet"}]
    reply = post(server, adapters=both)
    assert reply.status_code == 200, reply.text
    assert "sql" in reply.headers["x-veneer-adapter"]


def test_what_a_chat_honours_goes_through(server: Server) -> None:
    create(server, top_k=7, seed=5, min_p=0.25, stop_token_ids=[9], max_output_tokens=3)
    (sent,) = server.received("Generate")
    wanted = {"top_k": 7, "seed": 5, "min_p": 0.25, "stop_token_ids": [9], "max_tokens": 3}
    assert {name: sent["sampling"][name] for name in wanted} == wanted


def test_items_become_the_messages_of_a_chat(server: Server) -> None:
    items = [
        {"role": "developer", "content": "seven"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "one"}]},
        {
            "id": "msg_1",
            "type": "message",
            "status": "completed",
            "role": "assistant",
            "content": [
                {"type": "output_text", "text": "two", "annotations": [], "logprobs": []},
                {"type": "refusal", "refusal": "three"},
            ],
        },
        {"role": "user", "content": "four"},
    ]
    conforms({"model": BASE, "input": items}, "CreateResponse")
    create(server, input=items, max_output_tokens=1)
    parts = [("system", "seven"), ("user", "one"), ("assistant", "two\nthree"), ("user", "four")]
    rendered = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in parts)
    assert prompt_of(server) == f"{rendered}<|im_start|>assistant\n"


def test_calls_and_their_outputs_become_messages(tmp_path: Path, model_folder: Path) -> None:
    template = (
        "{% for m in messages %}[{{ m.role }}|{{ m.content or '' }}|{% for c in m.tool_calls or [] %}"
        "{{ c.id }} {{ c.function.name }} {{ c.function.arguments.x }};{% endfor %}]{% endfor %}"
    )
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    (folder / "chat_template.jinja").write_text(template + "{# tool #}")
    make = MakeServer(tmp_path, folder)
    server = make().until_ready()
    call = {"type": "function_call", "name": "f"}
    items = [
        USER,
        {"role": "assistant", "content": "two"},
        {**call, "call_id": "c1", "arguments": '{"x": 1}'},
        {**call, "call_id": "c2", "arguments": '{"x": 2}'},
        {"type": "function_call_output", "call_id": "c1", "output": "five"},
        {
            "type": "function_call_output",
            "call_id": "c2",
            "output": [{"type": "input_text", "text": "six"}],
        },
        {**call, "call_id": "c3", "arguments": '{"x": 3}'},
    ]
    conforms({"model": BASE, "input": items}, "CreateResponse")
    create(server, input=items, max_output_tokens=1)
    wanted = "[user|one|][assistant|two|c1 f 1;c2 f 2;][tool|five|][tool|six|][assistant||c3 f 3;]"
    assert prompt_of(server) == wanted
    make.stop()


def test_truncation_drops_the_oldest_turns(server: Server) -> None:
    turn = [{"role": "user", "content": "one " * 20}, {"role": "assistant", "content": "two " * 20}]
    items = [{"role": "system", "content": "seven"}, *turn * 12, {"role": "user", "content": "four"}]
    asked: dict[str, Any] = {"input": items, "max_output_tokens": 8}
    assert refusal(post(server, **asked))[:2] == (400, "input")
    found = create(server, **asked, truncation="auto")
    assert found["truncation"] == "auto"
    prompt = prompt_of(server)
    assert prompt.startswith("<|im_start|>system\nseven<|im_end|>\n<|im_start|>user\none")
    assert prompt.endswith("<|im_start|>user\nfour<|im_end|>\n<|im_start|>assistant\n")
    kept = found["usage"]["input_tokens"]
    one_more = kept + len(
        server.post("/tokenize", {"messages": turn, "add_generation_prompt": False}).json()["tokens"]
    )
    assert kept + 8 <= CONTEXT < one_more + 8
    only = [{"role": "user", "content": "one " * CONTEXT}]
    assert refusal(post(server, input=only, truncation="auto"))[:2] == (400, "input")


@pytest.mark.parametrize(
    ("fields", "param", "rule"),
    [
        ({"input": []}, "input", "must be text or a list"),
        ({"input": 3}, "input", "must be text or a list"),
        ({"input": ["one"]}, "input[0]", "must be an item"),
        ({"input": [{}]}, "input[0].type", "must be one of message"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input[0].type", "not supported"),
        ({"input": [USER, {"role": "tool", "content": "a"}]}, "input[1].role", "must be one of user"),
        ({"input": [{"role": "user", "content": []}]}, "input[0].content", "not empty"),
        ({"input": [{"role": "user"}]}, "input[0].content", "must be text"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input[0].content[0].type",
            "text only",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_text"}]}]},
            "input[0].content[0].text",
            "text",
        ),
        ({"input": [{**USER, "id": 3}]}, "input[0].id", "must be text"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input[0].call_id", "must be text"),
        ({"input": [{"type": "function_call_output", "output": "a"}]}, "input[0].call_id", "id of the call"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].id", "of a stored response"),
        ({"background": True}, "background", "while the client waits"),
        ({"conversation": "conv_1"}, "conversation", "previous_response_id"),
        ({"prompt": {"id": "p"}}, "prompt", "stores no prompts"),
        ({"reasoning": {"effort": "high"}}, "reasoning", "chat_template_kwargs"),
        ({"context_management": [{"type": "compaction"}]}, "context_management", "truncation"),
        ({"max_tool_calls": 3}, "max_tool_calls", "runs none"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "use functions"),
        ({"tool_choice": "required"}, "tool_choice", "there are no tools"),
        ({"include": ["everything"]}, "include[0]", ""),
        ({"top_logprobs": 2}, "top_logprobs", "message.output_text.logprobs"),
        ({"truncation": "last"}, "truncation", "'auto' or 'disabled'"),
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        ({"max_output_tokens": 0}, "max_output_tokens", "greater than or equal to 1"),
        ({"max_output_tokens": CONTEXT}, "input", "maximum context length"),
        ({"metadata": {"a": 1}}, "metadata.a", "valid string"),
        ({"metadata": {"a": "b" * 513}}, "metadata.a", "at most 512"),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata", "at most 16"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type", ""),
        ({"stream_options": {"include_obfuscation": False}}, "stream_options", "only with stream"),
        ({"messages": [USER]}, "messages", "/v1/chat/completions"),
        ({"max_completion_tokens": 4}, "max_completion_tokens", "/v1/chat/completions"),
        ({"n": 2}, "n", "one answer"),
        ({"max_tokens": 2}, "max_tokens", "max_output_tokens"),
        ({"task_id": 1}, "task_id", "the base has no tasks"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "no response 'resp_1'"),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else None,
)
def test_what_is_refused(server: Server, fields: dict[str, Any], param: str, rule: str) -> None:
    status, found, message = refusal(post(server, **fields))
    assert (status, found) == (400, param), message
    assert rule in message


def test_what_asks_for_nothing_is_taken(server: Server) -> None:
    harmless: dict[str, Any] = {
        "background": False,
        "conversation": None,
        "reasoning": {"effort": None, "summary": None},
        "include": ["reasoning.encrypted_content"],
        "tools": [],
        "tool_choice": "auto",
        "text": {"format": {"type": "text"}},
        "service_tier": "auto",
        "prompt_cache_key": "k",
        "max_output_tokens": 16,
    }
    conforms({"model": BASE, "input": "a", **harmless}, "CreateResponse")
    found = create(server, **harmless)
    assert (found["service_tier"], found["prompt_cache_key"]) == ("default", "k")


def test_a_stream_that_breaks_ends_with_a_failed_response(make_server: MakeServer) -> None:
    server = make_server("--step-seconds", "0.05").until_ready()
    with server.http.stream(
        "POST", ROUTE, json={"model": BASE, "input": "one", "stream": True, "ignore_eos": True}
    ) as reply:
        lines = reply.iter_lines()
        while "output_text.delta" not in next(lines):
            pass
        server.call(_end(server))
        events = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
    last = events[-1]
    assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")
    assert last["response"]["error"]["code"] == "server_error"
    conforms(last, "ResponseStreamEvent")
    assert server.http.get(f"{ROUTE}/{last['response']['id']}").status_code == 404


async def _end(server: Server) -> None:
    pid = server.state.engine.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
