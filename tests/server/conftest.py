"""A real server on a real socket, around an engine process with a toy model (fake_engine.py)."""

from __future__ import annotations

import asyncio
import hashlib
import json
import socket
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import httpx
import openai
import pytest
import uvicorn
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from veneer.adapters.store import AdapterStore
from veneer.engine.client import EngineClient, RestartPolicy
from veneer.engine.config import EngineConfig
from veneer.server.app import create_app
from veneer.server.metrics import PrometheusMetrics
from veneer.server.state import ServerConfig, ServerState

FAKE_ENGINE = Path(__file__).parent / "fake_engine.py"
BASE = "tiny"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = ["the quick brown fox jumps over the lazy dog. ", "one two three four five six seven. "]
WAIT = 30.0  # seconds until a test gives up waiting; never reached when things work

Value = TypeVar("Value")


def train_tokenizer() -> Tokenizer:
    """A byte-level BPE of 512 tokens; id 0 ends a sequence."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<|end|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken("<|pad|>", special=True)])
    return tokenizer


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the HTTP process reads of a model: tokenizer and chat template."""
    return write_model(tmp_path_factory.mktemp("model"))


def write_model(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    train_tokenizer().save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<|im_start|>", "eos_token": "<|end|>", "pad_token": "<|pad|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(CHATML)
    return folder


class Server:
    """A running server. `state` belongs to its thread's loop: use `call` for coroutines."""

    def __init__(self, state: ServerState, log: Path, listening: socket.socket | None = None) -> None:
        self.state, self.log = state, log
        self.running = False
        self._listening = listening or socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        self.http = httpx.Client(base_url=self.url, timeout=WAIT)
        self.openai = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=WAIT)
        self.app = create_app(state)
        config = uvicorn.Config(self.app, log_config=None, timeout_graceful_shutdown=5)
        self._uvicorn = uvicorn.Server(config)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve())

    async def _serve(self) -> None:
        await self.state.engine.start()
        try:
            await self._uvicorn.serve(sockets=[self._listening])
        finally:
            await self.state.engine.stop(drain_timeout=1)

    def __enter__(self) -> Server:
        self._thread.start()
        self.running = True
        self.until(lambda: self._uvicorn.started)
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End it; its store can be opened again. Safe to call twice."""
        if not self.running:
            return
        self.running = False
        self.http.close()
        self.openai.close()
        self._uvicorn.should_exit = True
        self._thread.join(WAIT)
        assert not self._thread.is_alive()
        self._loop.close()
        self.state.store.close()

    def call(self, work: Coroutine[Any, Any, Value]) -> Value:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(WAIT)

    def until(self, condition: Callable[[], Value]) -> Value:
        """Wait for a condition, with a bound."""
        pause, bound = threading.Event(), 0.0
        while not (value := condition()):
            pause.wait(0.01)
            bound += 0.01
            assert bound < WAIT, "the condition did not come true"
        return value

    def until_ready(self) -> Server:
        self.until(lambda: self.state.engine.state == "ready")
        return self

    def received(self, kind: str) -> list[dict[str, Any]]:
        """What the engine process was sent, of one type of message."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [line for line in map(json.loads, lines) if line["type"] == kind]

    def post(self, path: str, body: Any) -> httpx.Response:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.http.post(path, content=data, headers={"Content-Type": "application/json"})


class MakeServer:
    """Starts servers; the positional arguments go to the toy engine's command line."""

    def __init__(self, folder: Path, model_folder: Path) -> None:
        self._folder, self._model_folder = folder, model_folder
        self._running: list[Server] = []

    def __call__(
        self,
        *engine_options: str,
        config: ServerConfig = ServerConfig(),  # noqa: B008 - immutable
        engine: dict[str, Any] | None = None,
        adapters: tuple[str, ...] = (),
        after: Server | None = None,
        listening: socket.socket | None = None,
    ) -> Server:
        """A server with a store of its own, or with that of one that was stopped."""
        folder = after.log.parent if after else self._folder / f"server-{len(self._running)}"
        log = folder / "engine.log"
        store = AdapterStore(folder / "store")
        for name in adapters:
            add_adapter(store, name)
        options = EngineConfig(model=str(self._model_folder), store=str(store.root), **(engine or {}))
        command = [sys.executable, str(FAKE_ENGINE), "--log", str(log), *engine_options]
        state = ServerState(
            engine=EngineClient(options, command=command, restart=RestartPolicy(pause=0.01)),
            store=store,
            served_name=BASE,
            model_folder=self._model_folder,
            config=config,
            metrics=PrometheusMetrics(),
        )
        self._running.append(Server(state, log, listening).__enter__())
        return self._running[-1]

    def stop(self) -> None:
        for server in self._running:
            server.stop()


@pytest.fixture
def make_server(tmp_path: Path, model_folder: Path) -> Iterator[MakeServer]:
    make = MakeServer(tmp_path, model_folder)
    yield make
    make.stop()


@pytest.fixture(scope="module")
def module_server(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Iterator[Server]:
    make = MakeServer(tmp_path_factory.mktemp("module"), model_folder)
    yield make(adapters=("sql", "team/poet")).until_ready()
    make.stop()


@pytest.fixture
def server(module_server: Server) -> Server:
    """A ready server with two adapters, shared by the module's tests; its engine's log starts empty."""
    module_server.log.unlink(missing_ok=True)
    return module_server


def add_adapter(store: AdapterStore, name: str) -> str:
    """Put two files into the store under `name`; the toy engine does not read them. Returns the digest."""
    with store.stage() as staging:
        (staging.path / "adapter_config.json").write_text(json.dumps({"for": name}))
        (staging.path / "adapter_model.safetensors").write_bytes(hashlib.sha256(name.encode()).digest())
        return store.commit(staging, name, {}).digest
