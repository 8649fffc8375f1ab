"""The life of fine-tuning jobs: published, failed, cancelled, paused, and restarts of engine and server."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Any

import openai
import pytest
from tests.server.adapters import complete, error, left_behind
from tests.server.conftest import BASE, MakeServer, Server
from tests.server.jobs import (
    OVER,
    ROWS,
    create,
    events,
    get,
    messages,
    put,
    steps,
    until_over,
    until_status,
    waiting,
)

from veneer.server.state import ServerConfig
from veneer.training.jobs import job_events

INTERRUPTED = "Training was interrupted and goes on from its last saved state"


@pytest.fixture
def fresh(make_server: MakeServer) -> Server:
    return make_server().until_ready()


def folder(server: Server, id: str) -> Path:
    return server.state.store.root / "jobs" / id


def left(server: Server, id: str) -> list[str]:
    return [path.name for path in folder(server, id).iterdir()]


def served(server: Server) -> set[str]:
    return {model.id for model in server.openai.models.list()} - {BASE}


# ---- ends -----------------------------------------------------------------------------------------


def test_a_job_from_file_to_answer(fresh: Server) -> None:
    job = create(fresh, suffix="my.poet", training={"checkpoint_every": 2})
    done = until_over(fresh, job.id)
    name = f"ft:{BASE}:my.poet:{job.id[-8:]}"
    assert (done.status, done.fine_tuned_model) == ("succeeded", name)
    first, second = (f"{name}:ckpt-step-{step}" for step in (2, 4))
    assert served(fresh) == {name, first, second}
    listed = fresh.openai.fine_tuning.jobs.checkpoints.list(job.id)
    assert [each.fine_tuned_model_checkpoint for each in listed] == [second, first]
    assert messages(fresh, job.id) == [
        f"Created fine-tuning job: {job.id}",
        f"Validating {job.training_file}",
        "Files validated, moving job to running state",
        "Step 1/4: training loss=1.0000",
        "Step 2/4: training loss=0.5000, validation loss=1.0000",
        f"Checkpoint created at step 2: {first}",
        "Step 3/4: training loss=0.3333",
        "Step 4/4: training loss=0.2500, validation loss=0.5000",
        f"Checkpoint created at step 4: {second}",
        f"New fine-tuned model created: {name}",
        "The job has successfully completed",
    ]
    for model in (name, first, f"{name}@1", f"{BASE}:{name}"):
        assert complete(fresh, model).status_code == 200
    digest = fresh.http.get(f"/v1/adapters/{name}").json()["digest"]
    assert [each["adapter"] for each in fresh.received("Generate")[::2]] == [digest] * 2
    assert left_behind(fresh) == []


def test_a_result_is_a_model_like_others(fresh: Server) -> None:
    name = until_over(fresh, create(fresh).id).fine_tuned_model
    assert name is not None
    assert re.fullmatch(rf"ft:{BASE}::[a-z0-9]{{8}}", name)
    assert fresh.http.put("/v1/aliases/prod", json={"target": name}).status_code == 200
    assert complete(fresh, "prod").status_code == 200
    assert fresh.http.post(f"/v1/adapters/{name}/pin").json()["pinned"]
    assert fresh.http.delete("/v1/aliases/prod").status_code == 200
    assert fresh.openai.models.delete(name).deleted
    error(complete(fresh, name), 404, "model_not_found")
    with pytest.raises(openai.BadRequestError):
        fresh.openai.models.delete(BASE)


def test_state_and_data_go_when_a_job_is_over(fresh: Server) -> None:
    job = create(fresh)
    until_over(fresh, job.id)
    fresh.until(lambda: left(fresh, job.id) == ["training.json"])


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ({"invalid": "line 3 has no messages"}, "invalid_rows", "line 3 has no messages"),
        ({"fail_at": 3}, "nan_loss", "the loss is NaN at step 3"),
        ({"config": {"result": {"refuse": "no rank"}}}, "adapter_refused", "no rank"),
        ({"config": {"result": {"ineffective": True}}}, "adapter_refused", "it changes nothing"),
    ],
)
def test_a_job_fails_with_its_reason(fresh: Server, options: dict[str, Any], code: str, message: str) -> None:
    training: dict[str, Any] = {"checkpoint_every": 2}
    job = create(fresh, options=options, training=training)
    done = until_over(fresh, job.id)
    assert done.status == "failed"
    assert done.error is not None
    assert done.error.code == code
    assert message in done.error.message
    assert (done.fine_tuned_model, done.result_files, done.trained_tokens) == (None, [], None)
    last = events(fresh, job.id)[-1]
    assert (last.level, message in last.message) == ("error", True)
    checkpoints = list(fresh.openai.fine_tuning.jobs.checkpoints.list(job.id))
    assert len(checkpoints) == (0 if "invalid" in options else 1 if "fail_at" in options else 2)
    for each in checkpoints:
        assert complete(fresh, each.fine_tuned_model_checkpoint).status_code == 200
    fresh.until(lambda: fresh.http.get("/health").json()["job"] is None)
    assert (folder(fresh, job.id) / "data" / "training.jsonl").exists()  # nothing is lost
    assert until_over(fresh, create(fresh).id).status == "succeeded"  # the next one trains


GATED = {
    "checkpoint_every": 2,
    "validation_fraction": 0.5,
    "evaluation": {"gate": {"metric": "exact_match", "at_least": 0.9, "no_worse_than": "previous"}},
}


def held_out(server: Server, answer: str) -> list[dict[str, Any]]:
    """Rows that the toy engine's adapters answer like that, or not."""
    asked = [{"role": "user", "content": "one two three"}]
    return [{"messages": [*asked, {"role": "assistant", "content": answer}]}] * 3


