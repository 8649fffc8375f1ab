"""What adapters do to the base's input and output against float64: torch, interpreted Triton, Triton on a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import triton.language  # noqa: F401  before the patch: only our own kernels are to be interpreted
from tests.kernels.rows import segments_of, tiles_of

from veneer.kernels.low_rank import DECODE_TILE, make_tiles
from veneer.kernels.tables import (
    ALIGNED,
    BASE_SLOT,
    IN_BLOCK,
    IN_OFFSET,
    MAX_BLOCK,
    OUT_OFFSET,
    OUT_PAIR,
    AdapterTables,
    RowTiles,
    Segment,
    absent_entries,
)
from veneer.kernels.transform import (
    transform_input,
    transform_input_torch,
    transform_input_triton,
    transform_output,
    transform_output_torch,
    transform_output_triton,
)

CUDA = torch.cuda.is_available()
if not CUDA:  # a kernel is compiled or interpreted according to this when its module is imported
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        import veneer.kernels.jit.transform  # noqa: F401

Input = Callable[..., torch.Tensor]
Output = Callable[[torch.Tensor, AdapterTables, RowTiles, int], None]
BASE = BASE_SLOT
SITE = 1


@dataclass(frozen=True)
class Case:
    """`counts` are (slot, rows) in row order; `sizes` are the slots' blocks or pairs, None without a tensor."""

    name: str
    counts: tuple[tuple[int, int], ...]
    sizes: tuple[int | None, ...]
    features: int = 96
    tile_rows: int = DECODE_TILE


INPUTS = [
    Case("empty", (), (4,)),
    Case("only base rows", ((BASE, 5),), (4,)),
    Case("a diagonal", ((0, 3),), (1,)),
    Case("one block", ((0, 1),), (96,)),
    Case("every kind at once", ((BASE, 2), (0, 3), (1, 9), (2, 1), (3, 2)), (1, 32, None, 12)),
    Case("blocks of no power of two", ((0, 3), (1, 2), (2, 4)), (3, 6, 48)),
    Case("blocks across programs", ((0, 9), (1, 2)), (200, 80), features=400),
    Case("odd features", ((0, 2), (1, 3)), (7, 1), features=133),
    Case("large tiles", ((0, 70), (BASE, 9), (1, 12)), (16, 24), tile_rows=64),
    Case("largest block", ((0, 2),), (MAX_BLOCK,), features=2 * MAX_BLOCK),
]
OUTPUTS = [
    Case("empty", (), (0,)),
    Case("only base rows", ((BASE, 5),), (0,)),
    Case("a scale", ((0, 3),), (0,)),
    Case("every kind at once", ((BASE, 2), (0, 3), (1, 9), (2, 1), (3, 2)), (0, 32, None, 2)),
    Case("one pair of halves", ((0, 3), (1, 2)), (96, 6)),
    Case("odd features", ((0, 3), (BASE, 1)), (0,), features=133),
    Case("pairs across programs", ((0, 9), (1, 2)), (500, 100), features=500),
    Case("large tiles", ((0, 70), (BASE, 9), (1, 12)), (0, 48), tile_rows=64),
]
LARGE = [
    Case("prefill", ((BASE, 300), (0, 900), (1, 500)), (32, None), features=4096, tile_rows=64),
    Case("decode", tuple((slot, 8) for slot in range(8)), (64,) * 8, features=2048),
]


