"""An engine in this process, driven step by step."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from veneer.engine.config import EngineConfig
from veneer.engine.messages import Generate, Outputs, SamplingParams, SequenceOutput


class Driver:
    """Submits requests to an `Engine` and steps it until they are answered."""

    def __init__(self, config: EngineConfig) -> None:
        from veneer.engine.engine import Engine

        self._news = threading.Event()
        self.engine = Engine(config, wake=self._news.set)
        self.outputs: dict[str, list[SequenceOutput]] = {}
        self._next = 0

    def submit(self, prompt: list[int], adapter: str | None = None, **sampling: Any) -> str:
        self._next += 1
        identifier = f"r{self._next}"
        params = SamplingParams(**{"max_tokens": 16, "temperature": 0.0, "ignore_eos": True, **sampling})
        request = Generate(id=identifier, prompt=prompt, sampling=params, adapter=adapter)
        self.outputs[identifier] = []
        self._take(self.engine.handle(request))
        return identifier

    def run(self, *identifiers: str, limit: int = 5000) -> list[list[int]]:
        """Step until all are finished; returns their tokens."""
        for _ in range(limit):
            if all(self.finished(i) for i in identifiers):
                return [self.tokens(i) for i in identifiers]
            self.step()
        raise AssertionError(f"not finished after {limit} steps")

    def step(self) -> list[Any]:
        """One step; when nothing could run, wait until the engine has news. Returns all replies."""
        self._news.clear()
        replies, ran = self.engine.step()
        if not ran:
            self._news.wait(0.05)
        self._take(replies)
        return replies

    def generate(self, prompt: list[int], adapter: str | None = None, **sampling: Any) -> list[int]:
        return self.run(self.submit(prompt, adapter, **sampling))[0]

    def finished(self, identifier: str) -> bool:
        found = self.outputs[identifier]
        return bool(found) and (found[-1].finish_reason is not None or found[-1].error is not None)

    def tokens(self, identifier: str) -> list[int]:
        return [token for item in self.outputs[identifier] for token in item.tokens]

    def _take(self, replies: list[Any]) -> None:
        for reply in replies:
            if isinstance(reply, Outputs):
                for item in reply.items:
                    self.outputs[item.id].append(item)


@pytest.fixture
def make_engine(tmp_path: Path) -> Iterator[Callable[..., Driver]]:
    """A function: model folder and config fields -> Driver. Engines are closed at the end."""
    made: list[Driver] = []

    def make(folder: Path, **fields: Any) -> Driver:
        defaults: dict[str, Any] = {
            "store": str(tmp_path / "store"),
            "device": "cpu",
            "dtype": "float32",
            "quantization": "none",
            "page_size": 4,
            "kv_cache_memory": 8 << 20,
            "adapter_memory": 16 << 20,
            "host_adapter_memory": 32 << 20,
        }
        driver = Driver(EngineConfig(model=str(folder), **{**defaults, **fields}))
        made.append(driver)
        return driver

    yield make
    for driver in made:
        driver.engine.close()