def right_answer(server: Server) -> str:
    """What every adapter of the toy engine answers."""
    name = until_over(server, create(server).id).fine_tuned_model
    reply = server.openai.chat.completions.create(
        model=str(name), messages=[{"role": "user", "content": "one two three"}], max_tokens=64, temperature=0
    )
    return str(reply.choices[0].message.content)


def test_a_gate_is_measured_on_held_out_rows_and_what_passes_is_published(fresh: Server) -> None:
    rows = held_out(fresh, right_answer(fresh))
    jobs = [create(fresh, options={"held_out": rows}, training=GATED, suffix="same") for _ in range(2)]
    first, second = (until_over(fresh, job.id) for job in jobs)
    assert (first.status, second.status) == ("succeeded", "succeeded")
    data: Any = events(fresh, second.id)[-2].data
    assert data["gate"]["passed"]
    assert data["evaluation"].keys() >= {BASE, first.fine_tuned_model}
    assert data["evaluation"][first.fine_tuned_model]["exact_match"] == 1.0
    assert "equal to that of" in data["gate"]["reason"]
    names = [fresh.openai.files.retrieve(id).filename for id in second.result_files]
    assert names == ["step_metrics.csv", "evaluation.json", "evaluation.html"]
    page = fresh.openai.files.content(second.result_files[2]).text
    assert "one two three" in page
    assert str(first.fine_tuned_model) in page


def test_what_misses_its_gate_is_not_published_and_its_evaluation_kept(fresh: Server) -> None:
    job = create(fresh, options={"held_out": held_out(fresh, "something else")}, training=GATED)
    done = until_over(fresh, job.id)
    assert (done.status, done.fine_tuned_model) == ("failed", None)
    assert done.error is not None
    assert done.error.code == "gate_not_passed"
    assert "exact_match" in done.error.message
    assert [fresh.openai.files.retrieve(id).filename for id in done.result_files] == [
        "evaluation.json",
        "evaluation.html",
    ]
    (last, *_) = fresh.openai.fine_tuning.jobs.checkpoints.list(job.id)
    assert complete(fresh, last.fine_tuned_model_checkpoint).status_code == 200


def test_a_gate_without_rows_is_refused_before_and_never_passed_by_silence(fresh: Server) -> None:
    gate = {"evaluation": GATED["evaluation"]}
    with pytest.raises(openai.BadRequestError, match="measured on validation rows"):
        create(fresh, training=gate)
    done = until_over(fresh, create(fresh, training=GATED).id)  # the engine leaves no rows
    assert done.error is not None
    assert (done.status, done.error.code) == ("failed", "gate_not_evaluated")


def test_a_field_that_the_kind_has_no_use_for_is_refused_at_once(fresh: Server) -> None:
    with pytest.raises(openai.BadRequestError, match="'ia3' has no use for it"):
        fresh.openai.fine_tuning.jobs.create(
            model=BASE, training_file=put(fresh).id, extra_body={"adapter": {"kind": "ia3", "rank": 4}}
        )


def test_a_checkpoint_that_cannot_be_served_ends_nothing(fresh: Server) -> None:
    options = {"config": {"2": {"ineffective": True}}}
    job = create(fresh, options=options, training={"checkpoint_every": 2})
    assert until_over(fresh, job.id).status == "succeeded"
    warned = [event.message for event in events(fresh, job.id) if event.level == "warn"]
    assert warned == ["The checkpoint at step 2 is not served: it changes nothing"]
    assert [each.step_number for each in fresh.openai.fine_tuning.jobs.checkpoints.list(job.id)] == [4]


