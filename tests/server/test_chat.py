"""/v1/chat/completions and /v1/models with the official client, over a real socket."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from typing import Any

import httpx
import openai
import pytest
from tests.server.conftest import BASE, MakeServer, Server

from veneer.server.state import ServerConfig

HELLO: list[Any] = [{"role": "user", "content": "hello world"}]
# The toy model repeats its prompt; special tokens do not show.
ANSWER = "user\nhello world\nassistant\n"


def body(**fields: Any) -> dict[str, Any]:
    return {"model": BASE, "messages": HELLO, "temperature": 0} | fields


def chat(server: Server, **fields: Any) -> dict[str, Any]:
    reply = server.post("/v1/chat/completions", body(**fields))
    assert reply.status_code == 200, reply.text
    return dict(reply.json())


def test_an_answer_has_openais_shape(server: Server) -> None:
    raw = server.openai.chat.completions.with_raw_response.create(
        model=BASE, messages=HELLO, temperature=0, service_tier="auto"
    )
    answer = raw.parse()
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == BASE
    assert answer.system_fingerprint is not None
    assert answer.system_fingerprint.startswith("fp_")
    assert answer.service_tier == "default"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == ANSWER
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == answer.usage.prompt_tokens + 1  # the prompt again, and the end
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    details = answer.usage.prompt_tokens_details
    assert details is not None
    assert details.cached_tokens == answer.usage.prompt_tokens // 2
    assert "x-veneer-adapter" not in raw.headers


def test_a_stream_carries_the_same_text_in_small_pieces(server: Server) -> None:
    stream = server.openai.chat.completions.create(
        model=BASE, messages=HELLO, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ANSWER
    assert len(chunks) > 5
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["stop"]
    assert all(chunk.usage is None for chunk in chunks)
    assert {chunk.id for chunk in [*chunks, last]} == {last.id}
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == last.usage.prompt_tokens + 1


def test_a_stream_ends_with_done(server: Server) -> None:
    reply = server.post("/v1/chat/completions", body(stream=True))
    assert reply.headers["content-type"].startswith("text/event-stream")
    events = reply.text.strip().split("\n\n")
    assert events[-1] == "data: [DONE]"
    assert all("usage" not in json.loads(event.removeprefix("data: ")) for event in events[:-1])


def test_n_choices_follow_from_one_seed(server: Server) -> None:
    def texts(**fields: Any) -> list[str]:
        answer = chat(server, temperature=1, seed=7, **fields)
        return [choice["message"]["content"] for choice in answer["choices"]]

    three = texts(n=3)
    assert texts(n=3) == three
    assert len(set(three)) == 3
    assert texts(n=1) == three[:1]  # choice 0 has the request's own seed
    streamed = ["", "", ""]
    for chunk in server.openai.chat.completions.create(
        model=BASE, messages=HELLO, temperature=1, seed=7, n=3, stream=True
    ):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == three


def test_requests_without_a_seed_differ(server: Server) -> None:
    for _ in range(3):
        chat(server, temperature=1, n=2)
    seeds = [message["sampling"]["seed"] for message in server.received("Generate")]
    assert len(set(seeds)) == 6


def test_logprobs_belong_to_the_text(server: Server) -> None:
    answer = server.openai.chat.completions.create(
        model=BASE, messages=HELLO, temperature=0, logprobs=True, top_logprobs=3
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    shown = [entry for entry in logprobs.content if not entry.token.startswith("<|")]
    assert b"".join(bytes(entry.bytes or []) for entry in shown).decode() == ANSWER
    assert all(len(entry.top_logprobs) == 3 for entry in shown)
    assert all(entry.logprob == entry.top_logprobs[0].logprob == -0.5 for entry in shown)
    assert answer.usage is not None
    assert len(logprobs.content) == answer.usage.completion_tokens - 1  # the end token is no content


def test_prompt_logprobs_stand_beside_the_choices(server: Server) -> None:
    answer = chat(server, temperature=0, n=2, prompt_logprobs=0)
    prompt = server.received("Generate")[-1]["prompt"]
    first, *others = answer["prompt_logprobs"]
    assert first is None
    for at, (token, found) in enumerate(zip(prompt[1:], others, strict=True), 1):
        text = server.state.texts.base.tokenizer.token_bytes(token).decode()
        assert found == {str(token): {"logprob": -0.25 * at, "rank": 2, "decoded_token": text}}


def test_streamed_logprobs_arrive_with_their_text(server: Server) -> None:
    tokens = ""
    for chunk in server.openai.chat.completions.create(
        model=BASE, messages=HELLO, temperature=0, logprobs=True, stream=True, stop=["world"]
    ):
        choice = chunk.choices[0]
        if choice.logprobs and choice.logprobs.content:
            assert all(entry.top_logprobs == [] for entry in choice.logprobs.content)
            tokens += "".join(e.token for e in choice.logprobs.content if not e.token.startswith("<|"))
    assert tokens.rstrip() == "user\nhello"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("stop", "extra", "text"),
    [
        ("lo wor", {}, "user\nhel"),
        (["zzz", "world", "hello w"], {}, "user\n"),
        ("lo wor", {"include_stop_str_in_output": True}, "user\nhello wor"),
        ("not there", {}, ANSWER),
    ],
)
def test_stop_strings_cut_tokens(
    server: Server, stop: Any, extra: dict[str, Any], text: str, stream: bool
) -> None:
    request = {"model": BASE, "messages": HELLO, "temperature": 0, "stop": stop, "extra_body": extra}
    if stream:
        chunks = list(server.openai.chat.completions.create(stream=True, **request))
        got = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        reason = chunks[-1].choices[0].finish_reason
    else:
        choice = server.openai.chat.completions.create(**request).choices[0]
        got, reason = choice.message.content or "", choice.finish_reason
    assert (got, reason) == (text, "stop")
    if text != ANSWER:
        (sequence,) = server.received("Generate")
        server.until(lambda: sequence["id"] in [message["id"] for message in server.received("Cancel")])


def test_stop_token_ids_end_without_their_text(server: Server) -> None:
    world = server.state.texts.base.tokenizer.encode(" world", add_special_tokens=False)
    answer = chat(server, stop_token_ids=[world[0]])
    assert answer["choices"][0]["message"]["content"] == "user\nhello"
    assert answer["choices"][0]["stop_reason"] == world[0]
    shown = chat(server, stop_token_ids=[world[0]], include_stop_str_in_output=True)
    assert shown["choices"][0]["message"]["content"].startswith("user\nhello ")


def test_usage_comes_with_each_chunk_when_wanted(server: Server) -> None:
    asked = body(max_tokens=3, stream=True, stream_options={"continuous_usage_stats": True})
    text = server.post("/v1/chat/completions", asked).text
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts)
    assert counts[-1] == 3
    assert all(event["choices"] for event in events)  # and no chunk for usage alone


def test_length_ends_the_answer(server: Server) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        answer = chat(server, **{name: 3})
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["usage"]["completion_tokens"] == 3
        (choice,) = chat(server, **{name: 0})["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("", "length")
    rest = chat(server, ignore_eos=True)
    assert rest["usage"]["total_tokens"] == 256  # the whole context


def test_sampling_reaches_the_engine(server: Server) -> None:
    sent = {
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "seed": 11,
        "min_tokens": 2,
        "stop_token_ids": [3, 4],
        "ignore_eos": True,
        "max_tokens": 9,
    }
    chat(server, **sent, logit_bias={"17": -100, "18": 2.5})
    sampling = server.received("Generate")[0]["sampling"]
    assert sampling.pop("logit_bias") == {"17": -100, "18": 2.5}
    assert sampling == sent
    chat(server, temperature=0.000001, top_p=0, top_k=-1, max_tokens=1)
    second = server.received("Generate")[1]["sampling"]
    assert second["temperature"] == 0
    assert second["top_k"] == 1  # top_p = 0 keeps the most likely token
    assert second.get("top_p", 1) == 1


def test_null_means_absent(server: Server) -> None:
    fields = ("n", "stop", "seed", "max_tokens", "logit_bias", "tools", "response_format", "stream_options")
    nothing: dict[str, Any] = dict.fromkeys(fields)
    assert chat(server, **nothing)["choices"][0]["message"]["content"] == ANSWER


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0].type",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}]},
            "messages[0].content[0].text",
        ),
        ({"messages": [{"role": "assistant", "tool_calls": [{"a": 1}]}]}, "messages[0].tool_calls"),
        ({"model": 5}, "model"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "0.5"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"512": 1}}, "logit_bias"),
        ({"logit_bias": {"²": 1}}, "logit_bias"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": 10**30}, "n"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
        ({"min_tokens": 9, "max_tokens": 4}, "min_tokens"),
        ({"seed": 2**63}, "seed"),
        ({"stop": ["a"] * 65}, "stop"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"stop": ""}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"stop_token_ids": [512]}, "stop_token_ids"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"timeout": 0}, "timeout"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"prompt": "x"}, "prompt"),
        ({"echo": True}, "echo"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
    ],
)
def test_bad_values_are_refused_by_name(server: Server, fields: dict[str, Any], param: str) -> None:
    reply = server.post("/v1/chat/completions", body(**fields))
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert param.split(".")[0].split("[")[0] in error["message"]
    assert server.received("Generate") == []


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b"5",
        b'{"model": NaN}',
        b'{"n": 1e999}',
        b'{"n": ' + b"9" * 5000 + b"}",
        b"\xff\xfe",
        b'{"model": "\xed\xa0\x80"}',
        b'{"model": "\\ud800 "}',
        b"[" * 100_000,
    ],
)
def test_what_is_no_json_is_refused(server: Server, raw: bytes) -> None:
    reply = server.post("/v1/chat/completions", raw)
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["code"] == "invalid_json"


def test_missing_fields_are_named(server: Server) -> None:
    for missing in ("model", "messages"):
        reply = server.post("/v1/chat/completions", {k: v for k, v in body().items() if k != missing})
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, missing)


def test_official_clients_raise_their_own_errors(server: Server) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        server.openai.chat.completions.create(model=BASE, messages=HELLO, n=500)
    assert refused.value.param == "n"
    with pytest.raises(openai.NotFoundError) as unknown:
        server.openai.chat.completions.create(model="gpt-9", messages=HELLO)
    assert unknown.value.code == "model_not_found"
    assert unknown.value.param == "model"


def test_a_conversation_that_fills_the_context_is_refused(server: Server) -> None:
    long: list[Any] = [{"role": "user", "content": "x" * 2000}]
    for fields in ({"messages": long}, {"max_tokens": 250}):
        reply = server.post("/v1/chat/completions", body(**fields))
        assert reply.status_code == 400
        assert reply.json()["error"]["code"] == "context_length_exceeded"
        assert "maximum context length is 256" in reply.json()["error"]["message"]


def test_a_body_over_the_limit_is_refused(make_server: MakeServer) -> None:
    server = make_server(config=ServerConfig(max_body_bytes=1000)).until_ready()
    reply = server.post("/v1/chat/completions", body(user="x" * 1000))
    assert (reply.status_code, reply.json()["error"]["code"]) == (413, "too_large")


def test_roles_that_the_template_does_not_know_are_mapped(server: Server) -> None:
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": "ok", "name": "helper"},
        {"role": "tool", "content": "42", "tool_call_id": "c1"},
    ]
    answer = chat(server, messages=messages, skip_special_tokens=False)
    assert answer["choices"][0]["message"]["content"].startswith(
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\none\ntwo<|im_end|>\n"
        "<|im_start|>assistant\nok<|im_end|>\n<|im_start|>user\n42<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_final_message_is_continued(server: Server) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "one two"}]
    answer = chat(server, messages=messages, continue_final_message=True)
    assert answer["choices"][0]["message"]["content"] == "user\nhello world\nassistant\none two"


def test_unknown_fields_are_counted(server: Server) -> None:
    answer = chat(server, colour="red", messages=[{"role": "user", "content": "hello world", "mood": 1}])
    assert answer["choices"][0]["message"]["content"] == ANSWER
    metrics = server.http.get("/metrics").text
    assert 'veneer_unknown_request_fields_total{field="colour"} 1.0' in metrics
    assert 'veneer_unknown_request_fields_total{field="messages.mood"} 1.0' in metrics


def test_a_request_chooses_its_adapter(server: Server) -> None:
    store = server.state.store
    store.alias("prod", "sql")
    digest = store.resolve("sql").digest
    for model in ("sql", "sql@1", "tiny:sql", "prod"):
        raw = server.openai.chat.completions.with_raw_response.create(
            model=model, messages=HELLO, temperature=0
        )
        assert raw.parse().model == model
        assert raw.headers["x-veneer-adapter"] == "sql@1"
        assert raw.headers["x-veneer-adapter-digest"] == digest
    assert {message["adapter"] for message in server.received("Generate")} == {digest}
    assert server.state.in_flight.total() == 0


@pytest.mark.parametrize("model", ["gpt-9", "sql@2", "sql@x", "tiny:nope", "../etc/passwd", "é", "a" * 300])
def test_unknown_models_are_not_found(server: Server, model: str) -> None:
    reply = server.post("/v1/chat/completions", body(model=model))
    assert reply.status_code == 404
    error = reply.json()["error"]
    assert (error["code"], error["param"], error["type"]) == (
        "model_not_found",
        "model",
        "invalid_request_error",
    )


def test_models_list_the_base_first(server: Server) -> None:
    server.state.store.alias("prod", "sql")
    models = list(server.openai.models.list())
    assert [model.id for model in models] == [BASE, "prod", "sql", "team/poet"]
    base, alias, sql, poet = (model.model_dump() for model in models)
    assert (base["parent"], base["root"], base["max_model_len"]) == (None, BASE, 256)
    assert (alias["parent"], alias["root"]) == (BASE, "sql@1")
    assert (sql["parent"], sql["root"]) == (BASE, "sql@1")
    assert poet["owned_by"] == "veneer"
    assert server.openai.models.retrieve("team/poet").id == "team/poet"
    assert server.openai.models.retrieve(BASE).id == BASE
    with pytest.raises(openai.NotFoundError):
        server.openai.models.retrieve("nope")


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_stops_its_sequences(make_server: MakeServer, stream: bool) -> None:
    server = make_server("--step-seconds", "0.05", adapters=("sql",)).until_ready()
    data = json.dumps(body(model="sql", n=2, ignore_eos=True, stream=stream)).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
    port = int(server.url.rsplit(":", 1)[1])
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(head.encode() + data)
        if stream:
            assert b"200 OK" in connection.recv(100)
        sequences = server.until(
            lambda: len(server.received("Generate")) == 2 and server.received("Generate")
        )
        assert isinstance(sequences, list)
    server.until(lambda: len(server.received("Cancel")) == 2)
    assert {m["id"] for m in server.received("Cancel")} == {m["id"] for m in sequences}
    server.until(lambda: server.state.in_flight.total() == 0)
    assert 'outcome="cancelled"' in server.http.get("/metrics").text


def test_a_killed_engine_is_reported_and_restarted(make_server: MakeServer) -> None:
    server = make_server("--step-seconds", "0.05").until_ready()
    chunks = server.openai.chat.completions.create(
        model=BASE, messages=HELLO, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(chunks))
    first = server.state.engine.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    with pytest.raises(openai.APIError, match="killed by signal 9"):  # the status was 200 already
        list(chunks)
    server.until(lambda: server.state.engine.pid not in (None, first))
    server.until_ready()
    assert chat(server)["choices"][0]["message"]["content"] == ANSWER
    assert server.state.engine.restarts == 1


def test_while_the_engine_starts_the_answer_is_503(make_server: MakeServer) -> None:
    server = make_server("--load-seconds", "30")
    reply = server.post("/v1/chat/completions", body())
    assert reply.status_code == 503
    assert reply.json()["error"]["code"] == "engine_unavailable"
    assert int(reply.headers["retry-after"]) >= 1


@pytest.mark.parametrize("how", ["timeout", "config"])
def test_a_deadline_is_kept(make_server: MakeServer, how: str) -> None:
    limit = 0.2 if how == "config" else None
    server = make_server("--step-seconds", "0.05", config=ServerConfig(request_timeout=limit)).until_ready()
    fields: dict[str, Any] = {"ignore_eos": True} | ({} if limit else {"timeout": 0.2})
    reply = server.post("/v1/chat/completions", body(**fields))
    assert (reply.status_code, reply.json()["error"]["code"]) == (504, "deadline_exceeded")
    events = server.post("/v1/chat/completions", body(stream=True, **fields)).text.strip().split("\n\n")
    assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == "deadline_exceeded"
    assert events[-1] == "data: [DONE]"


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue_is_429(make_server: MakeServer, stream: bool) -> None:
    server = make_server("--step-seconds", "0.05", engine={"max_queue": 2}).until_ready()
    url = f"{server.url}/v1/chat/completions"
    with httpx.stream("POST", url, json=body(n=2, ignore_eos=True, stream=True), timeout=30) as holding:
        assert holding.status_code == 200  # two have a place
        reply = server.post("/v1/chat/completions", body(stream=stream))
        assert reply.status_code == 429
        assert reply.json()["error"]["code"] == "queue_full"
        assert int(reply.headers["retry-after"]) >= 1
    server.until(lambda: len(server.received("Cancel")) == 2)  # those that had a place, now that it is gone


def test_a_request_that_gets_part_of_its_places_is_refused_whole(make_server: MakeServer) -> None:
    server = make_server("--step-seconds", "0.05", engine={"max_queue": 2}).until_ready()
    reply = server.post("/v1/chat/completions", body(n=3, ignore_eos=True))
    assert reply.status_code == 429
    server.until(lambda: len(server.received("Cancel")) == 2)


def test_a_slow_reader_delays_nobody(make_server: MakeServer) -> None:
    server = make_server().until_ready()
    data = json.dumps(body(n=64, ignore_eos=True, stream=True)).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
    port = int(server.url.rsplit(":", 1)[1])
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(head.encode() + data)
        server.until(lambda: len(server.received("Generate")) == 64)
        assert chat(server)["choices"][0]["message"]["content"] == ANSWER  # nothing was read above


def test_the_server_imports_no_torch_and_starts_fast() -> None:
    code = (  # processor time: a busy machine does not count; in what its libraries take: a slow one does not
        "import sys, time; start = time.process_time(); import fastapi, sqlalchemy.orm; "
        "libraries = time.process_time() - start; import veneer.server.app; "
        "print((time.process_time() - start) / libraries); "
        "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        for _ in range(2)  # the first may have to write bytecode
    ]
    ratio, modules = runs[-1].splitlines()
    assert modules == "[]"
    assert float(ratio) < 2.0


# ---- drafts --------------------------------------------------------------------------------------


def test_a_prediction_goes_to_the_engine_as_tokens(server: Server) -> None:
    """As what the answer may repeat; an explicit number of tokens goes before the usual one."""
    content = [{"type": "text", "text": "hello "}, {"type": "text", "text": "world"}]
    ways: list[dict[str, Any]] = [
        {"prediction": {"type": "content", "content": "hello world"}},
        {"prediction": {"type": "content", "content": content}, "prompt_lookup_num_tokens": 3},
        {"prompt_lookup_num_tokens": 5},
        {},
    ]
    usages = [chat(server, **fields)["usage"] for fields in ways]
    sent = [each["sampling"] for each in server.received("Generate")]
    assert [each.get("draft_tokens", 0) for each in sent] == [10, 3, 5, 0]
    assert sent[0]["prediction"] == sent[1]["prediction"] != []
    assert "prediction" not in sent[2]
    details = {
        "accepted_prediction_tokens": 0,
        "rejected_prediction_tokens": 0,
    }  # the toy model drafts nothing
    assert [usage.get("completion_tokens_details") for usage in usages] == [details] * 3 + [None]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prediction": "hello"}, "prediction"),
        ({"prediction": {"type": "content", "content": []}}, "prediction"),
        ({"prediction": {"type": "content", "content": [{"type": "image_url"}]}}, "prediction"),
        ({"prediction": {"type": "content", "content": "word " * 5000}}, "prediction"),
        ({"prompt_lookup_num_tokens": 65}, "prompt_lookup_num_tokens"),
        ({"prompt_lookup_num_tokens": -1}, "prompt_lookup_num_tokens"),
    ],
)
def test_a_prediction_that_cannot_be_used_is_refused(server: Server, fields: Any, param: str) -> None:
    reply = server.post("/v1/chat/completions", body(**fields))
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)
