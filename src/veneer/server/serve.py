"""`veneer serve`: from the command line's arguments to a running server, and to its orderly end.

    resolve the model (a child process: conversion needs torch) → bind the port → spawn the engine
    → HTTP answers, /ready says 503 → engine ready → --lora-modules registered → /ready says 200
    SIGTERM → new requests get 503 → running ones finish, at most --shutdown-timeout → engine ends → exit 0

A second signal ends everything at once.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import msgspec
import uvicorn
import uvloop

import veneer
from veneer.adapters.store import AdapterStore
from veneer.engine.client import EngineClient
from veneer.engine.config import EngineConfig
from veneer.engine.source import served_name
from veneer.errors import EngineUnavailable, InvalidRequest, VeneerError
from veneer.server.app import create_app
from veneer.server.metrics import PrometheusMetrics
from veneer.server.publish import Fill, fill_from, follow_pins, publish
from veneer.server.state import ServerConfig, ServerState

log = logging.getLogger(__name__)

FLUSH_SECONDS = 5  # connections get this long for their last bytes after the engine has ended
SHOWN_ADAPTERS = 5


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Everything `run` needs. `engine_command` is the seam for tests: the engine's argv without the address."""

    served_name: str
    server: ServerConfig
    engine: EngineConfig
    lora_modules: Sequence[tuple[str, str]] = ()
    shutdown_timeout: float = 30.0
    access_log: bool = False
    engine_command: Sequence[str] = (sys.executable, "-m", "veneer.training.process")


