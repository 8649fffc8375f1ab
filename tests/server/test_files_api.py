"""`/v1/files` by the official client and over raw HTTP."""

from __future__ import annotations

import time
from typing import Any

import openai
import pytest
from tests.server.adapters import error
from tests.server.conftest import MakeServer, Server
from tests.server.jobs import conforms, put, rows

from veneer.server.state import ServerConfig


def stored(server: Server) -> list[str]:
    return sorted(path.name for path in (server.state.store.root / "files").iterdir())


def test_a_file_from_upload_to_delete(make_server: MakeServer) -> None:
    server = make_server()  # no engine is needed
    files = server.openai.files
    file = put(server, rows(2), "my rows.jsonl")
    assert (file.filename, file.bytes, file.purpose, file.status) == (
        "my rows.jsonl",
        len(rows(2)),
        "fine-tune",
        "processed",
    )
    assert files.retrieve(file.id) == file
    assert files.content(file.id).read() == rows(2)
    assert [each.id for each in files.list()] == [file.id]
    assert stored(server) == [file.id]
    assert files.delete(file.id).deleted
    assert stored(server) == []
    with pytest.raises(openai.NotFoundError):
        files.retrieve(file.id)
    with pytest.raises(openai.NotFoundError):
        files.content(file.id)
    with pytest.raises(openai.NotFoundError):
        files.delete(file.id)


def test_answers_conform_to_the_specification(make_server: MakeServer) -> None:
    server = make_server()
    conforms(server.http.get("/v1/files").json(), "ListFilesResponse")
    file = put(server)
    conforms(server.http.get(f"/v1/files/{file.id}").json(), "OpenAIFile")
    conforms(server.http.get("/v1/files").json(), "ListFilesResponse")
    conforms(server.http.delete(f"/v1/files/{file.id}").json(), "DeleteFileResponse")


def test_lists_are_paged_ordered_and_filtered(make_server: MakeServer) -> None:
    server = make_server()
    ids = [put(server, name=f"{n}.jsonl").id for n in range(5)]
    other = server.openai.files.create(file=("a.txt", b"text"), purpose="user_data").id
    page = server.openai.files.list
    assert [each.id for each in page(limit=2)] == [other, *ids[::-1]]  # the client turns the pages
    assert [each.id for each in page(limit=2, order="asc").data] == ids[:2]
    assert [each.id for each in page(limit=2, order="asc", after=ids[1]).data] == ids[2:4]
    assert [each.id for each in page(purpose="fine-tune", limit=4)] == ids[::-1]
    assert [each.id for each in page(purpose="user_data")] == [other]
    assert list(page(purpose="fine-tune-results")) == []
    last = server.http.get("/v1/files", params={"after": ids[1], "limit": 1}).json()
    assert (last["first_id"], last["last_id"], last["has_more"]) == (ids[0], ids[0], False)


def upload(server: Server, content: bytes = b"x", *, name: str = "x.jsonl", **fields: Any) -> Any:
    fields = {"purpose": "fine-tune"} | fields
    return server.http.post("/v1/files", data=fields, files={"file": (name, content)})


def test_refused_uploads(make_server: MakeServer) -> None:
    server = make_server(config=ServerConfig(max_file_bytes=1000, max_files=2))
    assert "empty" in error(upload(server, b""), 400, "invalid_value")
    error(upload(server, b"x" * 1001), 413, "too_large")
    error(upload(server, b"x" * (3 << 20)), 413, "too_large")
    assert "'poems'" in error(upload(server, purpose="poems"), 400, "invalid_value")
    error(upload(server, purpose="fine-tune-results"), 400, "invalid_value")
    error(upload(server, name="x" * 256), 400, "invalid_value")
    error(upload(server, colour="red"), 400, "invalid_value")
    lifetime: dict[str, Any] = {"expires_after[anchor]": "created_at"}
    error(upload(server, **lifetime), 400, "invalid_value")
    lifetime["expires_after[seconds]"] = "60"
    error(upload(server, **lifetime), 400, "invalid_value")
    error(server.http.post("/v1/files", data={"purpose": "fine-tune"}), 400, "invalid_value")
    error(server.http.post("/v1/files", json={"purpose": "fine-tune"}), 400, "invalid_value")
    no_file = {"purpose": (None, "fine-tune"), "file": (None, "text")}
    error(server.http.post("/v1/files", files=no_file), 400, "invalid_value")
    assert stored(server) == []
    for _ in range(2):
        assert upload(server).status_code == 200
    assert "limit is 2" in error(upload(server), 400, "too_many_files")
    assert len(stored(server)) == 2


@pytest.mark.parametrize("query", ["limit=0", "limit=10001", "limit=x", "order=up", "purpose=poems"])
def test_refused_lists(server: Server, query: str) -> None:
    error(server.http.get(f"/v1/files?{query}"), 400, "invalid_value")


@pytest.mark.parametrize("id", ["file-nothing", "..%2F..%2Fstore.db", "%00", "x" * 99])
def test_unknown_ids(server: Server, id: str) -> None:
    error(server.http.get(f"/v1/files?after={id}"), 404, "not_found")
    for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/content")):
        assert server.http.request(method, f"/v1/files/{id}{path}").status_code == 404


def test_a_name_is_never_a_path(make_server: MakeServer) -> None:
    server = make_server()
    reply = upload(server, name="../../etc/passwd")
    assert reply.json()["filename"] == "../../etc/passwd"
    assert stored(server) == [reply.json()["id"]]


def test_a_file_expires(make_server: MakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server = make_server()
    file = server.openai.files.create(
        file=("x.jsonl", rows()),
        purpose="fine-tune",
        expires_after={"anchor": "created_at", "seconds": 3600},
    )
    assert file.expires_at == file.created_at + 3600
    later = time.time() + 3601
    monkeypatch.setattr(time, "time", lambda: later)
    with pytest.raises(openai.NotFoundError):
        server.openai.files.retrieve(file.id)
    assert list(server.openai.files.list()) == []
    kept = put(server)
    assert stored(server) == [kept.id]  # the next upload removes what has expired


def test_changes_need_the_admin_key(make_server: MakeServer) -> None:
    server = make_server(config=ServerConfig(api_keys=("user",), admin_key="admin"))
    user, admin = ({"Authorization": f"Bearer {key}"} for key in ("user", "admin"))
    body: Any = {"data": {"purpose": "fine-tune"}, "files": {"file": ("x", b"x")}}
    assert server.http.post("/v1/files", headers=user, **body).status_code == 403
    id = server.http.post("/v1/files", headers=admin, **body).json()["id"]
    assert server.http.get(f"/v1/files/{id}", headers=user).status_code == 200
    assert server.http.delete(f"/v1/files/{id}", headers=user).status_code == 403
    for path in ("", "/x/cancel", "/x/pause", "/x/resume"):
        assert server.http.post(f"/v1/fine_tuning/jobs{path}", headers=user).status_code == 403
    assert server.http.get("/v1/fine_tuning/jobs", headers=user).status_code == 200
