"""Uploads over a real socket: what is taken, what is refused, and that a refusal leaves nothing."""

from __future__ import annotations

import errno
import io
import os
import socket
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tests.server.adapters import WEIGHTS, complete, error, files, left_behind, made, upload
from tests.server.conftest import BASE, WAIT, MakeServer, Server

from veneer.adapters import staging
from veneer.server.state import ServerConfig


@pytest.fixture
def fresh(make_server: MakeServer) -> Server:
    """A server for one test that changes adapters; `server` is shared by those that change nothing."""
    return make_server(adapters=("sql", "team/poet")).until_ready()


def test_an_upload_is_served(fresh: Server) -> None:
    adapter = made(fresh, "org/new", r=8, base_model_name_or_path=BASE)
    assert adapter["id"] == "org/new"
    assert adapter["object"] == "adapter"
    assert (adapter["version"], adapter["current"]) == (1, True)
    assert (adapter["kind"], adapter["primitives"], adapter["rank"], adapter["bytes"]) == (
        "lora",
        ["low_rank"],
        8,
        1024,
    )
    assert adapter["warnings"] == []
    assert complete(fresh, "org/new").status_code == 200
    assert fresh.received("Generate")[-1]["adapter"] == adapter["digest"]
    shown = fresh.http.get("/v1/adapters/org/new").json()
    assert shown["requests"] == 1
    assert [each["version"] for each in shown["versions"]] == [1]


def test_an_adapter_that_changes_nothing_is_taken_only_if_allowed(fresh: Server) -> None:
    assert "changes nothing" in error(upload(fresh, "new", ineffective=True), 400, "adapter_refused")
    assert left_behind(fresh) == []
    form = {"name": "new", "allow_ineffective": "yes"}
    reply = fresh.http.post("/v1/adapters", data=form, files=files(ineffective=True))
    assert "'yes' is neither 'true' nor 'false'" in error(reply, 400, "invalid_value")
    for value, status in (("false", 400), ("true", 201)):
        form["allow_ineffective"] = value
        reply = fresh.http.post("/v1/adapters", data=form, files=files(ineffective=True))
        assert reply.status_code == status, reply.text
    assert [each["allow_ineffective"] for each in fresh.received("CheckAdapter")] == [False, False, True]


def test_the_same_content_again_changes_nothing(fresh: Server) -> None:
    first = made(fresh, "new")
    again = upload(fresh, "new")
    assert again.status_code == 200
    assert (again.json()["version"], again.json()["digest"]) == (1, first["digest"])
    assert made(fresh, "new", b"other")["version"] == 2


