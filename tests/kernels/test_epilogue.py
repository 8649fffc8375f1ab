"""The epilogues against float64: references, Triton in the interpreter, Triton on a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import pytest
import torch
import triton.language  # noqa: F401  before the patch: only our own kernels are to be interpreted
from tests.kernels.rows import segments_of, tiles_of

from veneer.kernels import epilogue, low_rank, shared
from veneer.kernels.epilogue import plan
from veneer.kernels.low_rank import DECODE_TILE, PROGRAMS, SHARED_TILE, Workspace, fill_tiles, view_tiles
from veneer.kernels.tables import (
    ABSENT,
    ALIGNED,
    BASE_SLOT,
    BIAS_OFFSET,
    OUT_OFFSET,
    OUT_PAIR,
    RANK,
    RANK_SCALE,
    UPDATE_SCALE,
    AdapterTables,
    RowTiles,
    Segment,
    absent_entries,
    find_kin,
)

CUDA = torch.cuda.is_available()
if not CUDA:  # a kernel is compiled or interpreted according to this when its module is imported
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        import veneer.kernels.jit.epilogue
        import veneer.kernels.jit.low_rank
        import veneer.kernels.jit.shared  # noqa: F401

SITE = 1  # the first of a group
HEADS, KV_HEADS = 4, 2
PAGE = 4


@dataclass(frozen=True)
class Case:
    """`counts` are (slot, rows) in row order; slot s has rank ranks[s] and a bias where s is in `biases`."""

    name: str
    counts: tuple[tuple[int, int], ...]
    ranks: tuple[int, ...] = (4,)
    biases: tuple[int, ...] = ()
    inputs: int = 48
    head_dim: int = 16  # of rope; the other epilogues have four times as many features in a site
    splits: int = 1  # float32 planes; 0: one part of the engine's dtype
    bias: bool = False  # of the base
    joined: bool = False  # one site makes the outputs of the whole group
    norms: bool = False
    tile_rows: int = DECODE_TILE
    heads: tuple[int, int] = (HEADS, KV_HEADS)
    features: int | None = None
    changes: tuple[tuple[int, int], ...] = ()  # (slot, pair): its adapter scales the output, in pairs over 0
    kin: tuple[
        int, ...
    ] = ()  # slots that share the factors of the first of them, each with scales of its own

    @property
    def rows(self) -> int:
        return sum(rows for _, rows in self.counts)


BASE = BASE_SLOT
SMALL = [
    Case("one row", ((0, 1),)),
    Case("only base rows", ((BASE, 11),), splits=2, bias=True, norms=True),
    Case("base between", ((BASE, 3), (1, 2), (BASE, 4), (0, 9), (BASE, 1)), (4, 8), (1,), splits=3),
    Case("ranks", tuple((slot, 1) for slot in range(6)), (1, 17, 16, 33, 0, 256), (4,), splits=4),
    Case("engine dtype", ((0, 3), (BASE, 2), (1, 12)), (7, 16), (0,), splits=0, bias=True),
    Case("joined", ((0, 5), (BASE, 2), (1, 1)), (5, 16), (0, 1), splits=2, joined=True),
    Case("norms", ((0, 5), (1, 4)), (5, 20), splits=2, norms=True),
    Case("odd", ((2, 7), (BASE, 1), (0, 17)), (13, 4, 33), (2,), 397, 24, splits=2, features=131, bias=True),
    Case("large tiles", ((0, 70), (BASE, 65), (1, 3)), (40, 8), (0,), splits=0, norms=True, tile_rows=64),
    Case(
        "scales",
        ((0, 3), (BASE, 2), (1, 9), (2, 1)),
        (4, 0, 2),
        (1,),
        splits=3,
        bias=True,
        changes=((0, 0), (1, 0)),
    ),
    Case(
        "pairs",
        ((BASE, 1), (0, 9), (1, 2), (2, 3)),
        (0, 5, 3),
        (0,),
        splits=2,
        bias=True,
        norms=True,
        changes=((0, 8), (1, 32), (2, 0)),
    ),
    Case("joined pairs", ((0, 5), (1, 1)), (5, 0), (0,), splits=2, joined=True, changes=((0, 64), (1, 2))),
    Case("odd scales", ((1, 2), (0, 9)), (3, 0), (), 40, splits=2, features=131, changes=((0, 0), (1, 0))),
    Case(
        "scaled large tiles",
        ((0, 70), (BASE, 5), (1, 3)),
        (7, 0),
        splits=0,
        tile_rows=64,
        changes=((0, 4), (1, 0)),
    ),
    Case("kin", ((0, 3), (1, 4), (2, 1)), (20, 20, 20), splits=2, bias=True, kin=(0, 1, 2)),
    Case(
        "kin beside others",
        ((BASE, 2), (3, 5), (1, 30), (2, 9), (0, 3), (BASE, 1)),
        (4, 40, 40, 0),
        (0, 3),
        splits=3,
        norms=True,
        tile_rows=SHARED_TILE,
        kin=(1, 2),
    ),
    Case("joined kin", ((1, 2), (0, 7), (2, 1)), (17, 17, 3), splits=0, joined=True, kin=(0, 1)),
    Case(
        "kin in large tiles",
        ((0, 70), (1, 3), (2, 61), (BASE, 5)),
        (40, 40, 8),
        splits=2,
        tile_rows=64,
        changes=((2, 4),),
        kin=(0, 1),
    ),
    Case("odd kin", ((1, 2), (0, 9)), (33, 33), (), 1040, splits=2, features=131, kin=(0, 1)),
    Case("split input", ((1, 2), (0, 1)), (3, 20), (), 1040, splits=2, bias=True),
]
LLAMA = Case("", (), inputs=4096, head_dim=128, heads=(32, 8), features=14336, splits=4)
LARGE = [
    replace(LLAMA, name="1/1", counts=((0, 1),), ranks=(16,), splits=16),
    replace(LLAMA, name="8/64", counts=tuple((s, 8) for s in range(8)), ranks=(16,) * 8),
    replace(LLAMA, name="64/64", counts=tuple((s, 1) for s in range(64)), ranks=(16,) * 64, norms=True),
    replace(
        LLAMA,
        name="mixed ranks",
        counts=((BASE, 3), (2, 20), (0, 1), (BASE, 9), (1, 31)),
        ranks=(8, 128, 64),
        biases=(0, 2),
        bias=True,
    ),
    replace(
        LLAMA,
        name="scaled",
        counts=((BASE, 3), (2, 20), (0, 1), (1, 31)),
        ranks=(16, 0, 16),
        bias=True,
        norms=True,
        changes=((0, 0), (1, 64), (2, 1024)),
    ),
    replace(
        LLAMA,
        name="64 kin",
        counts=tuple((s, 1) for s in range(64)),
        ranks=(256,) * 64,
        tile_rows=SHARED_TILE,
        kin=tuple(range(64)),
    ),
    replace(
        LLAMA,
        name="kin beside LoRA",
        counts=((BASE, 3), (0, 20), (3, 2), (1, 40), (2, 300)),
        ranks=(16, 256, 256, 8),
        tile_rows=64,
        kin=(1, 2),
    ),
    replace(
        LLAMA,
        name="prefill",
        counts=((0, 300), (BASE, 100), (1, 112)),
        ranks=(16, 100),
        splits=0,
        tile_rows=64,
        norms=True,
    ),
]


class Setup:
    """Random adapters, NaN between their tensors and in all scratch, parts of a product, and the sum expected."""

    def __init__(self, case: Case, widths: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
        self.case, self.dtype, self.device = case, dtype, device
        self.random = torch.Generator().manual_seed(0)
        self.sites = 1 if case.joined else len(widths)
        self.widths = (sum(widths),) if case.joined else widths
        self.pairs = dict(case.changes)
        self.changes: dict[tuple[int, int], torch.Tensor] = {}
        pieces: list[torch.Tensor] = []
        entries = absent_entries(len(case.ranks), SITE + self.sites + 1)
        self.factors: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        self.shared: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

        def place(values: torch.Tensor) -> int:
            size = sum(map(len, pieces))
            offset = -(-(size + 3) // ALIGNED) * ALIGNED
            pieces.extend((torch.full((offset - size,), math.nan), values.flatten()))
            return offset

        for slot, rank in enumerate(case.ranks):
            for index, width in enumerate(self.widths):
                a = self.randn(rank, case.inputs) / case.inputs**0.5
                b = self.randn(rank, width) / max(rank, 1) ** 0.5
                bias = self.randn(width) * (slot in case.biases)
                a, b, bias = (side.to(dtype) for side in (a, b, bias))
                entry = entries[slot, SITE + index]
                first = case.kin[0] if slot in case.kin else slot
                if first != slot:
                    entry[: RANK + 1] = entries[first, SITE + index, : RANK + 1]
                    a, b = self.shared[index]
                elif rank:
                    entry[: RANK + 1] = torch.tensor([place(a), place(b), ABSENT, rank])
                    self.shared[index] = a, b
                scaled = a.double()
                if slot in case.kin:
                    c, d = ((self.randn(size) * 0.6).to(dtype) for size in (rank, width))
                    entry[[RANK_SCALE, UPDATE_SCALE]] = torch.tensor([place(c), place(d)])
                    scaled, b = c.double()[:, None] * scaled, b.double() * d.double()
                self.factors[slot, index] = scaled, b.double(), bias.double()
                if slot in case.biases:
                    entries[slot, SITE + index, BIAS_OFFSET] = place(bias)
                if slot in self.pairs:
                    pair = self.pairs[slot]
                    change = (self.randn(2 if pair else 1, width) * 0.2).to(dtype)
                    entries[slot, SITE + index, [OUT_OFFSET, OUT_PAIR]] = torch.tensor([place(change), pair])
                    self.changes[slot, index] = change.double()
        arena = torch.cat([*pieces, torch.full((64,), math.nan)]).to(device, dtype)
        self.tables = AdapterTables(arena, entries.to(device), entries)
        self.workspace = Workspace(self.tables, max(case.rows, 1), max(*case.ranks, 1))
        self.workspace.planes.fill_(math.nan)
        self.workspace.plane.fill_(math.nan)
        self.x = self.on_device(self.randn(case.rows, case.inputs))
        features = sum(widths)
        parts = self.randn(max(case.splits, 1), case.rows, features)
        self.parts = parts.to(device, torch.float32 if case.splits else dtype)
        self.bias = self.on_device(self.randn(features)) if case.bias else None

    def randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.random)

    def on_device(self, values: torch.Tensor) -> torch.Tensor:
        return values.to(self.device, self.dtype)

    @property
    def segments(self) -> list[Segment]:
        return segments_of(self.case.counts)

    def tiles(self) -> RowTiles:
        case = self.case
        adapted = any(slot != BASE for slot, _ in case.counts)
        kin = {slot: found for slot in case.kin if (found := find_kin(self.tables.entries_host[slot]))}
        assert len(set(kin.values())) == bool(case.kin)
        slots = len(case.ranks)
        return tiles_of(self.segments, slots, case.tile_rows, self.device, spare=2, adapted=adapted, kin=kin)

    def total(self) -> torch.Tensor:
        """OUT(parts + bias) + updates in float64."""
        total = self.parts.double().sum(0).cpu()
        if self.bias is not None:
            total += self.bias.double().cpu()
        for index, columns in enumerate(torch.split(total, list(self.widths), -1)):
            for slot, start, stop in self.segments:
                if slot != BASE:
                    a, b, bias = self.factors[slot, index]
                    if slot in self.pairs:
                        columns[start:stop] = self.changed(columns[start:stop], slot, index)
                    columns[start:stop] += self.x[start:stop].double().cpu() @ a.T @ b + bias
        return total

    def changed(self, rows: torch.Tensor, slot: int, index: int) -> torch.Tensor:
        change, pair = self.changes[slot, index], self.pairs[slot]
        found = rows * (1 + change[0])
        if pair:
            i = torch.arange(rows.shape[1])
            partner = torch.where(i % pair < pair // 2, i + pair // 2, i - pair // 2)
            found += rows[:, partner] * change[1]
        return found


@dataclass(frozen=True)
class Path:
    """The functions of one backend."""

    suffix: str

    def __call__(self, name: str, module: ModuleType = epilogue) -> Callable[..., torch.Tensor]:
        function: Callable[..., torch.Tensor] = getattr(module, name + self.suffix)
        return function

    def shrunk(self, setup: Setup) -> tuple[AdapterTables, RowTiles, int, int, Workspace]:
        """The arguments in the middle, after `shrink` and, where adapters share factors, `scale_ranks`."""
        tables, tiles, workspace = setup.tables, setup.tiles(), setup.workspace
        self("shrink", low_rank)(setup.x, tables, tiles, SITE, setup.sites, workspace)
        if tiles.row_slots is not None:
            self("scale_ranks", shared)(tables, tiles, SITE, setup.sites, setup.case.rows, workspace)
        return tables, tiles, SITE, setup.sites, workspace


DISPATCHED, TRITON = Path(""), Path("_triton")


def assert_close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """Worst element relative to its size (at least the root mean square), and root mean square of the error.

    float32: sums of up to 4096 products, then a few operations. bf16 and float16: each of up to three values
    that a result is made of is rounded by up to 2^-9.
    """
    error, scale = (actual.double().cpu() - expected).abs(), expected.square().mean().sqrt()
    worst, mean = (2e-5, 3e-6) if dtype == torch.float32 else (4e-2, 6e-3)
    assert (error / expected.abs().clamp(min=float(scale))).max() <= worst
    assert error.square().mean().sqrt() <= mean * scale


def check_add(case: Case, dtype: torch.dtype, device: str, path: Path) -> None:
    width = case.features or 4 * case.head_dim
    setup = Setup(case, (width,), dtype, device)
    expected = setup.total()
    tables, tiles, site, _, workspace = path.shrunk(setup)
    add = path("add_update")
    scaled = bool(case.changes)
    assert_close(add(setup.parts, tables, tiles, site, workspace, setup.bias, scaled=scaled), expected, dtype)
    # columns of a wider tensor, which keeps what surrounds them, and a residual
    guarded = torch.full((case.rows + 2, width + 5), math.nan, dtype=dtype, device=device)
    residual = setup.on_device(setup.randn(case.rows, width))
    out = guarded[1:-1, 2:-3]
    add(setup.parts, tables, tiles, site, workspace, setup.bias, residual, out, scaled)
    assert_close(out, expected + residual.double().cpu(), dtype)
    out.fill_(math.nan)
    assert guarded.isnan().all()
    if setup.parts.dtype == dtype and not scaled:  # in place
        out = setup.parts[0]
        assert_close(add(setup.parts, tables, tiles, site, workspace, setup.bias, out=out), expected, dtype)


def check_gated(case: Case, dtype: torch.dtype, device: str, path: Path) -> None:
    width = case.features or 4 * case.head_dim
    setup = Setup(case, (width, width), dtype, device)
    gate, up = setup.total().to(dtype).double().chunk(2, -1)
    arguments = path.shrunk(setup)
    for name, activated in (
        ("silu", torch.nn.functional.silu(gate)),
        ("gelu_tanh", torch.nn.functional.gelu(gate, approximate="tanh")),
    ):
        actual = path("gated")(setup.parts, *arguments, name, setup.bias, bool(case.changes))
        assert_close(actual, activated * up, dtype)


def check_rope(case: Case, dtype: torch.dtype, device: str, path: Path) -> None:
    (heads, kv_heads), head_dim, rows = case.heads, case.head_dim, case.rows
    setup = Setup(case, tuple(count * head_dim for count in (heads, kv_heads, kv_heads)), dtype, device)
    angle = setup.randn(rows, head_dim // 2).repeat(1, 2)
    cos, sin = setup.on_device(angle.cos()), setup.on_device(angle.sin())
    q_norm, k_norm = (setup.on_device(setup.randn(head_dim)) if case.norms else None for _ in range(2))
    eps = 1e-5
    pages = -(-rows // PAGE) + 1
    slots = torch.randperm(pages * PAGE, generator=setup.random)[:rows]
    shape = (pages, PAGE, kv_heads, head_dim)
    arguments = path.shrunk(setup)
    z = setup.total().view(rows, -1, head_dim)
    q, k, v = torch.split(z, [heads, kv_heads, kv_heads], dim=1)
    turned = []
    for side, weight in ((q, q_norm), (k, k_norm)):
        if weight is not None:
            side = side * torch.rsqrt(side.square().mean(-1, keepdim=True) + eps) * weight.double().cpu()
        rotated = torch.cat((-side[..., head_dim // 2 :], side[..., : head_dim // 2]), -1)
        turned.append(side * cos.double().cpu()[:, None] + rotated * sin.double().cpu()[:, None])
    for integer in (torch.int32, torch.int64):
        caches = [torch.full(shape, math.nan, dtype=dtype, device=device) for _ in range(2)]
        actual = path("rope")(
            setup.parts, *arguments, heads, kv_heads, cos, sin, *caches, slots.to(device, integer),
            setup.bias, q_norm, k_norm, eps, bool(case.changes),
        )  # fmt: skip
        assert_close(actual, turned[0], dtype)
        for cache, expected in zip(caches, (turned[1], v), strict=True):
            flat = cache.view(-1, kv_heads, head_dim)
            assert_close(flat[slots.to(device)], expected, dtype)
            assert int(flat.isnan().sum()) == (len(flat) - rows) * kv_heads * head_dim


CHECKS = pytest.mark.parametrize("check", [check_add, check_gated, check_rope])
Check = Callable[[Case, torch.dtype, str, Path], None]


def ids(case: object) -> str | None:
    return case.name if isinstance(case, Case) else None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", SMALL, ids=ids)
@CHECKS
def test_reference_matches_float64(check: Check, case: Case, dtype: torch.dtype) -> None:
    check(case, dtype, "cpu", DISPATCHED)


@pytest.mark.skipif(CUDA, reason="kernels are compiled where there is a GPU, and run there by the gpu tests")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", SMALL, ids=ids)
@CHECKS
def test_interpreted_triton_matches_float64(check: Check, case: Case, dtype: torch.dtype) -> None:
    """float16 stands for bf16, which the interpreter's matmul does not know."""
    check(case, dtype, "cpu", TRITON)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *((case, dtype) for case in SMALL for dtype in (torch.float32, torch.bfloat16)),
        *((case, torch.bfloat16) for case in LARGE),
    ],
    ids=ids,
)
@CHECKS
def test_compiled_triton_matches_float64(check: Check, case: Case, dtype: torch.dtype) -> None:
    check(case, dtype, "cuda", TRITON)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_a_captured_group_replays_another_mix_without_synchronizing() -> None:
    case = Case("before", ((0, 9), (1, 3)), (8, 3), features=96, splits=2)
    before = Setup(case, (96,), torch.float32, "cuda")
    tiles = before.tiles()
    block = torch.zeros(1 + len(tiles.tiles), 3, dtype=torch.int32, device="cuda")
    tiles = view_tiles(block, (), True, case.tile_rows)
    out = torch.empty(12, 96, device="cuda")

    def group() -> None:
        low_rank.shrink_triton(before.x, before.tables, tiles, SITE, 1, before.workspace)
        epilogue.add_update_triton(before.parts, before.tables, tiles, SITE, before.workspace, out=out)

    group()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.graph(graph):
            group()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for counts in (((0, 9), (1, 3)), ((1, 2), (BASE, 4), (0, 6)), ((BASE, 12),)):
        before.case = replace(case, counts=counts)
        host = torch.zeros_like(block, device="cpu")
        fill_tiles(host.numpy(), before.segments, case.tile_rows)
        block.copy_(host)
        out.fill_(math.nan)
        graph.replay()
        assert_close(out, before.total(), torch.float32)


