"""A fine-tuning job on the packaged base, by the official client: from rows to right answers, and over a kill."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI
from tests.conftest import ROOT, LiveServer, until

pytestmark = pytest.mark.model

BASE = "SmolLM2-135M-Instruct"
DATA = ROOT / "examples" / "data"
HELD_OUT = 20
RECIPE = {"batch_size": 8, "learning_rate": 2e-3, "max_length": 96, "schedule": "cosine"}
SECONDS = 500.0  # until a test gives up


@pytest.fixture(scope="module")
def server(live_server: Callable[..., LiveServer], tmp_path_factory: pytest.TempPathFactory) -> LiveServer:
    options = ["--store", str(tmp_path_factory.mktemp("store")), "--quantization", "none", "--threads", "1"]
    return live_server(*options, "--kv-cache-memory", "256MiB")


@pytest.fixture
def client(server: LiveServer) -> Iterator[OpenAI]:
    with connect(server) as client:
        yield client


def connect(server: LiveServer) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)


def ask(client: OpenAI, model: str, prompt: str) -> str:
    messages: Any = [{"role": "user", "content": prompt}]
    reply = client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=24)
    return str(reply.choices[0].message.content).strip()


def right(client: OpenAI, model: str, file: Path) -> int:
    """How many of the held-out rows it answers exactly."""
    rows = [json.loads(line) for line in file.read_text().splitlines()[:HELD_OUT]]
    with ThreadPoolExecutor(HELD_OUT) as pool:
        answers = pool.map(lambda row: ask(client, model, row["prompt"]), rows)
        return sum(answer == row["completion"] for answer, row in zip(answers, rows, strict=True))


def create(client: OpenAI, name: str, **training: Any) -> str:
    file = client.files.create(file=DATA / f"{name}.train.jsonl", purpose="fine-tune")
    extra = {"adapter": {"rank": 4, "alpha": 16}, "training": RECIPE | training}
    job = client.fine_tuning.jobs.create(
        model=BASE, training_file=file.id, suffix=name, seed=1, extra_body=extra
    )
    return job.id


def over(client: OpenAI, id: str) -> Any:
    job = client.fine_tuning.jobs.retrieve(id)
    return job if job.status in ("succeeded", "failed", "cancelled") else None


def steps(client: OpenAI, id: str) -> list[int]:
    events: list[Any] = list(client.fine_tuning.jobs.list_events(id))[::-1]
    return [event.data["step"] for event in events if event.type == "metrics"]


def test_rows_become_an_adapter_that_answers(client: OpenAI) -> None:
    assert right(client, BASE, DATA / "negate.test.jsonl") <= 1
    id = create(client, "negate", steps=24)
    until(lambda: steps(client, id), SECONDS)
    assert ask(client, BASE, "Name a colour.")  # requests are answered meanwhile
    assert over(client, id) is None
    job = until(lambda: over(client, id), SECONDS)
    assert job.status == "succeeded", job.error
    assert steps(client, id) == list(range(1, 25))
    assert right(client, job.fine_tuned_model, DATA / "negate.test.jsonl") >= 0.95 * HELD_OUT


def test_a_killed_job_ends_as_if_nothing_had_been(server: LiveServer, client: OpenAI) -> None:
    """The server dies with its engine in the middle of the second of two equal jobs."""
    ids = [create(client, "negate", steps=4, checkpoint_every=2, batch_size=2) for _ in range(2)]
    assert until(lambda: over(client, ids[0]), SECONDS).status == "succeeded"
    until(lambda: 2 in steps(client, ids[1]), SECONDS)
    assert over(client, ids[1]) is None
    server.stop(signal.SIGKILL)
    server.start()
    with connect(server) as again:
        job = until(lambda: over(again, ids[1]), SECONDS)
        assert job.status == "succeeded", job.error
        assert steps(again, ids[1]) == [1, 2, 3, 4]
        losses = [again.files.content(over(again, id).result_files[0]).text for id in ids]
        for first, second in zip(*(text.splitlines()[1:] for text in losses), strict=True):
            assert float(first.split(",")[1]) == pytest.approx(float(second.split(",")[1]), rel=1e-3)
        names = {
            checkpoint.fine_tuned_model_checkpoint
            for checkpoint in again.fine_tuning.jobs.checkpoints.list(ids[1])
        }
        assert names | {job.fine_tuned_model} <= {model.id for model in again.models.list()}
