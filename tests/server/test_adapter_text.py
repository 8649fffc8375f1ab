"""Tokenizers, chat templates and end tokens that come with adapters, through a real server."""

from __future__ import annotations

import io
import json
import shutil
import threading
import time
import zipfile
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.server.adapters import complete, error, files, left_behind
from tests.server.conftest import CHATML, MakeServer, Server, train_tokenizer
from tokenizers import AddedToken, Tokenizer

from veneer.adapters.store import AdapterStore
from veneer.server import adapter_text, sandbox
from veneer.server.adapter_text import AdapterTexts, base_text

TEMPLATE = "{% for m in messages %}<|tool|>{{ m.content }}{{ eos_token }}{% endfor %}"
MESSAGES = [{"role": "user", "content": "one two"}]
SLOW = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


def own_tokenizer() -> Tokenizer:
    """The base's and a token of its own, in a place of the vocabulary that the base has no token for."""
    tokenizer = train_tokenizer()
    tokenizer.add_tokens([AddedToken("<|tool|>", special=False)])
    assert tokenizer.get_vocab_size() <= 512
    return tokenizer


def text_files(**changes: Any) -> dict[str, bytes]:
    """What a tokenizer with a template saves; `changes` by the first part of a file's name, None leaves it out."""
    found: dict[str, Any] = {
        "tokenizer.json": own_tokenizer().to_str(),
        "tokenizer_config.json": json.dumps({"eos_token": "<|im_end|>"}),
        "special_tokens_map.json": "{}",
        "added_tokens.json": json.dumps({"<|tool|>": own_tokenizer().token_to_id("<|tool|>")}),
        "chat_template.jinja": TEMPLATE,
        "generation_config.json": json.dumps({"eos_token_id": [0, 7], "temperature": 0.6}),
    }
    named = {name.partition(".")[0]: name for name in found} | {name: name for name in found}
    for key, value in changes.items():
        found[named[key]] = value
    encoded = {name: value.encode() if isinstance(value, str) else value for name, value in found.items()}
    return {name: value for name, value in encoded.items() if value is not None}


def send(server: Server, name: str, texts: dict[str, bytes], **config: Any) -> httpx.Response:
    parts = [*files(name.encode(), **config), *(("files", item) for item in texts.items())]
    return server.http.post("/v1/adapters", data={"name": name}, files=parts)


def chat(server: Server, model: str, **fields: Any) -> httpx.Response:
    return server.post(
        "/v1/chat/completions",
        {"model": model, "messages": MESSAGES, "max_tokens": 3, "temperature": 0} | fields,
    )


def asked(server: Server) -> dict[str, Any]:
    """The last sequence that the engine was sent."""
    return server.received("Generate")[-1]


@pytest.fixture(scope="module")
def own(module_server: Server) -> dict[str, Any]:
    reply = send(module_server, "own", text_files())
    assert reply.status_code == 201, reply.text
    return dict(reply.json())


def test_requests_use_what_the_adapter_brings(server: Server, own: dict[str, Any]) -> None:
    tokenizer = own_tokenizer()
    reply = chat(server, "own")
    assert reply.status_code == 200, reply.text
    ends = "<|tool|>one two<|im_end|>"
    assert asked(server)["prompt"] == tokenizer.encode(ends, add_special_tokens=False).ids
    assert asked(server)["adapter"] == own["digest"]
    chat(server, "tiny")
    base = server.state.texts.base.tokenizer
    assert base.decode(asked(server)["prompt"], skip_special_tokens=False).startswith(
        "<|im_start|>user\none two"
    )


def test_answers_are_written_with_its_tokenizer(server: Server, own: dict[str, Any]) -> None:
    """The toy model repeats its prompt from the second token on; the token is no special one, so it is shown."""
    prompt = own_tokenizer().encode("one<|tool|>", add_special_tokens=False).ids
    fields = {"prompt": prompt, "max_tokens": len(prompt), "temperature": 0, "logprobs": 1, "echo": False}
    reply = complete(server, "own", **fields).json()["choices"][0]
    assert "<|tool|>" in reply["text"]
    assert "<|tool|>" in reply["logprobs"]["tokens"]
    streamed = ""
    body = {"model": "own", "stream": True} | fields
    with server.http.stream("POST", "/v1/completions", json=body) as stream:
        for line in stream.iter_lines():
            if line.startswith("data: {"):
                streamed += json.loads(line[6:])["choices"][0]["text"]
    assert streamed == reply["text"]
    assert "<|tool|>" not in complete(server, "tiny", **fields).json()["choices"][0]["text"]


