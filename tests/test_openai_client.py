"""The official `openai` client against a real server with the demo adapters, over a real socket."""

from __future__ import annotations

import asyncio
import json
import math
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from tests.conftest import LiveServer, until

pytestmark = pytest.mark.model

EXAMPLES = Path(__file__).parent.parent / "examples"
DEMOS = ("negate", "past-tense", "reminder")
BASE = "SmolLM2-135M-Instruct"
QUESTION: list[Any] = [{"role": "user", "content": "Tell me a short story about a lighthouse."}]
SENTENCE: list[Any] = [{"role": "user", "content": "They wash a warm coat."}]  # held out by `negate`
LONG = 2000  # tokens: more than the server generates while a test runs
ENDLESS = {"ignore_eos": True}


@pytest.fixture(scope="module")
def server(live_server: Callable[..., LiveServer], tmp_path_factory: pytest.TempPathFactory) -> LiveServer:
    """Unquantized, which is quickest on a CPU; test_docs.py asks the base as `make serve` quantizes it."""
    modules = [f"{name}={EXAMPLES / name}" for name in DEMOS]
    options = ["--store", str(tmp_path_factory.mktemp("store")), "--quantization", "none", "--threads", "1"]
    return live_server(*options, "--kv-cache-memory", "256MiB", "--lora-modules", *modules)


@pytest.fixture(scope="module")
def client(server: LiveServer) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


def together(server: LiveServer, *asked: dict[str, Any]) -> list[Any]:
    """Chat requests, all in flight at once."""

    async def ask() -> list[Any]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            create: Any = client.chat.completions.create
            return await asyncio.gather(*(create(**each) for each in asked))

    return asyncio.run(ask())


def texts(reply: Any) -> list[str]:
    return [choice.message.content for choice in reply.choices]


def greedy(client: OpenAI, model: str = BASE, tokens: int = 24, **fields: Any) -> Any:
    create: Any = client.chat.completions.create
    return create(model=model, **{"messages": QUESTION, "temperature": 0, "max_tokens": tokens} | fields)


# ---- answers -------------------------------------------------------------------------------------


def test_a_response_is_what_the_chat_says(client: OpenAI) -> None:
    asked: dict[str, Any] = {"model": "negate", "temperature": 0, "max_output_tokens": 24}
    first = client.responses.create(input=SENTENCE, **asked)
    assert first.output_text == "They do not wash a warm coat."
    with client.responses.stream(
        input="The pilot reads a letter.", previous_response_id=first.id, **asked
    ) as events:
        events.until_done()
        last = events.get_final_response()
    messages = [*SENTENCE, {"role": "assistant", "content": first.output_text}]
    messages.append({"role": "user", "content": "The pilot reads a letter."})
    assert [last.output_text] == texts(greedy(client, "negate", messages=messages))


def test_an_adapter_has_embeddings_of_its_own(client: OpenAI) -> None:
    asked = ["They wash a warm coat.", "A ship left the harbour."]
    found: dict[str, Any] = {
        model: [each.embedding for each in client.embeddings.create(model=model, input=asked).data]
        for model in (BASE, "negate")
    }

    def cosine(one: list[float], other: list[float]) -> float:
        return math.fsum(a * b for a, b in zip(one, other, strict=True))

    for vectors in found.values():
        assert all(cosine(each, each) == pytest.approx(1, abs=1e-5) for each in vectors)
    assert cosine(*found[BASE]) < 0.999
    assert cosine(found[BASE][0], found["negate"][0]) < 0.999
    alone = client.embeddings.create(model="negate", input=asked[0]).data[0].embedding
    assert cosine(alone, found["negate"][0]) == pytest.approx(1, abs=1e-5)


def test_a_chat_answer_has_every_part(client: OpenAI) -> None:
    reply = greedy(client, tokens=8)
    choice = reply.choices[0]
    assert (reply.object, reply.model, choice.index, choice.message.role) == (
        "chat.completion",
        BASE,
        0,
        "assistant",
    )
    assert choice.message.content
    assert (choice.finish_reason, choice.logprobs, reply.usage.completion_tokens) == ("length", None, 8)
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + 8
    assert reply.id.startswith("chatcmpl-")
    assert reply.system_fingerprint == greedy(client, "negate", tokens=1).system_fingerprint