def zipped(*extra: tuple[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in (("adapter_config.json", b"{}"), ("adapter_model.safetensors", WEIGHTS), *extra):
            archive.writestr(name, content)
    return file.getvalue()


def tarred() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name, content in (("a/adapter_config.json", b"{}"), ("a/adapter_model.safetensors", WEIGHTS)):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


@pytest.mark.parametrize(("name", "make"), [("a.zip", zipped), ("a.tar.gz", tarred)])
def test_an_archive(fresh: Server, name: str, make: Callable[[], bytes]) -> None:
    plain = made(fresh, "plain")
    reply = fresh.http.post("/v1/adapters", data={"name": "packed"}, files={"archive": (name, make())})
    assert reply.status_code == 201, reply.text
    assert reply.json()["digest"] == plain["digest"]


def test_weights_as_adapterhub_calls_them(fresh: Server) -> None:
    plain = made(fresh, "plain")
    sent = [("files", ("adapter_config.json", b"{}")), ("files", ("adapter.safetensors", WEIGHTS))]
    reply = fresh.http.post("/v1/adapters", data={"name": "hub"}, files=sent)
    assert reply.status_code == 201, reply.text
    assert reply.json()["digest"] == plain["digest"]
    for name in ("pytorch_adapter.bin", "model_head.safetensors"):
        sent[1] = ("files", (name, WEIGHTS))
        reply = fresh.http.post("/v1/adapters", data={"name": "hub2"}, files=sent)
        assert reply.status_code == 400
        assert f"the file '{name}' is not read" in reply.json()["error"]["message"]


def test_a_source_goes_to_the_hub(fresh: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None]] = []

    def from_hub(repo: str, staging: staging.Staging, limit: int, *, revision: str | None = None) -> None:
        asked.append((repo, revision))
        staging.write("adapter_config.json", [b"{}"], limit)
        staging.write("adapter_model.safetensors", [WEIGHTS], limit)

    monkeypatch.setattr("veneer.server.upload.from_hub", from_hub)
    body = {"name": "hub", "source": "org/repo", "revision": "main"}
    assert fresh.post("/v1/adapters", body).status_code == 201
    form = fresh.http.post("/v1/adapters", data={"name": "hub2", "source": "org/repo"}, files={})
    assert form.status_code == 400  # httpx sends this one as a form without parts
    form = fresh.http.post("/v1/adapters", files={"name": (None, "hub2"), "source": (None, "org/repo")})
    assert form.status_code == 201, form.text
    assert asked == [("org/repo", "main"), ("org/repo", None)]


def test_another_bases_name_is_a_warning(make_server: MakeServer) -> None:
    server = make_server(config=ServerConfig(base_names=("hub/Tiny-Instruct",))).until_ready()
    (warning,) = made(server, "one", base_model_name_or_path="meta-llama/Llama-3.1-8B")["warnings"]
    assert "'meta-llama/Llama-3.1-8B'" in warning
    assert repr(BASE) in warning
    assert server.http.get("/v1/adapters/one").json()["warnings"] == [warning]
    for known in (BASE, "/models/tiny-instruct/", "other/TINY"):
        assert made(server, "two", known.encode(), base_model_name_or_path=known)["warnings"] == []


NAME = {"name": "bad"}


@pytest.mark.parametrize(
    ("sent", "status", "code", "says"),
    [
        ({"data": NAME, "files": files(refuse="rank 100000 is too large")}, 400, "adapter_refused", "100000"),
        (
            {"data": NAME, "files": files()[:1]},
            400,
            "adapter_refused",
            "adapter_model.safetensors is missing",
        ),
        ({"data": NAME, "files": files() + files()[:1]}, 400, "invalid_value", "config.json was sent twice"),
        ({"data": NAME, "files": files() * 5}, 400, "invalid_value", "Too many files"),
        ({"data": NAME, "files": [files()[0], files()[0]]}, 400, "invalid_value", "sent twice"),
        (
            {"data": NAME, "files": [("files", ("adapter_model.bin", b"\x80"))]},
            400,
            "adapter_refused",
            "'adapter_model.bin'",
        ),
        ({"data": NAME, "files": [("files", ("../../x", b""))]}, 400, "adapter_refused", "'../../x'"),
        ({"data": NAME, "files": {"archive": ("a.zip", b"PK no")}}, 400, "adapter_refused", "archive"),
        (
            {"data": NAME, "files": {"archive": ("a.zip", zipped(("../evil", b"")))}},
            400,
            "adapter_refused",
            "../evil",
        ),
        ({"files": files()}, 400, "invalid_value", "'name' is missing"),
        ({"data": {"name": ["a", "b"]}, "files": files()}, 400, "invalid_value", "'name' must be sent once"),
        ({"data": {"name": "../up"}, "files": files()}, 400, "invalid_value", "'../up'"),
        ({"data": {"name": "a@1"}, "files": files()}, 400, "invalid_value", "'a@1'"),
        ({"data": {"name": BASE}, "files": files()}, 400, "invalid_value", "name of the base"),
        ({"data": NAME | {"rank": "8"}, "files": files()}, 400, "invalid_value", "unknown field 'rank'"),
        (
            {"data": NAME | {"files": "text"}, "files": {"x": ("x", b"")}},
            400,
            "invalid_value",
            "unknown field",
        ),
        ({"data": NAME | {"source": "a/b"}, "files": files()}, 400, "invalid_value", "send one of"),
        ({"data": NAME | {"revision": "x"}, "files": files()}, 400, "invalid_value", "'revision'"),
        ({"data": {"name": "x" * 100_000}, "files": files()}, 400, "invalid_value", "maximum size"),
        ({"json": {"name": "bad"}}, 400, "invalid_value", "source"),
        ({"json": {"name": "bad", "source": "a/b", "path": "/etc"}}, 400, "invalid_value", "path"),
        ({"json": {"name": "bad", "source": "x" * 100_000}}, 413, "too_large", "65,536"),
        (
            {"content": b"{", "headers": {"Content-Type": "application/json"}},
            400,
            "invalid_value",
            "truncated",
        ),
        ({"content": b"x", "headers": {"Content-Type": "text/plain"}}, 400, "invalid_value", "'text/plain'"),
        (
            {"content": b"x", "headers": {"Content-Type": "multipart/form-data"}},
            400,
            "invalid_value",
            "boundary",
        ),
        (
            {"content": b"junk", "headers": {"Content-Type": "multipart/form-data; boundary=b"}},
            400,
            "invalid_value",
            "The form cannot be read",
        ),
    ],
)
def test_a_refused_upload_leaves_nothing(
    server: Server, sent: dict[str, Any], status: int, code: str, says: str
) -> None:
    before = server.http.get("/v1/adapters").json()
    message = error(server.http.post("/v1/adapters", **sent), status, code)
    assert says in message
    assert left_behind(server) == []
    assert server.http.get("/v1/adapters").json() == before
    assert complete(server, "sql").status_code == 200


def test_the_limit_is_checked_by_the_length_told_and_by_the_bytes_sent(make_server: MakeServer) -> None:
    server = make_server(config=ServerConfig(max_upload_bytes=100_000)).until_ready()
    error(upload(server, "big", b"x" * 100_001), 413, "too_large")  # the file
    error(upload(server, "big", b"x" * 1_200_000), 413, "too_large")  # the body, told
    body = b'--b\r\nContent-Disposition: form-data; name="files"; filename="adapter_config.json"\r\n\r\n'

    def endless() -> Iterator[bytes]:
        yield body
        for _ in range(20):
            yield b"x" * 100_000

    reply = server.http.post(
        "/v1/adapters", content=endless(), headers={"Content-Type": "multipart/form-data; boundary=b"}
    )
    assert "more than" in error(reply, 413, "too_large")  # the body, counted
    assert left_behind(server) == []


def test_an_upload_that_breaks_off_leaves_nothing(fresh: Server) -> None:
    host, port = fresh.url.removeprefix("http://").split(":")
    head = (
        "POST /v1/adapters HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n"
        "Content-Type: multipart/form-data; boundary=b\r\n\r\n"
        '--b\r\nContent-Disposition: form-data; name="name"\r\n\r\nbroken\r\n'
    )
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode())
    assert upload(fresh, "broken").status_code == 201  # the name is not held
    assert left_behind(fresh) == []


