"""Factors of adapters that share A and B: in plain layers against float64, and who shares a tile with whom."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import triton.language  # noqa: F401  before the patch: only our own kernels are to be interpreted
from tests.kernels.rows import segments_of, tiles_of

from veneer.kernels.low_rank import (
    DECODE_TILE,
    SHARED_TILE,
    Workspace,
    low_rank,
    low_rank_torch,
    low_rank_triton,
    make_tiles,
    plan,
    shrink,
    shrink_torch,
    shrink_triton,
)
from veneer.kernels.shared import scale_ranks, scale_ranks_torch, scale_ranks_triton
from veneer.kernels.tables import (
    ABSENT,
    ACTIVATION,
    ACTIVATIONS,
    ALIGNED,
    BASE_SLOT,
    BIAS_OFFSET,
    OFFSETS,
    RANK,
    RANK_SCALE,
    UPDATE_SCALE,
    AdapterTables,
    RowTiles,
    Segment,
    absent_entries,
    find_hidden,
    find_kin,
    join_kin,
)

CUDA = torch.cuda.is_available()
if not CUDA:  # a kernel is compiled or interpreted according to this when its module is imported
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        import veneer.kernels.jit.activation
        import veneer.kernels.jit.epilogue
        import veneer.kernels.jit.low_rank
        import veneer.kernels.jit.shared  # noqa: F401

BASE = BASE_SLOT
SITE = 1  # the first of two, of four
OUTPUTS = 48


@dataclass(frozen=True)
class Case:
    """`counts` are (slot, rows) in row order. Slot s shares the factors of family `families[s]`; -1: LoRA, -2: with
    an activation."""

    name: str
    counts: tuple[tuple[int, int], ...]
    families: tuple[int, ...]
    ranks: tuple[int, ...] = (5, 40)  # of the families; LoRA has 7
    tile_rows: int = SHARED_TILE
    inputs: int = 64

    @property
    def rows(self) -> int:
        return sum(rows for _, rows in self.counts)

    def rank(self, slot: int) -> int:
        return self.ranks[self.families[slot]] if self.families[slot] >= 0 else 7


SMALL = [
    Case("one", ((0, 1),), (0,)),
    Case("kin", ((0, 1), (2, 3), (1, 1)), (0, 0, 0)),
    Case("two families", ((BASE, 2), (0, 3), (2, 1), (1, 4), (3, 2)), (0, 1, 0, 1)),
    Case("beside LoRA", ((BASE, 1), (3, 9), (0, 35), (1, 2), (BASE, 1)), (1, 1, 0, -1)),
    Case("beside an activation", ((2, 4), (0, 1), (1, 2), (3, 1)), (1, 1, -2, -1)),
    Case("small tiles", ((1, 19), (0, 3)), (0, 0), tile_rows=DECODE_TILE),
    Case("large tiles", ((1, 70), (0, 61), (BASE, 3)), (1, 1), tile_rows=64),
    Case("split", ((0, 1), (1, 1)), (1, 1), ranks=(3, 300), inputs=1040),
    Case("no rows", (), (0,)),
]
LARGE = [
    Case("decode", tuple((slot, 1) for slot in range(64)), (0,) * 64, ranks=(256,), inputs=4096),
    Case("prefill", ((0, 700), (1, 300), (BASE, 20), (2, 9)), (0, 0, -1), (256,), 64, 4096),
]


class Setup:
    """Random adapters at two neighbouring sites, at scattered offsets with NaN between them."""

    def __init__(self, case: Case, dtype: torch.dtype, device: str) -> None:
        self.case, self.random, self.pieces = case, torch.Generator().manual_seed(0), list[torch.Tensor]()
        entries = absent_entries(len(case.families), 4)
        self.factors: dict[tuple[int, int], tuple[torch.Tensor, ...]] = {}
        shared: dict[tuple[int, int], tuple[torch.Tensor, ...]] = {}
        for slot, family in enumerate(case.families):
            for site in (SITE, SITE + 1):
                rank, entry = case.rank(slot), entries[slot, site]
                a, b, places = shared.get((family, site)) or self._draw(rank, dtype)
                if family >= 0:
                    shared[family, site] = a, b, places
                entry[: RANK + 1] = torch.tensor([*places.tolist(), ABSENT, rank])
                c, d = torch.ones(rank), torch.ones(OUTPUTS)
                if family >= 0:
                    c, d = (torch.randn(n, generator=self.random).to(dtype) for n in (rank, OUTPUTS))
                    entry[[RANK_SCALE, UPDATE_SCALE]] = torch.tensor([self._place(c), self._place(d)])
                if family == -2:
                    entry[ACTIVATION] = ACTIVATIONS.index("relu")
                self.factors[slot, site] = tuple(side.double() for side in (a, b, c, d))
        arena = torch.cat([*self.pieces, torch.full((3,), math.nan)]).to(device, dtype)
        hidden = {slot: found for slot, each in enumerate(entries) if (found := find_hidden(each, 4))}
        kin = {slot: own for slot, each in enumerate(entries) if (own := find_kin(each))}
        self.tables = AdapterTables(arena, entries.to(device), entries, hidden=hidden, kin=kin)
        self.segments = segments_of(case.counts)
        self.x = torch.randn(case.rows, case.inputs, generator=self.random).to(device, dtype)
        self.y = torch.randn(case.rows, OUTPUTS, generator=self.random).to(device, dtype)
        bound = max(case.rank(slot) for slot in range(len(case.families)))
        self.workspace = Workspace(self.tables, max(case.rows, 1), bound)
        for poisoned in (self.workspace.planes, self.workspace.plane):
            poisoned.fill_(math.nan)  # what a kernel has not written must not pass

    def _draw(self, rank: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        a = torch.randn(rank, self.case.inputs, generator=self.random) / self.case.inputs**0.5
        b = torch.randn(rank, OUTPUTS, generator=self.random) / rank**0.5
        a, b = a.to(dtype), b.to(dtype)
        return a, b, torch.tensor([self._place(a), self._place(b)])

    def _place(self, values: torch.Tensor) -> int:
        used = sum(map(len, self.pieces))
        offset = -(-(used + 3) // ALIGNED) * ALIGNED
        self.pieces.extend((torch.full((offset - used,), math.nan), values.flatten().float()))
        return offset

    def tiles(self) -> RowTiles:
        hidden = -2 in self.case.families
        return tiles_of(
            self.segments, len(self.case.families), self.case.tile_rows, self.x.device, hidden=hidden,
            kin=self.tables.kin,
        )  # fmt: skip

    def expected_h(self, site: int, row: int, slot: int) -> torch.Tensor:
        """c * phi(A x) of a row, float64 [rank]."""
        a, _, c, _ = self.factors[slot, site]
        h = a @ self.x[row].double().cpu()
        return c * (h.relu() if self.case.families[slot] == -2 else h)

    def expected(self, site: int) -> torch.Tensor:
        y = self.y.double().cpu()
        for slot, start, stop in self.segments:
            for row in range(start, stop if slot != BASE else start):
                _, b, _, d = self.factors[slot, site]
                y[row] += d * (self.expected_h(site, row, slot) @ b)
        return y


def name(case: Case) -> str:
    return case.name


def check_update(case: Case, run: Callable[..., None], dtype: torch.dtype, device: str) -> None:
    setup = Setup(case, dtype, device)
    y = setup.y.clone()
    run(setup.x, y, setup.tables, setup.tiles(), SITE, setup.workspace)
    expected = setup.expected(SITE)
    if not case.rows:
        return
    limit = 2e-5 if dtype == torch.float32 else 4e-2
    assert (y.double().cpu() - expected).abs().max() <= limit * max(1.0, float(expected.abs().max()))
    for slot, start, stop in setup.segments:
        if slot == BASE:
            assert torch.equal(y[start:stop], setup.y[start:stop])


def check_planes(case: Case, run: Callable[..., None], first: Callable[..., None], device: str) -> None:
    """h of both sites in one plane, and nothing else written."""
    setup = Setup(case, torch.float32, device)
    tiles, workspace = setup.tiles(), setup.workspace
    first(setup.x, setup.tables, tiles, SITE, 2, workspace)
    if not case.rows:
        return
    run(setup.tables, tiles, SITE, 2, case.rows, workspace)
    found = workspace.held(SITE, 2, case.rows).cpu()
    assert found.shape[1] == 1
    for slot, start, stop in setup.segments:
        for row in range(start, stop):
            rank = 0 if slot == BASE else case.rank(slot)
            assert found[:, 0, row, rank:].isnan().all()
            for index in range(2 if rank else 0):
                expected = setup.expected_h(SITE + index, row, slot)
                error = (found[index, 0, row, :rank].double() - expected).abs().max()
                assert error <= 1e-5 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("run", [low_rank_torch, *([] if CUDA else [low_rank_triton])])
@pytest.mark.parametrize("case", SMALL, ids=name)
def test_update_matches_float64(case: Case, run: Callable[..., None]) -> None:
    check_update(case, run, torch.float32, "cpu")


PAIRS = [(scale_ranks_torch, shrink_torch), *([] if CUDA else [(scale_ranks_triton, shrink_triton)])]


@pytest.mark.parametrize(("run", "first"), PAIRS)
@pytest.mark.parametrize("case", [case for case in SMALL if -2 not in case.families], ids=name)
def test_planes_match_float64(case: Case, run: Callable[..., None], first: Callable[..., None]) -> None:
    check_planes(case, run, first, "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", [*SMALL, *LARGE], ids=name)
def test_compiled_update_matches_float64(case: Case, dtype: torch.dtype) -> None:
    check_update(case, low_rank, dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("case", [c for c in [*SMALL, *LARGE] if -2 not in c.families], ids=name)
def test_compiled_planes_match_float64(case: Case) -> None:
    check_planes(case, scale_ranks, shrink, "cuda")


def test_kin_differ_by_their_factors_alone() -> None:
    def entries(scale: int, **columns: Any) -> torch.Tensor:
        made = absent_entries(3)
        made[1, [0, 1, RANK, RANK_SCALE, UPDATE_SCALE]] = torch.tensor([0, 64, 4, scale, scale + 16])
        for site, column in columns.items():
            made[int(site[1:]), column] = 512
        return made

    kin = find_kin(entries(128))
    assert kin is not None
    assert find_kin(entries(256)) == kin
    assert find_kin(absent_entries(3)) is None
    for column in sorted({*OFFSETS, RANK} - {RANK_SCALE, UPDATE_SCALE}):
        for site in ("s1", "s2"):
            assert find_kin(entries(128, **{site: column})) != kin
    elsewhere = entries(128)
    elsewhere[2] = elsewhere[1]  # at one more site
    assert find_kin(elsewhere) not in (kin, None)
    lora = absent_entries(3)
    lora[1, [0, 1, RANK, BIAS_OFFSET]] = torch.tensor([0, 64, 4, 128])
    assert find_kin(lora) is None


def test_neighbours_of_one_kin_are_joined() -> None:
    kin = {0: b"a", 1: b"a", 2: b"b", 4: b"a"}
    segments = segments_of(((BASE, 2), (3, 1), (0, 2), (1, 1), (4, 1), (2, 3), (1, 2), (BASE, 1), (0, 1)))
    assert join_kin(segments, kin) == segments_of(
        ((BASE, 2), (3, 1), (0, 4), (2, 3), (1, 2), (BASE, 1), (0, 1))
    )
    assert join_kin(segments, {}) == segments


def test_tiles_of_kin_name_one_slot_and_rows_their_own() -> None:
    kin = {0: b"a", 1: b"a", 2: b"b"}
    segments = segments_of(((BASE, 3), (3, 1), (1, 20), (0, 30), (2, 2)))
    tiles = make_tiles(segments, 56, 4, torch.device("cpu"), kin=kin)
    assert tiles.tile_rows == SHARED_TILE
    used = tiles.tiles[: int(tiles.used)].tolist()
    assert used == [[BASE, 0, 3], [3, 3, 1], [1, 4, 32], [1, 36, 18], [2, 54, 2]]
    assert tiles.segments == (
        Segment(BASE, 0, 3), Segment(3, 3, 4), Segment(1, 4, 54), Segment(2, 54, 56)
    )  # fmt: skip
    assert tiles.row_slots is not None
    assert tiles.row_slots.tolist() == [BASE] * 3 + [3] + [1] * 20 + [0] * 30 + [2] * 2
    others = make_tiles(segments_of(((BASE, 3), (3, 53))), 56, 4, torch.device("cpu"), kin=kin)
    assert others.row_slots is None
    assert others.tile_rows == DECODE_TILE


def test_programs_share_the_ranks_of_a_tile_that_all_rows_are_in() -> None:
    alone, shared = (plan(64, 4096, 1, 65, SHARED_TILE, 256, shared=shared) for shared in (False, True))
    assert (alone.parts, shared.parts) == (1, 8)
    assert shared.splits == alone.splits
    assert plan(64, 4096, 1, 65, SHARED_TILE, 16, shared=True).parts == 1


def test_scales_without_row_slots_are_refused() -> None:
    setup = Setup(SMALL[0], torch.float32, "cpu")
    tiles = tiles_of(setup.segments, 1, DECODE_TILE, "cpu")
    with pytest.raises(ValueError, match="no row_slots"):
        scale_ranks_triton(setup.tables, tiles, SITE, 1, 1, setup.workspace)
