"""/v1/completions with the official client, over a real socket."""

from __future__ import annotations

from typing import Any

import pytest
from tests.server.conftest import BASE, MakeServer, Server

from veneer.engine.messages import TokenLogprobs
from veneer.server.generation import Logprob
from veneer.server.logprobs import completion_logprobs
from veneer.server.state import ServerConfig
from veneer.server.text import Entry

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
    assert chunks  # tokens that came together are one
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
    assert [m["sampling"]["max_tokens"] for m in server.received("Generate")] == [0]
    full = complete(server, prompt=[5] * 256, max_tokens=0)
    assert full["usage"]["prompt_tokens"] == 256


def test_logprobs_have_the_form_of_completions(server: Server) -> None:
    answer = server.openai.completions.create(model=BASE, prompt=PROMPT, temperature=0, logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert "".join(logprobs.tokens or []) == PROMPT + "<|end|>"  # what ended it has its place, too
    assert answer.usage is not None
    assert len(logprobs.tokens or []) == answer.usage.completion_tokens
    assert logprobs.token_logprobs == [-0.5] * len(logprobs.tokens or [])
    offsets = logprobs.text_offset or []
    for token, offset in zip(logprobs.tokens or [], offsets, strict=True):
        assert (PROMPT + "<|end|>")[offset:].startswith(token)
    for token, top in zip(logprobs.tokens or [], logprobs.top_logprobs or [], strict=True):
        assert top[token] == -0.5
        assert len(top) == 2
    chosen_only = complete(server, logprobs=0)["choices"][0]["logprobs"]
    assert [list(top) for top in chosen_only["top_logprobs"]] == [[token] for token in chosen_only["tokens"]]


def check_echo(logprobs: dict[str, Any], tokens: list[str], text: str, count: int) -> None:
    """The part of log probabilities that is of the prompt, by the toy model's scores."""
    size = len(tokens)
    assert logprobs["tokens"][:size] == tokens
    assert logprobs["token_logprobs"][:size] == [None, *(-0.25 * at for at in range(1, size))]
    for token, offset in zip(tokens, logprobs["text_offset"][:size], strict=True):
        assert text[offset:].startswith(token)
    tops = logprobs["top_logprobs"][:size]
    assert tops[0] is None
    for at, (token, top) in enumerate(zip(tokens[1:], tops[1:], strict=True), 1):
        likeliest = {"<|im_start|>": -0.125 * at} if count else {}
        assert top == {token: -0.25 * at} | likeliest


@pytest.mark.parametrize("count", [0, 1, 2])
@pytest.mark.parametrize("max_tokens", [0, 1, 9])
def test_echo_with_logprobs_begins_with_those_of_the_prompt(
    server: Server, max_tokens: int, count: int
) -> None:
    tokenizer = server.state.texts.base.tokenizer
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in (PROMPT, " four five", "o")]
    tokens = [[tokenizer.decode([token]) for token in each] for each in ids]
    asked: dict[str, Any] = {"echo": True, "logprobs": count, "max_tokens": max_tokens, "ignore_eos": True}
    given: list[Any] = [PROMPT, [PROMPT, " four five", "o"], ids[0], ids]
    for prompt in given:
        answer = complete(server, prompt=prompt, **asked)
        for choice, these, parts in zip(answer["choices"], ids, tokens, strict=False):
            logprobs, text = choice["logprobs"], choice["text"]
            assert {len(column) for column in logprobs.values()} == {len(these) + max_tokens}
            assert "".join(logprobs["tokens"]) == text
            starts = [len("".join(logprobs["tokens"][:at])) for at in range(len(logprobs["tokens"]))]
            assert logprobs["text_offset"] == starts
            check_echo(logprobs, parts, text, count)
            assert logprobs["token_logprobs"][len(these) :] == [-0.5] * max_tokens
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert server.received("Generate")[-1]["sampling"]["prompt_logprobs"] == count


def test_a_stream_with_echo_and_logprobs_carries_the_same(server: Server) -> None:
    fields: dict[str, Any] = {"echo": True, "logprobs": 2, "prompt": ["one two", " four five six"], "n": 2}
    whole = complete(server, **fields)
    text, columns = [""] * 4, [dict[str, list[Any]]() for _ in range(4)]
    for chunk in server.openai.completions.create(model=BASE, temperature=0, stream=True, **fields):
        (choice,) = chunk.choices
        text[choice.index] += choice.text
        assert choice.logprobs is not None
        for name, values in choice.logprobs.to_dict().items():
            columns[choice.index].setdefault(name, []).extend(values)
    assert text == texts(whole)
    assert columns == [choice["logprobs"] for choice in whole["choices"]]


