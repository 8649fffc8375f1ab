"""/tokenize, /detokenize and /tokenizer_info, for the base and for an adapter with a tokenizer of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.server.adapters import error
from tests.server.conftest import BASE, MakeServer, Server
from tests.server.test_adapter_text import TEMPLATE, own_tokenizer, send, text_files

from veneer.server.state import ServerConfig

TEXT = "one two<|tool|>"
MESSAGES = [{"role": "user", "content": "one two"}]
TOOL = {"type": "function", "function": {"name": "add"}}


@pytest.fixture(scope="module", autouse=True)
def own(module_server: Server) -> None:
    reply = send(module_server, "own", text_files())
    assert reply.status_code == 201, reply.text


def tokenize(server: Server, **fields: Any) -> dict[str, Any]:
    reply = server.post("/tokenize", fields)
    assert reply.status_code == 200, reply.text
    return dict(reply.json())


def test_a_text_becomes_tokens_and_text_again(server: Server) -> None:
    base = server.state.texts.base.tokenizer
    tokens = base.encode(TEXT, add_special_tokens=True)
    expected = {"count": len(tokens), "max_model_len": 256, "tokens": tokens, "token_strs": None}
    for model in ({}, {"model": BASE}, {"model": "sql"}):
        assert tokenize(server, prompt=TEXT, **model) == expected
        reply = server.post("/detokenize", {"tokens": tokens} | model)
        assert reply.json() == {"prompt": TEXT}
    strings = tokenize(server, prompt="one two", return_token_strs=True)["token_strs"]
    assert "".join(strings) == "oneĠtwo"
    assert tokenize(server, prompt="")["tokens"] == []
    assert server.post("/detokenize", {"tokens": []}).json() == {"prompt": ""}
    special = "<|im_start|>one<|end|>"
    ids = tokenize(server, prompt=special)["tokens"]
    assert server.post("/detokenize", {"tokens": ids}).json() == {"prompt": special}


def test_an_adapters_own_tokenizer_and_template_are_used(server: Server) -> None:
    tokenizer = own_tokenizer()
    tool = tokenizer.token_to_id("<|tool|>")
    tokens = tokenize(server, model="own", prompt=TEXT)["tokens"]
    assert tokens == tokenizer.encode(TEXT).ids
    assert tokens[-1] == tool
    assert server.post("/detokenize", {"model": "own", "tokens": [tool]}).json() == {"prompt": "<|tool|>"}
    assert server.post("/detokenize", {"tokens": [tool]}).json() == {"prompt": ""}
    ids = tokenize(server, model="own", messages=MESSAGES)["tokens"]
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|tool|>one two<|im_end|>"


def test_a_conversation_is_what_a_chat_would_send(server: Server) -> None:
    last = [*MESSAGES, {"role": "assistant", "content": "three"}]
    cases: list[tuple[list[Any], dict[str, Any]]] = [
        (MESSAGES, {}),
        (MESSAGES, {"add_generation_prompt": False}),
        (last, {"continue_final_message": True}),
        (MESSAGES, {"tools": [TOOL]}),
        (MESSAGES, {"tools": [TOOL], "tool_choice": "none"}),
        (MESSAGES, {"tools": [TOOL], "tool_choice": "required"}),
        (MESSAGES, {"chat_template_kwargs": {"messages_are": "plain"}, "add_special_tokens": True}),
    ]
    for messages, fields in cases:
        body = {"messages": messages} | fields
        reply = server.post("/v1/chat/completions", {"model": BASE, "max_tokens": 1} | body)
        assert reply.status_code == 200, reply.text
        assert tokenize(server, **body)["tokens"] == server.received("Generate")[-1]["prompt"]


def test_tokenizer_info_is_the_config_that_requests_are_read_with(server: Server, model_folder: Path) -> None:
    info = server.http.get("/tokenizer_info").json()
    assert info["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert (info["bos_token"], info["eos_token"]) == ("<|im_start|>", "<|end|>")
    assert info["unk_token"] is None
    assert info["chat_template"] == (model_folder / "chat_template.jinja").read_text()
    assert server.http.get("/tokenizer_info", params={"model": "sql"}).json() == info
    own = server.http.get("/tokenizer_info", params={"model": "own"}).json()
    assert (own["eos_token"], own["bos_token"], own["chat_template"]) == ("<|im_end|>", None, TEMPLATE)


def test_an_adapters_config_is_shown_without_paths(make_server: MakeServer) -> None:
    server = make_server().until_ready()
    config = {
        "tokenizer_class": "GPT2Tokenizer",
        "name_or_path": "/home/me/model",
        "vocab_file": "/home/me/vocab.json",
        "eos_token": {"content": "<|end|>", "special": True},
        "model_max_length": 2048,
    }
    reply = send(server, "named", text_files(tokenizer_config=json.dumps(config)))
    assert reply.status_code == 201, reply.text
    info = server.http.get("/tokenizer_info", params={"model": "named"}).json()
    assert (info["tokenizer_class"], info["eos_token"], info["model_max_length"]) == (
        "GPT2Tokenizer",
        "<|end|>",
        2048,
    )
    assert "/home/me" not in json.dumps(info)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"prompt": ["one"]}, "prompt"),
        ("/tokenize", {"prompt": "one", "add_generation_prompt": True}, "add_generation_prompt"),
        ("/tokenize", {"prompt": "one", "messages": MESSAGES}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": MESSAGES, "tools": [{"type": "function"}]}, "tools[0].function"),
        ("/tokenize", {"messages": MESSAGES, "tool_choice": "required"}, "tool_choice"),
        ("/tokenize", {"prompt": "one", "tools": [TOOL]}, "tools"),
        ("/tokenize", {"messages": MESSAGES, "chat_template": "x"}, "chat_template"),
        (
            "/tokenize",
            {"messages": MESSAGES, "continue_final_message": True, "add_generation_prompt": True},
            "continue_final_message",
        ),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "one"}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("/detokenize", {"tokens": [512]}, "tokens"),
        ("/detokenize", {"tokens": [1 << 70]}, "tokens[0]"),
    ],
)
def test_bad_values_are_refused_by_name(server: Server, path: str, body: dict[str, Any], param: str) -> None:
    reply = server.post(path, body)
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"] == param


def test_unknown_models_and_large_bodies(server: Server, make_server: MakeServer) -> None:
    for reply in (
        server.post("/tokenize", {"model": "nobody", "prompt": "one"}),
        server.post("/detokenize", {"model": "nobody", "tokens": [1]}),
        server.http.get("/tokenizer_info", params={"model": "nobody"}),
    ):
        error(reply, 404, "model_not_found")
    small = make_server(config=ServerConfig(max_body_bytes=64)).until_ready()
    assert small.post("/tokenize", {"prompt": "x" * 100}).status_code == 413
