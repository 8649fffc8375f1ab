"""Whole steps on Llama-3.1-8B's shapes with random NF4 weights: ops `decode_step` and `prefill`.

python -m benchmarks.decode [--cases 64/64,1/1] [--peers] [--profile] [--output benchmarks/results]

`decode_step`: 64 tokens in, 128 out, greedy, rank 16 on all seven projections; cases are adapters/batch. A step's
time is the wall time between two arrivals of tokens that lie 50 steps apart, over 50: whatever an engine
overlaps is in it once. `prefill`: four prompts of 2048 tokens on four adapters, beside the base alone.
Weights are drawn packed, on the device, so nothing is loaded or quantized. `--peers` adds PEFT on bitsandbytes'
NF4; vLLM and SGLang are servers, which benchmarks/serving.py measures with --peer.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from benchmarks.device import Ceilings, Row, device_name, measure_ceilings, print_rows, write_report
from benchmarks.engines import generate, random_engine, share_host_memory, step_bytes, step_outputs
from benchmarks.models import SHAPES, linear_shapes, llama_config, random_base

from veneer.engine.engine import Engine

CASES = "0/1,1/1,0/64,1/64,8/64,64/64"
PEER_CASES = ("1/1", "8/64")
PEER_STEPS = 8  # PEFT takes up to half a second for one
PROMPT, WINDOW = 64, 50
WARM, COOL = 5, 2  # steps left out at the ends
PREFILL = 4  # prompts, and adapters


def submit(engine: Engine, batch: int, adapters: int | Sequence[int], prompt: int, output: int) -> None:
    """So many requests that take turns on so many adapters, or on these; on the base when there are none."""
    name, vocabulary = f"r{time.monotonic()}", engine.base.config.vocab_size
    chosen = range(adapters) if isinstance(adapters, int) else adapters
    for index in range(batch):
        adapter = chosen[index % len(chosen)] if chosen else None
        engine.handle(generate(name, index, vocabulary, prompt, output, adapter))


def arrivals(engine: Engine, batch: int, adapters: int | Sequence[int], output: int) -> list[float]:
    """When the tokens of each step came in which the whole batch decodes, in seconds."""
    submit(engine, batch, adapters, PROMPT, output)
    times = []
    while engine.has_work:
        if sum(len(item.tokens) for item in step_outputs(engine)) == batch:
            times.append(time.perf_counter())
    return times[WARM:-COOL]


def step_times(times: Sequence[float]) -> list[float]:
    """Microseconds of a step: the time between two arrivals a window apart, over the window."""
    window = min(WINDOW, len(times) - 1)
    return [(b - a) / window * 1e6 for a, b in zip(times, times[window:], strict=False)]


def decode_row(engine: Engine, case: str, output: int, ceilings: Ceilings) -> Row:
    adapters, batch = map(int, case.split("/"))
    arrivals(engine, batch, adapters, WARM + COOL + 2)  # loads the adapters
    times = arrivals(engine, batch, adapters, output)
    single = sorted((b - a) * 1e6 for a, b in pairwise(times))
    ours = statistics.median(step_times(times))
    floor = ceilings.floor(step_bytes(engine.base, batch, adapters, PROMPT + output // 2))
    extra = {"p90_us": single[int(0.9 * len(single))], "tokens_per_s": batch / ours * 1e6}
    print(f"decode {case:6} {ours / 1e3:7.2f} ms  {extra['tokens_per_s']:8.0f} tok/s")
    return Row("decode_step", case, ours, floor, extra=extra)


def prefill_us(engine: Engine, adapters: int, tokens: int) -> float:
    """Wall time until the first token of each of four prompts is there."""
    submit(engine, PREFILL, adapters, tokens, 1)
    start = time.perf_counter()
    while engine.has_work:
        step_outputs(engine)
    return (time.perf_counter() - start) * 1e6


def prefill_row(engine: Engine, tokens: int, ceilings: Ceilings) -> Row:
    """Base and adapters take turns; the first of each warms up."""
    taken: dict[int, list[float]] = {0: [], PREFILL: []}
    for _ in range(4):
        for adapters, times in taken.items():
            times.append(prefill_us(engine, adapters, tokens))
    plain, adapted = (statistics.median(times[1:]) for times in taken.values())
    base = engine.base
    weights = base.num_layers * sum(n * k for n, k in linear_shapes(base.config).values())
    floor = ceilings.floor(step_bytes(base, 0, PREFILL, 0), 2 * PREFILL * tokens * weights)
    print(f"prefill {PREFILL}x{tokens}: {adapted / 1e3:.1f} ms, base only {plain / 1e3:.1f} ms")
    extra = {"ratio": adapted / plain}
    return Row("prefill", f"{PREFILL}x{tokens}", adapted, floor, {"base only": plain}, extra)


def profile(engine: Engine) -> None:
    """The kernels of one decode step by total time."""
    submit(engine, 64, 8, PROMPT, 40)
    while engine.scheduler.waiting or any(s.num_uncomputed != 1 for s in engine.scheduler.running):
        engine.step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
        engine.step()
        torch.cuda.synchronize()
    print(recorded.key_averages().table(sort_by="cuda_time_total", row_limit=25, max_name_column_width=60))


def measure(args: argparse.Namespace, ceilings: Ceilings) -> list[Row]:
    started = time.perf_counter()
    cases = args.cases.split(",")
    adapters = max(PREFILL, *(int(case.split("/")[0]) for case in cases))
    batch = max(PREFILL, *(int(case.split("/")[1]) for case in cases))
    with tempfile.TemporaryDirectory() as store:
        base = random_base(args.layers, args.shapes)
        engine = random_engine(Path(store), base, adapters, slots=adapters, batch=batch)
        share_host_memory(engine, adapters, copies=1)  # each is a copy of its own on the device
        try:
            print(f"ready in {time.perf_counter() - started:.1f} s; {'; '.join(base.notes)}")
            rows = [decode_row(engine, case, args.tokens, ceilings) for case in cases]
            rows.append(prefill_row(engine, args.prefill, ceilings))
            if args.profile:
                profile(engine)
        finally:
            engine.close()
    return rows


def add_peers(rows: list[Row], args: argparse.Namespace) -> None:
    """PEFT's time for the cases that it can be asked for, into the rows."""
    from benchmarks.peers import Peft, importable

    for name in ("vllm", "sglang"):
        where = "python -m benchmarks.serving --peer NAME=URL measures its server"
        print(f"{name}: {where if importable(name) else 'not installed, left out'}")
    wanted = [row for row in rows if row.op == "decode_step" and row.case in args.peer_cases.split(",")]
    most = max((int(row.case.split("/")[0]) for row in wanted), default=0)
    peft = Peft(llama_config(args.layers, args.shapes), most)
    for row in wanted:
        adapters, batch = map(int, row.case.split("/"))
        row.peers["PEFT, bitsandbytes NF4"] = peft.decode_us(batch, adapters, PROMPT, PEER_STEPS)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shapes", choices=SHAPES, default="8b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--cases", default=CASES, help="adapters/batch, comma-separated")
    parser.add_argument("--tokens", type=int, default=128, help="of each answer")
    parser.add_argument("--prefill", type=int, default=2048, help="tokens of each of the four prompts")
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--peer-cases", default=",".join(PEER_CASES))
    parser.add_argument("--profile", action="store_true", help="also print the kernels of one 8/64 step")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="a folder")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    ceilings = measure_ceilings()
    print(f"{device_name()}: copy {ceilings.copy / 1e6:.2f} TB/s, matmul {ceilings.matmul / 1e6:.0f} TFLOP/s")
    rows = measure(args, ceilings)
    extra = {"copy_tb_per_s": ceilings.copy / 1e6, "matmul_tflops": ceilings.matmul / 1e6}
    print(f"written to {write_report(args.output, 'decode', rows, extra)}", flush=True)
    if args.peers:
        gc.collect()
        add_peers(rows, args)
        write_report(args.output, "decode", rows, extra)
    print_rows(rows)


if __name__ == "__main__":
    main()
