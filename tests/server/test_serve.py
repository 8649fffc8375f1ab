"""`veneer serve` as a process of its own, from its arguments to its end; only the engine is a toy."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.conftest import until
from tests.server.conftest import FAKE_ENGINE, WAIT

from veneer.adapters.store import AdapterStore

# The command line's own main, with another engine command.
PROGRAM = """
import dataclasses, sys
from veneer.server import cli, serve
original, engine = serve.options_from, sys.argv[1].split()
serve.options_from = lambda *given: dataclasses.replace(original(*given), engine_command=engine)
sys.exit(cli.main(["serve", *sys.argv[2:]]))
"""


class Process:
    """A running `veneer serve`."""

    def __init__(self, arguments: list[str], engine: list[str], environment: dict[str, str]) -> None:
        command = [sys.executable, "-c", PROGRAM, " ".join(engine), *arguments]
        self.child = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | environment,
        )
        self.lines: list[str] = []
        self.url = ""
        self._printed = threading.Event()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.child.stdout is not None
        for line in self.child.stdout:
            self.lines.append(line)
            if found := re.search(r"listening on (http://\S+);", line):
                self.url = found[1]
            if line.startswith("Veneer "):
                self._printed.set()
        self._printed.set()

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def until_ready(self) -> Process:
        assert self._printed.wait(WAIT)
        assert self.child.poll() is None, self.output
        return self

    def until_answering(self) -> httpx.Response:
        """Wait for the port alone; returns what /ready says."""
        for _ in range(int(WAIT / 0.02)):
            if self.url:
                try:
                    return httpx.get(f"{self.url}/ready", timeout=WAIT)
                except httpx.TransportError:
                    pass
            threading.Event().wait(0.02)
        raise AssertionError(self.output)

    def end(self, *signals: signal.Signals) -> int:
        """Send signals and wait; returns the exit status."""
        for number in signals:
            self.child.send_signal(number)
        status = self.child.wait(WAIT)
        self._reader.join(WAIT)
        assert self.child.stdout is not None
        self.child.stdout.close()
        return status


Start = Callable[..., Process]


@pytest.fixture
def start(tmp_path: Path, model_folder: Path) -> Iterator[Start]:
    model = tmp_path / "tiny-model"
    shutil.copytree(model_folder, model)
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"")
    running: list[Process] = []

    def start(*arguments: str, engine: tuple[str, ...] = (), **environment: str) -> Process:
        command = [sys.executable, str(FAKE_ENGINE), "--log", str(tmp_path / "engine.log"), *engine]
        known = [str(model), "--port", "0", "--store", str(tmp_path / "store")]
        running.append(Process([*known, *arguments], command, environment))
        return running[-1]

    yield start
    for process in running:
        if process.child.poll() is None:
            process.end(signal.SIGKILL)


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    folder = tmp_path / "lora"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    return folder


def received(tmp_path: Path, kind: str) -> list[Any]:
    lines = (tmp_path / "engine.log").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["type"] == kind]


def test_it_serves_and_shows_what_to_try(start: Start, lora: Path) -> None:
    process = start("--lora-modules", f"demo={lora}").until_ready()
    assert httpx.get(f"{process.url}/ready").status_code == 200
    commands = [line for line in process.output.splitlines() if line.startswith("  curl ")]
    assert len(commands) == 3  # models, the base, the adapter
    for command, model in zip(commands[1:], ("tiny-model", "demo"), strict=True):
        shown = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=WAIT, check=True)
        assert json.loads(shown.stdout)["model"] == model, shown
    assert process.end(signal.SIGTERM) == 0


def test_lora_modules_are_registered_once(start: Start, lora: Path, tmp_path: Path) -> None:
    arguments = ("--lora-modules", f"demo={lora}")
    assert start(*arguments).until_ready().end(signal.SIGTERM) == 0
    process = start(*arguments).until_ready()
    files = {"archive": ("a.zip", b"no")}
    assert httpx.post(f"{process.url}/v1/adapters", data={"name": "demo"}, files=files).status_code == 400
    newer = [
        ("files", ("adapter_config.json", b"{}")),
        ("files", ("adapter_model.safetensors", b"newer")),
    ]
    assert httpx.post(f"{process.url}/v1/adapters", data={"name": "demo"}, files=newer).status_code == 201
    assert process.end(signal.SIGTERM) == 0
    process = start(*arguments).until_ready()  # an upload is not undone by a restart
    assert httpx.get(f"{process.url}/v1/adapters/demo").json()["version"] == 2
    assert "version 1, another one is current" in process.output
    assert process.end(signal.SIGTERM) == 0
    with AdapterStore(tmp_path / "store") as store:
        assert [each.version for each in store.versions("demo")] == [1, 2]


def test_pins_outlive_the_process(start: Start, lora: Path, tmp_path: Path) -> None:
    process = start("--lora-modules", f"demo={lora}").until_ready()
    assert httpx.post(f"{process.url}/v1/adapters/demo/pin").json()["pinned"]
    assert process.end(signal.SIGTERM) == 0
    (tmp_path / "engine.log").unlink()
    process = start().until_ready()
    (pin,) = received(tmp_path, "PinAdapter")
    assert pin["key"] == httpx.get(f"{process.url}/v1/adapters/demo").json()["digest"]
    assert process.end(signal.SIGTERM) == 0


JOBS = "/v1/fine_tuning/jobs"
BODY = {"model": "tiny-model", "prompt": "one two", "stream": True, "ignore_eos": True, "temperature": 0}


def events(reply: httpx.Response) -> Iterator[str]:
    return (line.removeprefix("data: ") for line in reply.iter_lines() if line.startswith("data: "))


def test_sigterm_lets_running_streams_finish(start: Start) -> None:
    process = start("--shutdown-timeout", "30", engine=("--step-seconds", "0.02")).until_ready()
    with (
        httpx.Client(base_url=process.url, timeout=WAIT) as client,
        client.stream("POST", "/v1/completions", json=BODY | {"max_tokens": 100}) as reply,
    ):
        lines = events(reply)
        next(lines)
        process.child.send_signal(signal.SIGTERM)
        while (ready := httpx.get(f"{process.url}/ready")).status_code == 200:
            pass
        assert ready.json() == {"status": "draining"}
        refused = httpx.post(f"{process.url}/v1/completions", json=BODY)
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "engine_unavailable"
        rest = list(lines)
        assert rest[-1] == "[DONE]"
        assert json.loads(rest[-2])["choices"][0]["finish_reason"] == "length"
    assert process.end() == 0


def test_a_stream_that_is_too_long_gets_an_error(start: Start) -> None:
    process = start("--shutdown-timeout", "0.2", engine=("--step-seconds", "0.2")).until_ready()
    with (
        httpx.Client(base_url=process.url, timeout=WAIT) as client,
        client.stream("POST", "/v1/completions", json=BODY | {"max_tokens": 200}) as reply,
    ):
        lines = events(reply)
        next(lines)
        process.child.send_signal(signal.SIGTERM)
        rest = list(lines)
    assert rest[-1] == "[DONE]"
    assert json.loads(rest[-2])["error"]["code"] == "engine_unavailable"
    assert process.end() == 0


def test_a_second_signal_ends_it_at_once(start: Start) -> None:
    process = start("--shutdown-timeout", "300", engine=("--step-seconds", "0.2")).until_ready()
    with (
        httpx.Client(base_url=process.url, timeout=WAIT) as client,
        client.stream("POST", "/v1/completions", json=BODY | {"max_tokens": 200}) as reply,
    ):
        lines = events(reply)  # kept: a generator that is collected closes the connection
        next(lines)
        process.child.send_signal(signal.SIGINT)
        while httpx.get(f"{process.url}/ready").status_code == 200:
            pass
        process.child.send_signal(signal.SIGINT)
        assert process.child.wait(WAIT) == 0
    process.end()


def test_a_signal_while_the_engine_starts(start: Start) -> None:
    process = start(engine=("--load-seconds", "60"))
    assert process.until_answering().json() == {"status": "starting"}
    assert process.end(signal.SIGTERM) == 0
    assert not re.search("Traceback|ERROR", process.output), process.output


def test_an_adapter_that_cannot_be_served_stops_the_start(start: Start, lora: Path) -> None:
    (lora / "adapter_config.json").write_text('{"refuse": "use_dora is not served yet"}')
    process = start("--lora-modules", f"demo={lora}")
    assert process.end() == 1
    assert f"veneer: --lora-modules demo={lora}: use_dora is not served yet" in process.output


def test_an_engine_that_cannot_start_stops_the_start(start: Start) -> None:
    process = start(engine=("--exit-at-start",))
    assert process.end() == 1
    assert "exit code 3" in process.output


def test_a_taken_port_and_a_taken_store_are_named(start: Start) -> None:
    first = start().until_ready()
    port = first.url.rpartition(":")[2]
    second = start("--port", port)
    assert second.end() == 1
    assert f"cannot listen on 127.0.0.1 port {port}" in second.output
    third = start()
    assert third.end() == 1
    assert "is open in another process" in third.output
    assert first.end(signal.SIGTERM) == 0


def test_keys_are_not_printed(start: Start) -> None:
    process = start(
        "--access-log", VENEER_API_KEY="sk-secret-1", VENEER_ADMIN_API_KEY="sk-secret-2"
    ).until_ready()
    assert httpx.get(f"{process.url}/v1/models").status_code == 401
    headers = {"Authorization": "Bearer sk-secret-1"}
    assert httpx.get(f"{process.url}/v1/models", headers=headers).status_code == 200
    assert process.end(signal.SIGTERM) == 0
    assert "$VENEER_API_KEY" in process.output
    assert "sk-secret" not in process.output


# ---- fine-tuning jobs -----------------------------------------------------------------------------


def test_jobs_outlive_kills(start: Start) -> None:
    """SIGKILL in the middle of two jobs: each step, checkpoint and event is there once in the end."""
    ids: list[str] = []
    for steps in (8, 44, 60):
        process = start(engine=("--step-seconds", "0.01")).until_ready()
        with httpx.Client(base_url=process.url, timeout=WAIT) as client:
            ids = ids or two_jobs(client)
            until(lambda: len(trained(client, ids)) >= steps)  # noqa: B023
            if steps < 60:
                assert process.end(signal.SIGKILL) == -signal.SIGKILL
                continue
            until(lambda: all(client.get(f"{JOBS}/{id}").json()["status"] == "succeeded" for id in ids))  # noqa: B023
            assert trained(client, ids) == [*range(1, 31)] * 2
            for id in ids:
                listed = client.get(f"{JOBS}/{id}/checkpoints").json()["data"]
                assert [each["step_number"] for each in listed] == [30, 20, 10]
                told = Counter(each["message"] for each in told_events(client, id))
                del told["Training was interrupted and goes on from its last saved state"]
                told = Counter(
                    {message: n for message, n in told.items() if "goes on at step" not in message}
                )
                assert set(told.values()) == {1}
    assert process.end(signal.SIGTERM) == 0


def two_jobs(client: httpx.Client) -> list[str]:
    file = client.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("x.jsonl", b"{}")})
    body = {"model": "tiny-model", "training_file": file.json()["id"]}
    body |= {"training": {"steps": 30, "checkpoint_every": 10}}
    return [client.post(JOBS, json=body).json()["id"] for _ in range(2)]


def told_events(client: httpx.Client, id: str) -> list[dict[str, Any]]:
    """Oldest first."""
    listed: list[dict[str, Any]] = client.get(f"{JOBS}/{id}/events?limit=1000").json()["data"]
    return listed[::-1]


def trained(client: httpx.Client, ids: list[str]) -> list[int]:
    """The steps that were told, job by job."""
    return [
        each["data"]["step"] for id in ids for each in told_events(client, id) if each["type"] == "metrics"
    ]
