"""Greedy answers of the resident base and of adapters on it, through an engine in this process: what is measured is
what is served.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from veneer.adapters.names import FILES
from veneer.adapters.staging import Staging
from veneer.engine.base import Base
from veneer.engine.config import EngineConfig
from veneer.engine.engine import Engine
from veneer.engine.messages import Generate, Outputs, SamplingParams, SequenceOutput
from veneer.engine.runner import kv_page_bytes
from veneer.errors import from_wire

_PAGE = 16  # tokens


class Answers:
    """A context manager around the engine, which has a small cache and a store of its own."""

    def __init__(self, base: Base, folder: Path, *, longest: int, batch_size: int) -> None:
        """`longest`: tokens of a prompt and its answer."""
        self._store = Path(tempfile.mkdtemp(prefix="veneer-answers-"))
        self._news = threading.Event()
        pages = batch_size * -(-longest // _PAGE)
        config = EngineConfig(
            model=str(folder),
            store=str(self._store),
            quantization=base.quantization,
            dtype=str(base.dtype).removeprefix("torch."),
            device=str(base.device),
            max_model_len=longest,
            max_num_seqs=batch_size,
            max_queue=1 << 20,
            page_size=_PAGE,
            kv_cache_memory=kv_page_bytes(base, _PAGE) * pages,
            max_loras=1,
            enforce_eager=True,
        )
        self._engine = Engine(config, wake=self._news.set, base=base)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._engine.close()
        shutil.rmtree(self._store, ignore_errors=True)

    def add(self, folder: Path) -> str:
        """Make an adapter known; returns its key."""
        copy = Path(tempfile.mkdtemp(dir=self._store))
        for name in FILES:
            shutil.copy(folder / name, copy)
        digest = Staging(copy).digest()
        blobs = self._store / "blobs"
        blobs.mkdir(exist_ok=True)
        copy.rename(blobs / digest)
        return digest

    def generate(
        self,
        prompts: Sequence[list[int]],
        adapter: str | None,
        max_new_tokens: int,
        on_answer: Callable[[], object] = lambda: None,
    ) -> list[list[int]]:
        """The tokens that follow each prompt, without the one that ends the turn. Raises VeneerError."""
        sampling = SamplingParams(max_tokens=max_new_tokens, temperature=0.0)
        answers: dict[str, list[int]] = {str(place): [] for place in range(len(prompts))}
        for place, prompt in enumerate(prompts):
            request = Generate(id=str(place), prompt=list(prompt), sampling=sampling, adapter=adapter)
            self._take(self._engine.handle(request), answers)
        left = len(answers)
        while left:
            self._news.clear()
            replies, ran = self._engine.step()
            ended = self._take(replies, answers)
            left -= ended
            for _ in range(ended):
                on_answer()
            if not ran:
                self._news.wait(0.05)
        return list(answers.values())

    def _take(self, replies: Sequence[object], answers: dict[str, list[int]]) -> int:
        """Collect tokens; returns how many answers ended."""
        ended = 0
        for item in (each for reply in replies if isinstance(reply, Outputs) for each in reply.items):
            answers[item.id] += _text_tokens(item)
            ended += item.finish_reason is not None
        return ended


def _text_tokens(item: SequenceOutput) -> list[int]:
    if item.error is not None:
        raise from_wire(item.error.status, item.error.code, item.error.message, item.error.param)
    return item.tokens[:-1] if item.stop_token is not None else item.tokens
