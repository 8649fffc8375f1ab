"""vLLM's two routes over a real socket, with vLLM's texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.server.adapters import WEIGHTS, complete, error, left_behind
from tests.server.conftest import MakeServer

from veneer.server.state import ServerConfig


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "allowed" / "lora"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(WEIGHTS)
    return folder


def vllm_error(reply: httpx.Response, status: int, kind: str, message: str) -> None:
    assert reply.status_code == status
    body = reply.json()["error"]
    assert (body["type"], body["code"]) == (kind, status)
    assert message in body["message"]


def test_vllms_routes(make_server: MakeServer, folder: Path) -> None:
    server = make_server(config=ServerConfig(adapter_dirs=(folder.parent,))).until_ready()
    load = {"lora_name": "sql", "lora_path": str(folder)}
    reply = server.post("/v1/load_lora_adapter", load)
    assert (reply.status_code, reply.text) == (200, "Success: LoRA adapter 'sql' added successfully.")
    assert complete(server, "sql").status_code == 200
    again = (
        "The lora adapter 'sql' has already been loaded. If you want to load the adapter in place, "
        "set 'load_inplace' to True."
    )
    vllm_error(server.post("/v1/load_lora_adapter", load), 400, "InvalidUserInput", again)
    (folder / "adapter_model.safetensors").write_bytes(b"changed")
    assert server.post("/v1/load_lora_adapter", load | {"load_inplace": True}).status_code == 200
    assert server.http.get("/v1/adapters/sql").json()["version"] == 2
    reply = server.post("/v1/unload_lora_adapter", {"lora_name": "sql", "lora_int_id": 1})
    assert (reply.status_code, reply.text) == (200, "Success: LoRA adapter 'sql' removed successfully.")
    error(complete(server, "sql"), 404, "model_not_found")
    assert left_behind(server) == []
    assert (folder / "adapter_model.safetensors").exists()  # the operator's own file


def test_vllms_refusals(make_server: MakeServer, folder: Path) -> None:
    server = make_server(config=ServerConfig(adapter_dirs=(folder,))).until_ready()

    def load(**body: Any) -> httpx.Response:
        return server.post("/v1/load_lora_adapter", body)

    both = "Both 'lora_name' and 'lora_path' must be provided."
    vllm_error(load(lora_name="x"), 400, "InvalidUserInput", both)
    vllm_error(load(lora_path=str(folder)), 400, "InvalidUserInput", both)
    for outside in ("/etc", f"{folder}/../..", str(folder.parent)):
        vllm_error(load(lora_name="x", lora_path=outside), 403, "PermissionDeniedError", "--adapter-dir")
    vllm_error(load(lora_name="x", lora_path=f"{folder}/no"), 404, "NotFoundError", "there is no folder")
    vllm_error(load(lora_name="x", lora_path="../allowed"), 400, "BadRequestError", "not a hub id")
    vllm_error(load(lora_name="a b", lora_path=str(folder)), 400, "BadRequestError", "'a b'")
    error(load(lora_name="x", lora_path=str(folder), lora_id=1), 400, "invalid_value")
    threed = load(lora_name="x", lora_path=str(folder), is_3d_lora_weight=True)
    vllm_error(threed, 400, "InvalidUserInput", "is_3d_lora_weight")
    (folder / "adapter_config.json").write_text(json.dumps({"refuse": "use_dora is not served"}))
    vllm_error(load(lora_name="x", lora_path=str(folder)), 400, "BadRequestError", "use_dora")
    missing = server.post("/v1/unload_lora_adapter", {"lora_name": "x"})
    vllm_error(missing, 404, "NotFoundError", "The lora adapter 'x' cannot be found.")
    vllm_error(server.post("/v1/unload_lora_adapter", {}), 400, "InvalidUserInput", "'lora_name' needs")
    assert left_behind(server) == []
