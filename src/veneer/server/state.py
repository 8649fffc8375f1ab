"""What every route shares: configuration, engine, store, tokenizers, metrics and the requests in flight.

One `ServerState` lives at `app.state.veneer`. Imports no torch.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from fastapi import Request

import veneer
from veneer.adapters.store import AdapterStore
from veneer.engine.client import EngineClient
from veneer.server.adapter_text import AdapterTexts, base_text
from veneer.server.known_blends import KnownBlends
from veneer.server.response_store import ResponseStore
from veneer.training.jobs.file_store import FileStore
from veneer.training.jobs.job_store import JobStore

if TYPE_CHECKING:  # it imports this module
    from veneer.server.merge_api import Merge


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """What `veneer serve` was started with, as far as the HTTP process needs it."""

    host: str = "127.0.0.1"
    port: int = 8000
    base_names: tuple[str, ...] = ()  # what else the base is called; for an adapter's base_model_name_or_path
    api_keys: tuple[str, ...] = ()
    admin_key: str | None = None
    adapter_dirs: tuple[Path, ...] = ()  # folders that adapters may be registered from by path
    max_upload_bytes: int = 4 << 30
    max_body_bytes: int = 16 << 20  # of a JSON request
    request_timeout: float | None = None  # seconds; the limit of every generation request
    max_models: int = 1000  # entries of /v1/models
    tool_call_parser: str | None = None  # of tool_calls/registry.py; None: seen from the chat template
    max_sequences: int = 1024  # sequences (prompts times n) of one request
    max_file_bytes: int = 512 << 20  # of one file of /v1/files
    max_files: int = 1000  # that clients may store
    max_jobs: int = 1000  # fine-tuning jobs that are remembered; the oldest that are over go first
    max_unfinished_jobs: int = 64  # fine-tuning jobs that wait, run or are paused
    max_checkpoints: int = 100  # newest ones of a job that are served
    max_responses: int = 10_000  # of /v1/responses that are stored, the newest; 0: none
    response_days: float = 30.0  # that they are stored


class Metrics(Protocol):
    """What the routes report. `adapter_name` is None for the base."""

    def request_started(self, route: str, adapter_name: str | None) -> None: ...

    def first_token(self, adapter_name: str | None, seconds: float) -> None:
        """From the request's receipt to its first token."""

    def inter_token(self, seconds: float) -> None:
        """Between two outputs of one sequence."""

    def tokens(self, adapter_name: str | None, prompt: int, completion: int) -> None: ...

    def request_finished(self, route: str, adapter_name: str | None, outcome: str) -> None:
        """`outcome` is "ok", "cancelled" or the code of the error."""

    def unknown_field(self, name: str) -> None: ...


class InFlight:
    """Counts requests by adapter digest, so that a delete can wait for the last one."""

    def __init__(self) -> None:
        self.started: Counter[str | None] = Counter()  # requests since the server started
        self._counts: Counter[str | None] = Counter()
        self._total = 0
        self._waiters: dict[str | None, asyncio.Event] = {}

    @contextmanager
    def hold(self, *digests: str | None) -> Iterator[None]:
        """Count one request that uses each of `digests` (None: the base) while the block runs."""
        self._total += 1
        self.started.update(digests)
        self._counts.update(digests)
        try:
            yield
        finally:
            self._total -= 1
            for digest in digests:
                self._release(digest)

    def _release(self, digest: str | None) -> None:
        self._counts[digest] -= 1
        if not self._counts[digest]:
            del self._counts[digest]
            if waiter := self._waiters.pop(digest, None):
                waiter.set()

    def count(self, digest: str | None) -> int:
        return self._counts[digest]

    def total(self) -> int:
        return self._total

    async def drained(self, digest: str | None) -> None:
        """Return once no request uses `digest`. New ones must have been stopped before."""
        while self._counts[digest]:
            await self._waiters.setdefault(digest, asyncio.Event()).wait()


@dataclass(kw_only=True)
class ServerState:
    engine: EngineClient
    store: AdapterStore
    served_name: str  # the base's model id
    model_folder: Path  # holds the base's tokenizer.json and chat template
    config: ServerConfig
    metrics: Metrics
    in_flight: InFlight = field(default_factory=InFlight)
    started: int = field(default_factory=lambda: int(time.time()))
    registering: bool = False  # adapters of the command line are still being added: /ready waits for them
    texts: AdapterTexts = field(init=False)
    blends: KnownBlends = field(init=False)
    merging: asyncio.Lock = field(default_factory=asyncio.Lock)  # each merge keeps a thread waiting
    merges: dict[str, Merge] = field(default_factory=dict)  # by id: those that wait or are under way
    files: FileStore = field(init=False)
    jobs: JobStore = field(init=False)
    responses: ResponseStore = field(init=False)

    def __post_init__(self) -> None:
        self.texts = AdapterTexts(base_text(self.model_folder), self.store.blob)
        self.blends = KnownBlends(self.engine)
        self.files = FileStore(self.store)
        self.jobs = JobStore(self.store, self.files)
        self.responses = ResponseStore(
            self.store, most=self.config.max_responses, lifetime=self.config.response_days * 86400
        )

    @property
    def fingerprint(self) -> str:
        """OpenAI's `system_fingerprint`: changes when the version, the base or its numerics change."""
        info = self.engine.info
        parts = [veneer.__version__, self.served_name]
        if info:
            parts += [info.model_type, info.device, info.dtype, info.quantization, info.kernels]
        return "fp_" + hashlib.sha256("\0".join(parts).encode()).hexdigest()[:10]


def state_of(request: Request) -> ServerState:
    """The state that `create_app` was given."""
    return cast(ServerState, request.app.state.veneer)