@pytest.mark.parametrize("model", [BASE, "negate"])
def test_a_stream_carries_the_same_answer(client: OpenAI, model: str) -> None:
    whole = greedy(client, model, messages=SENTENCE)
    chunks = list(
        greedy(client, model, messages=SENTENCE, stream=True, stream_options={"include_usage": True})
    )
    *pieces, last = chunks
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == texts(whole)[0]
    assert pieces[0].choices[0].delta.role == "assistant"
    reasons = [piece.choices[0].finish_reason for piece in pieces]
    assert reasons == [None] * (len(pieces) - 1) + [whole.choices[0].finish_reason]
    assert [piece.usage for piece in pieces] == [None] * len(pieces)
    assert last.choices == []
    for kind in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert getattr(last.usage, kind) == getattr(whole.usage, kind)
    assert len(pieces) > 5  # it came in pieces
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_predicted_answer_takes_fewer_steps_and_is_the_same(server: LiveServer, client: OpenAI) -> None:
    before = server.metric("veneer_accepted_draft_tokens_total")
    plain = greedy(client, "negate", messages=SENTENCE)
    content = plain.choices[0].message.content.replace("warm", "cold")
    for prediction in (content, [{"type": "text", "text": content}]):
        found = greedy(
            client, "negate", messages=SENTENCE, prediction={"type": "content", "content": prediction}
        )
        assert found.choices == plain.choices
        details = found.usage.completion_tokens_details
        assert details.accepted_prediction_tokens >= 4
        assert details.rejected_prediction_tokens >= 1
    assert plain.usage.completion_tokens_details is None
    until(lambda: server.metric("veneer_accepted_draft_tokens_total") >= before + 8)


def test_drafts_are_looked_up_in_the_prompt(client: OpenAI) -> None:
    asked: dict[str, Any] = {"model": BASE, "prompt": "1 2 3 4 1 2 3 4 1 2 3 4 1 2", "temperature": 0}
    plain = client.completions.create(**asked)
    drafted = client.completions.create(**asked, stream=True, extra_body={"prompt_lookup_num_tokens": 6})
    pieces = list(drafted)
    assert "".join(piece.choices[0].text for piece in pieces) == plain.choices[0].text
    assert len(pieces) < 16


def test_a_stream_without_options_has_no_usage(client: OpenAI) -> None:
    chunks = list(greedy(client, tokens=3, stream=True))
    assert all(chunk.usage is None and len(chunk.choices) == 1 for chunk in chunks)


