"""Merges over HTTP and on the command line: recipes, progress, what a death leaves, and files that come back."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.server.adapters import error, files, left_behind, made
from tests.server.conftest import MakeServer, Server

from veneer.adapters.recipes import Part, recipe
from veneer.server.cli import main


@pytest.fixture
def server(make_server: MakeServer) -> Server:
    server = make_server().until_ready()
    for name in ("a", "b"):
        made(server, name, name.encode())
    return server


def merge(server: Server, *adapters: Any, **fields: Any) -> Any:
    return server.post("/v1/adapters/merge", {"name": "both", "adapters": list(adapters)} | fields)


A, B = {"id": "a", "weight": 0.5}, {"id": "b"}


def key_of(server: Server, weights: dict[str, float], method: str = "linear", **fields: Any) -> str | None:
    store = server.state.store
    return recipe([Part(store.resolve(name).digest, w) for name, w in weights.items()], method, **fields).key


def test_a_merge_is_a_new_version_with_its_recipe(server: Server) -> None:
    reply = merge(server, A, B, method="dare_ties", density=0.25, seed=7)
    assert reply.status_code == 201, reply.text
    adapter = reply.json()
    assert (adapter["id"], adapter["version"], adapter["distance"]) == ("both", 1, 0.25)
    digests = [server.state.store.resolve(name).digest for name in ("a", "b")]
    assert adapter["recipe"] == {
        "method": "dare_ties",
        "adapters": [
            {"id": "a@1", "digest": digests[0], "task_id": None, "weight": 0.5},
            {"id": "b@1", "digest": digests[1], "task_id": None, "weight": 1.0},
        ],
        "density": 0.25,
        "majority_sign_method": "total",
        "seed": 7,
    }
    assert "merged by a toy" in adapter["warnings"]
    (asked,) = server.received("MergeAdapters")
    assert asked["key"] == key_of(server, {"a": 0.5, "b": 1.0}, "dare_ties", density=0.25, seed=7)
    assert server.http.get("/v1/adapters/both").json()["recipe"] == adapter["recipe"]
    assert server.openai.completions.create(model="both", prompt="one", max_tokens=1).choices
    again = merge(server, A, B, method="dare_ties", density=0.25, seed=7)
    assert (again.status_code, again.json()["version"]) == (200, 1)
    assert merge(server, A, B).json()["version"] == 2
    assert left_behind(server) == []


@pytest.mark.parametrize(
    ("method", "fields", "expected", "keep_rows"),
    [
        ("linear", {}, ("linear", {}), False),
        ("cat", {}, ("linear", {}), True),
        ("svd", {"rank": 3}, ("linear", {"rank": 3}), False),
        ("svd", {}, ("linear", {"rank": 8}), False),  # the largest of the parts, as PEFT
        ("ties", {"density": 0.5}, ("ties", {"density": 0.5}), False),
        ("ties_svd", {"density": 0.5, "rank": 4}, ("ties", {"density": 0.5, "rank": 4}), False),
        (
            "ties",
            {"density": 0.5, "majority_sign_method": "frequency"},
            ("ties", {"density": 0.5, "sign": "frequency"}),
            False,
        ),
        ("dare_linear", {"density": 0.5, "seed": 1}, ("dare_linear", {"density": 0.5, "seed": 1}), False),
        ("dare_linear_svd", {"density": 0.5}, ("dare_linear", {"density": 0.5, "rank": 8}), False),
        ("dare_ties_svd", {"density": 0.5}, ("dare_ties", {"density": 0.5, "rank": 8}), False),
        ("magnitude_prune", {"density": 0.5}, ("magnitude_prune", {"density": 0.5}), False),
        ("magnitude_prune_svd", {"density": 0.5}, ("magnitude_prune", {"density": 0.5, "rank": 8}), False),
    ],
)
def test_every_method(
    server: Server, method: str, fields: dict[str, Any], expected: tuple[str, Any], keep_rows: bool
) -> None:
    assert merge(server, A, B, method=method, **fields).status_code == 201
    (asked,) = server.received("MergeAdapters")
    assert asked["key"] == key_of(server, {"a": 0.5, "b": 1.0}, expected[0], **expected[1])
    assert asked["keep_rows"] == keep_rows


@pytest.mark.parametrize("method", ["linear", "cat", "ties", "dare_linear", "dare_ties", "magnitude_prune"])
def test_a_merge_of_one_is_that_one(server: Server, method: str) -> None:
    """To the byte: PEFT 0.21's is another adapter for rsLoRA, DoRA and biases."""
    template = ("files", ("chat_template.jinja", b"{{ messages }}"))
    reply = server.http.post("/v1/adapters", data={"name": "own"}, files=[*files(b"own"), template])
    density = {} if method in ("linear", "cat") else {"density": 1.0}
    nothing = [] if "ties" in method else [{"id": "b", "weight": 0.0}]  # it would have a voice in an election
    merged = merge(server, {"id": "own"}, *nothing, method=method, **density)
    assert merged.status_code == 201, merged.text
    assert (merged.json()["digest"], merged.json()["distance"]) == (reply.json()["digest"], 0.0)
    assert server.received("MergeAdapters") == []


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"method": "slerp"}, 400, "method"),
        ({"method": "ties"}, 400, "density"),
        ({"method": "ties", "density": 0.0}, 400, "density"),
        ({"density": 0.5}, 400, "density"),
        ({"rank": 4}, 400, "rank"),
        ({"method": "cat", "rank": 4}, 400, "rank"),
        ({"seed": 4}, 400, "seed"),
        ({"method": "ties", "density": 0.5, "seed": 4}, 400, "seed"),
        (
            {"method": "dare_linear", "density": 0.5, "majority_sign_method": "total"},
            400,
            "majority_sign_method",
        ),
        ({"adapters": [{"id": "nobody"}]}, 404, "model"),
        ({"adapters": [A, {"id": "a", "weight": -0.5}]}, 400, "adapters"),
        ({"name": "../both"}, 400, "name"),
        ({"name": "tiny"}, 400, "name"),
        ({"extra": 1}, 400, "extra"),
    ],
)
def test_what_cannot_be_merged_is_refused_by_name(
    server: Server, fields: dict[str, Any], status: int, param: str
) -> None:
    reply = merge(server, **{"name": "both", "adapters": [A, B]} | fields)
    assert reply.status_code == status, reply.text
    assert reply.json()["error"]["param"] == param
    assert left_behind(server) == []


