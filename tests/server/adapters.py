"""What the tests of the adapter routes share: uploads, and looks at what is left."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
from tests.server.conftest import Server

WEIGHTS = b"weights"


def files(weights: bytes = WEIGHTS, **config: Any) -> list[tuple[str, tuple[str, bytes]]]:
    return [
        ("files", ("adapter_config.json", json.dumps(config).encode())),
        ("files", ("adapter_model.safetensors", weights)),
    ]


def upload(server: Server, name: str, weights: bytes = WEIGHTS, **config: Any) -> httpx.Response:
    return server.http.post("/v1/adapters", data={"name": name}, files=files(weights, **config))


def made(server: Server, name: str, weights: bytes = WEIGHTS, **config: Any) -> dict[str, Any]:
    reply = upload(server, name, weights, **config)
    assert reply.status_code == 201, reply.text
    return dict(reply.json())


def complete(server: Server, model: str, **fields: Any) -> httpx.Response:
    return server.post("/v1/completions", {"model": model, "prompt": "one two", "max_tokens": 2} | fields)


def error(reply: httpx.Response, status: int, code: str) -> str:
    """Check the shape of an error; returns its message."""
    assert reply.status_code == status, reply.text
    (body,) = reply.json().values()
    assert set(body) == {"message", "type", "param", "code"}
    assert body["code"] == code, body
    return str(body["message"])


def left_behind(server: Server) -> list[str]:
    """Everything in the store but what the listed adapters need."""
    store = server.state.store
    blobs = {path.name for path in (store.root / "blobs").iterdir()}
    known = {each.digest for listed in store.list() for each in store.versions(listed.name)}
    return [*sorted(blobs - known), *(path.name for path in (store.root / "staging").iterdir())]


@contextmanager
def streaming(server: Server, model: str) -> Iterator[Iterator[str]]:
    """A request that runs until its connection is closed."""
    body = {"model": model, "prompt": "one two", "max_tokens": 200, "stream": True, "ignore_eos": True}
    with server.http.stream("POST", "/v1/completions", json=body) as reply:
        assert reply.status_code == 200
        lines = (line for line in reply.iter_lines() if line.startswith("data: "))
        next(lines)
        yield lines