@pytest.mark.skipif(CUDA, reason="compiled")
@CHECKS
def test_what_changes_the_output_is_not_read_unasked(check: Check) -> None:
    """Entries that lead nowhere do not matter to a call without `scaled`."""
    case = Case("unasked", ((0, 3), (1, 9)), (4, 0), (1,), splits=2)

    class Unread(Setup):
        def __init__(self, case: Case, *rest: Any) -> None:
            super().__init__(case, *rest)
            self.tables.entries[..., OUT_OFFSET] = 1 << 40

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(check.__globals__, "Setup", Unread)
        check(case, torch.float32, "cpu", TRITON)


@pytest.mark.skipif(CUDA, reason="compiled")
def test_rows_without_an_update_keep_every_bit_in_place() -> None:
    case = Case("two", ((BASE, 3), (0, 2), (1, 4)), (0, 3), splits=0)
    setup = Setup(case, (64,), torch.float32, "cpu")
    setup.parts.fill_(-0.0)  # adding 0 would turn it into +0
    expected = setup.total()
    tables, tiles, site, _, workspace = TRITON.shrunk(setup)
    TRITON("add_update")(setup.parts, tables, tiles, site, workspace, out=setup.parts[0])
    assert setup.parts[0, :5].signbit().all()
    assert_close(setup.parts[0], expected, torch.float32)


