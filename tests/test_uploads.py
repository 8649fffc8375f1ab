"""Adapters sent to a real server: what it must refuse, what it keeps, and what survives its death."""

from __future__ import annotations

import io
import json
import pickle
import signal
import tarfile
import threading
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save
from tests.conftest import LiveServer, until

from veneer.adapters.names import CONFIG_FILE, WEIGHTS_FILE
from veneer.engine.source import resolve

pytestmark = pytest.mark.model

Tensors = dict[str, torch.Tensor]
Files = dict[str, bytes]

BASE = "SmolLM2-135M-Instruct"
LIMIT = 64 << 20  # bytes of an upload
ATTENTION = ("q_proj", "v_proj")
LINEAR = (*ATTENTION, "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Store:
    """A server and the folder of its store."""

    def __init__(self, server: LiveServer, folder: Path) -> None:
        self.server, self.folder = server, folder

    def send(self, name: str, files: Files) -> httpx.Response:
        parts = [("files", (filename, data)) for filename, data in files.items()]
        return self.server.http.post("/v1/adapters", data={"name": name}, files=parts)

    def send_archive(self, name: str, data: bytes, filename: str = "adapter.zip") -> httpx.Response:
        files = {"archive": (filename, data)}
        return self.server.http.post("/v1/adapters", data={"name": name}, files=files)

    def held(self) -> list[Any]:
        """Everything an upload could leave: listed adapters, stored files, files on their way."""
        listed = self.server.http.get("/v1/adapters").json()["data"]
        kept = ("id", "version", "digest", "current", "aliases")
        blobs, staging = (sorted(map(str, (self.folder / part).rglob("*"))) for part in ("blobs", "staging"))
        return [[each[key] for key in kept] for each in listed] + [blobs, staging]

    def says(self, model: str, *, tokens: int = 8) -> str:
        """A greedy continuation, so that equal adapters give equal text."""
        body = {"model": model, "prompt": "Once upon a time", "max_tokens": tokens, "temperature": 0}
        reply = self.server.http.post("/v1/completions", json=body | {"ignore_eos": True})
        assert reply.status_code == 200, reply.text
        return str(reply.json()["choices"][0]["text"])


@pytest.fixture(scope="module")
def store(live_server: Callable[..., LiveServer], tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder = tmp_path_factory.mktemp("store")
    options = ["--store", str(folder), "--quantization", "none", "--threads", "1", "--max-upload", str(LIMIT)]
    return Store(live_server(*options, "--kv-cache-memory", "256MiB"), folder)


@pytest.fixture(scope="module")
def shapes() -> dict[str, list[int]]:
    """The base's linear layers: name -> [out, in]."""
    with safe_open(resolve(None) / "model.safetensors", "pt") as base:
        names = [name for name in base.keys() if "_proj" in name]  # noqa: SIM118 - it is no dict
        return {name.removesuffix(".weight"): base.get_slice(name).get_shape() for name in names}


MakeAdapter = Callable[..., tuple[dict[str, Any], Tensors]]


@pytest.fixture(scope="module")
def make(shapes: dict[str, list[int]]) -> MakeAdapter:
    """A function: seed, rank, targets -> config and tensors as PEFT writes them, with random values."""

    def make(
        seed: int, rank: int = 4, targets: tuple[str, ...] = ATTENTION
    ) -> tuple[dict[str, Any], Tensors]:
        config: dict[str, Any] = {"peft_type": "LORA", "base_model_name_or_path": BASE}
        config |= {"r": rank, "lora_alpha": 2 * rank, "target_modules": list(targets)}
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for name, (out_features, in_features) in shapes.items():
            if name.endswith(targets):
                key = f"base_model.model.{name}"
                for part, shape in (("A", (rank, in_features)), ("B", (out_features, rank))):
                    values = torch.randn(shape, generator=generator) * 0.1
                    tensors[f"{key}.lora_{part}.weight"] = values.to(torch.float16)
        return config, tensors

    return make


def files_of(config: dict[str, Any], tensors: Tensors) -> Files:
    return {CONFIG_FILE: json.dumps(config).encode(), WEIGHTS_FILE: save(tensors)}


def zipped(files: Files, *, compress: bool = True) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def tarred(files: Files, link: tuple[str, str] | None = None) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        if link is not None:
            info = tarfile.TarInfo(link[0])
            info.type, info.linkname = tarfile.SYMTYPE, link[1]
            archive.addfile(info)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def witness(store: Store, make: MakeAdapter) -> str:
    """A good adapter that goes on answering while others are refused; returns what it says."""
    assert store.send("witness", files_of(*make(0))).status_code == 201
    return store.says("witness")


# ---- refused -------------------------------------------------------------------------------------

A, B = "lora_A.weight", "lora_B.weight"
SITE = "base_model.model.model.layers.3.self_attn.q_proj"


def of_another_base(tensors: Tensors) -> Tensors:
    """The same layers, 512 wide instead of 576."""
    return {
        name: (value[:, :512] if name.endswith(A) else value[:512]).contiguous()
        for name, value in tensors.items()
    }


BAD_TENSORS: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "wrong shape": (lambda t: t | {f"{SITE}.{A}": torch.zeros(4, 575)}, f"{SITE}.{A}"),
    "missing": (lambda t: {name: v for name, v in t.items() if name != f"{SITE}.{B}"}, f"{SITE}.{B}"),
    "extra": (
        lambda t: t | {"base_model.model.model.layers.99.mlp.up_proj.lora_A.weight": torch.ones(4, 576)},
        "99",
    ),
    "NaN": (lambda t: t | {f"{SITE}.{B}": torch.full((576, 4), float("nan"))}, f"{SITE}.{B}"),
    "infinite": (lambda t: t | {f"{SITE}.{B}": torch.full((576, 4), float("inf"))}, f"{SITE}.{B}"),
    "integers": (lambda t: t | {f"{SITE}.{A}": torch.ones(4, 576, dtype=torch.int32)}, "I32"),
    "another base": (of_another_base, "512"),
    "none at all": (lambda t: {}, "missing"),
}
BAD_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "rank 100000": ({"r": 100_000}, "r = 100000"),
    "rank 0": ({"r": 0}, "r = 0"),
    "unknown field": ({"use_wizardry": True}, "use_wizardry"),
    "DoRA": ({"use_dora": True}, "lora_magnitude_vector"),
    "modules to save": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "another kind": ({"peft_type": "IA3"}, "IA3"),
    "another layer": ({"target_modules": ["c_attn"]}, "c_attn"),
}


