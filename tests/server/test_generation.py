"""What is left of the context: the adapter's virtual tokens take room and are nobody's usage."""

from __future__ import annotations

from tests.server.adapters import error
from tests.server.conftest import BASE, MakeServer
from tests.server.fake_engine import CONTEXT


def test_virtual_tokens_count_for_the_context_and_not_as_usage(make_server: MakeServer) -> None:
    server = make_server().until_ready()
    with server.state.store.stage() as staging:
        (staging.path / "adapter_config.json").write_text("{}")
        (staging.path / "adapter_model.safetensors").write_bytes(b"virtual tokens")
        server.state.store.commit(staging, "prompted", {"virtual_tokens": 100})
    body = {"prompt": [5] * 6, "temperature": 0, "ignore_eos": True}
    room = CONTEXT - 6
    assert server.post("/v1/completions", {**body, "model": BASE, "max_tokens": room}).status_code == 200
    reply = server.post("/v1/completions", {**body, "model": "prompted", "max_tokens": room - 100})
    assert reply.status_code == 200, reply.text
    usage = reply.json()["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (6, room - 100)
    reply = server.post("/v1/completions", {**body, "model": "prompted", "max_tokens": room - 99})
    message = error(reply, 400, "context_length_exceeded")
    assert "100 virtual ones of the adapter, 6 in the prompt" in message
    chat = {"model": "prompted", "messages": [{"role": "user", "content": "one"}], "ignore_eos": True}
    usage = server.post("/v1/chat/completions", chat).json()["usage"]
    assert usage["total_tokens"] == CONTEXT - 100
