"""A decode step of each kind of adapter beside one of LoRA, on Llama-3.1-8B's shapes: op `kinds`.

python -m benchmarks.kinds [--cases dora,ia3] [--rounds 3] [--output benchmarks/results]

64 rows on 8 adapters, 64 tokens in, 128 out, greedy, as benchmarks/decode.py measures a step. LoRA has rank 16 on
all seven projections, and so has DoRA; each case is measured in the same engine and in turn with LoRA, whose time
is the row's peer. `mixed8` has one adapter of each of the eight kinds; `vera256x64` has 64 VeRAs beside 64 LoRAs,
in an engine of its own. Weights and adapters are random; what an adapter takes on the device is `adapter_bytes`,
virtual tokens and its part of what it shares included.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from benchmarks.decode import COOL, PROMPT, WARM, arrivals, step_times
from benchmarks.device import Ceilings, Row, device_name, measure_ceilings, print_rows, write_report
from benchmarks.engines import program_bytes, random_engine, share_host_memory, step_bytes
from benchmarks.models import SHAPES, random_base, random_program

from veneer.adapters.program import Program, Prompt, SiteProgram
from veneer.engine.base import Base
from veneer.engine.engine import Engine

ADAPTERS, MANY_ADAPTERS = 8, 64
OFT_BLOCK, ROAD_PAIR, VERA_RANK, VIRTUAL_TOKENS = 32, 64, 256, 16
REFERENCE, MIXED, MANY = "lora", "mixed8", "vera256x64"

Change = Callable[
    [SiteProgram, int, int], SiteProgram
]  # a LoRA's site, in and out features -> the kind's site


@functools.cache
def draw(*shape: int, number: int = 0) -> torch.Tensor:
    """Random numbers around 0; the same tensor for the same shape and number, which is packed at each site anew."""
    return torch.randn(shape) * 0.01


def factor(*shape: int) -> torch.Tensor:
    return 1 + draw(*shape)


def rotation(inputs: int) -> torch.Tensor:
    return draw(inputs // OFT_BLOCK, OFT_BLOCK, OFT_BLOCK) + torch.eye(OFT_BLOCK)


def program(base: Base, kind: str, change: Change, only: tuple[str, ...] = ()) -> Program:
    """Of that kind at the projections of these names, or at all seven."""
    lora = random_program(base)
    sites = {
        name: change(lora.sites[name], site.in_features, site.out_features)
        for name, site in base.sites.items()
        if name in lora.sites and (not only or name.endswith(only))
    }
    return Program(kind=kind, sites=sites)


def ia3(base: Base) -> Program:
    """PEFT's choice for Llama: outputs of keys and values, and the input of the feed-forward's last linear."""
    outputs = program(base, "ia3", lambda _, i, o: SiteProgram(scale_out=factor(o)), ("k_proj", "v_proj"))
    down = program(base, "ia3", lambda _, i, o: SiteProgram(rotate_in=factor(i, 1, 1)), ("down_proj",))
    return replace(outputs, sites={**outputs.sites, **down.sites})


def vera(base: Base) -> Program:
    def site(_: SiteProgram, inputs: int, outputs: int) -> SiteProgram:
        factors = draw(VERA_RANK, inputs), draw(VERA_RANK, outputs, number=1)
        return SiteProgram(*factors, rank_scale=draw(VERA_RANK), update_scale=draw(outputs))

    return program(base, "vera", site)


def prompted(base: Base, embeddings: bool) -> Program:
    shape = (base.num_layers, 2, VIRTUAL_TOKENS, base.num_kv_heads, base.head_dim)
    rows = draw(VIRTUAL_TOKENS, base.config.hidden_size) if embeddings else None
    prompt = Prompt(shape, None if embeddings else draw(*shape), rows)
    return Program(kind="prompt_tuning" if embeddings else "prefix_tuning", sites={}, prompt=prompt)


KINDS: Mapping[str, Callable[[Base], Program]] = {
    REFERENCE: random_program,
    "dora": lambda base: program(base, "dora", lambda lora, i, o: replace(lora, scale_out=factor(o))),
    "ia3": ia3,
    "oft32": lambda base: program(base, "oft", lambda _, i, o: SiteProgram(rotate_in=rotation(i))),
    "road": lambda base: program(
        base, "road", lambda _, i, o: SiteProgram(scale_out=factor(o), cross_out=draw(o), pair=ROAD_PAIR)
    ),
    "vera256": vera,
    "prefix": lambda base: prompted(base, embeddings=False),
    "prompt": lambda base: prompted(base, embeddings=True),
}
"""A random adapter of each kind. Digest n has the content of kind n modulo their number."""
CASES = [*KINDS, MIXED, MANY][1:]


def adapters_of(case: str) -> list[int]:
    """Which digests the case uses."""
    kinds = list(KINDS)
    if case == MIXED:
        return list(range(len(kinds)))
    return numbers("vera256" if case == MANY else case, count_of(case))


def numbers(kind: str, count: int) -> list[int]:
    """The first digests with a kind's content."""
    return [list(KINDS).index(kind) + len(KINDS) * number for number in range(count)]