class Setup:
    """Random transforms in an arena, at site 1 of 3, at scattered offsets with NaN between them."""

    def __init__(self, case: Case, dtype: torch.dtype, device: str, *, inputs: bool) -> None:
        random = torch.Generator().manual_seed(0)
        self.case = case
        features = case.features
        pieces: list[torch.Tensor] = []
        entries = absent_entries(len(case.sizes), 3)
        columns = (IN_OFFSET, IN_BLOCK) if inputs else (OUT_OFFSET, OUT_PAIR)
        self.matrices: list[torch.Tensor] = []  # R^T or OUT as [features, features], float64
        for slot, size in enumerate(case.sizes):
            self.matrices.append(torch.eye(features, dtype=torch.float64))
            if size is None:
                continue
            used = sum(map(len, pieces))
            offset = -(-(used + 3) // ALIGNED) * ALIGNED
            shape = (features // size, size, size) if inputs else (2 if size else 1, features)
            values = (torch.randn(*shape, generator=random) / max(shape[-1] if inputs else 1, 1) ** 0.5).to(
                dtype
            )
            pieces += (torch.full((offset - used,), math.nan), values.flatten().float())
            entries[slot, SITE, list(columns)] = torch.tensor([offset, size])
            self.matrices[-1] += in_matrix(values.double()) if inputs else out_matrix(values.double(), size)
        arena = torch.cat([*pieces, torch.full((ALIGNED,), math.nan)]).to(device, dtype)
        self.tables = AdapterTables(arena, entries.to(device), entries)
        self.segments = segments_of(case.counts)
        self.rows = sum(rows for _, rows in case.counts)
        self.wide = torch.randn(self.rows, features + 5, generator=random).to(device, dtype)

    def tiles(self) -> RowTiles:
        slots = len(self.case.sizes)
        return tiles_of(self.segments, slots, self.case.tile_rows, self.wide.device)

    def expected(self, rows: torch.Tensor) -> torch.Tensor:
        found = rows.double().cpu()
        for slot, start, stop in self.segments:
            if slot != BASE:
                found[start:stop] = found[start:stop] @ self.matrices[slot].T
        return found

    def check(self, found: torch.Tensor, expected: torch.Tensor, limit: float) -> None:
        error = (found.double().cpu() - expected).abs()
        assert (error <= limit * expected.abs().clamp(min=expected.abs().mean())).all()


def in_matrix(blocks: torch.Tensor) -> torch.Tensor:
    """x @ block_diag(D) as a matrix on columns."""
    matrix: torch.Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    return matrix.T


def out_matrix(values: torch.Tensor, pair: int) -> torch.Tensor:
    found = torch.diag(values[0])
    for i in range(values.shape[1] if pair else 0):
        partner = i + pair // 2 if i % pair < pair // 2 else i - pair // 2
        found[i, partner] += values[1, i]
    return found


def check_input(kernel: Input, case: Case, dtype: torch.dtype, device: str, limit: float) -> None:
    setup = Setup(case, dtype, device, inputs=True)
    x = setup.wide[:, : case.features].contiguous()
    before = x.clone()
    (found,) = kernel(x, setup.tables, setup.tiles(), SITE)
    assert torch.equal(x, before)
    assert (found.shape, found.dtype) == (x.shape, dtype)
    setup.check(found, setup.expected(x), limit)


def check_output(kernel: Output, case: Case, dtype: torch.dtype, device: str, limit: float) -> None:
    setup = Setup(case, dtype, device, inputs=False)
    y = setup.wide[:, : case.features]  # columns of a wider tensor
    expected, rest = setup.expected(y), setup.wide[:, case.features :].clone()
    base = [y[start:stop].clone() for slot, start, stop in setup.segments if slot == BASE]
    kernel(y, setup.tables, setup.tiles(), SITE)
    setup.check(y, expected, limit)
    assert torch.equal(setup.wide[:, case.features :], rest)
    after = [y[start:stop] for slot, start, stop in setup.segments if slot == BASE]
    assert all(torch.equal(one, other) for one, other in zip(base, after, strict=True))


def name(case: Case) -> str:
    return case.name


@pytest.mark.parametrize("kernel", [transform_input_torch, *([] if CUDA else [transform_input_triton])])
@pytest.mark.parametrize("case", INPUTS, ids=name)
def test_input_matches_float64(kernel: Input, case: Case) -> None:
    check_input(kernel, case, torch.float32, "cpu", 2e-6)


@pytest.mark.parametrize("kernel", [transform_output_torch, *([] if CUDA else [transform_output_triton])])
@pytest.mark.parametrize("case", OUTPUTS, ids=name)
def test_output_matches_float64(kernel: Output, case: Case) -> None:
    check_output(kernel, case, torch.float32, "cpu", 1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 2e-6), (torch.bfloat16, 2**-7)])
@pytest.mark.parametrize("case", [*INPUTS, *LARGE], ids=name)
def test_compiled_input_matches_float64(case: Case, dtype: torch.dtype, limit: float) -> None:
    check_input(transform_input, case, dtype, "cuda", limit)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-7)])
@pytest.mark.parametrize("case", [*OUTPUTS, *LARGE], ids=name)
def test_compiled_output_matches_float64(case: Case, dtype: torch.dtype, limit: float) -> None:
    check_output(transform_output, case, dtype, "cuda", limit)


@pytest.mark.parametrize("kernel", [transform_input_torch, *([] if CUDA else [transform_input_triton])])
@pytest.mark.parametrize("case", INPUTS, ids=name)
def test_neighbouring_sites_turn_one_input_each_in_its_own_way(kernel: Input, case: Case) -> None:
    """The site itself, and one without anything on either side: three inputs, of which the middle is turned."""
    setup = Setup(case, torch.float32, "cpu", inputs=True)
    x = setup.wide[:, : case.features].contiguous()
    found = kernel(x, setup.tables, setup.tiles(), SITE - 1, 3)
    assert found.shape == (3, *x.shape)
    assert torch.equal(found[0], x)
    assert torch.equal(found[2], x)
    setup.check(found[1], setup.expected(x), 2e-6)


def test_what_does_not_fit_is_refused() -> None:
    entries = absent_entries(1, 1)
    tables = AdapterTables(torch.zeros(16), entries, entries)
    tiles = make_tiles([Segment(0, 0, 2)], 2, 1, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"x is torch\.float32 \[2, 4\]; .* contiguous"):
        transform_input(torch.ones(2, 8)[:, ::2], tables, tiles, 0)
    with pytest.raises(ValueError, match=r"y is torch\.bfloat16 \[2, 4\]; it must be torch\.float32"):
        transform_output(torch.ones(2, 4).bfloat16(), tables, tiles, 0)
