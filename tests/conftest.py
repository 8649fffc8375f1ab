"""Fixtures that several rooms share: tiny random models in transformers' own formats, and live servers."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest
from tests.text_model import VOCABULARY, make_text_model

ROOT = Path(__file__).parent.parent
Value = TypeVar("Value")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Modules that serve the packaged base come first: they take longest, and one at the end would run alone."""
    long = {item.path for item in items if item.get_closest_marker("model")}
    items.sort(key=lambda item: item.path not in long)


_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_WINDOW = 11  # shorter than the prompts, no multiple of a page


def _tiny_config(architecture: str) -> Any:
    import transformers as tf

    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    match architecture:
        case "llama":
            return tf.LlamaConfig(**_COMMON)
        case "llama-tied":
            return tf.LlamaConfig(**_COMMON, tie_word_embeddings=True)
        case "mistral":
            return tf.MistralConfig(**_COMMON, sliding_window=_WINDOW)
        case "qwen2":
            return tf.Qwen2Config(
                **_COMMON, use_sliding_window=True, sliding_window=_WINDOW, max_window_layers=1
            )
        case "qwen3":
            return tf.Qwen3Config(**_COMMON, head_dim=32)
        case "gemma3":
            return tf.Gemma3TextConfig(
                **_COMMON, head_dim=32, sliding_window=_WINDOW, layer_types=layers, query_pre_attn_scalar=32
            )
        case "phi3":
            return tf.Phi3Config(**_COMMON, sliding_window=_WINDOW)
    raise ValueError(architecture)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function: architecture -> folder of a random float32 model of it, made once a session."""
    made: dict[str, Path] = {}

    def make(architecture: str) -> Path:
        if architecture not in made:
            import torch
            from transformers import AutoModelForCausalLM

            torch.manual_seed(hash_of(architecture))
            model = AutoModelForCausalLM.from_config(_tiny_config(architecture), dtype=torch.float32)
            for name, parameter in model.named_parameters():
                # Flat logits would make greedy ties likely; norms near their initial values hide scale errors.
                scale = 0.15 if parameter.ndim > 1 else 0.3
                if parameter.ndim > 1:
                    parameter.data.normal_(0, scale)
                elif "norm" in name:
                    parameter.data += torch.randn_like(parameter) * scale
            folder = tmp_path_factory.mktemp(architecture)
            model.save_pretrained(folder)
            made[architecture] = folder
        return made[architecture]

    return make


@pytest.fixture(scope="session")
def text_model(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama that writes text and reads chats."""
    return make_text_model(tiny_model("llama"), tmp_path_factory.mktemp("text") / "text-model")


def hash_of(text: str) -> int:
    return sum(map(ord, text))


def until(condition: Callable[[], Value | None], seconds: float = 120.0) -> Value:
    """Poll another process until `condition` gives something true; returns that."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.02)
    return value


def process_state(pid: int) -> str:
    """The letter that ps shows: Z has ended and waits for its parent; empty when there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


class LiveServer:
    """`veneer serve` with its engine, as processes of their own, on a free port of 127.0.0.1.

    After `stop` it can `start` again, with the same store and on another port.
    """

    def __init__(self, command: list[str], log: Path) -> None:
        self._command, self._log = command, log
        self._process: subprocess.Popen[bytes]

    def start(self) -> LiveServer:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*self._command, "--port", "0"], cwd=ROOT, stdout=log, stderr=log
            )
        try:
            self.url = until(self._listening, 240)  # the first ever converts the base
            self.http = httpx.Client(base_url=self.url, timeout=120)
            until(lambda: self._alive() and self.is_ready())
        except BaseException:
            self._process.kill()
            raise
        return self

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        """End the server and wait for its engine too; returns the exit status."""
        engine = self.engine_pid()
        self.http.close()
        self._process.send_signal(how)
        status = self._process.wait(60)
        until(lambda: engine is None or process_state(engine) in ("", "Z"), 30)
        return status

    def runs(self) -> bool:
        return self._process.poll() is None

    def is_ready(self) -> bool:
        return self.http.get("/ready").status_code == 200

    def engine_pid(self) -> int | None:
        """The server's one child that is the engine, found as an operator would."""
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                is_engine = b"veneer.training.process" in (entry / "cmdline").read_bytes()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if is_engine and parent == self._process.pid:
                return int(entry.name)
        return None

    def metric(self, sample: str) -> float:
        """The value of one sample of /metrics, given as it is printed there; 0 when it is not there."""
        found = re.search(rf"^{re.escape(sample)} (\S+)$", self.http.get("/metrics").text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def _alive(self) -> bool:
        assert self.runs(), self.log
        return True

    def _listening(self) -> str | None:
        found = self._alive() and re.search(r"listening on (http://\S+);", self.log)
        return found[1] if found else None


@pytest.fixture(scope="module")
def live_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., LiveServer]]:
    """Starts servers on the CPU, with the default base unless another command is given."""
    started: list[LiveServer] = []

    def start(*options: str, command: list[str] | None = None) -> LiveServer:
        command = command or [sys.executable, "-m", "veneer.server.cli", "serve", "--device", "cpu", *options]
        started.append(LiveServer(command, tmp_path_factory.mktemp("server") / "log"))
        return started[-1].start()

    yield start
    for server in started:
        if server.runs():
            assert server.stop() == 0, server.log
