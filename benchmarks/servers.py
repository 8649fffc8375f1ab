"""A `veneer serve` process on a random checkpoint, and op `http`: its tokens/s beside those of its engine alone.

The checkpoint and its adapters are made once and kept (16 + 5 GB for 64 adapters at the 8B shapes).
"""

from __future__ import annotations

import argparse
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import torch
from benchmarks.device import Row, measure_ceilings
from benchmarks.engines import step_bytes, step_outputs
from benchmarks.load import ROOT, Result, Shot, fire, make_shots
from benchmarks.models import (
    KV_TOKENS,
    RANK,
    SHAPES,
    adapter_bytes,
    kv_token_bytes,
    llama_config,
    random_adapters,
    random_checkpoint,
)

from veneer.engine.engine import Engine
from veneer.engine.messages import Generate, SamplingParams
from veneer.server.cli import build_parser
from veneer.server.serve import options_from

START_SECONDS = 600  # loading, and checking every adapter
REQUEST_SECONDS = 120


def serve_options(args: argparse.Namespace, folder: Path) -> list[str]:
    """What `veneer serve` gets; the engine alone gets the same."""
    config = llama_config(args.layers, args.shapes)
    item = 2 if torch.cuda.is_available() else 4
    size = adapter_bytes(config, item)
    adapters = random_adapters(folder.parent / "adapters", args.adapters, RANK, args.layers, args.shapes)
    sizes = {
        "--max-loras": args.adapters,
        "--max-lora-rank": RANK,
        "--max-num-seqs": args.clients,
        "--max-model-len": 4096,
        "--adapter-memory": (args.adapters + 1) * size,
        "--host-adapter-memory": (args.adapters + 1) * (1 << size.bit_length()),
        "--kv-cache-memory": KV_TOKENS * kv_token_bytes(config, item),
    }
    return [
        str(random_checkpoint(folder, args.layers, args.shapes)),
        *("--store", str(folder.with_name(f"{folder.name}-store"))),
        *(part for name, value in sizes.items() for part in (name, str(value))),
        *shlex.split(args.serve),
        *("--lora-modules", *(f"a{index}={path}" for index, path in enumerate(adapters))),
    ]


@contextmanager
def serving(options: Sequence[str]) -> Iterator[str]:
    """The URL of a server that runs meanwhile."""
    command = [sys.executable, "-m", "veneer.server.cli", "serve", *options, "--port", "0"]
    with tempfile.NamedTemporaryFile("ab") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        try:
            yield _wait_ready(process, Path(log.name))
        finally:
            process.terminate()
            process.wait(60)


def _wait_ready(process: subprocess.Popen[bytes], log: Path) -> str:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        time.sleep(0.1)
        found = re.search(r" listening on (http://\S+);", log.read_text(errors="replace"))
        with suppress(httpx.TransportError):  # it may end at any moment
            if found and httpx.get(f"{found[1]}/ready").status_code == 200:
                return found[1]
    shown = log.read_text(errors="replace")[-3000:]
    raise SystemExit(f"the server was not ready within {START_SECONDS} s; its log ends with\n{shown}")


def adapters_of(url: str, count: int) -> list[dict[str, Any]]:
    """The first `count` adapters that a server lists."""
    listed = httpx.get(f"{url}/v1/models").json()["data"]
    found = [model for model in listed if model.get("parent")]
    if len(found) < count:
        raise SystemExit(f"{url} lists {len(found)} adapters and --adapters is {count}; register more")
    return found[:count]


def checked(results: list[Result]) -> list[Result]:
    """Ends the program when a request failed."""
    if failed := [result for result in results if result.error]:
        raise SystemExit(f"{len(failed)} of {len(results)} requests failed, first: {failed[0].error}")
    return results


# Op `http`


def http_prompts(args: argparse.Namespace) -> list[list[Shot]]:
    """The requests of each round; the first one is for warming up."""
    models = [f"a{index}" for index in range(args.adapters)]
    return [
        make_shots(
            models,
            [0.0] * args.clients,
            "distinct",
            vocabulary=SHAPES[args.shapes]["vocab_size"],
            prompt=args.prompt,
            output=args.http_tokens,
            seed=1000 * (1 + number),
        )
        for number in range(args.rounds + 1)
    ]


def http_us(args: argparse.Namespace, url: str) -> float:
    """Median microseconds a token over the rounds."""
    taken = []
    for shots in http_prompts(args):
        results = checked(fire(url, shots, processes=args.processes, timeout=REQUEST_SECONDS))
        seconds = max(r.events[-1] for r in results) - min(r.sent for r in results)
        taken.append(seconds / sum(r.tokens for r in results) * 1e6)
    return statistics.median(taken[1:])


def alone_us(args: argparse.Namespace, engine: Engine, digests: Sequence[str]) -> float:
    """The same requests, handed to the engine in this process."""
    taken = []
    for number, shots in enumerate(http_prompts(args)):
        tokens, start = 0, time.perf_counter()
        for index, shot in enumerate(shots):
            engine.handle(_generate(f"{number}-{index}", shot, digests[index % len(digests)]))
        while engine.has_work:
            tokens += sum(len(item.tokens) for item in step_outputs(engine))
        taken.append((time.perf_counter() - start) / tokens * 1e6)
    return statistics.median(taken[1:])


def _generate(name: str, shot: Shot, digest: str) -> Generate:
    prompt = [int(word[1:]) for word in shot.prompt.split()]  # word n is token n
    sampling = SamplingParams(max_tokens=shot.output, temperature=0.0, ignore_eos=True)
    return Generate(id=name, prompt=prompt, sampling=sampling, adapter=digest)


def http_row(args: argparse.Namespace, options: Sequence[str], digests: Sequence[str], ours: float) -> Row:
    """Starts the engine alone; the server must have ended."""
    arguments = build_parser().parse_args(["serve", *options])
    engine = Engine(options_from(arguments, Path(options[0])).engine)
    try:
        alone = alone_us(args, engine, digests)
        size = step_bytes(engine.base, args.clients, len(digests), args.prompt + args.http_tokens // 2)
        notes = list(engine.base.notes)
    finally:
        engine.close()
    floor = measure_ceilings().floor(size) / args.clients
    extra = {"share": alone / ours, "engine_notes": notes}
    return Row("http", f"{args.clients}/{args.adapters}", ours, floor, {"engine alone": alone}, extra)