def test_its_end_tokens_end_its_requests(server: Server, own: dict[str, Any]) -> None:
    end = own_tokenizer().token_to_id("<|im_end|>")
    complete(server, "own", stop_token_ids=[9])
    assert asked(server)["sampling"]["stop_token_ids"] == [9, 0, 7, end]
    complete(server, "own", ignore_eos=True)
    assert "stop_token_ids" not in asked(server)["sampling"]
    complete(server, "tiny")
    assert "stop_token_ids" not in asked(server)["sampling"]
    # The toy model's second token is the end: it is not shown and no stop that the client asked for.
    choice = complete(server, "own", prompt=[300, 301, end, 302], temperature=0, max_tokens=9).json()[
        "choices"
    ][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", None)
    assert choice["text"] == own_tokenizer().decode([301])


def test_what_is_shown(server: Server, own: dict[str, Any]) -> None:
    shown = server.http.get("/v1/adapters/own").json()
    assert shown["own_tokenizer"]
    assert shown["own_chat_template"]
    assert shown["end_tokens"] == [0, 7, own_tokenizer().token_to_id("<|im_end|>")]
    assert set(shown["text_files"]) == set(text_files())
    assert shown["file_bytes"] == sum(map(len, text_files().values())) + len(b"own") + len(b"{}")
    sql = server.http.get("/v1/adapters/sql").json()
    assert not sql["own_tokenizer"]
    assert sql["text_files"] == []


def test_what_equals_the_bases_is_not_loaded_twice(server: Server, model_folder: Path) -> None:
    padded = Tokenizer.from_file(str(model_folder / "tokenizer.json"))
    padded.enable_padding(length=9)  # as a trainer leaves it; a request is never padded
    texts = {
        "tokenizer.json": padded.to_str(pretty=True).encode(),
        "tokenizer_config.json": (model_folder / "tokenizer_config.json").read_bytes(),
        "chat_template.jinja": CHATML.encode(),
    }
    made = send(server, "same", texts).json()
    assert not made["own_tokenizer"]
    assert not made["own_chat_template"]
    assert chat(server, "same").status_code == 200
    base, text = server.state.texts.base, server.state.texts._texts[made["digest"]]
    assert text.tokenizer is base.tokenizer
    assert text.template is base.template
    assert not text.is_slow


def test_a_template_alone_or_a_tokenizer_alone(server: Server) -> None:
    source = "{{ bos_token }}{{ messages[0].content }}"
    assert send(server, "template", {"chat_template.jinja": source.encode()}).status_code == 201
    assert chat(server, "template").status_code == 200
    base = server.state.texts.base.tokenizer
    assert base.decode(asked(server)["prompt"], skip_special_tokens=False) == "<|im_start|>one two"
    assert send(server, "tokens", {"tokenizer.json": own_tokenizer().to_str().encode()}).status_code == 201
    assert chat(server, "tokens").status_code == 200
    assert (
        own_tokenizer()
        .decode(asked(server)["prompt"], skip_special_tokens=False)
        .startswith("<|im_start|>user")
    )
    config = {"chat_template": [{"name": "default", "template": "named {{ messages[0].content }}"}]}
    assert send(server, "named", {"tokenizer_config.json": json.dumps(config).encode()}).status_code == 201
    assert chat(server, "named").status_code == 200
    assert base.decode(asked(server)["prompt"]) == "named one two"


def test_an_archive_brings_them_too(server: Server) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for _, (name, data) in files(b"zipped"):
            archive.writestr(f"a/{name}", data)
        for name, data in text_files().items():
            archive.writestr(f"a/{name}", data)
        archive.writestr("a/README.md", "skipped")
    reply = server.http.post(
        "/v1/adapters", data={"name": "zipped"}, files={"archive": ("a.zip", buffer.getvalue())}
    )
    assert reply.status_code == 201, reply.text
    assert set(reply.json()["text_files"]) == set(text_files())


def test_the_digest_covers_them(server: Server) -> None:
    one = send(server, "digest", text_files()).json()
    two = send(server, "digest", text_files(chat_template="other")).json()
    assert one["digest"] != two["digest"]
    assert (one["version"], two["version"]) == (1, 2)
    assert send(server, "digest", text_files(chat_template="other")).status_code == 200


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"chat_template": "{% for"}, "TemplateSyntaxError"),
        ({"chat_template": b"\xff"}, "not text in UTF-8"),
        ({"chat_template": "x" * ((1 << 20) + 1)}, "larger than the 1,048,576 bytes"),
        ({"chat_template": None, "tokenizer_config": '{"chat_template": 3}'}, "chat_template must be text"),
        (
            {"chat_template": None, "tokenizer_config": '{"chat_template": [{"template": "x"}]}'},
            "none is named 'default'",
        ),
        ({"tokenizer_config": "{"}, "tokenizer_config.json is not valid JSON"),
        ({"tokenizer_config": '{"bos_token": "\\ud800"}'}, "tokenizer_config.json is not valid JSON"),
        ({"tokenizer_config": '{"chat_template": "\\ud800"}'}, "tokenizer_config.json is not valid JSON"),
        ({"tokenizer_config": "[" * 100_000}, "tokenizer_config.json is not valid JSON"),
        ({"tokenizer_config": "[]"}, "must be a JSON object"),
        ({"tokenizer_config": '{"eos_token": {"id": 3}}'}, "eos_token must be text"),
        ({"tokenizer_config": '{"eos_token": "<never>"}'}, "'<never>' is no token"),
        ({"tokenizer_config": json.dumps({"bos_token": "x" * 1025})}, "at most 1024 characters"),
        (
            {"tokenizer_config": '{"added_tokens_decoder": {"' + "9" * 5000 + '": "<x>"}}'},
            "the added token '<x>' is 9999",
        ),
        ({"tokenizer_config": '{"added_tokens_decoder": 3}'}, "must be an object"),
        (
            {"tokenizer_config": '{"added_tokens_decoder": {"3": {"content": "<x>"}}}'},
            "the added token '<x>' is 3",
        ),
        ({"added_tokens": '{"<|tool|>": 3}'}, "the added token '<|tool|>' is 3"),
        ({"generation_config": '{"eos_token_id": "0"}'}, "eos_token_id must be a token id"),
        ({"generation_config": '{"eos_token_id": [-1]}'}, "eos_token_id must be a token id"),
        ({"generation_config": json.dumps({"eos_token_id": list(range(65))})}, "at most 64"),
        ({"tokenizer.json": "{}"}, "tokenizer.json: its model is 'None'"),
        ({"tokenizer.json": b"\x80\x04pickle"}, "tokenizer.json: it is not valid JSON"),
        ({"special_tokens_map": "7"}, "special_tokens_map.json must be a JSON object"),
    ],
)
def test_what_cannot_be_used_is_refused_when_it_is_uploaded(
    changes: dict[str, Any], says: str, server: Server
) -> None:
    reply = send(server, "refused", text_files(**changes))
    assert 400 <= reply.status_code < 500
    assert says in reply.json()["error"]["message"]
    assert server.received("CheckAdapter") == []
    assert left_behind(server) == []


