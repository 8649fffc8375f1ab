"""/v1/completions with the official client, over a real socket."""

from __future__ import annotations

from typing import Any

import pytest
from tests.server.conftest import BASE, MakeServer, Server

from veneer.server.state import ServerConfig

# The toy model repeats its prompt once.
PROMPT = "one two three"


def complete(server: Server, **fields: Any) -> dict[str, Any]:
    reply = server.post("/v1/completions", {"model": BASE, "temperature": 0, "prompt": PROMPT} | fields)
    assert reply.status_code == 200, reply.text
    return dict(reply.json())


def texts(answer: dict[str, Any]) -> list[str]:
    return [choice["text"] for choice in answer["choices"]]


def test_an_answer_has_openais_shape(server: Server) -> None:
    answer = server.openai.completions.create(model=BASE, prompt=PROMPT, temperature=0)
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    assert answer.choices[0].text == PROMPT
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].logprobs is None
    assert answer.usage is not None
    assert answer.usage.completion_tokens == answer.usage.prompt_tokens + 1


def test_a_stream_carries_the_same_text(server: Server) -> None:
    stream = server.openai.completions.create(
        model=BASE, prompt=PROMPT, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == PROMPT
    assert len(chunks) > 2
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert all(chunk.usage is None for chunk in chunks)
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == last.usage.prompt_tokens + 1


def test_a_prompt_comes_as_text_or_tokens_one_or_many(server: Server) -> None:
    one, two = (
        [*server.state.texts.base.tokenizer.encode(text, add_special_tokens=False)]
        for text in ("one", " two")
    )
    assert texts(complete(server, prompt="one")) == ["one"]
    assert texts(complete(server, prompt=["one", " two"])) == ["one", " two"]
    assert texts(complete(server, prompt=one)) == ["one"]
    assert texts(complete(server, prompt=[one, two])) == ["one", " two"]
    answer = complete(server, prompt=[one, two], n=2)
    assert texts(answer) == ["one", "one", " two", " two"]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["usage"]["prompt_tokens"] == len(one) + len(two)  # once, whatever n is
    assert [m["prompt"] for m in server.received("Generate")][-4:] == [one, one, two, two]


def test_the_same_seed_serves_every_prompt(server: Server) -> None:
    prompt = "abcdefghijklmnopqrstuvwxyz"
    answer = complete(server, prompt=[prompt, prompt], n=2, seed=3, temperature=1)
    first, second, third, fourth = texts(answer)
    assert (first, second) == (third, fourth)
    assert first != second


def test_the_default_length_is_16_tokens(server: Server) -> None:
    answer = complete(server, prompt="abcdefghijklmnopqrstuvwxyz")
    assert answer["usage"]["completion_tokens"] == 16
    assert answer["choices"][0]["finish_reason"] == "length"
    almost_full = complete(server, prompt=[5] * 250, ignore_eos=True)
    assert almost_full["usage"]["completion_tokens"] == 6


@pytest.mark.parametrize("stream", [False, True])
def test_echo_begins_with_the_prompt(server: Server, stream: bool) -> None:
    for prompt in ("one", server.state.texts.base.tokenizer.encode("one", add_special_tokens=False)):
        fields: dict[str, Any] = {"model": BASE, "prompt": prompt, "echo": True, "temperature": 0, "n": 2}
        if stream:
            got = ["", ""]
            for chunk in server.openai.completions.create(stream=True, **fields):
                got[chunk.choices[0].index] += chunk.choices[0].text
        else:
            got = [choice.text for choice in server.openai.completions.create(**fields).choices]
        assert got == ["oneone", "oneone"]


def test_no_tokens_may_be_asked_for(server: Server) -> None:
    answer = complete(server, max_tokens=0, echo=True)
    assert texts(answer) == [PROMPT]
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 0
    assert server.received("Generate") == []


def test_logprobs_have_the_form_of_completions(server: Server) -> None:
    answer = server.openai.completions.create(model=BASE, prompt=PROMPT, temperature=0, logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert "".join(logprobs.tokens or []) == PROMPT
    assert logprobs.token_logprobs == [-0.5] * len(logprobs.tokens or [])
    offsets = logprobs.text_offset or []
    for token, offset in zip(logprobs.tokens or [], offsets, strict=True):
        assert PROMPT[offset:].startswith(token)
    for token, top in zip(logprobs.tokens or [], logprobs.top_logprobs or [], strict=True):
        assert top[token] == -0.5
        assert len(top) == 2
    chosen_only = complete(server, logprobs=0)["choices"][0]["logprobs"]
    assert [list(top) for top in chosen_only["top_logprobs"]] == [[token] for token in chosen_only["tokens"]]


def test_stop_ends_one_prompt_and_not_the_other(server: Server) -> None:
    answer = complete(server, prompt=["one two", "three four"], stop=" two")
    assert texts(answer) == ["one", "three four"]
    assert [choice["stop_reason"] for choice in answer["choices"]] == [" two", None]


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"prompt": None}, "prompt", None),
        ({"prompt": ""}, "prompt", None),
        ({"prompt": []}, "prompt", None),
        ({"prompt": [[]]}, "prompt", None),
        ({"prompt": [1, "a"]}, "prompt", None),
        ({"prompt": [1, -2]}, "prompt", None),
        ({"prompt": [True]}, "prompt", None),
        ({"prompt": [2**70]}, "prompt", None),
        ({"prompt": {"a": 1}}, "prompt", None),
        ({"prompt": [5, 512]}, "prompt", None),
        ({"prompt": [5] * 256}, "prompt", "context_length_exceeded"),
        ({"max_tokens": 256}, "prompt", "context_length_exceeded"),
        ({"logprobs": 6}, "logprobs", None),
        ({"logprobs": True}, "logprobs", None),
        ({"echo": True, "logprobs": 1}, "logprobs", "unsupported_parameter"),
        ({"best_of": 2}, "best_of", "unsupported_parameter"),
        ({"suffix": "x"}, "suffix", "unsupported_parameter"),
        ({"messages": []}, "messages", None),
        ({"prompt": ["x"] * 9, "n": 128}, "n", None),
    ],
)
def test_bad_values_are_refused_by_name(
    server: Server, fields: dict[str, Any], param: str, code: str | None
) -> None:
    reply = server.post("/v1/completions", {"model": BASE, "prompt": PROMPT} | fields)
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert error["param"] == param
    assert code is None or error["code"] == code


def test_long_prompts_are_tokenized_off_the_loop(make_server: MakeServer) -> None:
    server = make_server(config=ServerConfig(max_body_bytes=1 << 20)).until_ready()
    reply = server.post("/v1/completions", {"model": BASE, "prompt": "the quick brown fox " * 20_000})
    assert reply.json()["error"]["code"] == "context_length_exceeded"
    assert server.state.in_flight.total() == 0


def test_unknown_routes_and_methods_have_openais_shape(server: Server) -> None:
    missing = server.post("/v1/embeddings", {})
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")
    wrong = server.http.get("/v1/completions")
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (405, "method_not_allowed")
    assert wrong.headers["allow"] == "POST"