def test_old_checkpoints_give_way(make_server: MakeServer) -> None:
    server = make_server(config=ServerConfig(max_checkpoints=2)).until_ready()
    job = create(server, training={"checkpoint_every": 1})
    name = until_over(server, job.id).fine_tuned_model
    assert [each.step_number for each in server.openai.fine_tuning.jobs.checkpoints.list(job.id)] == [4, 3]
    server.until(lambda: served(server) == {name, f"{name}:ckpt-step-3", f"{name}:ckpt-step-4"})


def test_a_long_job_has_fewer_events_than_steps(
    make_server: MakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_events, "MOST_STEPS", 5)
    server = make_server().until_ready()
    job = create(server, hyperparameters=openai.omit, training={"steps": 21})
    assert until_over(server, job.id).status == "succeeded"
    assert steps(server, job.id) == [
        *sorted({*range(2, 21, 2), *range(5, 21, 5)}),
        21,
    ]  # those with a validation loss, each fifth and the last


# ---- what clients want meanwhile ------------------------------------------------------------------


def test_cancel_while_it_runs(fresh: Server, tmp_path: Path) -> None:
    options, _ = waiting(tmp_path, 3)
    job = create(fresh, options=options)
    fresh.until(lambda: steps(fresh, job.id) == [1, 2])
    waits = create(fresh)
    assert get(fresh, waits.id).status == "queued"
    cancelled = fresh.openai.fine_tuning.jobs.cancel(job.id)
    assert (cancelled.status, cancelled.finished_at is not None) == ("cancelled", True)
    assert until_over(fresh, waits.id).status == "succeeded"
    assert [each["id"] for each in fresh.received("StopJob")] == [job.id]
    assert messages(fresh, job.id)[-1] == "The job was cancelled"
    fresh.until(lambda: left(fresh, job.id) == ["training.json"])
    for change in ("cancel", "pause", "resume"):
        reply = fresh.http.post(f"/v1/fine_tuning/jobs/{job.id}/{change}")
        assert "cancelled" in error(reply, 409, "invalid_job_status")


def test_cancel_while_queued(fresh: Server, tmp_path: Path) -> None:
    options, gate = waiting(tmp_path)
    first = create(fresh, options=options)
    until_status(fresh, first.id, "running")
    second = create(fresh)
    assert fresh.openai.fine_tuning.jobs.cancel(second.id).status == "cancelled"
    gate.touch()
    assert until_over(fresh, first.id).status == "succeeded"
    assert [each["id"] for each in fresh.received("StartJob")] == [first.id]
    assert fresh.received("StopJob") == []


def test_pause_and_resume(fresh: Server, tmp_path: Path) -> None:
    options, gate = waiting(tmp_path, 3)
    job = create(fresh, options=options)
    fresh.until(lambda: steps(fresh, job.id) == [1, 2])
    jobs = fresh.openai.fine_tuning.jobs
    assert jobs.pause(job.id).to_dict()["status"] == "paused"
    assert until_over(fresh, create(fresh).id).status == "succeeded"  # the engine is free meanwhile
    error(fresh.http.post(f"/v1/fine_tuning/jobs/{job.id}/pause"), 409, "invalid_job_status")
    assert jobs.resume(job.id).status == "queued"
    gate.touch()
    assert until_over(fresh, job.id).status == "succeeded"
    assert steps(fresh, job.id) == [1, 2, 3, 4]
    told = messages(fresh, job.id)
    assert [each for each in told if not each.startswith("Step")][3:6] == [
        "The job is paused",
        "The job was resumed; it waits for its turn",
        "Training goes on",
    ]
    assert INTERRUPTED not in told


def test_resume_at_once(fresh: Server, tmp_path: Path) -> None:
    """While the engine still stops: it is started once, after that."""
    options, gate = waiting(tmp_path, 3)
    job = create(fresh, options=options)
    until_status(fresh, job.id, "running")
    for _ in range(5):
        fresh.openai.fine_tuning.jobs.pause(job.id)
        fresh.openai.fine_tuning.jobs.resume(job.id)
    gate.touch()
    assert until_over(fresh, job.id).status == "succeeded"
    assert steps(fresh, job.id) == [1, 2, 3, 4]


