"""What bringing an adapter to the device costs, and what it costs the others: op `swap`, Llama-3.1-8B's shapes.

python -m benchmarks.swap [--output benchmarks/results]

Case `r16`: one adapter of rank 16 on all seven projections (84 MB) from host memory to the device through
residency, from asking for it until a request may use it, on an idle engine; the floor is one copy of as many
bytes from pinned memory, as measured here. Case `r16-p99`: the 99th percentile of the time between two tokens of 16
requests that decode on 8 resident adapters, while others are loaded without a pause; the peer is the same
without loads, and the two take turns.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from itertools import cycle, pairwise
from pathlib import Path

import numpy as np
import torch
from benchmarks.device import Ceilings, Row, device_name, measure_ceilings, print_rows, write_report
from benchmarks.engines import (
    count_loads,
    digest,
    generate,
    random_engine,
    share_host_memory,
    step_bytes,
    step_outputs,
)
from benchmarks.models import SHAPES, adapter_bytes, random_base

from veneer.engine.base import Base
from veneer.engine.engine import Engine

REQUESTS, RESIDENT = 16, 8
UNDER_WAY = 6  # loads: more than a step has time for, so that the copies have no pause
SWAPPED = 12  # adapters that take turns in as many slots
PROMPT = 64


def copy_us(size: int) -> float:
    """Median time of one copy of `size` bytes from pinned memory to the device (on a CPU: to other memory)."""
    cuda = torch.cuda.is_available()
    source = torch.ones(size, dtype=torch.uint8, pin_memory=cuda)
    target = torch.empty(size, dtype=torch.uint8, device="cuda" if cuda else "cpu")
    times = []
    for _ in range(20):
        start = time.perf_counter()
        target.copy_(source, non_blocking=True)
        if cuda:
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e6)
    return statistics.median(times)


def swap_us(engine: Engine, woken: threading.Event, rounds: int) -> list[float]:
    """Times from asking for an adapter that is in host memory until it can be used."""
    residency, times = engine.residency, []
    names = [
        digest(index) for index in range(RESIDENT + SWAPPED)
    ]  # more than slots: each was evicted meanwhile
    for name in names * (rounds + 1):
        woken.clear()
        start = time.perf_counter()
        while residency.acquire(name) is None:
            woken.wait()
            woken.clear()
            if failures := residency.poll():
                raise RuntimeError(failures[0][1].message)
        times.append((time.perf_counter() - start) * 1e6)
        residency.release(name)
    return times[len(names) :]  # the first of each may have packed it


class _Swaps:
    """Loads one after the other. `go_on` returns at once, and is called between two steps."""

    def __init__(self, engine: Engine) -> None:
        self._residency = engine.residency
        self._names = cycle(digest(RESIDENT + index) for index in range(SWAPPED))
        self._pending: list[str] = []

    def go_on(self) -> None:
        for name in list(self._pending):
            if self._residency.acquire(name) is not None:
                self._residency.release(name)  # used, so that it may be evicted at once
                self._pending.remove(name)
        while len(self._pending) < UNDER_WAY:
            self._pending.append(next(self._names))
            self._residency.prefetch(self._pending[-1])

    def finish(self) -> None:
        """Wait for those under way."""
        for name in self._pending:
            while self._residency.acquire(name) is None:
                self._residency.poll()
            self._residency.release(name)


def between_tokens_us(engine: Engine, tokens: int, swaps: bool) -> tuple[list[float], float]:
    """Times between two steps of the whole batch in microseconds, and loads a second meanwhile."""
    name, vocabulary = f"r{time.monotonic()}", engine.base.config.vocab_size
    for index in range(REQUESTS):
        engine.handle(generate(name, index, vocabulary, PROMPT, tokens, index % RESIDENT))
    swapping = _Swaps(engine)
    before = 0
    times: list[float] = []
    while engine.has_work:
        if len(step_outputs(engine)) == REQUESTS:
            before = before if times else count_loads(engine)
            times.append(time.perf_counter())
            if swaps:
                swapping.go_on()
    loads = count_loads(engine) - before
    swapping.finish()
    return [(b - a) * 1e6 for a, b in pairwise(times)], loads / (times[-1] - times[0])


def swap_row(engine: Engine, woken: threading.Event, rounds: int) -> Row:
    size = adapter_bytes(engine.base.config, engine.base.dtype.itemsize)
    times = swap_us(engine, woken, rounds)
    floor = copy_us(size)
    extra = {
        "p99_us": float(np.percentile(times, 99)),
        "bytes": size,
        "pcie_gb_per_s": size / floor / 1e3,
        "ratio": statistics.median(times) / floor,
    }
    return Row("swap", "r16", statistics.median(times), floor, extra=extra)


def beside_row(engine: Engine, base: Base, tokens: int, rounds: int, ceilings: Ceilings) -> Row:
    pooled: dict[bool, list[float]] = {False: [], True: []}
    rates = []
    between_tokens_us(engine, 16, swaps=True)  # warm
    for _ in range(rounds):
        for swaps, found in pooled.items():
            times, rate = between_tokens_us(engine, tokens, swaps)
            found += times
            if swaps:
                rates.append(rate)
            p50, p99 = np.percentile(times, (50, 99)) / 1e3
            print(
                f"{'with' if swaps else 'without':8} swaps ({rate:4.0f}/s): p50 {p50:.2f} ms, p99 {p99:.2f} ms"
            )
    (p50_without, without), (p50_with, with_swaps) = (
        map(float, np.percentile(pooled[swaps], (50, 99))) for swaps in (False, True)
    )
    floor = ceilings.floor(step_bytes(base, REQUESTS, RESIDENT, PROMPT + tokens // 2))
    extra = {
        "ratio": with_swaps / without,
        "p50_us": p50_with,
        "p50_without_us": p50_without,
        "swaps_per_s": statistics.mean(rates),
    }
    return Row("swap", "r16-p99", with_swaps, floor, {"without swaps": without}, extra)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shapes", choices=SHAPES, default="8b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--tokens", type=int, default=256, help="of each answer")
    parser.add_argument("--rounds", type=int, default=3, help="with and without swaps")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="a folder")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    ceilings = measure_ceilings()
    print(f"{device_name()}: copy {ceilings.copy / 1e6:.2f} TB/s")
    woken = threading.Event()
    with tempfile.TemporaryDirectory() as store:
        base = random_base(args.layers, args.shapes)
        engine = random_engine(
            Path(store), base, RESIDENT + SWAPPED, slots=RESIDENT + UNDER_WAY, batch=REQUESTS, wake=woken.set
        )
        share_host_memory(engine, RESIDENT + SWAPPED, copies=2)
        try:
            beside = beside_row(engine, base, args.tokens, args.rounds, ceilings)
            rows = [swap_row(engine, woken, args.rounds), beside]
        finally:
            engine.close()
    print_rows(rows)
    for row in rows:
        print(f"{row.op} {row.case}: ratio {row.extra['ratio']:.3f}")
    print(f"written to {write_report(args.output, 'swap', rows, {})}")


if __name__ == "__main__":
    main()