def count_of(case: str) -> int:
    """How many adapters it has, and LoRA beside it."""
    return MANY_ADAPTERS if case == MANY else ADAPTERS


def measure_us(engine: Engine, adapters: list[int], batch: int, output: int) -> float:
    """Median of a step, its adapters resident."""
    arrivals(engine, batch, adapters, WARM + COOL + 2)  # loads the adapters
    return statistics.median(step_times(arrivals(engine, batch, adapters, output)))


def floor_us(
    base: Base, programs: Sequence[Program], case: str, batch: int, output: int, ceilings: Ceilings
) -> float:
    """The bytes of the weights, of each distinct adapter's sites, and of keys and values, virtual ones too."""
    used = [programs[adapter % len(programs)] for adapter in adapters_of(case)]
    bare = {id(program): replace(program, prompt=None) for program in used}
    sites = program_bytes(base, *(bare[id(program)] for program in used))
    virtual = sum(program.prompt.tokens for program in used if program.prompt is not None) / len(used)
    return ceilings.floor(step_bytes(base, batch, 0, PROMPT + output // 2 + round(virtual)) + sites)


def measure(args: argparse.Namespace, ceilings: Ceilings, cases: list[str], adapters: int) -> list[Row]:
    """Each round takes LoRA and the case in turn; a row has the medians of the rounds."""
    started = time.perf_counter()
    base = random_base(args.layers, args.shapes)
    programs = [make(base) for make in KINDS.values()]
    taken: dict[str, tuple[list[float], list[float]]] = {case: ([], []) for case in cases}
    count = adapters * len(KINDS)
    with tempfile.TemporaryDirectory() as store:
        # Adapters of all sizes take turns in the slots: with spare room none waits for a gap in the arena.
        engine = random_engine(
            Path(store), base, count, slots=adapters, batch=args.batch, programs=programs, spare=ADAPTERS
        )
        try:
            share_host_memory(engine, count, programs=programs)
            engine.finish_chores()
            print(f"ready in {time.perf_counter() - started:.1f} s; {'; '.join(base.notes)}", flush=True)
            for _ in range(args.rounds):
                for case, (ours, lora) in taken.items():
                    lora.append(measure_us(engine, numbers(REFERENCE, adapters), args.batch, args.tokens))
                    ours.append(measure_us(engine, adapters_of(case), args.batch, args.tokens))
        finally:
            engine.close()
    rows = []
    for case, (ours, lora) in taken.items():
        found, reference = statistics.median(ours), statistics.median(lora)
        used = [programs[adapter % len(programs)] for adapter in adapters_of(case)]
        size = program_bytes(base, *used) / len(used)
        extra = {"ratio": found / reference, "adapter_bytes": round(size)}
        floor = floor_us(base, programs, case, args.batch, args.tokens, ceilings)
        rows.append(Row("kinds", case, found, floor, {REFERENCE: reference}, extra))
        print(
            f"{case:10} {found / 1e3:7.2f} ms, {found / reference:.3f} x LoRA, {size / 1e6:.1f} MB an adapter"
        )
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shapes", choices=SHAPES, default="8b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--cases", default=",".join(CASES), help="comma-separated")
    parser.add_argument("--batch", type=int, default=64, help="rows of a step")
    parser.add_argument("--tokens", type=int, default=128, help="of each answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="a folder")
    args = parser.parse_args(argv)
    if unknown := set(args.cases.split(",")) - set(CASES):
        parser.error(f"--cases {','.join(sorted(unknown))}: choose from {','.join(CASES)}")
    torch.manual_seed(0)
    ceilings = measure_ceilings()
    print(f"{device_name()}: copy {ceilings.copy / 1e6:.2f} TB/s, matmul {ceilings.matmul / 1e6:.0f} TFLOP/s")
    rows = []
    for adapters in (
        ADAPTERS,
        MANY_ADAPTERS,
    ):  # an engine for each number: its slots are part of a step's cost
        if cases := [case for case in args.cases.split(",") if count_of(case) == adapters]:
            rows += measure(args, ceilings, cases, adapters)
    extra = {"copy_tb_per_s": ceilings.copy / 1e6, "matmul_tflops": ceilings.matmul / 1e6}
    print(f"written to {write_report(args.output, 'kinds', rows, extra)}", flush=True)
    print_rows(rows)


if __name__ == "__main__":
    main()
