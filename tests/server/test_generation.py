"""What an adapter changes of a request's limits: virtual tokens take room, added ones are in its vocabulary."""

from __future__ import annotations

from tests.server.adapters import complete, error, made
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


def test_added_tokens_are_of_their_adapter_alone(make_server: MakeServer) -> None:
    server = make_server().until_ready()
    engine = server.state.engine.info
    assert engine is not None
    made(server, "grown", added_tokens=2)
    made(server, "other", weights=b"others")
    last = engine.vocab_size + 1
    fields = ({"prompt": [3, last]}, {"logit_bias": {str(last): 1}}, {"stop_token_ids": [last]})
    for each in fields:
        assert complete(server, "grown", **each).status_code == 200
        for model in (server.state.served_name, "other"):
            message = error(complete(server, model, **each), 400, "invalid_value")
            assert f"there is no token {last}; the vocabulary has the ids 0 to {last - 2}" in message
    assert f"no token {last + 1}" in error(complete(server, "grown", prompt=[last + 1]), 400, "invalid_value")