def test_planes_of_other_sites_are_refused() -> None:
    setup = Setup(SMALL[0], (64, 64), torch.float32, "cpu")
    tables, tiles, site, sites, workspace = DISPATCHED.shrunk(setup)
    with pytest.raises(ValueError, match=r"holds sites \(1, 2\).*not \(2, 2\) of 1 rows; call shrink"):
        epilogue.gated(setup.parts, tables, tiles, site + 1, sites, workspace, "silu")


def test_arguments_that_do_not_fit_are_refused() -> None:
    setup = Setup(SMALL[0], (64,), torch.float32, "cpu")
    tables, tiles, site, sites, workspace = DISPATCHED.shrunk(setup)
    rest = (tables, tiles, site, workspace)
    with pytest.raises(ValueError, match=r"must be \[splits, rows, features\]"):
        epilogue.add_update(setup.parts[0], *rest)
    with pytest.raises(ValueError, match=r"must be torch\.float32 or the arena's"):
        epilogue.add_update(setup.parts.half(), *rest)
    with pytest.raises(ValueError, match=r"bias is \[3\]; it must be \[64\]"):
        epilogue.add_update(setup.parts, *rest, bias=torch.zeros(3))
    with pytest.raises(ValueError, match="columns are read as partners"):
        epilogue.add_update(setup.parts, *rest, out=setup.parts[0], scaled=True)
    with pytest.raises(ValueError, match="activation is 'relu'"):
        epilogue.gated(setup.parts, tables, tiles, site, sites, workspace, "relu")
    cache = torch.zeros(1, 1, 2, 16)
    with pytest.raises(ValueError, match="64 features are not 4 \\+ 2 x 2 heads of 16"):
        epilogue.rope(
            setup.parts, tables, tiles, site, sites, workspace, 4, 2, cache, cache, cache, cache, cache
        )


@pytest.mark.parametrize("capacity", [1, 8, 64])
@pytest.mark.parametrize("columns", [64, 2048, 14336])
def test_plan_bounds_the_grid_and_narrows_blocks_for_few_tiles(capacity: int, columns: int) -> None:
    sizes = plan(columns, capacity, DECODE_TILE, 16)
    blocks = -(-columns // sizes.block_n)
    assert sizes.programs == min(capacity * blocks, PROGRAMS)
    assert sizes.block_n == (64 if capacity * columns / 64 >= PROGRAMS // 2 else 32)
    joined = plan(columns, capacity, SHARED_TILE, 256)
    assert (joined.block_n, joined.block_r, joined.num_warps) == (32, 32, 4)
    head = plan(48 * 128, capacity, DECODE_TILE, 16, head_dim=128)
    assert (head.block_n, head.programs) == (64, min(48 * capacity, PROGRAMS))
