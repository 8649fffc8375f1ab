"""What every benchmark needs: interleaved timing of captured graphs, ceilings, tables, JSON, a plot.

Ceilings, tables and reports also work without a GPU, for trying a script; graphs do not.
"""

from __future__ import annotations

import json
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

WARMUP, REPLAYS = 10, 50
PACKAGES = ("torch", "triton", "bitsandbytes", "transformers", "peft", "vllm", "sglang")


@dataclass(frozen=True)
class Row:
    """One measurement. All times in microseconds."""

    op: str
    case: str
    ours_us: float
    floor_us: float
    peers: dict[str, float] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)  # more keys of the row's JSON

    def as_json(self) -> dict[str, Any]:
        row = asdict(self)
        extra: dict[str, Any] = row.pop("extra")
        return {**row, **extra}


@dataclass(frozen=True)
class Ceilings:
    """What the device reaches: bytes and operations a microsecond."""

    copy: float  # bytes read + written by a large copy
    matmul: float  # bf16 operations of a large matmul

    def floor(self, size: float, operations: float = 0.0) -> float:
        return max(size / self.copy, operations / self.matmul)


def measure_ceilings() -> Ceilings:
    """Of the GPU, or without one of the CPU in float32."""
    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    side = 8192 if cuda else 1024
    # By a kernel: in a graph `copy_` becomes a copy node, which reached two thirds of it on an H200.
    source = torch.randn(1 << (29 if cuda else 25), device=device)
    target = torch.empty_like(source)
    square = torch.randn(side, side, dtype=dtype, device=device)
    product = torch.empty_like(square)
    timed = time_graphs if cuda else _time_calls
    copy = timed({"copy": lambda: torch.mul(source, 1, out=target)}, replays=20)["copy"]
    matmul = timed({"mm": lambda: torch.mm(square, square, out=product)}, replays=20)["mm"]
    return Ceilings(copy=2 * source.nbytes / copy, matmul=2 * side**3 / matmul)


def _time_calls(calls: Mapping[str, Callable[[], object]], replays: int) -> dict[str, float]:
    """Median microseconds of each call on the CPU."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(replays):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - start) * 1e6)
    return {name: statistics.median(taken) for name, taken in times.items()}


def time_graphs(
    calls: Mapping[str, Callable[[], object]], warmup: int = WARMUP, replays: int = REPLAYS
) -> dict[str, float]:
    """Median microseconds of each call, captured in a CUDA graph; the calls take turns at every replay.

    A call that cannot be captured is timed as it is, and named so: its launches may be part of the time.
    """
    runs: dict[str, Callable[[], object]] = {}
    for name, call in calls.items():
        call()  # compiles, and makes what is cached
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                call()
            runs[name] = graph.replay
        except RuntimeError as error:
            torch.cuda.synchronize()
            print(f"  {name}: not captured ({str(error).splitlines()[0]}), timed without a graph")
            runs[f"{name} (no graph)"] = call
    for _ in range(warmup):
        for run in runs.values():
            run()
    events = {name: [(_event(), _event()) for _ in range(replays)] for name in runs}
    for index in range(replays):
        for name, run in runs.items():
            start, stop = events[name][index]
            start.record()
            run()
            stop.record()
    torch.cuda.synchronize()
    return {
        name: statistics.median(start.elapsed_time(stop) for start, stop in pairs) * 1e3
        for name, pairs in events.items()
    }


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def device_name() -> str:
    """The GPU's name, or what the CPU is called."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU ({platform.processor() or platform.machine()}, {torch.get_num_threads()} threads)"


def device_slug() -> str:
    """How the device is called in file names."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def print_rows(rows: list[Row]) -> None:
    print(f"\n{'op':14}{'case':12}{'ours us':>10}{'floor us':>10}{'x floor':>9}   peers us")
    for row in rows:
        peers = "   ".join(f"{name} {value:.1f}" for name, value in row.peers.items())
        ratio = row.ours_us / row.floor_us
        print(f"{row.op:14}{row.case:12}{row.ours_us:10.1f}{row.floor_us:10.1f}{ratio:9.2f}   {peers}")


def commit() -> str:
    """The short hash of the checkout, or "unknown" outside of one."""
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


def write_report(
    folder: Path,
    name: str,
    rows: list[Row],
    extra: Mapping[str, Any],
    draw: Callable[[Path], None] | None = None,
) -> Path:
    """Write `<device>-<name>.json`, and a plot beside it. Returns the JSON file's path.

    `draw` makes the plot when bars of the rows do not show it.
    """
    versions = {"cuda": torch.version.cuda} if torch.cuda.is_available() else {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    report = {
        "device": device_name(),
        "commit": commit(),
        "versions": versions,
        **extra,
        "rows": [row.as_json() for row in rows],
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{device_slug()}-{name}.json"
    path.write_text(json.dumps(report, indent=2) + "\n")
    image = path.with_suffix(".png")
    draw(image) if draw else plot(rows, f"{device_name()}: {name}", image)
    return path


def plot(rows: list[Row], title: str, path: Path) -> None:
    """Times as multiples of the floor, one group of bars for each row."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    names = ["ours", *dict.fromkeys(name for row in rows for name in row.peers)]
    height = 0.8 / len(names)
    figure, axes = pyplot.subplots(figsize=(8, 1 + 0.5 * len(rows)), layout="constrained")
    for index, name in enumerate(names):
        values = [row.ours_us if name == "ours" else row.peers.get(name, float("nan")) for row in rows]
        ratios = [value / row.floor_us for value, row in zip(values, rows, strict=True)]
        axes.barh([place + index * height for place in range(len(rows))], ratios, height, label=name)
    axes.set_yticks([place + 0.4 - height / 2 for place in range(len(rows))])
    axes.set_yticklabels([f"{row.op} {row.case}" for row in rows])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xlabel("time / floor (1 = bytes at copy bandwidth or operations at matmul rate)")
    axes.set_title(title)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