def refused(store: Store, reply: httpx.Response, fault: str, code: str = "adapter_refused") -> None:
    error = reply.json()["error"]
    assert (reply.status_code, error["code"], error["type"]) == (400, code, "invalid_request_error")
    assert fault in error["message"]
    assert store.server.http.get("/v1/adapters/bad").status_code == 404


@pytest.mark.parametrize("what", BAD_TENSORS)
def test_tensors_that_do_not_fit(store: Store, make: MakeAdapter, witness: str, what: str) -> None:
    before = store.held()
    edit, fault = BAD_TENSORS[what]
    config, tensors = make(1)
    refused(store, store.send("bad", files_of(config, edit(tensors))), fault)
    assert store.held() == before
    assert store.says("witness") == witness


@pytest.mark.parametrize("what", BAD_CONFIGS)
def test_configs_that_cannot_be_honoured(store: Store, make: MakeAdapter, witness: str, what: str) -> None:
    before = store.held()
    changes, fault = BAD_CONFIGS[what]
    config, tensors = make(1)
    refused(store, store.send("bad", files_of(config | changes, tensors)), fault)
    assert store.held() == before
    assert store.says("witness") == witness


class Exploit:
    """Unpickling it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_files_that_are_no_safetensors(store: Store, make: MakeAdapter, witness: str, tmp_path: Path) -> None:
    before = store.held()
    good = files_of(*make(1))
    config, weights = good[CONFIG_FILE], good[WEIGHTS_FILE]
    trap = tmp_path / "pickle-was-run"
    torch_file = io.BytesIO()
    torch.save({"weights": Exploit(trap)}, torch_file)
    cases: list[tuple[Files, str]] = [
        ({CONFIG_FILE: config, "adapter_model.bin": torch_file.getvalue()}, "adapter_model.bin"),
        ({CONFIG_FILE: config, WEIGHTS_FILE: torch_file.getvalue()}, "pickle"),
        ({CONFIG_FILE: config, WEIGHTS_FILE: pickle.dumps(Exploit(trap))}, "pickle"),
        ({CONFIG_FILE: config, WEIGHTS_FILE: weights[:-1]}, "truncated"),
        ({CONFIG_FILE: config, WEIGHTS_FILE: weights[:100]}, "truncated"),
        ({CONFIG_FILE: config, WEIGHTS_FILE: weights + b"\0"}, "after its last tensor"),
        ({CONFIG_FILE: config, WEIGHTS_FILE: b""}, "truncated"),
        ({CONFIG_FILE: config, WEIGHTS_FILE: b"\xff" * 64}, "truncated"),
        ({CONFIG_FILE: b"{", WEIGHTS_FILE: weights}, CONFIG_FILE),
        ({CONFIG_FILE: config}, f"{WEIGHTS_FILE} is missing"),
        ({WEIGHTS_FILE: weights}, f"{CONFIG_FILE} is missing"),
    ]
    for files, fault in cases:
        refused(store, store.send("bad", files), fault)
        assert store.held() == before
    assert not trap.exists()
    assert store.says("witness") == witness


def test_archives_that_are_traps(store: Store, make: MakeAdapter, witness: str) -> None:
    before = store.held()
    good = files_of(*make(1))
    weights = good[WEIGHTS_FILE]
    bomb = zipped(good | {WEIGHTS_FILE: b"\0" * (LIMIT + 1)})
    assert len(bomb) < LIMIT / 500
    cases = [
        (zipped({f"../{CONFIG_FILE}": good[CONFIG_FILE], WEIGHTS_FILE: weights}), f"../{CONFIG_FILE}"),
        (tarred({f"../../{WEIGHTS_FILE}": weights, CONFIG_FILE: good[CONFIG_FILE]}), f"../../{WEIGHTS_FILE}"),
        (tarred({f"/tmp/{WEIGHTS_FILE}": weights}), f"/tmp/{WEIGHTS_FILE}"),
        (tarred({CONFIG_FILE: good[CONFIG_FILE]}, link=(WEIGHTS_FILE, "/etc/passwd")), "links"),
        (tarred({}, link=("adapter", "/etc")), "links"),
        (bomb, f"{LIMIT:,}"),
        (tarred(good | {WEIGHTS_FILE: b"\0" * (LIMIT + 1)}), f"{LIMIT:,}"),
        (zipped(good | {"adapter_model.bin": b"\x80\x04."}), "pickle"),
        (zipped(good | {"run.py": b"print()"}), "run.py"),
        (zipped(good)[:-40], "damaged"),
        (tarred(good)[:-40], "damaged"),
        (b"neither", "neither"),
    ]
    for archive, fault in cases:
        refused(store, store.send_archive("bad", archive), fault)
        assert store.held() == before
    assert store.says("witness") == witness


def test_an_upload_that_breaks_off_leaves_nothing(store: Store, make: MakeAdapter, witness: str) -> None:
    before = store.held()

    def half() -> Any:
        yield b'--x\r\nContent-Disposition: form-data; name="name"\r\n\r\nbad\r\n--x\r\n'
        yield b'Content-Disposition: form-data; name="files"; filename="adapter_config.json"\r\n\r\n{'
        raise ConnectionError

    with pytest.raises(ConnectionError):
        store.server.http.post(
            "/v1/adapters", content=half(), headers={"Content-Type": "multipart/form-data; boundary=x"}
        )
    assert store.held() == before
    assert store.says("witness") == witness


@pytest.mark.parametrize("name", ["", "../up", "a@1", "a:b", "-a", "a//b", "n" * 129, BASE])
def test_names_that_cannot_be(store: Store, make: MakeAdapter, witness: str, name: str) -> None:
    before = store.held()
    reply = store.send(name, files_of(*make(1)))
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "name")
    assert store.held() == before


def test_two_uploads_of_one_name_at_once(store: Store, make: MakeAdapter) -> None:
    """The second is refused while the first, which is large, is on its way."""
    large = files_of(*make(2, rank=64, targets=LINEAR))
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(store.send, "twice", large)
        until(lambda: list((store.folder / "staging").iterdir()))
        second = store.send("twice", files_of(*make(1)))
        assert first.result().status_code == 201
    assert (second.status_code, second.json()["error"]["code"]) == (400, "upload_in_progress")
    assert [each["version"] for each in store.server.http.get("/v1/adapters/twice").json()["versions"]] == [1]
    assert store.server.http.delete("/v1/adapters/twice").json()["deleted"]


# ---- accepted ------------------------------------------------------------------------------------


def test_each_form_of_an_upload(store: Store, make: MakeAdapter, witness: str) -> None:
    good = files_of(*make(0))
    in_folder = {f"adapter/{name}": data for name, data in good.items()} | {"adapter/README.md": b"# Mine"}
    replies = [
        store.send("form", good),
        store.send_archive("zip", zipped(good)),
        store.send_archive("zip-stored", zipped(in_folder, compress=False)),
        store.send_archive("tar", tarred(in_folder), "adapter.tar.gz"),
    ]
    described = [reply.json() for reply in replies]
    assert [reply.status_code for reply in replies] == [201] * 4
    assert len({each["digest"] for each in described}) == 1
    for each in described:
        assert (each["kind"], each["rank"], each["sites"], each["version"]) == ("lora", 4, 60, 1)
        assert each["effect"] > 0
        assert each["warnings"] == []
        assert store.says(each["id"]) == witness != store.says(BASE)
        assert store.server.http.delete(f"/v1/adapters/{each['id']}").status_code == 200


def test_another_bases_name_over_fitting_shapes_is_a_warning(store: Store, make: MakeAdapter) -> None:
    config, tensors = make(3)
    reply = store.send("stranger", files_of(config | {"base_model_name_or_path": "acme/other-1B"}, tensors))
    assert reply.status_code == 201
    assert "acme/other-1B" in reply.json()["warnings"][0]
    assert store.says("stranger") != store.says(BASE)
    store.server.http.delete("/v1/adapters/stranger")


def test_versions_aliases_rollback_and_pins(store: Store, make: MakeAdapter) -> None:
    http = store.server.http
    files = {version: files_of(*make(10 + version)) for version in (1, 2, 3)}
    text = {}
    for version in (1, 2, 3):
        reply = store.send("team/poet", files[version])
        assert (reply.status_code, reply.json()["version"]) == (201, version)
        text[version] = store.says("team/poet")
    assert len(set(text.values())) == 3
    again = store.send("team/poet", files[3])
    assert (again.status_code, again.json()["version"]) == (200, 3)
    assert [store.says(f"team/poet@{version}") for version in (1, 2, 3)] == [text[1], text[2], text[3]]

    assert http.put("/v1/aliases/stays", json={"target": "team/poet@2"}).status_code == 200
    assert http.put("/v1/aliases/follows", json={"target": "team/poet"}).status_code == 200
    assert (store.says("stays"), store.says("follows")) == (text[2], text[3])
    assert http.post("/v1/adapters/team/poet/rollback", json={"version": 1}).json()["version"] == 1
    assert [store.says(name) for name in ("team/poet", "stays", "follows")] == [text[1], text[2], text[1]]
    assert http.post("/v1/adapters/team/poet/rollback").json()["version"] == 3
    assert store.says(f"{BASE}:follows") == text[3]

    assert http.post("/v1/adapters/team/poet/pin").json()["pinned"] is True
    until(lambda: http.get("/v1/adapters/team/poet").json()["residency"] == "device")
    assert http.post("/v1/adapters/team/poet/unpin").json()["pinned"] is False

    held = http.delete("/v1/adapters/team/poet")
    assert (held.status_code, held.json()["error"]["code"]) == (409, "conflict")
    assert http.delete("/v1/adapters/team/poet@1").json()["deleted"]
    assert http.post("/v1/completions", json={"model": "team/poet@1", "prompt": "x"}).status_code == 404
    for alias in ("stays", "follows"):
        assert http.delete(f"/v1/aliases/{alias}").json()["deleted"]
    assert http.delete("/v1/adapters/team/poet").json()["deleted"]


def test_a_delete_waits_for_a_stream(store: Store, make: MakeAdapter) -> None:
    http, tokens = store.server.http, 60
    digest = store.send("brief", files_of(*make(20))).json()["digest"]
    expected = store.says("brief", tokens=tokens)
    begun, pieces = threading.Event(), list[str]()

    def read() -> None:
        body = {"model": "brief", "prompt": "Once upon a time", "max_tokens": tokens, "temperature": 0}
        body |= {"stream": True, "ignore_eos": True}
        with http.stream("POST", "/v1/completions", json=body) as reply:
            for line in reply.iter_lines():
                if line.startswith("data: {"):
                    pieces.append(json.loads(line.removeprefix("data: "))["choices"][0]["text"])
                    begun.set()

    with ThreadPoolExecutor(2) as pool:
        reading = pool.submit(read)
        assert begun.wait(60)
        deleting = pool.submit(http.delete, "/v1/adapters/brief")
        until(lambda: http.get("/v1/adapters/brief").status_code == 404)
        late = http.post("/v1/completions", json={"model": "brief", "prompt": "x"})
        assert (late.status_code, late.json()["error"]["code"]) == (404, "model_not_found")
        assert not reading.done()
        assert (store.folder / "blobs" / digest).is_dir()
        reading.result()
        assert deleting.result().json() == {"id": "brief", "object": "adapter.deleted", "deleted": True}
    assert "".join(pieces) == expected
    assert not (store.folder / "blobs" / digest).exists()


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_adapters_survive_the_end_of_the_server(
    store: Store, make: MakeAdapter, witness: str, how: signal.Signals
) -> None:
    name = how.name.lower()
    assert store.send(name, files_of(*make(30))).status_code == 201
    assert store.send(name, files_of(*make(31))).status_code == 201
    store.server.http.put(f"/v1/aliases/{name}-alias", json={"target": f"{name}@1"})
    store.server.http.post("/v1/adapters/witness/pin")
    models = ["witness", name, f"{name}@1", f"{name}-alias"]
    said, held = [store.says(model) for model in models], store.held()
    assert store.server.stop(how) == (0 if how is signal.SIGTERM else -how)
    store.server.start()
    assert store.held() == held
    assert [store.says(model) for model in models] == said
    assert store.server.http.get("/v1/adapters/witness").json()["residency"] == "device"


def test_an_adapter_is_asked_with_its_own_template(store: Store, make: MakeAdapter) -> None:
    own = {"chat_template.jinja": b"{% for message in messages %}{{ message.content }}{% endfor %}"}
    reply = store.send("templated", files_of(*make(77)) | own)
    assert reply.status_code == 201, reply.text
    assert reply.json()["own_chat_template"]
    body = {"messages": [{"role": "user", "content": "Once upon a time"}], "max_tokens": 8, "temperature": 0}
    said = {}
    for model in ("templated", BASE):
        chat = store.server.http.post(
            "/v1/chat/completions", json=body | {"model": model, "ignore_eos": True}
        )
        assert chat.status_code == 200, chat.text
        said[model] = chat.json()["choices"][0]["message"]["content"]
    assert said["templated"] == store.says("templated"), "the template adds nothing to the message"
    assert said[BASE] != store.says(BASE), "the base's does"
