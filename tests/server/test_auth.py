"""Keys: the rule by itself, and over every route of the real application on a real socket."""

from __future__ import annotations

import hmac
import logging
from collections.abc import Iterator, Sequence

import httpx
import pytest
from starlette.routing import BaseRoute, Route
from tests.server.conftest import MakeServer, Server

from veneer.errors import Forbidden, Unauthorized
from veneer.server.auth import GENERATES, OPEN, KeyCheck
from veneer.server.state import ServerConfig

KEY, OTHER_KEY, ADMIN = "sk-plain-1", "sk-plain-2", "sk-admin"
CHANGES = {
    ("POST", "/v1/adapters"),
    ("POST", "/v1/adapters/merge"),
    ("POST", "/v1/adapters/merge/{merge_id}/cancel"),
    ("DELETE", "/v1/adapters/{name:path}"),
    ("POST", "/v1/adapters/{name:path}/pin"),
    ("POST", "/v1/adapters/{name:path}/unpin"),
    ("POST", "/v1/adapters/{name:path}/rollback"),
    ("PUT", "/v1/aliases/{alias:path}"),
    ("DELETE", "/v1/aliases/{alias:path}"),
    ("POST", "/v1/load_lora_adapter"),
    ("POST", "/v1/unload_lora_adapter"),
    ("POST", "/load_lora_adapter"),
    ("POST", "/unload_lora_adapter"),
    ("DELETE", "/v1/models/{model:path}"),
    ("POST", "/v1/files"),
    ("DELETE", "/v1/files/{file_id}"),
    ("POST", "/v1/fine_tuning/jobs"),
    ("POST", "/v1/fine_tuning/jobs/{job_id}/cancel"),
    ("POST", "/v1/fine_tuning/jobs/{job_id}/pause"),
    ("POST", "/v1/fine_tuning/jobs/{job_id}/resume"),
}


def outcome(check: KeyCheck, method: str, path: str, key: str | None) -> int:
    try:
        check.check(method, path, None if key is None else f"Bearer {key}")
    except (Unauthorized, Forbidden) as error:
        return error.status
    return 200


@pytest.mark.parametrize(
    ("api_keys", "admin_key", "expected"),
    [
        # expected: statuses of (read, generate, change), for no key, a wrong key, a plain key, the admin key
        ((), None, "200 200 200 | 200 200 200 | 200 200 200 | 200 200 200"),
        ((KEY,), None, "401 401 401 | 401 401 401 | 200 200 200 | 401 401 401"),
        ((KEY,), ADMIN, "401 401 401 | 401 401 401 | 200 200 403 | 200 200 200"),
        ((), ADMIN, "200 200 401 | 200 200 401 | 200 200 401 | 200 200 200"),
    ],
)
def test_the_matrix(api_keys: tuple[str, ...], admin_key: str | None, expected: str) -> None:
    check = KeyCheck(api_keys, admin_key)
    calls = [("GET", "/v1/models"), ("POST", "/v1/completions"), ("DELETE", "/v1/adapters/x")]
    found = [
        " ".join(str(outcome(check, method, path, key)) for method, path in calls)
        for key in (None, "wrong", KEY, ADMIN)
    ]
    assert " | ".join(found) == expected


def test_every_configured_key_works() -> None:
    check = KeyCheck((KEY, OTHER_KEY, "schlüssel"))
    # A header's bytes reach the server as latin-1.
    for key in (KEY, OTHER_KEY, "schlüssel".encode().decode("latin-1")):
        assert outcome(check, "GET", "/v1/models", key) == 200


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Bearer ", KEY, f"Basic {KEY}", f"Bearer {KEY}x", "Bearer ü☃"]
)
def test_other_headers_are_refused(header: str) -> None:
    with pytest.raises(Unauthorized):
        KeyCheck((KEY,)).check("GET", "/v1/models", header)


def test_the_scheme_may_be_written_in_any_case() -> None:
    KeyCheck((KEY,)).check("GET", "/v1/models", f"bearer {KEY}")


def test_all_keys_are_compared_as_bytes_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bytes] = []
    compare = hmac.compare_digest

    def recording(one: bytes, two: bytes) -> bool:
        compared.append(two)
        return compare(one, two)

    monkeypatch.setattr(hmac, "compare_digest", recording)
    KeyCheck((KEY, OTHER_KEY)).check("GET", "/v1/models", f"Bearer {KEY}")
    assert compared == [KEY.encode(), OTHER_KEY.encode()]  # it does not stop at the hit


# ---- over the application -------------------------------------------------------------------------


@pytest.fixture
def guarded(make_server: MakeServer) -> Server:
    config = ServerConfig(api_keys=(KEY, OTHER_KEY), admin_key=ADMIN)
    return make_server(config=config, adapters=("sql",)).until_ready()


def routes(server: Server) -> list[tuple[str, str]]:
    """(method, path template) of every route, those of FastAPI itself included."""
    found = []
    for route in flat(server.app.routes):
        assert isinstance(route, Route), f"{route}: neither mounts nor web sockets are covered by the keys"
        found += [(method, route.path) for method in sorted(route.methods or ()) if method != "HEAD"]
    assert len(found) > 15
    return found


def flat(known: Sequence[BaseRoute]) -> Iterator[BaseRoute]:
    """Routes, with those of included routers (which FastAPI keeps as they are)."""
    for route in known:
        included = getattr(route, "original_router", None)
        yield from [route] if included is None else flat(included.routes)


def call(server: Server, method: str, path: str, key: str | None) -> httpx.Response:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    for parameter in ("{name:path}", "{alias:path}", "{model:path}"):
        path = path.replace(parameter, "nothing")
    body: dict[str, str] | None = {} if method in ("POST", "PUT") else None
    return server.http.request(method, path, headers=headers, json=body)


def test_no_route_answers_without_a_key(guarded: Server) -> None:
    for method, path in routes(guarded):
        for key in (None, "wrong"):
            reply = call(guarded, method, path, key)
            if path in OPEN:
                assert reply.status_code == 200, path
                continue
            assert reply.status_code == 401, (method, path)
            assert reply.headers["WWW-Authenticate"] == "Bearer"
            error = reply.json()["error"]
            assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")


def test_a_plain_key_reads_and_generates_and_changes_nothing(guarded: Server) -> None:
    refused = set()
    for method, path in routes(guarded):
        status = call(guarded, method, path, OTHER_KEY).status_code
        assert status != 401, (method, path)
        if status == 403:
            refused.add((method, path))
    assert refused == CHANGES


def test_the_admin_key_reaches_every_route(guarded: Server) -> None:
    for method, path in routes(guarded):
        assert call(guarded, method, path, ADMIN).status_code not in (401, 403), (method, path)


def test_unknown_paths_need_a_key_too(guarded: Server) -> None:
    assert call(guarded, "GET", "/nothing", None).status_code == 401
    assert call(guarded, "GET", "/nothing", KEY).status_code == 404
    assert call(guarded, "GET", "//health", None).status_code == 401
    assert call(guarded, "GET", "/health/", None).status_code == 401


def test_every_generating_path_exists(guarded: Server) -> None:
    """A path that is allowed to plain keys and is no route would open whatever comes there later."""
    assert {path for _, path in routes(guarded)} >= GENERATES


def test_keys_are_not_logged(guarded: Server, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    for key in (KEY, ADMIN, "sk-wrong"):
        call(guarded, "POST", "/v1/adapters", key)
        call(guarded, "GET", "/v1/models", key)
    assert not [key for key in (KEY, ADMIN, "sk-wrong") if key in caplog.text]
