"""`task_id`: which task of an adapter a request is for."""

from __future__ import annotations

import pytest
from tests.server.adapters import complete, error, made
from tests.server.conftest import MakeServer, Server


@pytest.fixture(scope="module")
def tasks(module_server: Server) -> dict[str, str]:
    """Adapters with 0, 1 and 3 tasks; their digests by name."""
    counts = {"none": 0, "one": 1, "three": 3}
    return {
        name: made(module_server, name, name.encode(), tasks=count)["digest"]
        for name, count in counts.items()
    }


def keys(server: Server) -> list[str]:
    return [str(line["adapter"]) for line in server.received("Generate")]


def test_a_task_has_a_key_of_its_own(server: Server, tasks: dict[str, str]) -> None:
    for task in (0, 1, 2):
        assert complete(server, "three", task_id=task).status_code == 200
    digest = tasks["three"]
    assert keys(server) == [digest, f"{digest}/1", f"{digest}/2"]


def test_the_openai_client_names_it_in_the_extra_body(server: Server, tasks: dict[str, str]) -> None:
    server.openai.chat.completions.create(
        model="three", messages=[{"role": "user", "content": "one"}], max_tokens=1, extra_body={"task_id": 2}
    )
    assert keys(server) == [f"{tasks['three']}/2"]


def test_one_task_need_not_be_named(server: Server, tasks: dict[str, str]) -> None:
    assert complete(server, "one").status_code == 200
    assert complete(server, "one", task_id=0).status_code == 200
    assert keys(server) == [tasks["one"]] * 2


@pytest.mark.parametrize(
    ("model", "fields", "rule"),
    [
        ("three", {}, "task_id is required: adapter 'three' has 3 tasks; say which one, from 0 to 2."),
        ("three", {"task_id": 3}, "task_id=3: adapter 'three' has the tasks 0 to 2."),
        ("one", {"task_id": 1}, "task_id=1: adapter 'one' has the tasks 0 to 0."),
        ("none", {"task_id": 0}, "task_id=0: adapter 'none' has no tasks; leave it out."),
        ("tiny", {"task_id": 0}, "task_id=0: the base has no tasks; leave it out."),
        ("three", {"task_id": -1}, "task_id"),
        ("three", {"task_id": "1"}, "task_id"),
        ("three", {"task_id": 1.0}, "task_id"),
        ("three", {"task_id": True}, "task_id"),
        ("three", {"task_id": 2**40}, "task_id"),
    ],
)
def test_other_tasks_are_refused(
    model: str, fields: dict[str, object], rule: str, server: Server, tasks: dict[str, str]
) -> None:
    reply = complete(server, model, **fields)
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "task_id"
    assert rule in reply.json()["error"]["message"]
    assert keys(server) == []


def test_what_is_shown(server: Server, tasks: dict[str, str]) -> None:
    listed = {each["id"]: each["tasks"] for each in server.http.get("/v1/adapters").json()["data"]}
    assert {name: listed[name] for name in tasks} == {"none": 0, "one": 1, "three": 3}


def test_a_pin_and_a_delete_are_of_all_tasks(make_server: MakeServer) -> None:
    server = make_server().until_ready()
    digest = made(server, "three", tasks=3)["digest"]
    assert server.http.post("/v1/adapters/three/pin").status_code == 200
    wanted = {digest, f"{digest}/1", f"{digest}/2"}
    assert {line["key"] for line in server.received("PinAdapter")} == wanted == server.state.engine.pinned
    assert server.http.delete("/v1/adapters/three").status_code == 200
    assert [line["digest"] for line in server.received("DropAdapter")] == [digest]
    assert server.state.engine.pinned == set()
    error(complete(server, "three", task_id=1), 404, "model_not_found")


def test_a_pin_that_not_all_tasks_find_room_for_leaves_none(make_server: MakeServer) -> None:
    server = make_server(engine={"max_loras": 3}).until_ready()
    made(server, "three", tasks=3)
    error(server.http.post("/v1/adapters/three/pin"), 409, "conflict")
    assert server.state.engine.pinned == set()
    assert not server.http.get("/v1/adapters/three").json()["pinned"]
