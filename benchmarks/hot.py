"""What a merged copy of one adapter gains on the CPU: op `hot`, a case for each format of the copy.

python -m benchmarks.hot [--shapes packaged|tiny] [--output benchmarks/results]

16 requests decode on one LoRA of rank 16 on all seven projections. `ours` is the time of one token on the copy, the
peers that with the adapter in a slot, and that of the base alone; all take turns in one run, and the median counts.
`error` and `lost` are what the copy says of itself (`veneer.engine.merged_copy`), here of random factors that are
large enough for NF4 to tell them from the base.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from benchmarks.device import Row, device_name, measure_ceilings, print_rows, write_report
from benchmarks.engines import digest, generate, random_engine, step_bytes, step_outputs
from benchmarks.models import make_base, random_program

from veneer.engine.engine import Engine
from veneer.engine.merged_copy import MergedCopy, make_copy

REQUESTS, PROMPT, STRENGTH = 16, 16, 40
PEERS = ("slot", "base")


def token_us(engine: Engine, name: str, copy: MergedCopy | None, adapter: int | None, output: int) -> float:
    """Microseconds of a decoded token, of steps in which all decode."""
    engine.runner.copy, engine.scheduler.has_copy = copy, copy is not None
    engine.scheduler.joining = None if copy is None else copy.key
    vocabulary = engine.base.config.vocab_size
    for index in range(REQUESTS):
        engine.handle(generate(name, index, vocabulary, PROMPT, output, adapter))
    times = []
    while engine.has_work:
        start = time.perf_counter()
        if len(step_outputs(engine)) == REQUESTS:
            times.append((time.perf_counter() - start) * 1e6 / REQUESTS)
    return statistics.median(times)


def measure(shapes: str, rounds: int, output: int) -> list[Row]:
    base = make_base(shapes)
    program = random_program(base)
    strong = {
        name: replace(part, b=STRENGTH * part.b) for name, part in program.sites.items() if part.b is not None
    }
    program = replace(program, sites=strong)
    with torch.no_grad():
        copies = {form: make_copy(digest(0), program, base, form) for form in ("full", "nf4")}
    cases: dict[str, tuple[MergedCopy | None, int | None]] = {"slot": (None, 0), "base": (None, None)}
    cases |= {form: (copy, 0) for form, copy in copies.items()}
    times: dict[str, list[float]] = {name: [] for name in cases}
    with tempfile.TemporaryDirectory() as store:
        engine = random_engine(Path(store), base, 1, slots=2, batch=REQUESTS, programs=[program])
        try:
            for round_ in range(-1, rounds):  # the first is to warm up
                for name, (copy, adapter) in cases.items():
                    found = token_us(engine, f"{name}{round_}", copy, adapter, output)
                    if round_ >= 0:
                        times[name].append(found)
        finally:
            engine.close()
    medians = {name: statistics.median(each) for name, each in times.items()}
    floor = measure_ceilings().floor(step_bytes(base, REQUESTS, 1, PROMPT)) / REQUESTS
    rows = []
    for form, copy in copies.items():
        assert copy is not None
        peers = {name: medians[name] for name in PEERS}
        extra = {"ratio": medians["slot"] / medians[form], "tokens_per_s": 1e6 / medians[form]}
        about = {"bytes": copy.bytes, "error": copy.error, "lost": copy.lost}
        rows.append(Row("hot", form, medians[form], floor, peers, {**extra, **about}))
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shapes", choices=("packaged", "tiny"), default="packaged")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--output-tokens", type=int, default=8)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="a folder")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    print(device_name())
    rows = measure(args.shapes, args.rounds, args.output_tokens)
    print_rows(rows)
    for row in rows:
        print(f"{row.case}: {row.extra}")
    print(f"written to {write_report(args.output, 'hot', rows, {})}")


if __name__ == "__main__":
    main()
