"""`/openapi.json`: every route, with the body it reads, in a document whose references lead somewhere."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from tests.server.conftest import BASE, Server
from tests.server.test_auth import routes

# Changes without a body
BARE = ("/cancel", "/pause", "/resume", "/pin", "/unpin")


@pytest.fixture
def document(server: Server) -> dict[str, Any]:
    found: dict[str, Any] = server.http.get("/openapi.json").json()
    return found


def test_every_route_is_there_with_its_body(server: Server, document: dict[str, Any]) -> None:
    known = {(method, re.sub(r":path}", "}", path)) for method, path in routes(server)}
    told = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    own = {("GET", path) for path in ("/openapi.json", "/docs", "/redoc", "/docs/oauth2-redirect")}
    assert told == known - own
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            has_body = method in ("post", "put") and not path.endswith(BARE)
            assert ("requestBody" in operation) == has_body, (method, path)
            assert operation["responses"].keys() >= {"200", "default"}


def test_references_lead_somewhere(document: dict[str, Any]) -> None:
    references = set(re.findall(r'"\$ref": "#/components/schemas/([^"]+)"', json.dumps(document)))
    assert references
    assert references <= document["components"]["schemas"].keys()
    assert "$defs" not in json.dumps(document)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "one"}], "seed": None}),
        ("/v1/completions", {"prompt": [[5, 6]], "max_tokens": 1, "stop": ["a"]}),
        ("/v1/responses", {"input": [{"role": "user", "content": "one"}], "max_output_tokens": 1}),
        ("/v1/embeddings", {"input": ["one"], "dimensions": 2}),
    ],
)
def test_it_describes_what_is_taken_and_what_is_refused(
    server: Server, document: dict[str, Any], path: str, body: dict[str, Any]
) -> None:
    schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    validator = Draft202012Validator(schema | {"components": document["components"]})
    good = {"model": BASE, **body}
    assert validator.is_valid(good)
    assert server.post(path, good).status_code == 200
    for bad in (body, good | {"model": 3}, good | {"task_id": -1}):
        assert not validator.is_valid(bad)
        assert server.post(path, bad).status_code == 400


def test_errors_are_as_it_says(server: Server, document: dict[str, Any]) -> None:
    validator = Draft202012Validator(document["components"]["schemas"]["Error"])
    for reply in (
        server.post("/v1/completions", {}),
        server.post("/v1/load_lora_adapter", {"lora_name": "a"}),
        server.http.get("/v1/responses/none"),
        server.http.get("/nowhere"),
    ):
        assert reply.status_code >= 400
        assert validator.is_valid(reply.json()), reply.text


def test_a_wrong_method_is_told_all_the_right_ones(server: Server) -> None:
    reply = server.http.patch("/v1/responses/any")
    assert (reply.status_code, reply.headers["allow"]) == (405, "DELETE, GET")
    assert "it takes DELETE, GET" in reply.json()["error"]["message"]