def test_other_files_are_refused_by_name(server: Server) -> None:
    reply = send(server, "refused", {"tokenizer.model": b"x"})
    assert "'tokenizer.model' is not read" in error(reply, 400, "adapter_refused")
    reply = send(server, "refused", {"modeling.py": b"x"})
    assert "'modeling.py' is not read" in error(reply, 400, "adapter_refused")


def test_a_template_that_fails_or_does_not_end_is_a_bad_request(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert send(server, "angry", {"chat_template.jinja": b"{{ raise_exception('no') }}"}).status_code == 201
    assert "conversation: no" in error(chat(server, "angry"), 400, "invalid_value")
    assert send(server, "slow", {"chat_template.jinja": SLOW.encode()}).status_code == 201
    assert "did not finish" in error(chat(server, "slow"), 400, "template_limit")
    assert chat(server, "slow", stream=True).status_code == 400
    assert chat(server, "tiny").status_code == 200
    assert complete(server, "slow").status_code == 200, "a prompt needs no template"


def test_tokens_without_rows_are_warned_of_and_refused(server: Server) -> None:
    tokenizer = train_tokenizer()
    names = [f"<|extra-{n}|>" for n in range(600 - tokenizer.get_vocab_size())]
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in names])
    made = send(server, "wide", {"tokenizer.json": tokenizer.to_str().encode()}).json()
    warning = "tokenizer.json has ids up to 599 and there are rows for 0 to 511"
    assert [text[: len(warning)] for text in made["warnings"]] == [warning]
    assert complete(server, "wide").status_code == 200
    message = error(complete(server, "wide", prompt=f"one {names[-1]}"), 400, "invalid_value")
    assert message == "prompt: there is no token 599; the vocabulary has the ids 0 to 511."