def test_a_stream_tells_how_far_it_is(server: Server) -> None:
    lines = [line for line in merge(server, A, B, stream=True).text.splitlines() if line]
    *progress, last, end = (line.removeprefix("data: ") for line in lines)
    assert end == "[DONE]"
    assert [json.loads(each)["done"] for each in progress] == [0, 1, 2]
    assert json.loads(last)["digest"] == server.state.store.resolve("both").digest


def test_a_refused_merge_leaves_nothing(server: Server) -> None:
    made(server, "bad", b"bad", merge_refuse="it has virtual tokens")
    for stream in (False, True):
        reply = merge(server, {"id": "bad", "weight": 0.5}, stream=stream)
        assert "it has virtual tokens" in reply.text
    assert left_behind(server) == []
    assert merge(server, A, B).status_code == 201


def test_an_engine_that_dies_in_a_merge_leaves_nothing(server: Server) -> None:
    made(server, "deadly", b"deadly", merge_dies=True)
    reply = merge(server, {"id": "deadly", "weight": 0.5})
    assert error(reply, 503, "engine_unavailable")
    assert left_behind(server) == []
    assert server.state.in_flight.total() == 0
    server.until_ready()
    assert merge(server, A, B).status_code == 201


def test_a_merge_keeps_its_adapters_and_is_finished_whoever_leaves(make_server: MakeServer) -> None:
    server = make_server("--step-seconds", "0.05").until_ready()
    for name in ("a", "b"):
        made(server, name, name.encode())

    async def hold() -> None:
        await server.state.merging.acquire()

    async def let_go() -> None:
        server.state.merging.release()

    server.call(hold())
    body = {"name": "both", "adapters": [A, B], "stream": True}
    with server.http.stream("POST", "/v1/adapters/merge", json=body) as reply:
        assert reply.status_code == 200
        held = [server.state.in_flight.count(server.state.store.resolve(name).digest) for name in ("a", "b")]
        assert held == [1, 1]
    server.call(let_go())
    server.until(lambda: any(each.name == "both" for each in server.state.store.list()))


