"""Blends over HTTP: what the engine is asked for, what is refused, and blends that are saved under a name."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.server.adapters import error, files, made
from tests.server.conftest import BASE, MakeServer, Server, add_adapter

from veneer.adapters.recipes import Part, recipe
from veneer.adapters.store import AdapterStore
from veneer.errors import Conflict

MESSAGES: list[Any] = [{"role": "user", "content": "one two three"}]


@pytest.fixture(scope="module")
def blender(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Iterator[Server]:
    make = MakeServer(tmp_path_factory.mktemp("blends"), model_folder)
    yield make(adapters=("a", "b", "c"), engine={"max_lora_rank": 16}).until_ready()
    make.stop()


@pytest.fixture
def server(blender: Server) -> Server:
    blender.log.unlink(missing_ok=True)
    return blender


def digest(server: Server, name: str) -> str:
    return server.state.store.resolve(name).digest


def key_of(server: Server, weights: dict[str, float], method: str = "linear", **fields: Any) -> str | None:
    return recipe([Part(digest(server, name), w) for name, w in weights.items()], method, **fields).key


def blend(server: Server, *adapters: Any, model: str = BASE, **fields: Any) -> Any:
    body = {"model": model, "prompt": "one two", "max_tokens": 2, "adapters": list(adapters)} | fields
    return server.post("/v1/completions", {name: value for name, value in body.items() if value is not None})


def asked(server: Server) -> list[str | None]:
    return [message["adapter"] for message in server.received("Generate")]


A, B = {"id": "a", "weight": 0.5}, {"id": "b", "weight": -1.25}


def test_the_official_client_asks_for_a_blend(server: Server) -> None:
    reply = server.openai.chat.completions.create(
        model=BASE, messages=MESSAGES, max_tokens=3, extra_body={"adapters": [A, B]}
    )
    assert reply.model == BASE
    assert reply.usage is not None
    assert reply.usage.model_dump()["blend"] == {"rank": 16, "error": None}
    assert asked(server) == [key_of(server, {"a": 0.5, "b": -1.25})]


def test_the_order_makes_no_difference_and_the_engine_is_asked_once(server: Server) -> None:
    weights = {"id": "a", "weight": 0.625}, {"id": "c", "weight": 2}
    for each in (weights, weights[::-1], weights):
        assert blend(server, *each).status_code == 200
    assert len(set(asked(server))) == 1
    assert len(server.received("CheckBlend")) == 1


def test_names_mean_what_they_mean_in_model(server: Server) -> None:
    server.state.store.alias("also-a", "a")
    reply = blend(server, {"id": "also-a", "weight": 0.5}, {"id": f"{BASE}:b@1", "weight": -1.25})
    assert reply.headers["x-veneer-adapter"] == "a@1*0.5+b@1*-1.25"
    assert asked(server) == [key_of(server, {"a": 0.5, "b": -1.25})]
    server.state.store.remove_alias("also-a")


@pytest.mark.parametrize(
    ("adapters", "expected"),
    [
        ([{"id": "a"}], {"a": 1.0}),
        ([{"id": "a", "weight": 1}, {"id": "b", "weight": 0}], {"a": 1.0}),
        ([A, A], {"a": 1.0}),
        ([A, {"id": "a", "weight": -0.5}], {}),
        ([A, {"id": "b", "weight": 0.5}, A], {"a": 1.0, "b": 0.5}),
    ],
)
def test_what_is_one_adapter_or_the_base_runs_as_such(
    server: Server, adapters: list[Any], expected: dict[str, float]
) -> None:
    reply = blend(server, *adapters)
    assert reply.status_code == 200
    assert asked(server) == [key_of(server, expected) if expected else None]
    assert ("blend" in reply.json()["usage"]) == (len(expected) > 1)


def test_a_rank_cap_tells_its_error(server: Server) -> None:
    message = error(blend(server, A, B, {"id": "c"}), 400, "adapter_refused")
    assert message == "the ranks add up to 24; send max_rank"
    reply = blend(server, A, B, {"id": "c"}, max_rank=12)
    assert reply.json()["usage"]["blend"] == {"rank": 12, "error": 0.1}
    assert reply.headers["x-veneer-blend-error"] == "0.1"
    assert asked(server) == [key_of(server, {"a": 0.5, "b": -1.25, "c": 1.0}, rank=12)]


def test_a_stream_tells_it_with_its_usage(server: Server) -> None:
    options = {"include_usage": True}
    reply = blend(server, A, B, max_rank=4, stream=True, stream_options=options)
    events = [line.removeprefix("data: ") for line in reply.text.splitlines() if line]
    assert json.loads(events[-2])["usage"]["blend"] == {"rank": 4, "error": 0.1}


@pytest.mark.parametrize(
    ("fields", "status", "param", "why"),
    [
        ({"model": "a"}, 400, "model", "'a' is an adapter; with several it must be the base"),
        ({"adapters": []}, 400, "adapters", "at least 1"),
        ({"adapters": [A] * 17}, 400, "adapters", "at most 16"),
        ({"adapters": [{"id": "a", "weight": "1"}]}, 400, "adapters[0].weight", "valid number"),
        ({"adapters": [{"id": "a", "weight": 1e9}]}, 400, "adapters[0].weight", "less than or equal to 1000"),
        ({"adapters": [{"id": "a", "scale": 1}]}, 400, "adapters[0].scale", "Extra inputs"),
        ({"adapters": [{"weight": 1}]}, 400, "adapters[0].id", "required"),
        ({"adapters": ["a"]}, 400, "adapters[0]", "valid dictionary"),
        ({"adapters": [{"id": "nobody"}]}, 404, "model", "'nobody' does not exist"),
        ({"adapters": [{"id": "a@7"}]}, 404, "model", "has no version 7"),
        ({"adapters": [{"id": BASE}]}, 400, "adapters", "is the base, which needs no weight"),
        ({"adapters": [{"id": "a", "task_id": 0}, B]}, 400, "adapters", "it has no tasks"),
        ({"adapters": [A, B], "task_id": 0}, 400, "task_id", "belongs to an entry of adapters"),
        ({"adapters": None, "max_rank": 4}, 400, "max_rank", "belongs to adapters"),
        ({"max_rank": 0}, 400, "max_rank", "greater than or equal to 1"),
        (
            {"merged_adapters": {"ids": ["a"], "weights": [1.0]}},
            400,
            "merged_adapters",
            "say the same thing; send one",
        ),
    ],
)
def test_what_is_no_blend_is_refused_by_name(
    server: Server, fields: dict[str, Any], status: int, param: str, why: str
) -> None:
    reply = blend(server, A, B, **fields)
    assert reply.status_code == status
    told = reply.json()["error"]
    assert told["param"] == param
    assert why in told["message"]
    assert asked(server) == []


def test_tasks_are_named_by_entry(make_server: MakeServer) -> None:
    server = make_server().until_ready()
    tasks = made(server, "tasks", tasks=3)["digest"]
    other = made(server, "other", b"other")["digest"]
    entries = [{"id": "tasks", "task_id": 2, "weight": 0.5}, {"id": "other", "weight": 0.5}]
    assert blend(server, *entries).status_code == 200
    assert asked(server) == [recipe([Part(f"{tasks}/2", 0.5), Part(other, 0.5)]).key]
    message = blend(server, {"id": "tasks"}, {"id": "other"}).json()["error"]["message"]
    assert "the tasks 0 to 2; its entry needs a task_id" in message


# ---- LoRAX ----------------------------------------------------------------------------------------


def merged(server: Server, **fields: Any) -> Any:
    body = {"ids": ["a", "b"], "weights": [0.5, -1.25]} | fields
    return blend(server, adapters=None, merged_adapters=body)


@pytest.mark.parametrize(
    ("fields", "method", "recipe_fields"),
    [
        ({}, "linear", {}),
        ({"merge_strategy": "linear", "density": 0.0, "majority_sign_method": "total"}, "linear", {}),
        ({"merge_strategy": "ties", "density": 0.5}, "ties", {"density": 0.5}),
        (
            {"merge_strategy": "ties", "density": 0.5, "majority_sign_method": "frequency"},
            "ties",
            {"density": 0.5, "sign": "frequency"},
        ),
        ({"merge_strategy": "dare_linear", "density": 0.25}, "dare_linear", {"density": 0.25}),
        ({"merge_strategy": "dare_ties", "density": 0.25}, "dare_ties", {"density": 0.25}),
    ],
)
def test_loraxs_body_is_taken(
    server: Server, fields: dict[str, Any], method: str, recipe_fields: dict[str, Any]
) -> None:
    assert merged(server, **fields).status_code == 200
    assert asked(server) == [key_of(server, {"a": 0.5, "b": -1.25}, method, **recipe_fields)]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"weights": [1.0]}, "merged_adapters.weights"),
        ({"ids": []}, "merged_adapters.ids"),
        ({"merge_strategy": "ties"}, "merged_adapters.density"),
        ({"density": 0.5}, "merged_adapters.density"),
        ({"density": 2.0}, "merged_adapters.density"),
        ({"merge_strategy": "slerp"}, "merged_adapters.merge_strategy"),
        ({"majority_sign_method": "loudest"}, "merged_adapters.majority_sign_method"),
    ],
)
def test_loraxs_body_is_checked(server: Server, fields: dict[str, Any], param: str) -> None:
    reply = merged(server, **fields)
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == param


# ---- text -----------------------------------------------------------------------------------------


def test_adapters_that_are_read_differently_have_no_blend(make_server: MakeServer) -> None:
    server = make_server().until_ready()
    template = ("files", ("chat_template.jinja", b"{{ messages[0].content }}"))
    for number, name in enumerate(("own", "same", "plain")):
        parts = [*files(bytes([number])), *([template] if name != "plain" else [])]
        reply = server.http.post("/v1/adapters", data={"name": name}, files=parts)
        assert reply.status_code == 201, reply.text
    own, same, plain = ({"id": name, "weight": 0.5} for name in ("own", "same", "plain"))
    message = blend(server, own, plain).json()["error"]["message"]
    assert "'own' and 'plain' are read with different tokenizers, chat templates" in message
    assert blend(server, own, same).status_code == 200
    body = {"model": BASE, "messages": MESSAGES, "max_tokens": 1, "adapters": [own, same]}
    assert server.post("/v1/chat/completions", body).status_code == 200
    prompts = [message["prompt"] for message in server.received("Generate")]
    text = server.state.texts.base.tokenizer
    assert prompts[-1] == text.encode("one two three", add_special_tokens=False)


# ---- deletes --------------------------------------------------------------------------------------


def test_a_running_blend_keeps_all_its_adapters(make_server: MakeServer) -> None:
    server = make_server("--step-seconds", "0.05", adapters=("a", "b")).until_ready()
    body = {"model": BASE, "prompt": "one two", "max_tokens": 200, "stream": True, "ignore_eos": True}
    with server.http.stream("POST", "/v1/completions", json=body | {"adapters": [A, B]}) as reply:
        assert reply.status_code == 200
        assert server.state.in_flight.total() == 1
        lines = reply.iter_lines()
        next(lines)
        held = [server.state.in_flight.count(digest(server, name)) for name in ("a", "b")]
        assert held == [1, 1]

        async def begin() -> asyncio.Task[Any]:
            from veneer.server.publish import delete

            return asyncio.create_task(delete(server.state, "b"))

        task = server.call(begin())
        server.until(lambda: not any(each.name == "b" for each in server.state.store.list()))
        assert not task.done()
        assert server.received("DropAdapter") == []
        message = error(blend(server, A, B), 404, "model_not_found")
        assert "'b' does not exist" in message
    server.until(task.done)
    assert [each["digest"] for each in server.received("DropAdapter")] != []
    assert server.state.in_flight.total() == 0


# ---- saved blends ---------------------------------------------------------------------------------


def save(server: Server, name: str, **body: Any) -> Any:
    return server.http.put(f"/v1/aliases/{name}", json=body)


def test_a_saved_blend_is_a_model_and_stays_what_it_was(make_server: MakeServer) -> None:
    server = make_server(adapters=("a", "b")).until_ready()
    expected = key_of(server, {"a": 0.5, "b": -1.25})
    reply = save(server, "team/mixed", adapters=[A, B])
    assert reply.status_code == 200, reply.text
    saved = reply.json()
    assert saved["id"] == "team/mixed"
    assert saved["adapters"] == [
        {"id": "a@1", "weight": 0.5, "task_id": None},
        {"id": "b@1", "weight": -1.25, "task_id": None},
    ]
    assert (saved["rank"], saved["error"], saved["method"]) == (16, None, "linear")
    made(server, "a", b"a newer version of a")
    answer = server.openai.completions.create(model="team/mixed", prompt="one two", max_tokens=2)
    assert answer.model == "team/mixed"
    assert asked(server) == [expected]
    models = {each.id: each for each in server.openai.models.list()}
    assert models["team/mixed"].model_dump()["root"] == "a@1*0.5+b@1*-1.25"
    assert server.openai.models.retrieve("team/mixed").model_dump()["parent"] == BASE
    assert server.http.get("/v1/aliases/team/mixed").json()["adapters"] == saved["adapters"]
    tokens = server.post("/tokenize", {"model": "team/mixed", "prompt": "one two"})
    assert tokens.status_code == 200
    metrics = server.http.get("/metrics").text
    assert 'veneer_adapter_requests_total{adapter="team/mixed"} 1.0' in metrics


def test_a_saved_blend_keeps_its_adapters(make_server: MakeServer) -> None:
    server = make_server(adapters=("a", "b")).until_ready()
    save(server, "mixed", adapters=[A, B])
    message = error(server.http.delete("/v1/adapters/a"), 409, "conflict")
    assert "is the target of 'mixed'" in message
    made(server, "a", b"second")
    assert "version 1 of adapter 'a'" in error(server.http.delete("/v1/adapters/a@1"), 409, "conflict")
    assert "is a saved blend" in error(
        server.http.post("/v1/adapters", data={"name": "mixed"}, files=files()), 409, "conflict"
    )
    assert "is a blend itself" in blend(server, {"id": "mixed"}, A).json()["error"]["message"]
    assert "an adapter's name" in error(save(server, "b", adapters=[A]), 409, "conflict")
    assert server.http.delete("/v1/aliases/mixed").status_code == 200
    assert server.http.delete("/v1/aliases/mixed").status_code == 404
    assert server.http.delete("/v1/adapters/a@1").status_code == 200
    assert server.post("/v1/completions", {"model": "mixed", "prompt": "one"}).status_code == 404


def test_an_alias_and_a_blend_take_each_others_place(make_server: MakeServer) -> None:
    server = make_server(adapters=("a", "b")).until_ready()
    for body, kind in (
        ({"target": "a"}, "alias"),
        ({"adapters": [A, B]}, "blend"),
        ({"target": "b"}, "alias"),
    ):
        assert save(server, "name", **body).json()["object"] == kind
        assert server.http.get("/v1/aliases/name").json()["object"] == kind
    assert server.state.store.blends() == ()
    bodies: list[dict[str, Any]] = [{}, {"target": "a", "adapters": [A]}]
    for body in (*bodies, {"adapters": [A, {"id": "a", "weight": -0.5}]}):
        assert save(server, "name", **body).status_code == 400
    assert server.http.get("/v1/aliases/name").json()["target"] == "b"


def test_a_blend_that_the_engine_refuses_is_not_saved(make_server: MakeServer) -> None:
    server = make_server(adapters=("a", "b"), engine={"max_lora_rank": 8}).until_ready()
    assert "send max_rank" in error(save(server, "mixed", adapters=[A, B]), 400, "adapter_refused")
    assert server.state.store.blends() == ()
    assert save(server, "mixed", adapters=[A, B], max_rank=8).json()["error"] == 0.1


def test_saved_blends_survive_a_restart(tmp_path: Path) -> None:
    with AdapterStore(tmp_path) as store:
        for name in ("a", "b"):
            add_adapter(store, name)
        from veneer.server.blend_wire import MergedAdapters, Mixture, make_blend

        body = MergedAdapters(ids=["a", "b"], weights=[0.1, 0.7], merge_strategy="ties", density=0.3)
        made_up = make_blend(store, BASE, Mixture(merged_adapters=body, max_rank=5))
        assert made_up is not None
        saved = store.save_blend("mixed", made_up.ingredients, made_up.recipe)
        assert saved.key == made_up.key
    with AdapterStore(tmp_path) as store:
        (again,) = store.blends()
        assert again == saved
        with pytest.raises(Conflict, match="'mixed'"):
            store.begin_delete("a")
        store.remove_alias("mixed")
        store.finish_delete(store.begin_delete("a"))
        assert [each.name for each in store.list()] == ["b"]
