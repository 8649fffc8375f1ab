"""Stored responses: going on from them, reading, deleting, their bounds, restarts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.server.conftest import BASE, MakeServer, Server
from tests.server.responses import ROUTE, conforms, create, post, prompt_of, refusal, stream, text_of

from veneer.adapters.store import AdapterStore
from veneer.errors import NotFound
from veneer.server.response_store import ResponseStore
from veneer.server.state import ServerConfig


def read(server: Server, id: str) -> dict[str, Any]:
    reply = server.http.get(f"{ROUTE}/{id}")
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    return found


def items(server: Server, id: str, **query: Any) -> dict[str, Any]:
    found: dict[str, Any] = server.http.get(f"{ROUTE}/{id}/input_items", params=query).json()
    conforms(found, "ResponseItemList")
    return found


def test_what_was_answered_is_read_again(server: Server) -> None:
    for answered in (create(server), stream(server)[-1]["response"]):
        assert answered["store"] is True
        assert read(server, answered["id"]) == answered


def test_a_response_goes_on_from_another(server: Server) -> None:
    first = create(server, input="one", instructions="seven", max_output_tokens=4)
    second = create(server, input="two", previous_response_id=first["id"], max_output_tokens=4)
    assert second["previous_response_id"] == first["id"]
    said = text_of(first)
    before = f"<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n{said}<|im_end|>\n"
    assert prompt_of(server) == f"{before}<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\n"
    third = create(server, input="six", previous_response_id=second["id"], store=False, max_output_tokens=4)
    assert prompt_of(server).count("<|im_start|>user") == 3
    assert server.http.get(f"{ROUTE}/{third['id']}").status_code == 404


def test_it_goes_on_when_the_earlier_one_is_gone(server: Server) -> None:
    first = create(server, input="one")
    second = create(server, input="two", previous_response_id=first["id"])
    server.openai.responses.delete(first["id"])
    create(server, input="six", previous_response_id=second["id"])
    assert prompt_of(server).count("<|im_start|>user") == 3
    status, param, _ = refusal(post(server, previous_response_id=first["id"]))
    assert (status, param) == (400, "previous_response_id")


def test_items_are_referred_to(server: Server) -> None:
    first = create(server, input="one", max_output_tokens=4)
    (item,) = first["output"]
    user = {"role": "user", "content": "one"}
    reference = {"type": "item_reference", "id": item["id"]}
    for each in (reference, item):
        create(server, input=[user, each, user], max_output_tokens=1)
    sent = server.received("Generate")
    assert sent[-1]["prompt"] == sent[-2]["prompt"]
    wrong = {"type": "item_reference", "id": item["id"][:-2] + "07"}
    assert refusal(post(server, input=[user, wrong]))[1] == "input[1].id"


def test_the_items_before_an_answer_are_listed(server: Server) -> None:
    first = create(server, input="one", max_output_tokens=4)
    second = create(server, input=[{"role": "user", "content": "two"}], previous_response_id=first["id"])
    found = items(server, second["id"], order="asc")
    assert [each["role"] for each in found["data"]] == ["user", "assistant", "user"]
    assert found["data"][1] == first["output"][0]
    ids = [each["id"] for each in found["data"]]
    assert (found["first_id"], found["last_id"], found["has_more"]) == (ids[0], ids[2], False)
    page = items(server, second["id"], limit=2)
    assert ([each["id"] for each in page["data"]], page["has_more"]) == (ids[:0:-1], True)
    rest = items(server, second["id"], after=page["last_id"])
    assert ([each["id"] for each in rest["data"]], rest["has_more"]) == (ids[:1], False)
    assert server.http.get(f"{ROUTE}/{second['id']}/input_items?after=x").status_code == 404
    assert server.http.get(f"{ROUTE}/{second['id']}/input_items?limit=0").status_code == 400
    listed = server.openai.responses.input_items.list(second["id"])
    assert [each.id for each in listed] == ids[::-1]


def test_a_deleted_response_is_gone(server: Server) -> None:
    id = create(server)["id"]
    gone = server.http.delete(f"{ROUTE}/{id}")
    assert gone.json() == {"id": id, "object": "response", "deleted": True}
    for reply in (
        server.http.get(f"{ROUTE}/{id}"),
        server.http.delete(f"{ROUTE}/{id}"),
        server.http.get(f"{ROUTE}/{id}/input_items"),
        server.http.post(f"{ROUTE}/{id}/cancel"),
    ):
        assert refusal(reply)[:2] == (404, "response_id")


def test_there_is_nothing_to_cancel(server: Server) -> None:
    status, _, message = refusal(server.http.post(f"{ROUTE}/{create(server)['id']}/cancel"))
    assert status == 400
    assert "background" in message


@pytest.mark.parametrize("query", ["stream=true", "starting_after=3"])
def test_a_stored_response_is_not_streamed(server: Server, query: str) -> None:
    status, param, _ = refusal(server.http.get(f"{ROUTE}/{create(server)['id']}?{query}"))
    assert (status, param) == (400, query.partition("=")[0])


def test_responses_outlive_the_server(make_server: MakeServer) -> None:
    server = make_server().until_ready()
    answered = create(server, input="one", max_output_tokens=4)
    server.stop()
    again = make_server(after=server).until_ready()
    assert read(again, answered["id"]) == answered
    create(again, input="two", previous_response_id=answered["id"])


def test_a_server_that_stores_none(make_server: MakeServer) -> None:
    server = make_server(config=ServerConfig(max_responses=0)).until_ready()
    found = create(server)
    assert found["store"] is False
    assert server.http.get(f"{ROUTE}/{found['id']}").status_code == 404
    assert refusal(post(server, store=True))[:2] == (400, "store")


def test_an_api_key_is_enough_for_them(make_server: MakeServer) -> None:
    server = make_server(config=ServerConfig(api_keys=("key",), admin_key="admin")).until_ready()
    server.http.headers["Authorization"] = "Bearer key"
    assert server.http.delete(f"{ROUTE}/{create(server)['id']}").status_code == 200
    assert server.http.delete("/v1/adapters/nobody").status_code == 403


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def response(number: int) -> dict[str, Any]:
    return {"id": f"resp_{number}", "model": BASE, "output": []}


def known(responses: ResponseStore, count: int) -> list[int]:
    def there(number: int) -> bool:
        try:
            return bool(responses.get(f"resp_{number}").response == response(number))
        except NotFound:
            return False

    return [number for number in range(count) if there(number)]


def test_the_oldest_give_way(tmp_path: Path) -> None:
    with AdapterStore(tmp_path / "store") as store:
        responses = ResponseStore(store, most=3, lifetime=100)
        for number in range(5):
            responses.add(response(number), [])
        assert known(responses, 5) == [2, 3, 4]
        responses.delete("resp_3")
        responses.add(response(5), [])
        assert known(responses, 6) == [2, 4, 5]
        assert known(ResponseStore(store, most=1, lifetime=100), 6) == [5]
        assert known(responses, 6) == [5]


def test_what_is_too_old_is_gone(tmp_path: Path) -> None:
    clock = Clock()
    with AdapterStore(tmp_path / "store") as store:
        responses = ResponseStore(store, most=10, lifetime=100, clock=clock)
        responses.add(response(0), [])
        clock.now += 60
        responses.add(response(1), [])
        assert known(responses, 2) == [0, 1]
        clock.now += 60
        assert known(responses, 2) == [1]
        with pytest.raises(NotFound):
            responses.delete("resp_0")
        responses.add(response(2), [])
        clock.now -= 60  # it is not only hidden
        assert known(responses, 3) == [1, 2]
