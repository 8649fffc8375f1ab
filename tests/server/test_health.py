"""/health, /ready, /version and /metrics over a real socket."""

from __future__ import annotations

import os

from prometheus_client.parser import text_string_to_metric_families
from tests.server.conftest import BASE, MakeServer, Server

import veneer


def samples(server: Server) -> dict[tuple[str, ...], float]:
    reply = server.http.get("/metrics")
    assert reply.headers["Content-Type"].startswith("text/plain; version=")
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(reply.text)
        for sample in family.samples
    }


def test_ready(make_server: MakeServer) -> None:
    server = make_server().until_ready()
    assert server.http.get("/ready").json() == {"status": "ready"}
    health = server.http.get("/health")
    assert health.status_code == 200
    shown = health.json()
    assert (shown["status"], shown["model"], shown["version"]) == ("ready", BASE, veneer.__version__)
    assert {"device", "dtype", "quantization", "kernels", "notes", "base_bytes"} <= set(shown["engine"])
    assert shown["restarts"] == 0
    assert server.http.get("/version").json() == {"version": veneer.__version__}


def test_not_ready_while_the_engine_starts(make_server: MakeServer) -> None:
    server = make_server("--load-seconds", "60")
    reply = server.http.get("/ready")
    assert (reply.status_code, reply.json()) == (503, {"status": "starting"})
    health = server.http.get("/health")
    assert (health.status_code, health.json()["engine"]) == (200, None)
    assert samples(server)["veneer_engine_state", "starting"] == 1


def test_not_ready_while_adapters_are_registered(make_server: MakeServer) -> None:
    server = make_server().until_ready()
    server.state.registering = True
    reply = server.http.get("/ready")
    assert (reply.status_code, reply.json()) == (503, {"status": "registering"})


def test_a_dead_engine_is_reported(make_server: MakeServer) -> None:
    server = make_server("--exit-at-start")
    server.until(lambda: server.state.engine.state == "dead")
    assert server.http.get("/ready").status_code == 503
    health = server.http.get("/health")
    assert (health.status_code, health.json()["status"]) == (503, "dead")
    assert "exit code 3" in health.json()["last_error"]
    assert samples(server)["veneer_engine_state", "dead"] == 1


def test_a_restart_is_counted(make_server: MakeServer) -> None:
    server = make_server().until_ready()
    pid = server.state.engine.pid
    assert pid is not None
    os.kill(pid, 9)
    server.until(lambda: server.state.engine.restarts == 1)
    server.until_ready()
    assert samples(server)["veneer_engine_restarts_total",] == 1
    assert "signal 9" in server.http.get("/health").json()["last_error"]


def test_requests_are_measured(make_server: MakeServer) -> None:
    server = make_server(adapters=("sql",)).until_ready()
    body = {"prompt": "one two", "max_tokens": 3, "temperature": 0, "ignore_eos": True, "frobnicate": 1}
    for model in (BASE, "sql", "sql", "nothing"):
        server.post("/v1/completions", body | {"model": model})
    found = samples(server)
    assert found["veneer_requests_total", "ok", "/v1/completions"] == 3
    assert found["veneer_adapter_requests_total", "sql"] == 2
    assert found["veneer_adapter_tokens_total", "sql", "completion"] == 6
    assert found["veneer_tokens_total", "completion"] == 9
    assert found["veneer_time_to_first_token_seconds_count",] == 3
    assert found["veneer_inter_token_latency_seconds_count",] == 6
    assert found["veneer_unknown_request_fields_total", "frobnicate"] >= 3
    assert found["veneer_requests_in_progress", "/v1/completions"] == 0
    assert {"vllm:num_requests_running", "vllm:lora_requests_info"} <= {name for name, *_ in found}
