"""From spawning the engine to ready on Llama-3.1-8B's shapes: op `ready`, one CUDA device.

A random checkpoint is made once in the cache. The engine starts twice, as the server starts it; the first start
quantizes, packs and keeps the base, the second, which is timed, reads the packed base, captures its graphs and says
that it is ready. The file was just written, so it is read from the page cache: a start after a reboot also waits
for the disk. The floor is the file's bytes over the measured page-locked copy to the device.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

import torch
from benchmarks.device import Row, print_rows, write_report
from benchmarks.models import checkpoint_folder, random_checkpoint

from veneer.engine.base import packed_runs
from veneer.engine.client import EngineClient, RestartPolicy
from veneer.engine.config import EngineConfig
from veneer.engine.packed_store import store_path
from veneer.errors import EngineUnavailable

LAYERS = 32
FIRST_START = 1200.0  # seconds
# The engine inherits our standard error; its log goes to a file, the last argument before the address.
LOGGED = ("sh", "-c", 'exec "$0" -m veneer.engine.process "$2" 2>"$1"', sys.executable)
_LINE = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}) engine \w+ (.*)")

Timeline = list[tuple[float, str]]


def timeline(log: str, begun: float) -> Timeline:
    """Seconds since `begun` (Unix time) and message of each line that the engine logged."""
    return [
        (round(datetime.strptime(found[1], "%Y-%m-%d %H:%M:%S,%f").timestamp() - begun, 3), found[2])
        for line in log.splitlines()
        if (found := _LINE.match(line))
    ]


async def start(config: EngineConfig, log: Path) -> tuple[float, Timeline]:
    """Seconds from spawning the engine process until it is ready, and what it logged on the way."""
    client = EngineClient(config, command=(*LOGGED, str(log)), restart=RestartPolicy(limit=0))
    begun, began = time.time(), time.perf_counter()
    await client.start()
    try:
        await client.wait_ready(FIRST_START)
        seconds = time.perf_counter() - began
        info = client.require_ready()
    except (EngineUnavailable, TimeoutError):
        print(log.read_text(errors="replace")[-4000:], file=sys.stderr)
        raise
    finally:
        await client.stop(0)
    steps = [*timeline(log.read_text(errors="replace"), begun), (round(seconds, 3), "ready")]
    for at, text in steps:
        print(f"  {at:7.2f} s  {text}")
    for note in info.notes:
        print(f"             note: {note}")
    return seconds, steps


def copy_rate() -> float:
    """Bytes a microsecond of a page-locked copy to the device."""
    source = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    best = float("inf")
    for _ in range(5):
        torch.cuda.synchronize()
        started = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - started)
    return source.nbytes / (best * 1e6)


def measure(layers: int, model: Path, store: Path) -> Row:
    path = store_path(model)
    path.unlink(missing_ok=True)
    config = EngineConfig(model=str(model), store=str(store), nf4_kernels="packed")
    print("first start")
    first, _ = asyncio.run(start(config, store / "first.log"))
    print("second start")
    second, steps = asyncio.run(start(config, store / "second.log"))
    case = "8b" if layers == LAYERS else f"8b, {layers} layers"
    floor = path.stat().st_size / copy_rate()
    return Row("ready", case, second * 1e6, floor, extra={"first_start_us": first * 1e6, "timeline": steps})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, default=LAYERS, help="fewer for a try")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    if not packed_runs("nf4", torch.bfloat16, device):
        sys.exit(f"benchmarks.ready needs the packed NF4 kernels: Triton on CUDA; this device is {device}")
    model = random_checkpoint(checkpoint_folder(arguments.layers), arguments.layers)
    with tempfile.TemporaryDirectory() as store:
        rows = [measure(arguments.layers, model, Path(store))]
    print_rows(rows)
    print(write_report(arguments.output, "ready", rows, {}))


if __name__ == "__main__":
    main()