def serve(arguments: argparse.Namespace) -> int:
    """Run `veneer serve` with the arguments of `cli.py`; returns the exit status."""
    logging.basicConfig(
        level=arguments.log_level.upper(), format="%(asctime)s %(levelname)-7s %(name)s: %(message)s"
    )
    for noisy in ("httpx", "uvicorn.error"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    return run(options_from(arguments, resolve_model(arguments.model)))


def resolve_model(model: str) -> Path:
    """A local folder that transformers can load; converts or downloads in a child process, with progress."""
    child = subprocess.run(
        [sys.executable, "-m", "veneer.engine.source", model], stdout=subprocess.PIPE, text=True, check=False
    )
    lines = child.stdout.strip().splitlines()
    if child.returncode or not lines:
        raise InvalidRequest(f"model {model!r} could not be made ready; the reason is above", param="model")
    return Path(lines[-1])


def options_from(arguments: argparse.Namespace, folder: Path) -> ServeOptions:
    """Sort the command line into what the HTTP process and what the engine needs."""
    api_keys, admin_key = _keys(arguments)
    name = arguments.served_model_name or served_name(arguments.model)
    server = ServerConfig(
        host=arguments.host,
        port=arguments.port,
        base_names=(arguments.model, served_name(arguments.model), folder.name),
        api_keys=api_keys,
        admin_key=admin_key,
        adapter_dirs=tuple(path.absolute() for path in arguments.adapter_dir),
        max_upload_bytes=arguments.max_upload,
        max_file_bytes=arguments.max_file,
        max_files=arguments.max_files,
        max_jobs=arguments.max_jobs,
        max_unfinished_jobs=arguments.max_unfinished_jobs,
        max_checkpoints=arguments.max_checkpoints,
        max_responses=arguments.max_responses,
        response_days=arguments.response_days,
        request_timeout=arguments.request_timeout or None,
        tool_call_parser=arguments.tool_call_parser,
    )
    engine = EngineConfig(
        model=str(folder),
        store=str(arguments.store.absolute()),
        quantization=arguments.quantization,
        nf4_kernels=arguments.nf4_kernels,
        dtype=arguments.dtype,
        device=arguments.device,
        max_model_len=arguments.max_model_len,
        max_num_seqs=arguments.max_num_seqs,
        max_num_batched_tokens=arguments.max_num_batched_tokens,
        max_queue=arguments.max_queue,
        page_size=arguments.block_size,
        kv_cache_memory=arguments.kv_cache_memory,
        prefix_caching=arguments.enable_prefix_caching,
        max_loras=arguments.max_loras,
        max_lora_rank=arguments.max_lora_rank,
        max_added_tokens=arguments.max_added_tokens,
        max_module_bytes=arguments.max_module_bytes,
        adapter_memory=arguments.adapter_memory,
        host_adapter_memory=arguments.host_adapter_memory,
        enforce_eager=arguments.enforce_eager,
        cuda_graphs=arguments.cuda_graphs,
        threads=arguments.threads,
        base_name=name,
        training_share=arguments.training_share,
        training_latency=arguments.training_latency,
        training_memory=arguments.training_memory,
        hot_adapter_memory=arguments.hot_adapter_memory,
        hot_adapter_format=arguments.hot_adapter_format,
    )
    return ServeOptions(
        served_name=name,
        server=server,
        engine=engine,
        lora_modules=tuple(arguments.lora_modules),
        shutdown_timeout=arguments.shutdown_timeout,
        access_log=arguments.access_log,
    )


def run(options: ServeOptions) -> int:
    """Serve until a signal; returns the exit status. Raises `VeneerError` when the start fails."""
    listening = _listen(options.server.host, options.server.port)
    runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
    with listening, AdapterStore(Path(options.engine.store)) as store, runner:
        return runner.run(_run(options, listening, store))


async def _run(options: ServeOptions, listening: socket.socket, store: AdapterStore) -> int:
    state = ServerState(
        engine=EngineClient(options.engine, command=options.engine_command),
        store=store,
        served_name=options.served_name,
        model_folder=Path(options.engine.model),
        config=options.server,
        metrics=PrometheusMetrics(),
        registering=True,
    )
    server = _Server(
        uvicorn.Config(
            create_app(state),
            log_config=None,
            access_log=options.access_log,
            server_header=False,
            timeout_graceful_shutdown=FLUSH_SECONDS,
        ),
        state.engine,
        options.shutdown_timeout,
    )
    url = _url(listening)
    log.info("listening on %s; /ready answers 200 once the engine has started", url)
    await state.engine.start()
    preparing = asyncio.create_task(_prepare(options, state, url))
    preparing.add_done_callback(server.end_if_failed)
    try:
        await server.serve(sockets=[listening])
    finally:
        await state.engine.stop(drain_timeout=0)
        preparing.cancel()
    failed = None if server.draining else (await asyncio.gather(preparing, return_exceptions=True))[0]
    if isinstance(failed, Exception):
        raise failed
    return 0


class _Server(uvicorn.Server):
    """uvicorn, but the first signal drains the engine while the port still answers, with 503."""

    def __init__(self, config: uvicorn.Config, engine: EngineClient, drain_timeout: float) -> None:
        super().__init__(config)
        self.draining = False
        self._engine = engine
        self._drain_timeout = drain_timeout
        self._drain: asyncio.Task[None] | None = None
        self._loop = asyncio.get_running_loop()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.draining:
            self.should_exit = self.force_exit = True
        else:
            self.draining = True
            self._loop.call_soon_threadsafe(self._begin_drain)

    def end_if_failed(self, task: asyncio.Task[None]) -> None:
        if task.cancelled() or task.exception():
            self.should_exit = True

    def _begin_drain(self) -> None:
        log.info("ending: running requests get %.0f s, new ones are refused", self._drain_timeout)
        self._drain = asyncio.create_task(self._engine.stop(self._drain_timeout))
        self._drain.add_done_callback(self._drained)

    def _drained(self, drain: asyncio.Task[None]) -> None:
        self.should_exit = True


async def _prepare(options: ServeOptions, state: ServerState, url: str) -> None:
    """What happens between the engine's start and /ready."""
    await _first_ready(state.engine)
    for name, path in options.lora_modules:
        try:
            record = await publish(state, name, _local_or_hub(state, path), unless_known=True)
        except EngineUnavailable:
            raise
        except VeneerError as error:
            raise InvalidRequest(f"--lora-modules {name}={path}: {error.message}") from error
        if not record.current:
            log.warning("%s: %s is version %d, another one is current", name, path, record.version)
    await follow_pins(state)
    state.registering = False
    print(await _greeting(state, url), flush=True)


async def _first_ready(engine: EngineClient) -> None:
    """Wait for the engine. One that dies before it was ever ready would die again: the start fails."""
    while engine.state == "starting" and engine.last_error is None:
        await asyncio.sleep(0.05)
    if engine.state == "starting":
        raise EngineUnavailable(f"the engine did not start: {engine.last_error}; the reason is above")
    await engine.wait_ready()


def _local_or_hub(state: ServerState, path: str) -> Fill:
    """The operator's own path: any folder, with links that lead anywhere (as in the hub's cache)."""
    folder = Path(path).expanduser()
    if folder.exists() or path.startswith(("/", ".", "~")):
        return fill_from(state, str(folder.absolute()), [Path("/")])
    return fill_from(state, path, [])


async def _greeting(state: ServerState, url: str) -> str:
    info = state.engine.info
    with_what = f" ({info.device_name}, {info.dtype}, {info.quantization})" if info else ""
    lines = [f"Veneer {veneer.__version__} serves {state.served_name} at {url}{with_what}. Try:", ""]
    key = ' -H "Authorization: Bearer $VENEER_API_KEY"' if state.config.api_keys else ""
    lines.append(f"  curl {url}/v1/models{key}")
    adapters = [each.name for each in await asyncio.to_thread(state.store.list) if each.alias is None]
    for model in [state.served_name, *adapters[:SHOWN_ADAPTERS]]:
        lines.append(_curl(state, url, model, key))
    if len(adapters) > SHOWN_ADAPTERS:
        lines.append(
            f"  … and {len(adapters) - SHOWN_ADAPTERS} more adapters: veneer adapters list --url {url}"
        )
    return "\n".join([*lines, ""])


def _curl(state: ServerState, url: str, model: str, key: str) -> str:
    if state.texts.base.template is not None:
        route = "chat/completions"
        body = {"model": model, "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 32}
    else:
        route, body = "completions", {"model": model, "prompt": "Once upon a time", "max_tokens": 32}
    data = shlex.quote(msgspec.json.encode(body).decode())
    return f"  curl {url}/v1/{route}{key} -H 'Content-Type: application/json' -d {data}"


def _keys(arguments: argparse.Namespace) -> tuple[tuple[str, ...], str | None]:
    """API keys and admin key from the flags, else from the environment."""
    environment = os.environ.get("VENEER_API_KEY")
    keys = tuple(arguments.api_key) or ((environment,) if environment else ())
    admin = arguments.admin_api_key or os.environ.get("VENEER_ADMIN_API_KEY") or None
    if not all(keys):
        raise InvalidRequest("--api-key is empty; give a key, or leave the flag out")
    if not keys and arguments.host not in ("127.0.0.1", "::1", "localhost"):
        log.warning("listening on %s without --api-key: everybody who reaches it may use it", arguments.host)
    return keys, admin


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket. Bound before the engine starts, so that a taken port fails at once."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise InvalidRequest(
            f"cannot listen on {host} port {port}: {error}; choose another with --host and --port"
        ) from None


def _url(listening: socket.socket) -> str:
    """Where a client on this machine reaches the socket."""
    host, port = listening.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
