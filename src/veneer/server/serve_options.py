"""The options of `veneer serve`. Flags have vLLM's names where vLLM has the flag."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from veneer.engine.source import DEFAULT_MODEL
from veneer.server.cli_values import (
    days,
    factor,
    lora_module,
    natural,
    port,
    positive,
    seconds,
    share,
    size,
)
from veneer.server.tool_calls.registry import FAMILIES


def default_store() -> Path:
    """Where adapters live unless --store says otherwise: the user's data folder."""
    home = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(home) / "veneer" / "store"


def add_serve(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", default=DEFAULT_MODEL, help="folder, hub id or GGUF file (%(default)s)"
    )
    http = parser.add_argument_group("HTTP")
    http.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    http.add_argument(
        "--port", type=port, default=8000, help="port to listen on, 0 = any free one (%(default)s)"
    )
    http.add_argument("--served-model-name", help="the base's name in requests (the model's own name)")
    http.add_argument(
        "--api-key",
        action="append",
        default=[],
        help="needed for all routes but /health and /ready; repeatable (also VENEER_API_KEY)",
    )
    http.add_argument(
        "--admin-api-key", help="needed to add, change and delete adapters (also VENEER_ADMIN_API_KEY)"
    )
    http.add_argument(
        "--tool-call-parser",
        choices=sorted(FAMILIES),
        help="the form of function calls (seen from the chat template)",
    )
    http.add_argument(
        "--request-timeout",
        type=seconds,
        default=600.0,
        help="seconds a request may take, 0 = any (%(default)s)",
    )
    http.add_argument(
        "--shutdown-timeout",
        type=seconds,
        default=30.0,
        help="seconds running requests get on SIGTERM (%(default)s)",
    )
    http.add_argument("--max-upload", type=size, default=size("4GiB"), help="largest adapter upload (4GiB)")
    http.add_argument(
        "--max-responses",
        type=natural,
        default=10_000,
        help="newest responses of /v1/responses that are stored; 0: none (%(default)s)",
    )
    http.add_argument(
        "--response-days",
        type=days,
        default=30.0,
        help="how long a response is stored (%(default)s)",
    )
    http.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="info")
    http.add_argument("--access-log", action="store_true", help="log every HTTP request")

    base = parser.add_argument_group("base model")
    base.add_argument("--quantization", choices=("nf4", "int8", "none"), default="nf4")
    base.add_argument(
        "--nf4-kernels",
        choices=("auto", "packed", "bitsandbytes"),
        default="auto",
        help="what multiplies NF4 weights; auto is packed, our own kernels, on CUDA in bfloat16 (%(default)s)",
    )
    base.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    base.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (%(default)s)")
    base.add_argument("--max-model-len", type=positive, help="tokens of prompt and answer together")
    base.add_argument("--max-num-seqs", type=positive, default=64, help="sequences in one step (%(default)s)")
    base.add_argument("--max-num-batched-tokens", type=positive, help="tokens in one step")
    base.add_argument("--max-queue", type=positive, default=1024, help="waiting sequences (%(default)s)")
    base.add_argument("--kv-cache-memory", type=size, metavar="SIZE", help="KV cache, for example 4GiB")
    base.add_argument("--block-size", type=positive, default=16, help="tokens in one KV page (%(default)s)")
    base.add_argument("--enable-prefix-caching", action=argparse.BooleanOptionalAction, default=True)
    base.add_argument("--enforce-eager", action="store_true", help="no CUDA graphs")
    base.add_argument(
        "--cuda-graphs",
        choices=("decode", "all"),
        default="all",
        help="which steps; all: also those with prompt chunks, or dense or sparse changes (%(default)s)",
    )
    base.add_argument("--threads", type=positive, help="CPU threads of the engine")

    adapters = parser.add_argument_group("adapters")
    adapters.add_argument(
        "--store", type=Path, default=default_store(), help="folder of adapters (%(default)s)"
    )
    adapters.add_argument(
        "--lora-modules",
        type=lora_module,
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=PATH",
        help="adapters to register at the start: a folder or a hub id each",
    )
    adapters.add_argument(
        "--adapter-dir",
        type=Path,
        action="append",
        default=[],
        help="clients may load adapters from folders below it by path; repeatable (none)",
    )
    adapters.add_argument("--max-loras", type=positive, default=8, help="device slots (%(default)s)")
    adapters.add_argument(
        "--max-lora-rank", type=positive, default=512, help="largest rank taken (%(default)s)"
    )
    adapters.add_argument(
        "--max-added-tokens",
        type=positive,
        default=256,
        help="tokens that an adapter may add to the vocabulary (%(default)s)",
    )
    adapters.add_argument(
        "--max-module-bytes",
        type=size,
        default=256 << 20,
        metavar="SIZE",
        help="of a weight that an adapter replaces or changes in full (256MiB)",
    )
    adapters.add_argument("--adapter-memory", type=size, metavar="SIZE", help="adapters on the device")
    adapters.add_argument("--host-adapter-memory", type=size, metavar="SIZE", help="adapters in host memory")
    adapters.add_argument(
        "--hot-adapter-memory",
        type=size,
        default=0,
        metavar="SIZE",
        help="for a merged copy of the adapter that most tokens are for, on the CPU; 0: none is made (0)",
    )
    adapters.add_argument(
        "--hot-adapter-format",
        choices=("full", "nf4"),
        default="full",
        help="of that copy: full, the type that is computed in, or nf4, quantized again (%(default)s)",
    )

    jobs = parser.add_argument_group("fine-tuning jobs")
    jobs.add_argument(
        "--training-share",
        type=share,
        default=0.5,
        help="of the processor's time for training while requests run, above 0 to 1 (%(default)s)",
    )
    jobs.add_argument(
        "--training-latency",
        type=factor,
        default=1.5,
        help="on CUDA: time between tokens beside a job over that without (%(default)s)",
    )
    jobs.add_argument(
        "--training-memory",
        type=size,
        metavar="SIZE",
        help="device memory kept free of KV cache for training",
    )
    jobs.add_argument("--max-file", type=size, default=size("512MiB"), help="largest file of rows (512MiB)")
    jobs.add_argument("--max-files", type=positive, default=1000, help="files that are stored (%(default)s)")
    jobs.add_argument(
        "--max-jobs",
        type=positive,
        default=1000,
        help="jobs that are remembered; the oldest that are over are forgotten first (%(default)s)",
    )
    jobs.add_argument(
        "--max-unfinished-jobs",
        type=positive,
        default=64,
        help="jobs that wait, run or are paused (%(default)s)",
    )
    jobs.add_argument(
        "--max-checkpoints",
        type=positive,
        default=100,
        help="newest checkpoints of a job that are served (%(default)s)",
    )
    parser.set_defaults(run=_serve)


def _serve(arguments: argparse.Namespace) -> int:
    from veneer.server.serve import serve

    return serve(arguments)
