"""The fine-tuning routes: bodies, lists, errors, and OpenAI's schemas. What happens to jobs is in test_jobs.py."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from tests.server.adapters import error, made
from tests.server.conftest import BASE, MakeServer, Server
from tests.server.jobs import (
    conforms,
    create,
    get,
    put,
    rows,
    steps,
    until_over,
    until_status,
    waiting,
)

from veneer.server.state import ServerConfig

JOBS = "/v1/fine_tuning/jobs"


@pytest.fixture(scope="module")
def file(module_server: Server) -> str:
    return put(module_server).id


def test_a_job_is_as_openai_describes_it(make_server: MakeServer) -> None:
    server = make_server().until_ready()
    training, validation = put(server), put(server, rows(2))
    asked: Any = {"batch_size": 2, "n_epochs": 2, "learning_rate_multiplier": "auto"}
    job = server.openai.fine_tuning.jobs.create(
        model=BASE,
        training_file=training.id,
        validation_file=validation.id,
        suffix="poet",
        seed=11,
        metadata={"team": "a"},
        method={"type": "supervised", "supervised": {"hyperparameters": asked}},
    )
    assert job.hyperparameters.to_dict() == {"batch_size": 2, "n_epochs": 2, "learning_rate_multiplier": 1.0}
    assert (job.seed, job.metadata, job.training_file) == (11, {"team": "a"}, training.id)
    assert job.fine_tuned_model is None
    done = until_over(server, job.id)
    assert done.error is None
    assert done.status == "succeeded"
    assert done.fine_tuned_model == f"ft:{BASE}:poet:{job.id[-8:]}"
    assert done.trained_tokens == 10 * len(steps(server, job.id)) == 80
    assert done.finished_at is not None
    conforms(server.http.get(f"{JOBS}/{job.id}").json(), "FineTuningJob")
    conforms(server.http.get(JOBS).json(), "ListPaginatedFineTuningJobsResponse")
    conforms(server.http.get(f"{JOBS}/{job.id}/events").json(), "ListFineTuningJobEventsResponse")
    listed = server.http.get(f"{JOBS}/{job.id}/checkpoints").json()
    conforms(listed, "ListFineTuningJobCheckpointsResponse")
    assert [each["step_number"] for each in listed["data"]] == [8, 4]
    assert listed["data"][1]["metrics"] == {"step": 4, "train_loss": 0.25}
    table = server.openai.files.content(done.result_files[0]).text.splitlines()
    assert table[:3] == ["step,train_loss,valid_loss", "1,1.0,", "2,0.5,1.0"]
    assert server.openai.files.retrieve(done.result_files[0]).purpose == "fine-tune-results"


def test_defaults_and_own_fields(make_server: MakeServer) -> None:
    server = make_server("--load-seconds", "60")  # jobs wait for the engine
    job = create(server, hyperparameters={}, training={"packing": True, "checkpoint_every": 5})
    body = job.to_dict()
    assert job.status == "queued"
    assert body["hyperparameters"] == {"batch_size": 8, "n_epochs": 3, "learning_rate_multiplier": 1.0}
    assert body["method"] == {
        "type": "supervised",
        "supervised": {"hyperparameters": body["hyperparameters"]},
    }
    training: Any = body["training"]
    assert (training["packing"], training["checkpoint_every"], training["loss_on"]) == (True, 5, "assistant")
    method: Any = {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.3}}}
    dpo = create(server, hyperparameters=openai.omit, method=method).to_dict()
    conforms(dpo, "FineTuningJob")
    assert dpo["method"]["dpo"]["hyperparameters"]["beta"] == 0.3  # type: ignore[index]
    text = create(server, hyperparameters=openai.omit, method={"type": "self_supervised"}).to_dict()
    assert text["training"]["loss_on"] == "all"  # type: ignore[index]


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"model": "nothing"}, "model", "model_not_found"),
        ({"model": "sql"}, "model", "unsupported_parameter"),
        ({"model": 5}, "model", "invalid_value"),
        ({"training_file": "file-nothing"}, "training_file", "file_not_found"),
        ({"training_file": "../store.db"}, "training_file", "file_not_found"),
        ({"training_file": None}, "training_file", "invalid_value"),
        ({"validation_file": "file-nothing"}, "validation_file", "file_not_found"),
        ({"suffix": "a b"}, "suffix", "invalid_value"),
        ({"suffix": "x" * 65}, "suffix", "invalid_value"),
        ({"suffix": ""}, "suffix", "invalid_value"),
        ({"seed": 2**31}, "seed", "invalid_value"),
        ({"seed": 1.5}, "seed", "invalid_value"),
        ({"metadata": {"a": 1}}, "metadata.a", "invalid_value"),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata", "invalid_value"),
        ({"integrations": [{"type": "wandb", "wandb": {}}]}, "integrations", "unsupported_parameter"),
        ({"method": {"type": "reinforcement", "reinforcement": {}}}, "method.type", "unsupported_parameter"),
        ({"method": {"type": "dpo", "supervised": {}}}, "method.supervised", "invalid_value"),
        ({"method": {"type": "dpo"}, "hyperparameters": {}}, "hyperparameters", "invalid_value"),
        ({"hyperparameters": {"n_epochs": 51}}, "hyperparameters.n_epochs", "invalid_value"),
        ({"hyperparameters": {"n_epochs": True}}, "hyperparameters.n_epochs", "invalid_value"),
        ({"hyperparameters": {"beta": 1}}, "hyperparameters.beta", "invalid_value"),
        ({"colour": "red"}, "colour", "invalid_value"),
        ({"adapter": {"kind": "nothing"}}, "adapter.kind", "invalid_value"),
        ({"adapter": {"colour": "red"}}, "adapter.colour", "invalid_value"),
        ({"adapter": []}, "adapter", "invalid_value"),
        ({"training": {"colour": "red"}}, "training.colour", "invalid_value"),
        ({"training": {"seed": 5}}, "training.seed", "invalid_value"),
        ({"training": {"adapter": {}}}, "training.adapter", "invalid_value"),
        ({"training": {"epochs": 1}, "hyperparameters": {"n_epochs": 1}}, "training.epochs", "invalid_value"),
        ({"training": {"packing": True}, "method": {"type": "dpo"}}, "training", "invalid_value"),
        ({"training": {"learning_rate": 5}}, "training.learning_rate", "invalid_value"),
    ],
)
def test_refused_jobs(server: Server, file: str, fields: dict[str, Any], param: str, code: str) -> None:
    reply = server.post(JOBS, {"model": BASE, "training_file": file} | fields)
    error(reply, 404 if code == "model_not_found" else 400, code)
    assert reply.json()["error"]["param"] == param
    assert list((server.state.store.root / "jobs").iterdir()) == []
    assert list((server.state.store.root / "staging").iterdir()) == []


def test_refused_bodies(server: Server, file: str) -> None:
    error(server.post(JOBS, b"{"), 400, "invalid_json")
    error(server.post(JOBS, b"[]"), 400, "invalid_json")
    error(server.post(JOBS, b'{"model": "\xff"}'), 400, "invalid_json")
    error(server.post(JOBS, b'{"model": "' + b"x" * (1 << 17) + b'"}'), 413, "too_large")
    deep = b"[" * 5000 + b"]" * 5000
    reply = server.post(
        JOBS,
        b'{"model": "%s", "training_file": "%s", "adapter": {"options": {"a": %s}}}'
        % (BASE.encode(), file.encode(), deep),
    )
    assert reply.status_code == 400


def test_other_purposes_and_equal_files(server: Server, file: str) -> None:
    other = server.openai.files.create(file=("a.jsonl", b"x"), purpose="user_data").id
    reply = server.post(JOBS, {"model": BASE, "training_file": other})
    assert "'user_data'" in error(reply, 400, "invalid_value")
    reply = server.post(JOBS, {"model": BASE, "training_file": file, "validation_file": file})
    assert reply.json()["error"]["param"] == "validation_file"


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/ftjob-nothing", 404, "not_found"),
        ("GET", "/ftjob-nothing/events", 404, "not_found"),
        ("GET", "/ftjob-nothing/checkpoints", 404, "not_found"),
        ("POST", "/ftjob-nothing/cancel", 404, "not_found"),
        ("POST", "/ftjob-nothing/pause", 404, "not_found"),
        ("POST", "/..%2F../resume", 404, "not_found"),
        ("GET", "?after=ftjob-nothing", 404, "not_found"),
        ("GET", "?limit=0", 400, "invalid_value"),
        ("GET", "?limit=1001", 400, "invalid_value"),
        ("GET", "?metadata=x", 400, "invalid_value"),
        ("DELETE", "/ftjob-nothing", 405, "method_not_allowed"),
    ],
)
def test_what_is_not_there(server: Server, method: str, path: str, status: int, code: str) -> None:
    error(server.http.request(method, JOBS + path), status, code)


def test_lists_are_paged_and_filtered(make_server: MakeServer) -> None:
    server = make_server("--load-seconds", "60")
    training = put(server).id
    labels: list[dict[str, str]] = [{"a": "1"}, {}, {"a": "1", "b": "x y"}, {"a": "2"}, {'"': "]["}]
    ids = [create(server, training_file=training, metadata=each).id for each in labels]
    jobs = server.openai.fine_tuning.jobs
    assert [each.id for each in jobs.list(limit=2)] == ids[::-1]
    assert [each.id for each in jobs.list(limit=2).data] == ids[:-3:-1]
    assert [each.id for each in jobs.list(metadata={"a": "1"}, limit=1)] == [ids[2], ids[0]]
    assert [each.id for each in jobs.list(metadata={"a": "1", "b": "x y"})] == [ids[2]]
    assert [each.id for each in jobs.list(metadata={'"': "]["})] == [ids[4]]
    assert [each["id"] for each in server.http.get(f"{JOBS}?metadata=null").json()["data"]] == [ids[1]]
    assert not server.http.get(f"{JOBS}?after={ids[0]}").json()["has_more"]


def test_events_and_checkpoints_are_paged(make_server: MakeServer) -> None:
    server = make_server().until_ready()
    job = create(server, training={"checkpoint_every": 1})
    until_over(server, job.id)
    jobs = server.openai.fine_tuning.jobs
    whole = server.http.get(f"{JOBS}/{job.id}/events?limit=1000").json()
    assert not whole["has_more"]
    assert [each.id for each in jobs.list_events(job.id, limit=3)] == [each["id"] for each in whole["data"]]
    assert [each.step_number for each in jobs.checkpoints.list(job.id, limit=1)] == [4, 3, 2, 1]
    for path in ("events?after=x", "events?after=ftevent-x", "checkpoints?after=ftevent-1"):
        error(server.http.get(f"{JOBS}/{job.id}/{path}"), 404, "not_found")


def test_many_jobs_at_once(make_server: MakeServer) -> None:
    server = make_server(config=ServerConfig(max_unfinished_jobs=5)).until_ready()
    training = put(server).id
    body = {"model": BASE, "training_file": training, "hyperparameters": {"n_epochs": 50}}
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda _: server.post(JOBS, body), range(8)))
    assert sorted(reply.status_code for reply in replies) == [200] * 5 + [429] * 3
    refused = next(reply for reply in replies if reply.status_code == 429)
    assert refused.headers["retry-after"] == "60"
    assert "limit is 5" in error(refused, 429, "queue_full")
    ids = [reply.json()["id"] for reply in replies if reply.status_code == 200]
    assert [until_over(server, id).status for id in ids] == ["succeeded"] * 5
    begun = [message["id"] for message in server.received("StartJob")]
    assert begun == sorted(ids, key=[each.id for each in server.openai.fine_tuning.jobs.list()][::-1].index)


def test_old_jobs_are_forgotten(make_server: MakeServer) -> None:
    server = make_server(config=ServerConfig(max_jobs=2)).until_ready()
    training = put(server).id
    ids = []
    for _ in range(3):
        ids.append(create(server, training_file=training).id)
        done = until_over(server, ids[-1])
    assert [each.id for each in server.openai.fine_tuning.jobs.list()] == ids[:0:-1]
    assert sorted(path.name for path in (server.state.store.root / "jobs").iterdir()) == sorted(ids[1:])
    results = list(server.openai.files.list(purpose="fine-tune-results"))
    assert [each.id for each in results] == [*done.result_files, *get(server, ids[1]).result_files]


def test_only_jobs_give_their_names(make_server: MakeServer) -> None:
    server = make_server().until_ready()
    made(server, "mine")
    name = f"ft:{BASE}:x:abc"
    reply = server.http.post(
        "/v1/adapters",
        data={"name": name},
        files=[("files", ("adapter_config.json", b"{}")), ("files", ("adapter_model.safetensors", b"x"))],
    )
    assert "only fine-tuning jobs" in error(reply, 400, "invalid_value")
    error(server.http.put(f"/v1/aliases/{name}", json={"target": "mine"}), 400, "invalid_value")


def test_jobs_when_nothing_can_train(make_server: MakeServer, tmp_path: Path) -> None:
    options, gate = waiting(tmp_path)
    server = make_server().until_ready()
    job = create(server, options=options)
    until_status(server, job.id, "running")
    server.state.engine.state = "draining"
    try:
        reply = server.post(JOBS, {"model": BASE, "training_file": "file-x"})
        error(reply, 503, "engine_unavailable")
    finally:
        server.state.engine.state = "ready"
        gate.touch()
