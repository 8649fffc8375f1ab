"""The batched low-rank matmul against float64: torch path, Triton in the interpreter, Triton on a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import triton.language  # noqa: F401  before the patch: only our own kernels are to be interpreted
from tests.kernels.rows import segments_of, tiles_of

from veneer.kernels.low_rank import (
    DECODE_TILE,
    PROGRAMS,
    SPLIT_ROWS,
    Workspace,
    choose_tile_rows,
    fill_tiles,
    low_rank,
    low_rank_torch,
    low_rank_triton,
    make_tiles,
    plan,
    tile_capacity,
)
from veneer.kernels.tables import (
    ABSENT,
    ALIGNED,
    BASE_SLOT,
    BIAS_OFFSET,
    RANK,
    AdapterTables,
    RowTiles,
    Segment,
    absent_entries,
)

CUDA = torch.cuda.is_available()
if not CUDA:  # a kernel is compiled or interpreted according to this when its module is imported
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        import veneer.kernels.jit.epilogue
        import veneer.kernels.jit.low_rank  # noqa: F401

Kernel = Callable[[torch.Tensor, torch.Tensor, AdapterTables, RowTiles, int, Workspace], None]
BASE = BASE_SLOT


@dataclass(frozen=True)
class Case:
    """`counts` are (slot, rows) in row order; `ranks` and `biases` belong to the slots."""

    name: str
    counts: tuple[tuple[int, int], ...]
    ranks: tuple[int, ...]
    biases: tuple[bool, ...] = ()
    inputs: int = 64
    outputs: int = 48
    tile_rows: int = DECODE_TILE

    def has_bias(self, slot: int) -> bool:
        return slot < len(self.biases) and self.biases[slot]


def zipf(rows: int, slots: int) -> tuple[tuple[int, int], ...]:
    total = sum(1 / (slot + 1) for slot in range(slots))
    return tuple((slot, max(1, round(rows / (slot + 1) / total))) for slot in range(slots))


SMALL = [
    Case("empty", (), (4,)),
    Case("only base rows", ((BASE, 5),), (4,)),
    Case("one row", ((0, 1),), (8,)),
    Case("identical", ((0, 19),), (8,)),
    Case("distinct", tuple((slot, 1) for slot in range(8)), (1, 2, 3, 4, 8, 16, 17, 64)),
    Case("uniform", tuple((slot, 4) for slot in range(4)), (8, 8, 8, 8), (True, False, True)),
    Case("zipf", zipf(40, 5), (16, 8, 4, 2, 1)),
    Case("zipf, large tiles", zipf(100, 3), (40, 8, 64), tile_rows=64),
    Case("base between adapters", ((BASE, 3), (1, 2), (BASE, 4), (0, 5), (BASE, 2)), (4, 8), (True,)),
    Case("rank 0 beside rank 5", ((0, 3), (1, 3)), (0, 5)),
    Case("bias only", ((0, 3), (1, 18)), (0, 5), (True, True)),
    Case("odd sizes", ((1, 7), (0, 17)), (13, 33), (True,), inputs=397, outputs=131),
    Case("rank 512", ((0, 2), (1, 2)), (512, 1), inputs=160, outputs=70),
    Case("split over columns", ((0, 3), (2, 1)), (8, 3, 20), inputs=1040, outputs=33),
]
LARGE = [
    Case("prefill", zipf(3000, 6), (64, 1, 16, 512, 0, 8), (True, False, False, False, True), 1024, 3072, 64),
    Case("decode", tuple((slot, 1) for slot in range(64)), (16,) * 64, (), 4096, 1032),
    Case("decode, mixed ranks", zipf(64, 10), (1, 2, 4, 8, 16, 32, 64, 128, 256, 512), (), 3000, 4096),
]


class Setup:
    """Random adapters in an arena, at site 1 of 3, at scattered offsets with NaN between them."""

    def __init__(self, case: Case, dtype: torch.dtype, device: str, seed: int = 0) -> None:
        random = torch.Generator().manual_seed(seed)
        self.case = case
        slots, sizes = len(case.ranks), (case.inputs, case.outputs)
        pieces: list[torch.Tensor] = []
        entries = absent_entries(slots, 3)
        self.factors: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

        def place(values: torch.Tensor) -> int:
            offset = -(-(sum(map(len, pieces)) + 3) // ALIGNED) * ALIGNED
            gap = torch.full((offset - sum(map(len, pieces)),), math.nan)
            pieces.extend((gap, values.flatten()))
            return offset

        for slot, rank in enumerate(case.ranks):
            a = torch.randn(rank, sizes[0], generator=random) / sizes[0] ** 0.5
            b = torch.randn(rank, sizes[1], generator=random) / max(rank, 1) ** 0.5
            bias = torch.randn(sizes[1], generator=random) * case.has_bias(slot)
            a, b, bias = (side.to(dtype) for side in (a, b, bias))
            self.factors.append((a.double(), b.double(), bias.double()))
            if rank:
                entries[slot, 1, : RANK + 1] = torch.tensor([place(a), place(b), ABSENT, rank])
            if case.has_bias(slot):
                entries[slot, 1, BIAS_OFFSET] = place(bias)
        arena = torch.cat([*pieces, torch.full((3,), math.nan)]).to(device, dtype)
        self.tables = AdapterTables(arena, entries.to(device), entries)

        self.segments = segments_of(case.counts)
        self.rows = sum(rows for _, rows in case.counts)
        self.x = torch.randn(self.rows, sizes[0], generator=random).to(device, dtype)
        self.y = torch.randn(self.rows, sizes[1], generator=random).to(device, dtype)
        self.workspace = Workspace(self.tables, max(self.rows, 1), max(*case.ranks, 1))
        self.workspace.planes.fill_(math.nan)  # what a kernel has not written must not pass

    def tiles(self, spare: int = 3) -> RowTiles:
        slots = len(self.case.ranks)
        return tiles_of(self.segments, slots, self.case.tile_rows, self.x.device, spare=spare)

    def expected(self) -> torch.Tensor:
        y = self.y.double().cpu()
        for slot, start, stop in self.segments:
            if slot == BASE:
                continue
            a, b, bias = self.factors[slot]
            y[start:stop] += self.x[start:stop].double().cpu() @ a.T @ b + bias
        return y

    def run(self, kernel: Kernel) -> torch.Tensor:
        """y after the kernel, checked to leave base rows and all that surrounds y as they were.

        y is the middle columns of a wider tensor, as the outputs of fused linears are.
        """
        wide = (self.rows + 2, self.case.outputs + 5)
        guarded = torch.full(wide, 7.0, dtype=self.y.dtype, device=self.y.device)
        y = guarded[1:-1, 2:-3]
        y.copy_(self.y)
        kernel(self.x, y, self.tables, self.tiles(), 1, self.workspace)
        around = guarded.clone()
        around[1:-1, 2:-3] = 7
        assert (around == 7).all()
        touched = torch.zeros(self.rows, dtype=torch.bool)
        for slot, start, stop in self.segments:
            touched[start:stop] = slot != BASE
        assert torch.equal(y.cpu()[~touched], self.y.cpu()[~touched])
        return y.double().cpu()


def assert_close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """Worst element relative to its size (at least the root mean square), and root mean square of the error.

    float32: sums of up to 4096 products. bf16 and float16: A x and y are rounded by up to 2^-9 each.
    """
    if not expected.numel():
        return
    error, scale = (actual - expected).abs(), expected.square().mean().sqrt()
    worst, mean = (1e-5, 2e-6) if dtype == torch.float32 else (1.5e-2, 4e-3)
    assert (error / expected.abs().clamp(min=float(scale))).max() <= worst
    assert error.square().mean().sqrt() <= mean * scale


def ids(case: Case) -> str:
    return case.name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", SMALL, ids=ids)
def test_torch_path_matches_float64(case: Case, dtype: torch.dtype) -> None:
    setup = Setup(case, dtype, "cpu")
    assert_close(setup.run(low_rank), setup.expected(), dtype)


@pytest.mark.skipif(CUDA, reason="kernels are compiled where there is a GPU, and run there by the gpu tests")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", SMALL, ids=ids)
def test_interpreted_triton_matches_float64(case: Case, dtype: torch.dtype) -> None:
    """float16 stands for bf16, which the interpreter's matmul does not know."""
    setup = Setup(case, dtype, "cpu")
    assert_close(setup.run(low_rank_triton), setup.expected(), dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", SMALL + LARGE, ids=ids)
def test_compiled_triton_matches_float64(case: Case, dtype: torch.dtype) -> None:
    setup = Setup(case, dtype, "cuda")
    assert_close(setup.run(low_rank_triton), setup.expected(), dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_a_captured_graph_replays_another_mix_without_synchronizing() -> None:
    before = Setup(Case("before", ((0, 9), (1, 3)), (8, 3)), torch.float32, "cuda")
    after = Setup(Case("after", ((1, 2), (BASE, 4), (0, 6)), (8, 3)), torch.float32, "cuda")
    tiles, y = before.tiles(), before.y.clone()
    arguments = (before.x, y, before.tables, tiles, 1, before.workspace)
    low_rank_triton(*arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.set_sync_debug_mode("error")
    try:
        low_rank_triton(*arguments)
        with torch.cuda.graph(graph):
            low_rank_triton(*arguments)
        next_tiles = make_tiles(after.segments, 12, 2, tiles.tiles.device)
        tiles.tiles[: len(next_tiles.tiles)].copy_(next_tiles.tiles)
        tiles.used.copy_(next_tiles.used)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    y.copy_(before.y)
    graph.replay()
    before.segments = after.segments
    assert_close(y.double().cpu(), before.expected(), torch.float32)


def test_a_replaced_adapter_is_seen_at_once() -> None:
    setup = Setup(Case("one", ((0, 2),), (4,)), torch.float32, "cpu")
    setup.run(low_rank)
    offset = int(setup.tables.entries_host[0, 1, 1])
    setup.tables.arena[offset : offset + 4 * 48] *= 2  # B, in place: cached views must show it
    a, b, bias = setup.factors[0]
    setup.factors[0] = (a, 2 * b, bias)
    assert_close(setup.run(low_rank), setup.expected(), torch.float32)
    setup.tables.entries_host[0, 1] = absent_entries(1)[0]
    assert torch.equal(setup.run(low_rank), setup.y.double())


BOTH = pytest.mark.parametrize(
    "kernel",
    [low_rank_torch, pytest.param(low_rank_triton, marks=pytest.mark.skipif(CUDA, reason="compiled"))],
)


@BOTH
def test_a_broken_adapter_spoils_only_its_own_rows(kernel: Kernel) -> None:
    setup = Setup(Case("two", ((0, 3), (1, 3)), (4, 4)), torch.float32, "cpu")
    offset = int(setup.tables.entries_host[0, 1, 0])
    setup.tables.arena[offset] = math.nan
    result = setup.run(kernel)
    assert result[:3].isnan().all()
    assert_close(result[3:], setup.expected()[3:], torch.float32)


@BOTH
def test_an_adapter_with_nothing_at_a_site_leaves_every_bit(kernel: Kernel) -> None:
    setup = Setup(Case("nothing", ((0, 3),), (0,)), torch.float32, "cpu")
    setup.y.fill_(-0.0)  # adding 0 would turn it into +0
    assert setup.run(kernel).signbit().all()


def test_tiles_cut_segments_of_adapters_and_base() -> None:
    segments = [Segment(4, 0, 18), Segment(1, 18, 34), Segment(BASE, 34, 38), Segment(0, 38, 39)]
    tiles = make_tiles(segments, 39, 3, torch.device("cpu"))
    expected = [[4, 0, 8], [4, 8, 8], [4, 16, 2], [1, 18, 8], [1, 26, 8], [BASE, 34, 4], [0, 38, 1]]
    assert tiles.tiles[: int(tiles.used)].tolist() == expected
    assert tiles.adapted
    assert tiles.segments == tuple(segments)
    base = make_tiles([Segment(BASE, 0, 300)], 300, 3, torch.device("cpu"))
    assert (base.adapted, base.tile_rows, base.used.tolist()) == (False, 64, [5])
    assert make_tiles([], 0, 3, torch.device("cpu")).used.tolist() == [0]


def test_segments_that_miss_rows_or_do_not_fit_are_refused() -> None:
    for segments in ([Segment(0, 1, 3)], [Segment(0, 0, 2)], [Segment(0, 0, 1), Segment(1, 2, 3)]):
        with pytest.raises(ValueError, match="do not cover rows 0 to 3 in order"):
            make_tiles(segments, 3, 1, torch.device("cpu"))
    with pytest.raises(ValueError, match="2 tiles do not fit a table of 1"):
        fill_tiles(np.zeros((2, 3), dtype=np.int32), [Segment(0, 0, 17)], 16)


@pytest.mark.parametrize("rows", [0, 1, 5, 16, 17, 64, 256])
@pytest.mark.parametrize("slots", [1, 3, 64])
def test_capacity_is_enough_and_reached(rows: int, slots: int) -> None:
    """The worst case gives the base and all slots but one a single row, and the rest to the last slot."""
    used = min(rows, slots + 1)
    lone = [Segment(slot - 1, slot, slot + 1) for slot in range(used - 1)]
    segments = [*lone, Segment(used, used - 1, rows)] if used else []
    tiles = make_tiles(segments, rows, slots, torch.device("cpu"))
    assert tiles.used.tolist() == [len(tiles.tiles)] == [tile_capacity(rows, slots, DECODE_TILE)]


@pytest.mark.parametrize("rows", [1, 7, 64, 256, 257, 8192])
@pytest.mark.parametrize("inputs", [16, 576, 4096, 14336])
@pytest.mark.parametrize("rank_bound", [1, 16, 512])
def test_plan_covers_everything_within_the_workspace(rows: int, inputs: int, rank_bound: int) -> None:
    tile_rows = choose_tile_rows(rows)
    sizes = plan(rows, inputs, 3, tile_capacity(rows, 8, tile_rows), tile_rows, rank_bound)
    assert sizes.splits * sizes.split_size >= inputs > (sizes.splits - 1) * sizes.split_size
    assert sizes.split_size % sizes.block_k == 0
    assert sizes.splits * rows <= max(rows, SPLIT_ROWS)
    assert 1 <= sizes.programs <= PROGRAMS


def test_splits_fill_the_gpu_and_do_not_depend_on_the_rows_of_a_decode_step() -> None:
    assert {plan(rows, 4096, 1, 2, DECODE_TILE, 64).splits for rows in (1, 64, 256)} == {16}
    assert plan(1, 14336, 1, 2, DECODE_TILE, 64).splits == 16
    assert plan(8192, 4096, 3, 136, 64, 64).splits == 1


def test_arguments_that_do_not_fit_are_refused() -> None:
    setup = Setup(SMALL[3], torch.float32, "cpu")
    tiles, rest = setup.tiles(), (setup.tables, setup.tiles(), 1, setup.workspace)
    with pytest.raises(ValueError, match=r"must be the arena's torch\.float32"):
        low_rank(setup.x.half(), setup.y, *rest)
    with pytest.raises(ValueError, match="contiguous"):
        low_rank(setup.x.T.contiguous().T, setup.y, *rest)
    with pytest.raises(ValueError, match="19 rows and y 18"):
        low_rank(setup.x, setup.y[1:], *rest)
    with pytest.raises(ValueError, match="another arena"):
        low_rank(setup.x, setup.y, setup.tables, tiles, 1, Setup(SMALL[3], torch.float32, "cpu").workspace)
