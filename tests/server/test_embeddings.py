"""`/v1/embeddings`: forms of input and output, dimensions, adapters, refusals. Real ones are in test_pooling.py."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pytest
from tests.server.conftest import BASE, MakeServer, Server
from tests.server.fake_engine import CONTEXT, HIDDEN_SIZE, VOCAB_SIZE
from tests.server.responses import conforms

from veneer.server.state import ServerConfig

ROUTE = "/v1/embeddings"


def vector(tokens: list[int], *, adapter: bool = False, size: int = HIDDEN_SIZE) -> np.ndarray[Any, Any]:
    """What the toy engine's states become."""
    numbers = np.array([*tokens, *[1.0 + adapter] * HIDDEN_SIZE][:size])
    scaled: np.ndarray[Any, Any] = numbers / np.linalg.norm(numbers)
    return scaled


def ask(server: Server, **fields: Any) -> dict[str, Any]:
    reply = server.post(ROUTE, {"model": BASE, **fields})
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    return found


def tokens_of(server: Server, text: str) -> list[int]:
    found: list[int] = server.post("/tokenize", {"prompt": text}).json()["tokens"]
    return found


def test_every_form_of_input(server: Server) -> None:
    texts = ["the quick", "one two three"]
    ids = [tokens_of(server, text) for text in texts]
    for given, wanted in ((texts, ids), (ids, ids), (texts[0], ids[:1]), (ids[1], ids[1:])):
        conforms({"model": BASE, "input": given, "encoding_format": "float"}, "CreateEmbeddingRequest")
        found = ask(server, input=given)
        conforms(found, "CreateEmbeddingResponse")
        assert (found["object"], found["model"]) == ("list", BASE)
        count = sum(map(len, wanted))
        assert found["usage"] == {"prompt_tokens": count, "total_tokens": count}
        assert [(each["object"], each["index"]) for each in found["data"]] == [
            ("embedding", index) for index in range(len(wanted))
        ]
        for each, tokens in zip(found["data"], wanted, strict=True):
            np.testing.assert_allclose(each["embedding"], vector(tokens), atol=1e-6)


def test_base64_is_the_same_numbers(server: Server) -> None:
    asked = {"input": [[5, 6, 7], [8]]}
    floats, texts = ask(server, **asked), ask(server, **asked, encoding_format="base64")
    for number, text in zip(floats["data"], texts["data"], strict=True):
        found = np.frombuffer(base64.b64decode(text["embedding"]), "<f4")
        assert found.tolist() == np.float32(number["embedding"]).tolist()


def test_openais_client_reads_them(server: Server) -> None:
    """It asks for base64 unless told otherwise."""
    found = server.openai.embeddings.create(model="sql", input="the quick brown")
    wanted = vector(tokens_of(server, "the quick brown"), adapter=True)
    np.testing.assert_allclose(found.data[0].embedding, wanted, atol=1e-6)


def test_dimensions_cut_and_scale_again(server: Server) -> None:
    found = ask(server, input=[3, 4, 5], dimensions=2)["data"][0]["embedding"]
    np.testing.assert_allclose(found, [0.6, 0.8], atol=1e-6)


def test_the_last_token_alone(server: Server) -> None:
    found = ask(server, input=[3, 4], pooling="last")["data"][0]["embedding"]
    np.testing.assert_allclose(found, vector([]), atol=1e-6)
    (sent,) = server.received("Generate")
    assert (sent["sampling"]["pooling"], sent["sampling"]["max_tokens"]) == ("last", 0)


def test_the_adapter_is_named(server: Server) -> None:
    reply = server.post(ROUTE, {"model": "sql", "input": [3]})
    assert reply.headers["x-veneer-adapter"] == "sql@1"
    assert server.received("Generate")[0]["adapter"] == reply.headers["x-veneer-adapter-digest"]


def test_blends_have_embeddings(server: Server) -> None:
    both = [{"id": "sql", "weight": 0.5}, {"id": "team/poet"}]
    reply = server.post(ROUTE, {"model": BASE, "input": [3], "adapters": both})
    assert reply.status_code == 200, reply.text
    chat = {"model": BASE, "prompt": [3], "max_tokens": 1, "adapters": both}
    assert (
        reply.headers["x-veneer-adapter"] == server.post("/v1/completions", chat).headers["x-veneer-adapter"]
    )
    first, second = server.received("Generate")
    assert first["adapter"] == second["adapter"]


@pytest.mark.parametrize(
    ("fields", "param", "rule"),
    [
        ({"input": ""}, "input", "has no tokens"),
        ({"input": []}, "input", "must be text, a list of texts"),
        ({"input": [[]]}, "input", "must be text, a list of texts"),
        ({"input": {"a": 1}}, "input", "must be text, a list of texts"),
        ({"input": ["a", ""]}, "input[1]", "has no tokens"),
        ({"input": [VOCAB_SIZE]}, "input", f"no token {VOCAB_SIZE}"),
        ({"input": [[5] * CONTEXT, [5] * (CONTEXT + 1)]}, "input[1]", f"takes {CONTEXT}"),
        ({}, "input", "Field required"),
        ({"input": "a", "dimensions": HIDDEN_SIZE + 1}, "dimensions", f"have {HIDDEN_SIZE} numbers"),
        ({"input": "a", "dimensions": 0}, "dimensions", "greater than or equal to 1"),
        ({"input": "a", "pooling": "cls"}, "pooling", "'mean' or 'last'"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format", "'float' or 'base64'"),
        ({"input": "a", "truncate_prompt_tokens": 4}, "truncate_prompt_tokens", "shorten the prompt"),
        ({"input": "a", "task_id": 0}, "task_id", "the base has no tasks"),
    ],
)
def test_what_is_refused(server: Server, fields: dict[str, Any], param: str, rule: str) -> None:
    reply = server.post(ROUTE, {"model": BASE, **fields})
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (400, param)
    assert rule in error["message"]


def test_too_many_inputs(make_server: MakeServer) -> None:
    server = make_server(config=ServerConfig(max_sequences=2)).until_ready()
    reply = server.post(ROUTE, {"model": BASE, "input": ["a"] * 3})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "input")


def test_unknown_models(server: Server) -> None:
    reply = server.post(ROUTE, {"model": "nobody", "input": "a"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "model_not_found")