def test_the_files_of_a_running_job_may_go(fresh: Server, tmp_path: Path) -> None:
    options, gate = waiting(tmp_path)
    training, validation = put(fresh).id, put(fresh).id
    job = create(fresh, training_file=training, validation_file=validation, options=options)
    until_status(fresh, job.id, "running")
    for id in (training, validation):
        fresh.openai.files.delete(id)
    assert len((folder(fresh, job.id) / "data" / "training.jsonl").read_bytes().splitlines()) == ROWS
    gate.touch()
    assert until_over(fresh, job.id).status == "succeeded"


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("a.csv", "training.csv"),
        ("A.PARQUET", "training.parquet"),
        ("x", "training.jsonl"),
        ("../x.sh", "training.jsonl"),
    ],
)
def test_the_rows_keep_their_format(fresh: Server, name: str, stored: str, tmp_path: Path) -> None:
    options, _ = waiting(tmp_path)
    job = create(fresh, training_file=put(fresh, name=name).id, options=options)
    assert [path.name for path in (folder(fresh, job.id) / "data").iterdir()] == [stored]


# ---- what is shown --------------------------------------------------------------------------------


def test_health_and_metrics_show_the_running_job(fresh: Server, tmp_path: Path) -> None:
    assert fresh.http.get("/health").json()["job"] is None
    options, gate = waiting(tmp_path, 3)
    job = create(fresh, options=options)
    fresh.until(lambda: steps(fresh, job.id) == [1, 2])
    shown = fresh.http.get("/health").json()["job"]
    assert shown == {
        "id": job.id,
        "step": 2,
        "total_steps": 4,
        "tokens": 20,
        "tokens_per_second": 20.0,
        "seconds_left": 1.0,
    }
    text = fresh.http.get("/metrics").text
    assert 'veneer_fine_tuning_jobs{status="running"} 1.0' in text
    assert "veneer_training_step 2.0" in text
    assert "veneer_training_tokens_per_second 20.0" in text
    running = get(fresh, job.id)
    assert running.estimated_finish is not None
    assert complete(fresh, BASE).status_code == 200  # requests are served meanwhile
    gate.touch()
    assert until_over(fresh, job.id).estimated_finish is None
    fresh.until(lambda: 'status="succeeded"} 1.0' in fresh.http.get("/metrics").text)


# ---- restarts -------------------------------------------------------------------------------------


def test_the_engine_dies_in_the_middle(fresh: Server) -> None:
    job = create(fresh, options={"die_at": 3}, training={"checkpoint_every": 1})
    done = until_over(fresh, job.id)
    assert done.status == "succeeded"
    assert len(fresh.received("StartJob")) == 2
    assert messages(fresh, job.id).count(INTERRUPTED) == 1
    assert steps(fresh, job.id) == [1, 2, 3, 4]
    assert [each.step_number for each in fresh.openai.fine_tuning.jobs.checkpoints.list(job.id)] == [
        4,
        3,
        2,
        1,
    ]


def test_a_job_that_kills_the_engine_is_given_up(fresh: Server) -> None:
    job = create(fresh, options={"die_at": 2, "die_times": 100})
    done = until_over(fresh, job.id)
    assert done.error is not None
    assert done.error.code == "engine_died"
    assert len(fresh.received("StartJob")) == 3
    fresh.until_ready()
    assert until_over(fresh, create(fresh).id).status == "succeeded"


def test_a_server_that_ends_tells_the_engine_and_goes_on(make_server: MakeServer, tmp_path: Path) -> None:
    options, gate = waiting(tmp_path, 3)
    server = make_server().until_ready()
    job = create(server, options=options)
    waits = create(server)
    server.until(lambda: steps(server, job.id) == [1, 2])
    server.stop()
    assert [each["id"] for each in server.received("StopJob")] == [job.id]
    gate.touch()
    again = make_server(after=server)
    assert get(again, job.id).status == "running"
    assert until_over(again, job.id).status == "succeeded"
    assert until_over(again, waits.id).status == "succeeded"
    assert steps(again, job.id) == [1, 2, 3, 4]
    assert messages(again, job.id).count(INTERRUPTED) == 1
    assert messages(again, waits.id).count(INTERRUPTED) == 0


def test_a_killed_engine_while_jobs_wait(fresh: Server, tmp_path: Path) -> None:
    options, gate = waiting(tmp_path, 2)
    first, second = create(fresh, options=options), create(fresh)
    fresh.until(lambda: steps(fresh, first.id) == [1])
    pid = fresh.state.engine.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    gate.touch()
    for id in (first.id, second.id):
        assert until_over(fresh, id).status == "succeeded"
        assert steps(fresh, id) == [1, 2, 3, 4]
    assert {get(fresh, id).status for id in (first.id, second.id)} < set(OVER)


def test_cancel_without_an_engine(make_server: MakeServer) -> None:
    server = make_server("--load-seconds", "60")
    job = create(server)
    assert server.openai.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    server.until(lambda: left(server, job.id) == ["training.json"])
