"""SGLang's two adapter routes, and `lora_path` as the choice of an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.server.adapters import WEIGHTS, complete
from tests.server.conftest import BASE, MakeServer, Server

from veneer.server.state import ServerConfig

MESSAGES = [{"role": "user", "content": "one"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": ["one", "two"], "max_tokens": 1},
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 1},
    "/v1/responses": {"input": "one", "max_output_tokens": 1},
    "/v1/embeddings": {"input": "one"},
}


def test_sglangs_routes(make_server: MakeServer, tmp_path: Path) -> None:
    folder = tmp_path / "allowed" / "lora"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(WEIGHTS)
    server = make_server(config=ServerConfig(adapter_dirs=(folder.parent,)), adapters=("poet",)).until_ready()
    load = {"lora_name": "sql", "lora_path": str(folder), "pinned": True}
    reply = server.post("/load_lora_adapter", load)
    served = {"poet": "poet@1", "sql": "sql@1"}
    assert reply.json() == {"success": True, "error_message": None, "loaded_adapters": served}
    assert server.http.get("/v1/adapters/sql").json()["pinned"] is True
    assert complete(server, "sql").status_code == 200
    again = server.post("/load_lora_adapter", load)
    assert (again.status_code, again.json()["success"]) == (400, False)
    assert "already loaded" in again.json()["error_message"]
    gone = server.post("/unload_lora_adapter", {"lora_name": "sql"})
    assert gone.json() == {"success": True, "error_message": None, "loaded_adapters": {"poet": "poet@1"}}
    missing = server.post("/unload_lora_adapter", {"lora_name": "sql"})
    assert (missing.status_code, missing.json()["success"]) == (400, False)
    outside = server.post("/load_lora_adapter", load | {"lora_path": str(tmp_path)})
    assert (outside.status_code, outside.json()["success"]) == (400, False)
    assert server.post("/load_lora_adapter", {"lora_name": "sql"}).status_code == 400


@pytest.mark.parametrize("route", BODIES)
def test_lora_path_chooses_the_adapter(server: Server, route: str) -> None:
    named: list[Any] = ["sql", ["sql"], ["sql", "sql"]]
    for path in named:
        reply = server.post(route, {"model": BASE, "lora_path": path, **BODIES[route]})
        assert reply.headers["x-veneer-adapter"] == "sql@1", reply.text
    assert server.post(route, {"model": "sql", "lora_path": "sql", **BODIES[route]}).status_code == 200
    none: list[Any] = [[None], [None, None], ""]
    for path in none:
        reply = server.post(route, {"model": BASE, "lora_path": path, **BODIES[route]})
        assert reply.status_code == 200
        assert "x-veneer-adapter" not in reply.headers


@pytest.mark.parametrize("route", BODIES)
@pytest.mark.parametrize(
    ("model", "path", "status", "rule"),
    [
        (BASE, ["sql", "team/poet"], 400, "one request has one adapter"),
        (BASE, ["sql", None], 400, "one request has one adapter"),
        ("team/poet", "sql", 400, "is another adapter"),
        (BASE, "nobody", 404, "nobody"),
        (BASE, [], 400, "an adapter's name"),
        (BASE, 3, 400, "an adapter's name"),
    ],
)
def test_lora_path_is_refused(
    server: Server, route: str, model: str, path: Any, status: int, rule: str
) -> None:
    reply = server.post(route, {"model": model, "lora_path": path, **BODIES[route]})
    assert reply.status_code == status
    assert rule in reply.json()["error"]["message"]
