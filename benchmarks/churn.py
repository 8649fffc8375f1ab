"""More adapters than slots: op `churn`, case `1000`, on Llama-3.1-8B's shapes with random NF4 weights.

python -m benchmarks.churn [--adapters 1000] [--slots 64] [--output benchmarks/results]

64 requests are in flight all the time, 64 tokens in and 64 to 192 out, each for one of 1000 adapters of rank 16
drawn by Zipf's law (the k-th in proportion to 1/k). All lie in host memory, 64 fit on the device. The peer is the
same sequence of requests with adapter k replaced by k modulo 64: all are resident. Both take turns; the first
run of each warms up and is left out. A token's time is taken while requests are left to follow.

1000 adapters would take 84 GB of host memory (134 pinned). They share 32 pieces of it, so the budget of the host
cache, which counts each in full, is set to the nominal size; every load copies its 84 MB to the device.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from benchmarks.device import Row, device_name, measure_ceilings, print_rows, write_report
from benchmarks.engines import (
    count_loads,
    digest,
    generate,
    random_engine,
    share_host_memory,
    step_bytes,
    step_outputs,
)
from benchmarks.load import choose
from benchmarks.models import SHAPES, random_base

from veneer.engine.engine import Engine

PROMPT = 64
HOST_COPIES = 32
RESIDENT = "all resident"


class Run(NamedTuple):
    """What one run showed."""

    token_us: float
    loads_per_s: float
    distinct: float  # adapters that the running requests use, the mean over the steps


def run(engine: Engine, name: str, adapters: Sequence[int], outputs: Sequence[int], in_flight: int) -> Run:
    """Requests with the given adapters and lengths, `in_flight` at a time."""
    vocabulary = engine.base.config.vocab_size
    waiting = iter(range(len(adapters)))

    def submit() -> bool:
        index = next(waiting, None)
        if index is not None:
            engine.handle(generate(name, index, vocabulary, PROMPT, outputs[index], adapters[index]))
        return index is not None

    for _ in range(in_flight):
        submit()
    tokens, distinct, more = 0, [], True
    loads, start = count_loads(engine), time.perf_counter()
    while engine.has_work:
        items = step_outputs(engine)
        for item in items:
            if item.finish_reason:
                more = submit()
        if more:
            tokens += sum(len(item.tokens) for item in items)
            seconds, loaded = time.perf_counter() - start, count_loads(engine) - loads
            distinct.append(len({sequence.adapter for sequence in engine.scheduler.running}))
    return Run(seconds / tokens * 1e6, loaded / seconds, statistics.mean(distinct))


def make_resident(engine: Engine, adapters: int) -> None:
    """Load the first ones, and let them be evicted again."""
    for name in map(digest, range(adapters)):
        while engine.residency.acquire(name) is None:
            engine.residency.poll()
        engine.residency.release(name)


def compare(engine: Engine, args: argparse.Namespace) -> dict[str, Run]:
    """The median run of each kind by its time."""
    chosen = choose("zipf", args.adapters, args.requests, seed=0)
    generator = random.Random(1)
    outputs = [generator.randint(args.tokens // 2, args.tokens * 3 // 2) for _ in chosen]
    kinds = {RESIDENT: [adapter % args.slots for adapter in chosen], "ours": chosen}
    runs: dict[str, list[Run]] = {kind: [] for kind in kinds}
    for round_ in range(args.rounds + 1):
        for kind, adapters in kinds.items():
            if kind == RESIDENT:
                make_resident(engine, args.slots)
            runs[kind].append(found := run(engine, f"{kind}{round_}", adapters, outputs, args.in_flight))
            print(f"{kind:14}{1e6 / found.token_us:8.0f} tok/s, {found.loads_per_s:.0f} loads/s")
    return {kind: sorted(found[1:])[len(found[1:]) // 2] for kind, found in runs.items()}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shapes", choices=SHAPES, default="8b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--in-flight", type=int, default=64)
    parser.add_argument("--requests", type=int, default=512, help="of one run")
    parser.add_argument("--tokens", type=int, default=128, help="of an answer, the mean")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="a folder")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    ceilings = measure_ceilings()
    print(f"{device_name()}: copy {ceilings.copy / 1e6:.2f} TB/s")
    with tempfile.TemporaryDirectory() as store:
        base = random_base(args.layers, args.shapes)
        engine = random_engine(Path(store), base, args.adapters, slots=args.slots, batch=args.in_flight)
        try:
            share_host_memory(engine, args.adapters, min(HOST_COPIES, args.adapters))
            runs = compare(engine, args)
        finally:
            engine.close()
    ours, resident = runs["ours"], runs[RESIDENT]
    size = step_bytes(base, args.in_flight, ours.distinct, PROMPT + args.tokens // 2)
    extra = {
        "share": resident.token_us / ours.token_us,
        "loads_per_s": ours.loads_per_s,
        "distinct_running": ours.distinct,
        "distinct_running_resident": resident.distinct,
    }
    floor = ceilings.floor(size) / args.in_flight
    rows = [Row("churn", str(args.adapters), ours.token_us, floor, {RESIDENT: resident.token_us}, extra)]
    print_rows(rows)
    print(f"{extra['share']:.0%} of the all-resident throughput")
    setting = {"slots": args.slots, "in_flight": args.in_flight, "host_copies": HOST_COPIES}
    print(f"written to {write_report(args.output, 'churn', rows, setting)}")


if __name__ == "__main__":
    main()
