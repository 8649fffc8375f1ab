"""The adapter routes over a real socket: lists, versions, aliases, pins and deletes."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from tests.server.adapters import complete, error, left_behind, made, streaming
from tests.server.conftest import BASE, WAIT, MakeServer, Server

from veneer.server import publish


@pytest.fixture
def fresh(make_server: MakeServer) -> Server:
    """A server for one test that changes adapters; `server` is shared by those that change nothing."""
    return make_server(adapters=("sql", "team/poet")).until_ready()


# ---- listing, versions, aliases -------------------------------------------------------------------


def test_the_list(fresh: Server) -> None:
    made(fresh, "fresh")
    reply = fresh.http.get("/v1/adapters").json()
    assert reply["object"] == "list"
    assert [each["id"] for each in reply["data"]] == ["fresh", "sql", "team/poet"]
    fields = (
        "digest kind primitives portability effect rank bytes version current residency pinned running requests "
        "loads evictions created_at warnings aliases"
    )
    for each in reply["data"]:
        assert set(fields.split()) <= set(each)
    fresh.until(lambda: fresh.http.get("/v1/adapters/fresh").json()["residency"] == "host")
    assert reply["data"][1]["residency"] == "disk"


def test_one_adapter_by_name_version_and_alias(fresh: Server) -> None:
    for weights in (b"one", b"two"):
        made(fresh, "org/x", weights)
    fresh.http.put("/v1/aliases/prod", json={"target": "org/x@1"})
    fresh.http.put("/v1/aliases/next", json={"target": "org/x"})
    shown = {
        name: fresh.http.get(f"/v1/adapters/{name}").json()["version"]
        for name in ("org/x", "org%2Fx", "org/x@1", "org/x%401", "prod", "next", f"{BASE}:org/x")
    }
    assert shown == {
        "org/x": 2,
        "org%2Fx": 2,
        "org/x@1": 1,
        "org/x%401": 1,
        "prod": 1,
        "next": 2,
        f"{BASE}:org/x": 2,
    }
    assert fresh.http.get("/v1/adapters/org/x").json()["aliases"] == ["next", "prod"]


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("GET", "/v1/adapters/nothing", None, 404, "model_not_found"),
        ("GET", "/v1/adapters/sql@2", None, 404, "model_not_found"),
        ("GET", "/v1/adapters/sql@x", None, 404, "model_not_found"),
        ("GET", f"/v1/adapters/{BASE}", None, 404, "model_not_found"),
        ("GET", "/v1/adapters/" + "x" * 500, None, 404, "model_not_found"),
        ("DELETE", "/v1/adapters/nothing", None, 404, "model_not_found"),
        ("DELETE", f"/v1/adapters/{BASE}", None, 404, "model_not_found"),
        ("DELETE", "/v1/adapters/..%2F..%2Fetc", None, 404, "model_not_found"),
        ("POST", "/v1/adapters/nothing/pin", None, 404, "model_not_found"),
        ("POST", "/v1/adapters/sql@1/pin", None, 400, "invalid_value"),
        ("POST", "/v1/adapters/nothing/rollback", None, 404, "model_not_found"),
        ("POST", "/v1/adapters/sql/rollback", None, 409, "conflict"),
        ("POST", "/v1/adapters/sql/rollback", {"version": 9}, 404, "model_not_found"),
        ("POST", "/v1/adapters/sql/rollback", {"version": 0}, 400, "invalid_value"),
        ("POST", "/v1/adapters/sql/rollback", {"version": "1"}, 400, "invalid_value"),
        ("POST", "/v1/adapters/sql/rollback", {"to": 1}, 400, "invalid_value"),
        ("PUT", "/v1/aliases/prod", {}, 400, "invalid_value"),
        ("PUT", "/v1/aliases/prod", {"target": "nothing"}, 404, "model_not_found"),
        ("PUT", "/v1/aliases/prod", {"target": "sql@9"}, 404, "model_not_found"),
        ("PUT", "/v1/aliases/prod", {"target": "sql", "version": 1}, 400, "invalid_value"),
        ("PUT", "/v1/aliases/sql", {"target": "team/poet"}, 409, "conflict"),
        ("PUT", f"/v1/aliases/{BASE}", {"target": "sql"}, 400, "invalid_value"),
        ("PUT", "/v1/aliases/a@1", {"target": "sql"}, 400, "invalid_value"),
        ("DELETE", "/v1/aliases/nothing", None, 404, "not_found"),
        ("DELETE", "/v1/aliases/sql", None, 404, "not_found"),
    ],
)
def test_refused_changes(
    server: Server, method: str, path: str, body: dict[str, Any] | None, status: int, code: str
) -> None:
    before = server.http.get("/v1/adapters").json()
    error(server.http.request(method, path, json=body), status, code)
    assert server.http.get("/v1/adapters").json() == before


def test_rollback_moves_what_is_served(fresh: Server) -> None:
    one, two = (made(fresh, "x", weights)["digest"] for weights in (b"one", b"two"))
    assert fresh.http.post("/v1/adapters/x/rollback").json()["version"] == 1
    complete(fresh, "x")
    assert fresh.received("Generate")[-1]["adapter"] == one
    assert fresh.http.post("/v1/adapters/x/rollback", json={"version": 2}).json()["digest"] == two
    complete(fresh, "x")
    assert fresh.received("Generate")[-1]["adapter"] == two


def test_an_alias_serves_and_goes(fresh: Server) -> None:
    reply = fresh.http.put("/v1/aliases/prod/sql", json={"target": "sql"})
    assert reply.status_code == 200
    assert (reply.json()["id"], reply.json()["target"]) == ("prod/sql", "sql")
    assert complete(fresh, "prod/sql").status_code == 200
    error(fresh.http.delete("/v1/adapters/sql"), 409, "conflict")
    assert fresh.http.delete("/v1/aliases/prod/sql").json()["deleted"]
    error(complete(fresh, "prod/sql"), 404, "model_not_found")
    assert complete(fresh, "sql").status_code == 200


# ---- pins -----------------------------------------------------------------------------------------


def pins(server: Server) -> list[tuple[str, bool]]:
    return [(message["key"], message["pinned"]) for message in server.received("PinAdapter")]


def test_a_pin_follows_the_name(fresh: Server) -> None:
    one = made(fresh, "x", b"one")["digest"]
    assert fresh.http.post("/v1/adapters/x/pin").json()["pinned"]
    assert fresh.http.post("/v1/adapters/x/pin").json()["pinned"]
    assert pins(fresh) == [(one, True)]
    fresh.until(lambda: fresh.http.get("/v1/adapters/x").json()["residency"] == "device")
    two = made(fresh, "x", b"two")["digest"]
    assert pins(fresh)[1:] == [(one, False), (two, True)]
    fresh.http.post("/v1/adapters/x/rollback")
    assert pins(fresh)[3:] == [(two, False), (one, True)]
    assert not fresh.http.post("/v1/adapters/x/unpin").json()["pinned"]
    assert pins(fresh)[5:] == [(one, False)]


def test_a_pin_needs_the_engine(make_server: MakeServer) -> None:
    server = make_server("--load-seconds", "60", adapters=("sql",))
    error(server.http.post("/v1/adapters/sql/pin"), 503, "engine_unavailable")
    assert not server.http.get("/v1/adapters/sql").json()["pinned"]


# ---- deletes --------------------------------------------------------------------------------------


def test_a_delete_waits_for_the_running_request(make_server: MakeServer) -> None:
    fresh = make_server("--step-seconds", "0.05").until_ready()  # the request would run for ten seconds
    digest = made(fresh, "x")["digest"]
    with ThreadPoolExecutor(1) as pool:
        with streaming(fresh, "x") as lines:
            deleting = pool.submit(fresh.http.delete, "/v1/adapters/x")
            fresh.until(lambda: complete(fresh, "x").status_code == 404)  # new requests do not find it
            assert not deleting.done()
            assert fresh.state.store.blob(digest).exists()
            assert fresh.received("DropAdapter") == []
            assert json.loads(next(lines).removeprefix("data: "))["choices"]  # the running one goes on
        reply = deleting.result(WAIT)
    assert (reply.status_code, reply.json()["deleted"]) == (200, True)
    assert [each["digest"] for each in fresh.received("DropAdapter")] == [digest]
    assert not fresh.state.store.blob(digest).exists()
    error(fresh.http.get("/v1/adapters/x"), 404, "model_not_found")
    assert left_behind(fresh) == []


def test_a_delete_that_takes_long_is_answered_and_goes_on(
    make_server: MakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = make_server("--step-seconds", "0.05").until_ready()
    monkeypatch.setattr(publish, "DELETE_WAIT", 0.0)
    digest = made(fresh, "x")["digest"]
    with streaming(fresh, "x"):
        reply = fresh.http.delete("/v1/adapters/x")
        assert reply.status_code == 202
        assert reply.json() == {
            "id": "x",
            "object": "adapter.deleted",
            "deleted": False,
            "status": "draining",
        }
        error(fresh.http.delete("/v1/adapters/x"), 404, "model_not_found")
    fresh.until(lambda: not fresh.state.store.blob(digest).exists())


def test_one_version_goes(fresh: Server) -> None:
    for weights in (b"one", b"two"):
        made(fresh, "x", weights)
    error(fresh.http.delete("/v1/adapters/x@2"), 409, "conflict")  # the current one
    assert fresh.http.delete("/v1/adapters/x@1").json()["deleted"]
    assert [each["version"] for each in fresh.http.get("/v1/adapters/x").json()["versions"]] == [2]
    assert complete(fresh, "x").status_code == 200
    assert left_behind(fresh) == []


def test_a_delete_works_without_the_engine(make_server: MakeServer) -> None:
    server = make_server("--load-seconds", "60", adapters=("sql",))
    assert server.http.delete("/v1/adapters/sql").json()["deleted"]
    assert left_behind(server) == []
