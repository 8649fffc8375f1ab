"""A bottleneck and an intervention in AdapterHub's files, sent to a real server over HTTP, and a chat with each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import save
from tests.conftest import LiveServer

from veneer.training.conformance.adapterhub_configs import BOTTLENECK, REFT, Config

pytestmark = pytest.mark.model

HIDDEN, LAYERS = 576, 30  # of the packaged base


@pytest.fixture(scope="module")
def server(live_server: Callable[..., LiveServer], tmp_path_factory: pytest.TempPathFactory) -> LiveServer:
    folder = tmp_path_factory.mktemp("store")
    options = ("--store", str(folder), "--quantization", "none", "--threads", "1")
    return live_server(*options, "--kv-cache-memory", "256MiB")


def send(server: LiveServer, name: str, config: Config, tensors: dict[str, torch.Tensor]) -> httpx.Response:
    whole = {"config": config, "hidden_size": HIDDEN, "name": "task", "version": "adapters.1.3.0"}
    files = [
        ("files", ("adapter_config.json", json.dumps(whole).encode())),
        ("files", ("adapter.safetensors", save(tensors))),
    ]
    return server.http.post("/v1/adapters", data={"name": name}, files=files)


def chat(server: LiveServer, model: str) -> Any:
    body = {"model": model, "messages": [{"role": "user", "content": "Name three colours."}]}
    reply = server.http.post("/v1/chat/completions", json=body | {"temperature": 0, "max_tokens": 12})
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["message"]["content"]


def bottlenecks(inner: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    tensors = {}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}.output_adapters.adapters.task"
        tensors[f"{at}.adapter_down.0.weight"] = 0.05 * torch.randn(inner, HIDDEN)
        tensors[f"{at}.adapter_down.0.bias"] = torch.randn(inner)
        tensors[f"{at}.adapter_up.weight"] = 0.2 * torch.randn(HIDDEN, inner)
        tensors[f"{at}.adapter_up.bias"] = torch.zeros(HIDDEN)
    return tensors


def interventions(rank: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    tensors = {}
    for layer in range(LAYERS):
        for unit in range(2):
            at = f"model.layers.{layer}.reft_layer.refts.task.units.{unit}"
            tensors[f"{at}.learned_source.weight"] = 0.1 * torch.randn(rank, HIDDEN)
            tensors[f"{at}.learned_source.bias"] = torch.randn(rank)
            tensors[f"{at}.projection.weight"] = 0.1 * torch.randn(rank, HIDDEN)
    return tensors


def test_a_bottleneck_and_an_intervention_answer_over_http(server: LiveServer, tmp_path: Path) -> None:
    base = chat(server, server.http.get("/v1/models").json()["data"][0]["id"])
    config = BOTTLENECK | {"original_ln_before": True, "reduction_factor": HIDDEN / 8}
    made = send(server, "pfeiffer", config, bottlenecks(8))
    assert made.status_code == 201, made.text
    assert made.json()["kind"] == "adapterhub_bottleneck"
    assert made.json()["primitives"] == ["low_rank", "activation", "bias"]
    reft = REFT | {"orthogonality": False, "r": 2, "prefix_positions": 4, "suffix_positions": 5}
    refused = send(server, "reft", reft, interventions(2))
    assert refused.status_code == 400
    assert "NoReFT and DiReFT have the same files" in refused.json()["error"]["message"]
    made = send(server, "reft", reft | {"subtract_projection": True}, interventions(2))
    assert made.status_code == 201, made.text
    assert made.json()["kind"] == "adapterhub_noreft"
    answers = [chat(server, name) for name in ("pfeiffer", "reft", "pfeiffer", "reft")]
    assert answers[:2] == answers[2:]
    assert len({base, *answers}) == 3
    gated = send(server, "gated", config | {"use_gating": True}, bottlenecks(8))
    assert gated.status_code == 400
    assert "use_gating = true" in gated.json()["error"]["message"]