def test_the_token_that_ends_an_answer_is_counted(server: Server) -> None:
    """lm-evaluation-harness takes all but the last entry for the prompt, whatever was generated."""
    prompt = [300, 301, 0, 302]  # the toy model's first token is the prompt's, which the request calls an end
    choice = complete(server, prompt=prompt, max_tokens=1, echo=True, logprobs=1, stop_token_ids=[300])[
        "choices"
    ][0]
    assert choice["finish_reason"] == "stop"
    assert len(choice["logprobs"]["tokens"]) == len(prompt) + 1
    assert choice["logprobs"]["text_offset"][-1] == len(choice["text"])


def test_special_tokens_of_a_prompt_stand_where_its_text_has_them(server: Server) -> None:
    text = "<|im_start|>one<|im_end|> two"
    fields: dict[str, Any] = {"echo": True, "logprobs": 0, "max_tokens": 0}
    logprobs = complete(server, prompt=text, **fields)["choices"][0]["logprobs"]
    assert "".join(logprobs["tokens"]) == text
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        assert text[offset:].startswith(token)
    ids = server.state.texts.base.tokenizer.encode(text, add_special_tokens=False)
    hidden = complete(server, prompt=ids, **fields)["choices"][0]
    assert hidden["text"] == "one two"
    assert hidden["logprobs"]["tokens"] == logprobs["tokens"]
    assert hidden["logprobs"]["text_offset"][:2] == [0, 0]
    shown = complete(server, prompt=ids, skip_special_tokens=False, **fields)["choices"][0]
    assert (shown["text"], shown["logprobs"]["text_offset"]) == (text, logprobs["text_offset"])


def test_tokens_that_read_alike_keep_the_likelier(server: Server) -> None:
    """Whether the prompt's token is the likeliest is told by the largest of `top_logprobs`."""
    half = server.state.texts.base.tokenizer.encode("é", add_special_tokens=False)
    tokens = [Logprob(Entry(half[1], 0, 0), TokenLogprobs(-3.0, [half[0], 5], [-0.5, -4.0], 7))]
    found = completion_logprobs(server.state.texts.base.tokenizer, tokens, 1)
    assert found["token_logprobs"] == [-3.0]
    assert found["top_logprobs"] == [{"\ufffd": -0.5}]


def test_prompt_logprobs_have_vllms_form(server: Server) -> None:
    tokenizer = server.state.texts.base.tokenizer
    ids = tokenizer.encode(PROMPT, add_special_tokens=False)
    answer = complete(server, prompt=[ids, [5]], prompt_logprobs=1, logprobs=3, echo=True, max_tokens=1)
    first, second = (choice["prompt_logprobs"] for choice in answer["choices"])
    assert second == [None]
    assert first[0] is None
    for at, (token, found) in enumerate(zip(ids[1:], first[1:], strict=True), 1):
        assert found == {
            str(token): {"logprob": -0.25 * at, "rank": 2, "decoded_token": tokenizer.decode([token])},
            "1": {"logprob": -0.125 * at, "rank": 1, "decoded_token": "<|im_start|>"},
        }
    assert server.received("Generate")[-1]["sampling"]["prompt_logprobs"] == 3  # the echo's
    assert len(answer["choices"][0]["logprobs"]["tokens"]) == len(ids) + 1
    assert len(answer["choices"][0]["logprobs"]["top_logprobs"][1]) == 3
    assert "prompt_logprobs" not in complete(server)["choices"][0]


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
        ({"prompt_logprobs": 21}, "prompt_logprobs", None),
        ({"prompt_logprobs": -1}, "prompt_logprobs", None),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", None),
        ({"prompt": [5] * 257, "max_tokens": 0}, "prompt", "context_length_exceeded"),
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
    missing = server.post("/v1/images/generations", {})
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")
    wrong = server.http.get("/v1/completions")
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (405, "method_not_allowed")
    assert wrong.headers["allow"] == "POST"