def test_they_outlive_a_restart_and_go_with_the_adapter(make_server: MakeServer, tmp_path: Path) -> None:
    server = make_server().until_ready()
    made = send(server, "own", text_files()).json()
    blob = server.state.store.blob(made["digest"])
    assert {path.name for path in blob.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        *text_files(),
    }
    copy = tmp_path / "copy"
    shutil.copytree(server.state.store.root, copy, ignore=shutil.ignore_patterns("lock"))
    with AdapterStore(copy) as store:
        again = store.resolve("own")
        assert again.text_files == {name: len(data) for name, data in text_files().items()}
    (copy / "blobs" / made["digest"] / "chat_template.jinja").write_text("shorter")
    with AdapterStore(copy) as store:
        damage = store.list()[0].damage
        assert damage is not None
        assert "chat_template.jinja has 7 bytes" in damage
    assert chat(server, "own").status_code == 200
    assert made["digest"] in server.state.texts._texts
    assert server.http.delete("/v1/adapters/own").status_code == 200
    assert made["digest"] not in server.state.texts._texts
    assert not blob.exists()


def test_texts_are_kept_within_a_bound(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for digest in "abc":
        folder = tmp_path / digest
        folder.mkdir()
        for name, data in text_files(chat_template=None).items():
            (folder / name).write_bytes(data)
    texts = AdapterTexts(base_text(model_folder), lambda digest: tmp_path / digest)
    one, two = texts._load("a"), texts._load("b")
    assert one.tokenizer is two.tokenizer, "one file, one tokenizer"
    assert one.tokenizer is not texts.base.tokenizer
    monkeypatch.setattr(adapter_text, "TEXTS_LIMIT", 2)
    texts._load("a")
    texts._load("c")
    assert list(texts._texts) == ["a", "c"]
    monkeypatch.setattr(adapter_text, "TOKENIZER_BYTES", one.tokenizer_bytes)
    texts._load("b")
    assert list(texts._texts) == ["b"]
    texts.close()


def test_a_slow_template_does_not_keep_others_waiting(server: Server) -> None:
    """Two at once end two processes; the base's requests meanwhile do not wait for them."""
    for name in ("slow-1", "slow-2"):
        assert send(server, name, {"chat_template.jinja": (SLOW + name).encode()}).status_code == 201
    replies: list[httpx.Response] = []
    threads = [
        threading.Thread(target=lambda name=name: replies.append(chat(server, name)))
        for name in ("slow-1", "slow-2")
    ]
    for thread in threads:
        thread.start()
    start = time.monotonic()
    assert chat(server, "tiny").status_code == 200
    assert time.monotonic() - start < sandbox.SECONDS
    for thread in threads:
        thread.join()
    assert [reply.status_code for reply in replies] == [400, 400]
