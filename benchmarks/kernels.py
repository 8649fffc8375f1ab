"""Kernels at the shapes of Llama-3.1-8B, each checked against float64 and then timed beside its peers.

python -m benchmarks.kernels [--ops nf4_linears,lora,attention] [--output benchmarks/results]
python -m benchmarks.kernels --sweep nf4        tile choices of the NF4 matmul, nothing is written

Every layer has its own buffers, so nothing is found in L2; calls are captured in CUDA graphs and take turns.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise, product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from benchmarks.device import Ceilings, Row, measure_ceilings, print_rows, time_graphs, write_report

from veneer.kernels.attention import PagedBatch, paged_attention
from veneer.kernels.epilogue import add_update, gated, rope
from veneer.kernels.low_rank import Workspace, low_rank, make_tiles, shrink
from veneer.kernels.nf4 import dequantize_nf4, nf4_matmul, nf4_matmul_triton, nf4_planes
from veneer.kernels.nf4_layout import BLOCK, Nf4Codes, Nf4Weight, pack_nf4, unpack_nf4
from veneer.kernels.nf4_plan import FUSED_ROWS, Device, Nf4Plan, make_plan
from veneer.kernels.nf4_plan import plan as plan_nf4
from veneer.kernels.tables import ABSENT, RANK, AdapterTables, RowTiles, Segment, absent_entries

LINEARS = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
SITES = ((4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336))
GROUPS = {"qkv": (0, 3), "o": (3, 1), "gate_up": (4, 2), "down": (6, 1)}  # first of SITES, how many
LAYERS = 32
NF4_LAYERS = 8  # 0.9 GB packed
NF4_ROWS = (1, 16, 32, 64, 256, 2048)
RANKS = {  # of the adapters; the tokens are spread evenly over them
    "1/1": (1, [16]),
    "1/64": (64, [16]),
    "8/64": (64, [16] * 8),
    "64/64": (64, [16] * 64),
    "mixed": (64, [8] * 12 + [16] * 2 + [64, 128]),
}
SEQUENCES, KEYS = 64, 2048  # of attention
BF16 = torch.bfloat16


def check(name: str, actual: torch.Tensor, expected: torch.Tensor, rms: float, worst: float) -> None:
    """Limits the error's root mean square and its worst element, relative to the RMS of what is expected."""
    error, scale = (actual.double() - expected).abs(), expected.square().mean().sqrt()
    measured = float(error.square().mean().sqrt() / scale), float(error.max() / scale)
    if not (measured[0] <= rms and measured[1] <= worst):
        raise SystemExit(f"{name} is wrong: RMS error {measured[0]:.2e}, worst {measured[1]:.2e}")
    print(f"  {name}: RMS error {measured[0]:.1e}, worst {measured[1]:.1e}")


# NF4


@dataclass(frozen=True)
class Linear:
    """The same weight in each of the forms that are compared."""

    packed: Nf4Weight
    dense: torch.Tensor
    peer: Any  # (data, quant_state) of bitsandbytes