def test_a_merge_is_cancelled_in_the_engine_and_before_its_turn(server: Server) -> None:
    made(server, "slow", b"slow", merge_waits=True)

    def begin(stack: ExitStack, *adapters: Any) -> httpx.Response:
        body = {"name": "both", "adapters": list(adapters), "stream": True}
        return stack.enter_context(server.http.stream("POST", "/v1/adapters/merge", json=body))

    def cancelled(merge: httpx.Response) -> bool:
        id = merge.headers["x-veneer-merge"]
        reply = server.post(f"/v1/adapters/merge/{id}/cancel", b"")
        assert reply.json() == {"id": id, "object": "adapter.merge", "status": "cancelled"}
        assert error(server.post(f"/v1/adapters/merge/{id}/cancel", b""), 404, "not_found")
        return '"code":"merge_cancelled"' in merge.read().decode()

    with ExitStack() as stack:
        first = begin(stack, {"id": "slow", "weight": 0.5})
        server.until(lambda: server.received("MergeAdapters"))
        assert cancelled(begin(stack, A, B))
        assert cancelled(first)
    assert len(server.received("MergeAdapters")) == len(server.received("CancelMerge")) == 1
    assert left_behind(server) == []
    assert server.state.in_flight.total() == 0
    assert merge(server, A, B).status_code == 201


def test_a_merge_that_is_done_cannot_be_cancelled(server: Server, tmp_path: Path) -> None:
    """Its result is being checked."""
    go = tmp_path / "go"
    go.touch()
    made(server, "a", b"newer", wait_for=str(go))
    go.unlink()
    body = {"name": "both", "adapters": [{"id": "a"}], "stream": True}
    with server.http.stream("POST", "/v1/adapters/merge", json=body) as reply, ThreadPoolExecutor(1) as pool:
        id = reply.headers["x-veneer-merge"]
        server.until(lambda: server.state.merges[id].has_turn)
        cancel = pool.submit(server.post, f"/v1/adapters/merge/{id}/cancel", b"")
        server.until(lambda: server.state.merges[id].cancelled)
        go.touch()
        assert error(cancel.result(), 409, "conflict")
    assert server.state.store.resolve("both").version == 1


# ---- command line ---------------------------------------------------------------------------------


def test_the_command_line_merges_and_exports(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--method", "ties", "--density", "0.5", "--url", server.url]
    assert main(["merge", "a=0.5", "b", "--name", "both", *options]) == 0
    assert capsys.readouterr().out == "both version 1: lora of rank 8, 0.25 from the exact blend\n"
    (asked,) = server.received("MergeAdapters")
    assert asked["key"] == key_of(server, {"a": 0.5, "b": 1.0}, "ties", density=0.5)
    output = tmp_path / "out"
    assert main(["adapters", "export", "both", "--output", str(output), "--url", server.url]) == 0
    stored = server.state.store.blob(server.state.store.resolve("both").digest)
    assert {p.name: p.read_bytes() for p in output.iterdir()} == {
        p.name: p.read_bytes() for p in stored.iterdir()
    }
    assert main(["adapters", "export", "both", "--output", str(output), "--url", server.url]) == 1
    assert "exists and is not overwritten" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".out")] == []


def test_the_command_line_cancels_when_interrupted(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    made(server, "slow", b"slow", merge_waits=True)

    def interrupted(*_: Any) -> None:
        server.until(lambda: server.received("MergeAdapters"))
        raise KeyboardInterrupt

    monkeypatch.setattr("veneer.server.merge_cli._follow", interrupted)
    assert main(["merge", "slow=0.5", "--name", "both", "--url", server.url]) == 130
    assert server.received("CancelMerge")
    assert server.state.in_flight.total() == 0


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["a", "b"], "needs --name"),
        (["a=much", "--name", "x"], "after = stands the weight"),
        (["nobody", "--name", "x"], "'nobody' does not exist"),
        (["a", "--name", "x", "--method", "slerp"], "method"),
        (["a", "--into-base", "m"], "--into-base needs --output"),
        (["a", "--into-base", "m", "--output", "o", "--rank", "3"], "--rank does nothing"),
    ],
)
def test_the_command_line_says_what_is_wrong(
    server: Server, capsys: pytest.CaptureFixture[str], arguments: list[str], why: str
) -> None:
    assert main(["merge", *arguments, "--url", server.url]) == 1
    assert why in capsys.readouterr().err


def test_files_come_back_as_they_were_stored(server: Server) -> None:
    reply = server.http.get("/v1/adapters/a/files/adapter_model.safetensors")
    assert (reply.status_code, reply.content) == (200, b"a")
    assert reply.headers["x-veneer-adapter-digest"] == server.state.store.resolve("a").digest
    assert hashlib.sha256(reply.content).hexdigest() == hashlib.sha256(b"a").hexdigest()
    made(server, "a", b"newer")
    assert server.http.get("/v1/adapters/a@1/files/adapter_model.safetensors").content == b"a"
    for path in ("a/files/tokenizer.json", "a/files/..%2f..%2flock", "nobody/files/adapter_config.json"):
        assert server.http.get(f"/v1/adapters/{path}").status_code == 404