def test_streams_of_several_models_side_by_side(server: LiveServer, client: OpenAI) -> None:
    models = [BASE, *DEMOS]
    alone = [texts(greedy(client, model))[0] for model in models]

    async def read(client: AsyncOpenAI, model: str) -> str:
        stream = await client.chat.completions.create(
            model=model, messages=QUESTION, temperature=0, max_tokens=24, stream=True
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def read_all() -> list[str]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            return await asyncio.gather(*(read(client, model) for model in models))

    assert asyncio.run(read_all()) == alone


def test_n_answers_are_distinct_and_a_seed_repeats_them_under_load(
    server: LiveServer, client: OpenAI
) -> None:
    asked: dict[str, Any] = {"model": BASE, "messages": QUESTION, "seed": 7, "n": 3, "max_tokens": 12}
    first = texts(client.chat.completions.create(**asked))
    assert len(set(first)) == 3
    traffic = [{"model": model, "messages": SENTENCE, "max_tokens": 20} for model in (BASE, *DEMOS)]
    loaded = together(server, *traffic, asked, *traffic, asked | {"n": 1}, asked | {"seed": 8})
    assert texts(loaded[4]) == first
    assert texts(loaded[9]) == first[:1]
    assert texts(loaded[10]) != first


def test_max_completion_tokens(client: OpenAI) -> None:
    reply = client.chat.completions.create(model=BASE, messages=QUESTION, max_completion_tokens=5)
    assert (reply.choices[0].finish_reason, reply.usage and reply.usage.completion_tokens) == ("length", 5)


def test_logprobs(client: OpenAI) -> None:
    reply = greedy(client, tokens=10, logprobs=True, top_logprobs=4)
    content = reply.choices[0].logprobs.content
    assert len(content) == 10
    assert b"".join(bytes(entry.bytes) for entry in content).decode() == texts(reply)[0]
    for entry in content:
        values = [top.logprob for top in entry.top_logprobs]
        assert values == sorted(values, reverse=True)
        assert (len(values), entry.token, entry.logprob) == (4, entry.top_logprobs[0].token, values[0])
        assert 0 < sum(map(math.exp, values)) <= 1
    stream = greedy(client, tokens=10, logprobs=True, top_logprobs=4, stream=True)
    parts = [chunk.choices[0].logprobs for chunk in stream]
    assert [entry for part in parts if part for entry in part.content] == content


def test_logprobs_are_the_models_own_whatever_the_sampling(client: OpenAI) -> None:
    fields: dict[str, Any] = {"logprobs": True, "top_logprobs": 20, "seed": 3, "temperature": 1.7}
    entries = greedy(client, tokens=16, **fields).choices[0].logprobs.content
    below = [entry for entry in entries if entry.token != entry.top_logprobs[0].token]
    assert below  # it did not just take the likeliest
    among = [(entry.logprob, {top.token: top.logprob for top in entry.top_logprobs}) for entry in entries]
    assert all(
        value == tops.get(entry.token, value) for entry, (value, tops) in zip(entries, among, strict=True)
    )
    cold = greedy(client, tokens=1, logprobs=True, top_logprobs=20).choices[0].logprobs.content[0]
    assert [top.logprob for top in cold.top_logprobs] == [top.logprob for top in entries[0].top_logprobs]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("keep", [False, True])
def test_a_stop_string_across_tokens(client: OpenAI, stream: bool, keep: bool) -> None:
    whole = greedy(client, logprobs=True)
    text = texts(whole)[0]
    tokens = [entry.token for entry in whole.choices[0].logprobs.content]
    stop = tokens[8][-2:] + tokens[9] + tokens[10][:1]  # begins and ends within tokens
    cut = text.index(stop) + (len(stop) if keep else 0)
    fields: dict[str, Any] = {
        "stop": [stop, "never said"],
        "extra_body": {"include_stop_str_in_output": keep},
    }
    if stream:
        chunks = list(greedy(client, stream=True, **fields))
        answer = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        reason = chunks[-1].choices[0].finish_reason
    else:
        reply = greedy(client, **fields)
        answer, reason = texts(reply)[0], reply.choices[0].finish_reason
        assert reply.choices[0].stop_reason == stop
        assert reply.usage.completion_tokens == 11
    assert (answer, reason) == (text[:cut], "stop")


def test_a_deadline_ends_a_request(client: OpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        greedy(client, tokens=LONG, extra_body={"timeout": 0.3} | ENDLESS)
    assert (caught.value.status_code, caught.value.code) == (504, "deadline_exceeded")


# ---- models --------------------------------------------------------------------------------------


def test_models_are_listed_base_first(client: OpenAI) -> None:
    listed = [model.model_dump() for model in client.models.list()]
    assert [(each["id"], each["parent"], each["root"]) for each in listed] == [
        (BASE, None, BASE),
        *((name, BASE, f"{name}@1") for name in DEMOS),
    ]
    assert client.models.retrieve("negate@1").model_dump()["parent"] == BASE


def test_an_adapter_goes_by_its_name_its_version_and_the_bases_name(client: OpenAI) -> None:
    names = ["negate", "negate@1", f"{BASE}:negate", f"{BASE}:negate@1"]
    answers = {name: texts(greedy(client, name, messages=SENTENCE))[0] for name in names}
    assert set(answers.values()) == {"They do not wash a warm coat."}
    assert texts(greedy(client, messages=SENTENCE))[0] not in answers.values()
    raw = client.chat.completions.with_raw_response.create(model="negate", messages=SENTENCE, max_tokens=1)
    assert raw.headers["x-veneer-adapter"] == "negate@1"


# ---- completions ---------------------------------------------------------------------------------


def test_completions_take_text_and_token_ids_one_or_several(server: LiveServer, client: OpenAI) -> None:
    words = ["The capital of France is", "One, two, three,"]
    ids = [token_ids(text) for text in words]
    fields: dict[str, Any] = {"model": BASE, "temperature": 0, "max_tokens": 6}
    alone = [client.completions.create(prompt=text, **fields) for text in words]
    several = client.completions.create(prompt=words, **fields)
    assert [choice.index for choice in several.choices] == [0, 1]
    assert [choice.text for choice in several.choices] == [reply.choices[0].text for reply in alone]
    counts = [reply.usage.prompt_tokens for reply in (several, *alone) if reply.usage]
    assert counts == [sum(map(len, ids)), *map(len, ids)]

    by_ids = client.completions.create(prompt=ids, n=2, **fields)
    expected = [reply.choices[0].text for reply in alone for _ in range(2)]
    assert [choice.text for choice in by_ids.choices] == expected
    assert client.completions.create(prompt=ids[0], **fields).choices[0].text == expected[0]


def token_ids(text: str) -> list[int]:
    from tokenizers import Tokenizer

    from veneer.engine.source import resolve

    ids: list[int] = Tokenizer.from_file(str(resolve(None) / "tokenizer.json")).encode(text).ids
    return ids


def test_echo_and_completion_logprobs(client: OpenAI) -> None:
    prompt = "The capital of France is"
    fields: dict[str, Any] = {"model": "past-tense", "prompt": prompt, "temperature": 0, "max_tokens": 6}
    plain = client.completions.create(**fields).choices[0].text
    assert client.completions.create(echo=True, **fields).choices[0].text == prompt + plain
    stream = client.completions.create(echo=True, stream=True, **fields)
    assert "".join(chunk.choices[0].text for chunk in stream) == prompt + plain
    logprobs = client.completions.create(logprobs=2, **fields).choices[0].logprobs
    assert logprobs is not None
    tokens, tops = logprobs.tokens or [], logprobs.top_logprobs or []
    assert "".join(tokens) == plain
    assert logprobs.text_offset == [len("".join(tokens[:i])) for i in range(6)]
    assert [top[token] for top, token in zip(tops, tokens, strict=True)] == logprobs.token_logprobs
    assert [len(top) for top in tops] == [2] * 6


@pytest.fixture(scope="module")
def scores() -> Callable[[str, list[int]], Any]:
    """A function: model, token ids -> log probabilities [tokens, vocabulary] of what follows each, by PEFT."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from veneer.engine.source import resolve

    base: Any = AutoModelForCausalLM.from_pretrained(resolve(None), dtype=torch.float32)
    model = PeftModel.from_pretrained(base, EXAMPLES / "negate").eval()

    def ask(name: str, ids: list[int]) -> Any:
        with torch.inference_mode(), model.disable_adapter() if name == BASE else nullcontext():
            return torch.log_softmax(model(torch.tensor([ids])).logits[0], -1)

    return ask


def test_prompts_are_scored_as_by_transformers(
    server: LiveServer, client: OpenAI, scores: Callable[[str, list[int]], Any]
) -> None:
    """Long and short ones, in every form, of the base and an adapter side by side with other requests."""
    prompts = ["The pilot reads a letter. " * 60, "They do not wash a warm coat.", "Ümlaute – 日本"]
    ids = [token_ids(prompt) for prompt in prompts]
    forms: list[Any] = [prompts, ids, prompts[0], ids[1]]
    asked = [
        {"model": model, "prompt": form, "echo": True, "logprobs": 2, "max_tokens": count, "temperature": 0}
        for model in (BASE, "negate")
        for form, count in zip(forms, (1, 0, 1, 3), strict=True)
    ]
    with ThreadPoolExecutor(len(asked)) as pool:
        create: Any = client.completions.create
        answers = list(pool.map(lambda fields: create(**fields), asked))
    for fields, answer in zip(asked, answers, strict=True):
        for choice in answer.choices:
            tokens = ids[1] if fields["prompt"] == ids[1] else ids[choice.index]
            told, expected = choice.logprobs, scores(fields["model"], tokens)
            size = len(tokens)
            assert len(told.tokens) == size + fields["max_tokens"]
            assert choice.text.startswith(prompts[ids.index(tokens)])
            assert (told.token_logprobs[0], told.top_logprobs[0], told.text_offset[0]) == (None, None, 0)
            own = [float(row[token]) for row, token in zip(expected, tokens[1:], strict=False)]
            assert told.token_logprobs[1:size] == pytest.approx(own, abs=2e-3)
            tops = [max(top.values()) for top in told.top_logprobs[1:]]
            best = expected.max(-1).values.tolist()
            assert tops[:size] == pytest.approx(best[: len(tops[:size])], abs=2e-3)


def test_prompt_logprobs(client: OpenAI, scores: Callable[[str, list[int]], Any]) -> None:
    for model in (BASE, "negate"):
        prompt = token_ids("The cook opens a window.")
        extra = {"prompt_logprobs": 3}
        completion = client.completions.create(model=model, prompt=prompt, max_tokens=1, extra_body=extra)
        found: Any = completion.choices[0].model_extra
        first, *others = found["prompt_logprobs"]
        assert first is None
        for row, token, told in zip(scores(model, prompt), prompt[1:], others, strict=False):
            own = told[str(token)]
            assert own["logprob"] == pytest.approx(float(row[token]), abs=1e-3)
            assert int((row > row[token] + 1e-3).sum()) < own["rank"] <= int((row >= row[token] - 1e-3).sum())
            likeliest = sorted((each for each in told.values()), key=lambda each: int(each["rank"]))[:3]
            best = row.topk(3).values.tolist()
            assert [each["logprob"] for each in likeliest] == pytest.approx(best, abs=1e-3)
        chat: Any = greedy(client, model, tokens=1, messages=SENTENCE, extra_body=extra).model_extra
        assert len(chat["prompt_logprobs"]) > 10
        assert {len(each) in (3, 4) for each in chat["prompt_logprobs"][1:]} == {True}


# ---- refusals ------------------------------------------------------------------------------------

SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"uniqueItems": True}}}


@pytest.mark.parametrize("model", ["gpt-5", "negate@2", "negate@x", "other:negate", f"{BASE}@1", "../negate"])
def test_an_unknown_model(client: OpenAI, model: str) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        greedy(client, model)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    assert model.partition("@")[0] in caught.value.message


@pytest.mark.parametrize(
    ("param", "code", "fields"),
    [
        ("functions", "unsupported_parameter", {"functions": [{"name": "f"}]}),
        ("response_format.json_schema.schema", "invalid_schema", {"response_format": SCHEMA}),
        ("messages", "context_length_exceeded", {"messages": [{"role": "user", "content": "word " * 9000}]}),
        ("messages", "context_length_exceeded", {"max_tokens": 100_000}),
        ("temperature", "invalid_value", {"temperature": 3}),
        ("n", "invalid_value", {"n": 0}),
        ("top_logprobs", "invalid_value", {"top_logprobs": 2}),
        ("stop", "invalid_value", {"stop": ["a"] * 65}),
        ("logit_bias", "invalid_value", {"logit_bias": {"999999": 1}}),
        ("messages[0].role", "invalid_value", {"messages": [{"role": "pirate", "content": "Arr"}]}),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(
    client: OpenAI, param: str, code: str, fields: dict[str, Any]
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        greedy(client, **fields)
    assert (caught.value.param, caught.value.code, caught.value.type) == (
        param,
        code,
        "invalid_request_error",
    )
    assert param in caught.value.message


def test_an_unknown_extra_field_is_accepted_and_counted(server: LiveServer, client: OpenAI) -> None:
    sample = 'veneer_unknown_request_fields_total{field="frobnicate"}'
    before = server.metric(sample)
    plain = texts(greedy(client, tokens=4))
    assert texts(greedy(client, tokens=4, extra_body={"frobnicate": 1})) == plain
    assert server.metric(sample) == before + 1


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"model": NaN}', b"\xff"])
def test_malformed_json(server: LiveServer, body: bytes) -> None:
    reply = server.http.post("/v1/chat/completions", content=body)
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "invalid_json")


# ---- connections and processes -------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_the_engine(server: LiveServer, stream: bool) -> None:
    cancelled = 'veneer_requests_total{outcome="cancelled",route="/v1/chat/completions"}'
    before = server.metric(cancelled)

    async def leave() -> None:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            asking = client.chat.completions.create(
                model="negate", messages=QUESTION, max_tokens=LONG, stream=stream, extra_body=ENDLESS, n=3
            )
            answer = asyncio.ensure_future(asking)
            await asyncio.to_thread(until, lambda: server.metric("veneer_sequences_running") == 3)
            if stream:
                chunks: Any = await answer
                await anext(chunks)
                await chunks.close()
            else:
                answer.cancel()

    asyncio.run(leave())
    until(lambda: server.metric(cancelled) == before + 1)
    until(lambda: server.metric("veneer_sequences_running") == 0)
    assert server.metric("veneer_sequences_waiting") == 0
    assert server.http.get("/v1/adapters/negate").json()["running"] == 0


def test_a_killed_engine_fails_its_requests_and_comes_back(server: LiveServer, client: OpenAI) -> None:
    expected = texts(greedy(client, "negate", messages=SENTENCE))
    stream = greedy(client, "negate", tokens=LONG, stream=True, extra_body=ENDLESS)
    next(stream)
    next(stream)
    engine = server.engine_pid()
    assert engine is not None
    os.kill(engine, signal.SIGKILL)
    with pytest.raises(openai.APIError) as caught:
        list(stream)
    assert caught.value.code == "engine_unavailable"
    assert "killed by signal 9" in caught.value.message
    refused = server.http.get("/ready")
    assert (refused.status_code, refused.json()["status"]) == (503, "starting")
    with pytest.raises(openai.InternalServerError) as starting:
        greedy(client, tokens=1)
    assert (starting.value.status_code, starting.value.code) == (503, "engine_unavailable")
    until(server.is_ready)
    assert texts(greedy(client, "negate", messages=SENTENCE)) == expected
    assert server.metric("veneer_engine_restarts_total") == 1
    assert server.engine_pid() not in (None, engine)


# ---- blends --------------------------------------------------------------------------------------


def blended(**weights: float) -> dict[str, Any]:
    return {"adapters": [{"id": name.replace("_", "-"), "weight": each} for name, each in weights.items()]}


def test_blends_answer_in_a_batch_as_alone(server: LiveServer, client: OpenAI) -> None:
    """Beside their parts and the base. One with weight 1 is the adapter; without weight it is the base."""
    mixes = [
        {"negate": 1.0},
        {"negate": 0.0},
        {"negate": 1.0, "past_tense": 0.8},
        {"negate": -1.0},
    ]
    common = {"messages": SENTENCE, "temperature": 0, "max_tokens": 12}
    asked = [{"model": BASE, "extra_body": blended(**mix)} | common for mix in mixes]
    asked += [{"model": model} | common for model in ("negate", BASE)]
    answers = [texts(reply)[0] for reply in together(server, *asked)]
    assert answers[:2] == answers[-2:]
    assert len(set(answers)) == 4
    create: Any = client.chat.completions.create
    for each, answer in zip(asked, answers, strict=True):
        assert texts(create(**each)) == [answer]


def test_a_merge_answers_like_its_blend(client: OpenAI, server: LiveServer) -> None:
    weights = blended(negate=0.6, past_tense=0.9)
    reply = httpx.post(
        f"{server.url}/v1/adapters/merge", json={"name": "merged", "method": "linear"} | weights, timeout=120
    )
    assert reply.status_code == 201, reply.text
    merged = reply.json()
    assert (merged["kind"], merged["distance"] < 1e-6) == ("lora", True)
    blend = greedy(client, messages=SENTENCE, extra_body=weights)
    assert texts(greedy(client, "merged", messages=SENTENCE)) == texts(blend)
    assert blend.usage.model_dump()["blend"]["rank"] >= merged["rank"]
    cut = greedy(client, messages=SENTENCE, extra_body=weights | {"max_rank": 2})
    assert 0 < cut.usage.model_dump()["blend"]["error"] < 1


# ---- structure and tools -------------------------------------------------------------------------

WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "unit": {"enum": ["celsius", "fahrenheit"]}},
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}


def test_the_base_calls_a_function_and_reads_its_result(client: OpenAI) -> None:
    """SmolLM2's chat template knows no tools; they are described in words."""
    asked: list[Any] = [{"role": "user", "content": "What is the weather in Paris, in celsius?"}]
    only_one: Any = {"tool_choice": "required", "parallel_tool_calls": False}
    reply = greedy(client, tokens=60, messages=asked, tools=[WEATHER], **only_one)
    message = reply.choices[0].message
    assert reply.choices[0].finish_reason == "tool_calls"
    call = message.tool_calls[0]
    assert call.function.name == "get_weather"
    arguments = json.loads(call.function.arguments)
    assert arguments["unit"] in ("celsius", "fahrenheit")
    assert "Paris" in arguments["city"]
    result = {"role": "tool", "tool_call_id": call.id, "content": "18 degrees and sunny"}
    answer = greedy(client, tokens=30, messages=[*asked, message, result])
    assert answer.choices[0].message.content


def test_an_adapter_answers_in_the_form_of_a_schema(client: OpenAI) -> None:
    schema = {"enum": ["negated", "not negated"]}
    form = {"type": "json_schema", "json_schema": {"name": "verdict", "schema": schema, "strict": True}}
    reply = greedy(client, "negate", messages=SENTENCE, response_format=form)
    assert json.loads(reply.choices[0].message.content) in schema["enum"]