def test_two_uploads_of_one_name_at_once(fresh: Server, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(upload, fresh, "same", b"one", wait_for=str(gate))
        fresh.until(lambda: fresh.received("CheckAdapter"))
        assert "'same'" in error(upload(fresh, "same", b"two"), 400, "upload_in_progress")
        assert upload(fresh, "another", b"two").status_code == 201
        gate.touch()
        assert first.result(WAIT).status_code == 201
    assert upload(fresh, "same", b"two").json()["version"] == 2


def test_a_full_disk(fresh: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr("veneer.adapters.staging.os.write", full)
        error(upload(fresh, "full"), 400, "storage_full")
    with monkeypatch.context() as patched:  # the form parser's own temporary file
        patched.setattr("starlette.datastructures.UploadFile.write", full)
        error(upload(fresh, "full"), 400, "storage_full")
    assert left_behind(fresh) == []
    assert upload(fresh, "full").status_code == 201


def test_no_engine_no_upload(make_server: MakeServer) -> None:
    server = make_server("--load-seconds", "60")
    assert "starting" in error(upload(server, "early"), 503, "engine_unavailable")
    body = {"lora_name": "early", "lora_path": "org/x"}
    assert server.post("/v1/load_lora_adapter", body).status_code == 503
    assert left_behind(server) == []


def test_an_engine_that_dies_while_it_checks(fresh: Server, tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(upload, fresh, "lost", wait_for=str(tmp_path / "never"))
        fresh.until(lambda: fresh.received("CheckAdapter"))
        pid = fresh.state.engine.pid
        assert pid is not None
        os.kill(pid, 9)
        error(waiting.result(WAIT), 503, "engine_unavailable")
    assert left_behind(fresh) == []
    assert upload(fresh.until_ready(), "lost").status_code == 201
