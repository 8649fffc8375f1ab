"""An engine in this process, driven step by step."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from veneer.engine.config import EngineConfig
from veneer.engine.graphs import DecodeGraphs, Variant, _Captured, buckets_up_to
from veneer.engine.messages import AdapterChecked, Done, Generate, Outputs, SamplingParams, SequenceOutput
from veneer.engine.step_tables import LENGTHS
from veneer.kernels.tables import Segment


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

    def call(self, request: Any, limit: int = 2000) -> Any:
        """Send a request that is answered by one reply, and step until it is."""
        replies = self.engine.handle(request)
        for _ in range(limit):
            for reply in replies:
                if isinstance(reply, AdapterChecked | Done):
                    return reply
            replies = self.step()
        raise AssertionError(f"not answered after {limit} steps")

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


@pytest.fixture(scope="session")
def base(tiny_model: Callable[[str], Path]) -> Path:
    """The folder of the tiny Llama, for modules that need no other."""
    return tiny_model("llama")


@pytest.fixture(scope="session")
def make_stores(
    tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Callable[[Path, Path], None]], Callable[[str], Path]]:
    """A function: what writes a base's adapters, given its folder and that of the blobs -> `store_of`.

    That is a function, too: architecture -> the folder of a store with those adapters, made once.
    """

    def make(write: Callable[[Path, Path], None]) -> Callable[[str], Path]:
        @cache
        def store_of(architecture: str) -> Path:
            store = tmp_path_factory.mktemp("store")
            write(tiny_model(architecture), store / "blobs")
            return store

        return store_of

    return make


class Replay:
    """In place of a captured graph: the forward over the static tables, each time anew, on the CPU."""

    def __init__(self, graphs: DecodeGraphs, bucket: int, variant: Variant) -> None:
        self.graphs, self.bucket, self.variant, self.replays = graphs, bucket, variant, 0
        vocabulary = graphs._base.config.vocab_size
        ids = torch.empty(bucket, dtype=torch.int64)
        self.captured = _Captured(self, torch.empty(bucket, vocabulary), ids)  # type: ignore[arg-type]

    def replay(self) -> None:
        self.replays += 1
        graphs, step = self.graphs, self.graphs._base.context
        graphs._bind(self.bucket, self.variant)
        assert step.rows is not None
        assert step.batch is not None
        # the torch kernels go by host lists, which a graph has not; they are read back from the tables
        tiles = step.rows.tiles[: int(step.rows.used)].tolist()
        segments = tuple(Segment(slot, first, first + rows) for slot, first, rows in tiles)
        step.rows = step.head_rows = replace(step.rows, segments=segments)
        step.batch = replace(step.batch, kv_lens=graphs._tables.rows[LENGTHS, : self.bucket].tolist())
        logits, ids = graphs._forward(self.bucket)
        self.captured.logits.copy_(logits)
        self.captured.ids.copy_(ids)


@pytest.fixture
def replay_graphs() -> Callable[[Any], list[Replay]]:
    """A function: engine -> what stands for its decode graphs of up to 16 rows from then on."""

    def make(engine: Any) -> list[Replay]:
        graphs = DecodeGraphs(
            engine.base,
            engine.runner._tokens,
            page_size=engine.config.page_size,
            scratch_page=engine.pool.num_pages,
            max_pages=-(-engine.max_model_len // engine.config.page_size),
            max_batch=16,
            slots=engine.config.max_loras,
        )
        made = [Replay(graphs, bucket, variant) for bucket in buckets_up_to(16) for variant in Variant]
        graphs._captured = {(each.bucket, each.variant): each.captured for each in made}
        engine.runner.graphs = graphs
        return made

    return make
