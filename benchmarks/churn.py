"""What adapter swaps cost the others: inter-token latency of running requests with and without swaps.

Eight requests on the base decode; meanwhile eight adapters are loaded in turn into four device slots, evicting
each other, at a given rate. Prints both distributions and writes JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import threading
import time
from pathlib import Path

import torch
from benchmarks.batched import make_adapters

from veneer.engine.config import EngineConfig
from veneer.engine.engine import Engine
from veneer.engine.messages import Generate, SamplingParams
from veneer.engine.source import resolve

REQUESTS = 8
TOKENS = 150
SLOTS = 4


def measure(engine: Engine, digests: list[str], swaps_per_second: float) -> tuple[list[float], int]:
    """Step intervals in milliseconds while `swaps_per_second` adapters are asked for, and loads done."""
    for index in range(REQUESTS):
        sampling = SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
        engine.handle(Generate(id=f"r{index}", prompt=[5 + index, 6, 7], sampling=sampling))
    engine.step()
    loads = sum(entry.loads for entry in engine.stats().adapters.values())
    intervals = []
    pending: list[str] = []
    asked = 0
    start = last = time.perf_counter()
    while engine.has_work:
        for digest in list(pending):
            if engine.residency.acquire(digest) is not None:  # loaded: used, and free to be evicted
                engine.residency.release(digest)
                pending.remove(digest)
        while asked < (last - start) * swaps_per_second and len(pending) < SLOTS:
            pending.append(digests[asked % len(digests)])
            engine.residency.prefetch(pending[-1])
            asked += 1
        engine.step()
        now = time.perf_counter()
        intervals.append((now - last) * 1e3)
        last = now
    return intervals, sum(entry.loads for entry in engine.stats().adapters.values()) - loads


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rate", type=float, default=20.0, help="swaps a second")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/cpu-churn.json"))
    args = parser.parse_args()
    model = resolve(None)
    with tempfile.TemporaryDirectory() as folder:
        adapters = make_adapters(Path(folder), model)
        store = Path(folder) / "store"
        digests = [f"{index:064x}" for index in range(len(adapters))]
        (store / "blobs").mkdir(parents=True)
        for digest, adapter in zip(digests, adapters, strict=True):
            (store / "blobs" / digest).symlink_to(adapter)
        engine = Engine(EngineConfig(model=str(model), store=str(store), max_loras=SLOTS, device=args.device))
        try:
            measure(engine, digests, args.rate)  # warm: every adapter is in host memory
            rows = []
            for rate in (0.0, args.rate, 0.0, args.rate):
                intervals, loads = measure(engine, digests, rate)
                ordered = sorted(intervals)
                rows.append(
                    {
                        "swaps_per_second": rate,
                        "loads": loads,
                        "loads_per_second": loads / sum(intervals) * 1e3,
                        "median_ms": statistics.median(ordered),
                        "p99_ms": ordered[int(0.99 * (len(ordered) - 1))],
                        "max_ms": ordered[-1],
                    }
                )
                print({name: round(value, 2) for name, value in rows[-1].items()})
        finally:
            engine.close()
    report = {
        "device": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "python_threads": threading.active_count(),
        "rows": rows,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