def make_linear(outputs: int, inputs: int, peers: bool = True) -> Linear:
    codes = torch.randint(16, (outputs, inputs), dtype=torch.uint8, device="cuda")
    absmax = torch.rand(outputs, inputs // BLOCK, device="cuda") * 0.05 + 0.01
    packed = pack_nf4(Nf4Codes(codes, absmax))
    dense = torch.empty(outputs if peers else 0, inputs, dtype=BF16, device="cuda")
    if not peers:
        return Linear(packed, dense, None)
    dequantize_nf4(packed, dense)
    try:
        import bitsandbytes.functional as bnb
    except ImportError:
        return Linear(packed, dense, None)
    data = (codes.view(-1, 2)[:, :1] << 4) | codes.view(-1, 2)[:, 1:]
    state = bnb.QuantState(
        absmax=absmax.view(-1),
        shape=torch.Size((outputs, inputs)),
        code=bnb.get_4bit_type("nf4", device="cuda"),
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=BF16,
    )
    return Linear(packed, dense, (data, state))


def run_nf4(ceilings: Ceilings) -> list[Row]:
    layers = [{name: make_linear(*shape) for name, shape in LINEARS.items()} for _ in range(NF4_LAYERS)]
    scratch = torch.empty(max(n * k for n, k in LINEARS.values()), dtype=BF16, device="cuda")
    return [nf4_row(rows, layers, scratch, ceilings) for rows in NF4_ROWS]


def nf4_row(rows: int, layers: list[dict[str, Linear]], scratch: torch.Tensor, ceilings: Ceilings) -> Row:
    print(f"nf4_linears M={rows}")
    fused = rows <= FUSED_ROWS
    x = {inputs: torch.randn(rows, inputs, dtype=BF16, device="cuda") for _, inputs in LINEARS.values()}
    out = {name: torch.empty(rows, n, dtype=BF16, device="cuda") for name, (n, _) in LINEARS.items()}

    def whole(linear: Linear, name: str) -> object:
        return nf4_matmul(x[linear.packed.in_features], linear.packed, out=out[name], scratch=scratch)

    def ours(linear: Linear, name: str) -> object:
        """As a decoder layer runs it: the next kernel adds up the planes of a product that is split."""
        return nf4_planes(x[linear.packed.in_features], linear.packed) if fused else whole(linear, name)

    def cublas(linear: Linear, name: str) -> object:
        return torch.mm(x[linear.packed.in_features], linear.dense.T, out=out[name])

    def bitsandbytes(linear: Linear, _: str) -> object:
        import bitsandbytes

        data, state = linear.peer
        return bitsandbytes.matmul_4bit(x[linear.packed.in_features], data.t(), quant_state=state)

    for name, (_, inputs) in LINEARS.items():
        linear = layers[0][name]
        expected = x[inputs].double() @ unpack_nf4(linear.packed, torch.float64).T
        out[name].fill_(float("nan"))
        whole(linear, name)
        check(name, out[name], expected, 4e-3, 4e-2)
        if fused:
            check(f"{name}, planes", nf4_planes(x[inputs], linear.packed).sum(0), expected, 1e-5, 1e-4)
        if linear.peer is not None:
            theirs = bitsandbytes(linear, name)
            assert isinstance(theirs, torch.Tensor)
            check(f"{name}, bitsandbytes", theirs, expected, 1e-2, 1e-1)

    def every(call: Callable[[Linear, str], object]) -> None:
        for layer in layers:
            for name, linear in layer.items():
                call(linear, name)

    calls = {
        "ours": partial(every, ours),
        "whole": partial(every, whole),
        "bf16 cuBLAS": partial(every, cublas),
    }
    if layers[0]["qkv"].peer is not None:
        calls["bitsandbytes"] = partial(every, bitsandbytes)
    times = {name: value / len(layers) for name, value in time_graphs(calls).items()}
    weights = sum(n * k for n, k in LINEARS.values())
    size = weights * (0.5 + 1 / BLOCK) + 2 * rows * sum(map(sum, LINEARS.values()))
    floor = ceilings.floor(size, 2 * rows * weights)
    ours_us, whole_us = times.pop("ours"), times.pop("whole")
    return Row("nf4_linears", f"M={rows}", ours_us, floor, times, {"with_sum_of_planes_us": whole_us})


# Batched adapters


def make_tables(ranks: list[int]) -> AdapterTables:
    sizes = [rank * (n + k) for rank in ranks for _ in range(LAYERS) for n, k in SITES]
    arena = torch.empty(sum(sizes), dtype=BF16, device="cuda")
    arena.normal_(0, 0.05)
    entries = absent_entries(len(ranks), LAYERS * len(SITES))
    offset = 0
    for slot, rank in enumerate(ranks):
        for site in range(entries.shape[1]):
            n, k = SITES[site % len(SITES)]
            entries[slot, site, : RANK + 1] = torch.tensor([offset, offset + rank * k, ABSENT, rank])
            offset += rank * (n + k)
    return AdapterTables(arena, entries.to("cuda"), entries)


def run_lora(ceilings: Ceilings) -> list[Row]:
    return [lora_row(case, ceilings) for case in RANKS]


class LoraStep:
    """What adapters are part of in a decode step: for each group of a layer, `shrink` and the epilogue.

    The planes of the base's product are one buffer for all layers: in a step they were just written too.
    """

    def __init__(self, rows: int, ranks: list[int]) -> None:
        self.tables = make_tables(ranks)
        bounds = [slot * rows // len(ranks) for slot in range(len(ranks) + 1)]
        self.segments = [Segment(slot, *part) for slot, part in enumerate(pairwise(bounds))]
        self.tiles = make_tiles(self.segments, rows, len(ranks), self.tables.arena.device)
        self.workspace = Workspace(self.tables, rows, max(ranks))
        self.x = {k: torch.randn(rows, k, dtype=BF16, device="cuda") for _, k in SITES}
        splits = {name: plan_nf4(rows, n, k, Device()).splits for name, (n, k) in LINEARS.items()}
        self.parts = {
            name: torch.randn(splits[name], rows, LINEARS[name][0], device="cuda") for name in LINEARS
        }
        self.residual = torch.randn(rows, 4096, dtype=BF16, device="cuda")
        self.cos, self.sin = (
            fill((rows, 128), dtype=BF16, device="cuda") for fill in (torch.ones, torch.zeros)
        )
        self.slots = torch.arange(rows, dtype=torch.int32, device="cuda")
        self.caches = [torch.zeros(-(-rows // 16), 16, 8, 128, dtype=BF16, device="cuda") for _ in range(2)]

    def shrink(self, layer: int, name: str) -> None:
        first, sites = GROUPS[name]
        site = layer * len(SITES) + first
        shrink(self.x[LINEARS[name][1]], self.tables, self.tiles, site, sites, self.workspace)

    def epilogue(self, layer: int, name: str, tiles: RowTiles) -> torch.Tensor:
        first, sites = GROUPS[name]
        site = layer * len(SITES) + first
        parts = self.parts[name]
        if name == "qkv":
            return rope(
                parts, self.tables, tiles, site, sites, self.workspace, 32, 8, self.cos, self.sin,
                self.caches[0], self.caches[1], self.slots,
            )  # fmt: skip
        if name == "gate_up":
            return gated(parts, self.tables, tiles, site, sites, self.workspace, "silu")
        return add_update(parts, self.tables, tiles, site, self.workspace, residual=self.residual)

    def adapted(self) -> None:
        for layer in range(LAYERS):
            for name in GROUPS:
                self.shrink(layer, name)
                self.epilogue(layer, name, self.tiles)

    def base(self) -> None:
        tiles = replace(self.tiles, adapted=False)
        for layer in range(LAYERS):
            for name in GROUPS:
                self.epilogue(layer, name, tiles)

    def total(self, layer: int, name: str) -> torch.Tensor:
        """Planes and updates of a group in float64, [rows, features]."""
        total = self.parts[name].double().sum(0)
        first, sites = GROUPS[name]
        widths = [n for n, _ in SITES[first : first + sites]]
        x = self.x[LINEARS[name][1]].double()
        for site, columns in enumerate(torch.split(total, widths, -1), layer * len(SITES) + first):
            for slot, start, stop in self.segments:
                a_at, b_at, _, rank = self.tables.entries_host[slot, site].tolist()
                a = self.tables.arena[a_at:][: rank * x.shape[1]].view(rank, -1).double()
                b = self.tables.arena[b_at:][: rank * columns.shape[1]].view(rank, -1).double()
                columns[start:stop] += x[start:stop] @ a.T @ b
        return total

    def check(self, layer: int) -> None:
        for name in GROUPS:
            self.shrink(layer, name)
            actual = self.epilogue(layer, name, self.tiles)
            expected = self.total(layer, name)
            if name == "qkv":  # cos 1 and sin 0 leave q and k as they are
                kept = [cache.view(-1, 1024)[: len(actual)] for cache in self.caches]
                actual = torch.cat((actual.flatten(1), *kept), 1)
            elif name == "gate_up":
                gate, up = expected.chunk(2, -1)
                expected = torch.nn.functional.silu(gate) * up
            else:
                expected += self.residual.double()
            # a product of two has larger elements, for the same root mean square
            check(f"layer {layer} {name}", actual, expected, 8e-3, 3e-1 if name == "gate_up" else 8e-2)


def lora_row(case: str, ceilings: Ceilings) -> Row:
    """What adapters add: shrinks and epilogues with adapters, less the same epilogues without.

    The epilogue runs for the base alone as well, to add up the planes of its product and for what follows; that
    part is no cost of adapters. In a step `shrink` runs beside that product; here it has the device for itself.
    """
    print(f"lora {case}")
    rows, ranks = RANKS[case]
    step = LoraStep(rows, ranks)
    for layer in (0, LAYERS - 1):
        step.check(layer)
    y = [torch.zeros(rows, n, dtype=BF16, device="cuda") for n, _ in SITES]

    def by_site() -> None:
        for site in range(LAYERS * len(SITES)):
            index = site % len(SITES)
            low_rank(step.x[SITES[index][1]], y[index], step.tables, step.tiles, site, step.workspace)

    times = time_graphs({"adapted": step.adapted, "base": step.base, "two launches a site": by_site})
    adapted, base = times.pop("adapted"), times.pop("base")
    print(f"  epilogues with adapters and shrink {adapted:.1f} us, epilogues without {base:.1f} us")
    inputs = sum(k for _, k in LINEARS.values())
    floor = ceilings.floor(step.tables.arena.nbytes + 2 * rows * LAYERS * inputs)
    return Row("lora", case, adapted - base, floor, times)


# Attention


def run_attention(ceilings: Ceilings) -> list[Row]:
    case = f"{SEQUENCES}x{KEYS}"
    print(f"attention {case}")
    sequences, keys, heads, kv_heads, head_dim, page = SEQUENCES, KEYS, 32, 8, 128, 16
    shape = (sequences * keys // page, page, kv_heads, head_dim)
    k_cache, v_cache = (torch.randn(shape, dtype=BF16, device="cuda") for _ in range(2))
    table = torch.randperm(shape[0], dtype=torch.int32, device="cuda").view(sequences, -1)
    q = torch.randn(sequences, heads, head_dim, dtype=BF16, device="cuda")
    batch = PagedBatch(
        query_start=torch.arange(sequences + 1, dtype=torch.int32, device="cuda"),
        kv_len=torch.full((sequences,), keys, dtype=torch.int32, device="cuda"),
        block_table=table,
        slot_mapping=torch.zeros(sequences, dtype=torch.int64, device="cuda"),
        query_lens=[1] * sequences,
        kv_lens=[keys] * sequences,
    )
    # The peer has no pages: it gets the keys of a sequence in one piece.
    k, v = (cache[table.long()].flatten(1, 2).transpose(1, 2).contiguous() for cache in (k_cache, v_cache))

    def peer() -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            q.view(sequences, kv_heads, heads // kv_heads, head_dim), k, v, scale=head_dim**-0.5
        )

    def ours() -> torch.Tensor:
        return paged_attention(q, k_cache, v_cache, batch, head_dim**-0.5)

    score = q.double().view(sequences, kv_heads, -1, head_dim) @ k.double().transpose(-1, -2)
    expected = torch.softmax(score * head_dim**-0.5, -1) @ v.double()
    check("paged", ours(), expected.view(sequences, heads, head_dim), 8e-3, 8e-2)
    del score, expected
    times = time_graphs({"ours": ours, "torch SDPA, no pages": peer})
    size = k_cache.nbytes + v_cache.nbytes + 2 * q.nbytes
    return [Row("attention", case, times.pop("ours"), ceilings.floor(size), times)]


# Tile choices


def sweep_plans(rows: int, outputs: int, inputs: int) -> list[Nf4Plan]:
    """Plans to try, with their duplicates (splits that round to the same) removed."""
    blocks = {1: (16,), 16: (16,), 64: (32, 64), 256: (64, 128)}[rows]
    found: dict[Nf4Plan, None] = {}
    for block_m, tiles, dependent in product(blocks, (1, 2), (False, True)):
        for splits in (1, 2, 3, 4, 6, 8, 12, 16):
            made = make_plan(rows, outputs, inputs, Device(), block_m=block_m, tiles=tiles, splits=splits)
            if made.split_pairs > 1 and (rows < 256 or splits <= 4):
                found[replace(made, dependent_launch=dependent)] = None
    return list(found)


def compile_plan(sizes: Nf4Plan) -> None:
    """Leave the kernel of a plan in Triton's cache; runs in a process of its own."""
    weight = pack_nf4(
        Nf4Codes(torch.zeros(128, 2048, dtype=torch.uint8, device="cuda"), torch.ones(128, 32, device="cuda"))
    )
    x = torch.zeros(16, 2048, dtype=BF16, device="cuda")
    nf4_matmul_triton(
        x,
        weight,
        sizes=replace(sizes, splits=min(sizes.splits, 2), split_pairs=16 if sizes.splits == 1 else 8),
    )
    torch.cuda.synchronize()


def sweep_nf4(seconds: float = 85.0) -> None:
    started = time.monotonic()
    kernels: dict[tuple[object, ...], Nf4Plan] = {}
    for rows in (16, 64, 256):
        for sizes in sweep_plans(rows, *LINEARS["o"]):
            key = (sizes.tiles, sizes.block_m, sizes.dependent_launch, sizes.splits == 1)
            kernels.setdefault(key, sizes)
    with ProcessPoolExecutor(12, mp_context=get_context("spawn")) as pool:
        list(pool.map(compile_plan, kernels.values()))
    print(f"{len(kernels)} kernels compiled in {time.monotonic() - started:.0f} s")
    layers = {
        name: [make_linear(*shape, peers=False) for _ in range(NF4_LAYERS)] for name, shape in LINEARS.items()
    }
    for rows in (16, 64, 1, 256):
        total = 0.0
        for name, (outputs, inputs) in LINEARS.items():
            if time.monotonic() - started > seconds:
                print(f"M={rows} {name} and later: left out, {seconds:.0f} s are over")
                return
            total += sweep_linear(rows, name, layers[name], sweep_plans(rows, outputs, inputs))
        print(f"M={rows}: best sum {total:.1f} us per layer\n")


def sweep_linear(rows: int, name: str, linears: list[Linear], plans: list[Nf4Plan]) -> float:
    """Time every plan for one linear, print the best ones and the one that is chosen today; returns the best."""
    weight = linears[0].packed
    x = torch.randn(rows, weight.in_features, dtype=BF16, device="cuda")
    out = torch.empty(rows, weight.out_features, dtype=BF16, device="cuda")
    expected = x.double() @ unpack_nf4(weight, torch.float64).T
    scale = expected.square().mean().sqrt()

    def every(sizes: Nf4Plan | None) -> None:
        for linear in linears:
            nf4_matmul_triton(x, linear.packed, out=out, sizes=sizes)

    times: dict[Nf4Plan | None, float] = {}
    for sizes in (None, *plans):
        nf4_matmul_triton(x, weight, out=out.fill_(float("nan")), sizes=sizes)
        error = float((out.double() - expected).abs().max() / scale)
        if not error <= 4e-2:
            print(f"  WRONG {sizes}: worst error {error:.2e}")
            continue
        taken = time_graphs({"ours": partial(every, sizes)}, warmup=3, replays=10)
        times[sizes] = taken["ours"] / len(linears)
    print(f"M={rows} {name}: chosen today {times.pop(None, float('nan')):.1f} us")
    best = sorted(times, key=lambda sizes: times[sizes])
    for sizes in best[:4]:
        assert sizes is not None
        print(
            f"  {times[sizes]:7.1f} us  tiles {sizes.tiles} block_m {sizes.block_m} splits {sizes.splits}"
            f" dependent {sizes.dependent_launch}"
        )
    return times[best[0]]


OPS = {"nf4_linears": run_nf4, "lora": run_lora, "attention": run_attention}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--ops", default=",".join(OPS), help="comma-separated")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="a folder")
    parser.add_argument("--sweep", choices=["nf4"])
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.sweep:
        return sweep_nf4()
    started = time.monotonic()
    ceilings = measure_ceilings()
    print(
        f"{torch.cuda.get_device_name()}: copy {ceilings.copy / 1e6:.2f} TB/s, "
        f"bf16 matmul {ceilings.matmul / 1e6:.0f} TFLOP/s"
    )
    rows: list[Row] = []
    for op in args.ops.split(","):
        rows += OPS[op](ceilings)
        torch.cuda.empty_cache()
    print_rows(rows)
    extra = {"copy_tb_per_s": ceilings.copy / 1e6, "matmul_tflops": ceilings.matmul / 1e6}
    path = write_report(args.output, "kernels", rows, extra)
    print(f"{time.monotonic() - started:.0f} s; written to {path}")
    return None


if __name__ == "__main__":
    main()
