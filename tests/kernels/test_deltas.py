"""Dense and sparse changes of the base's weight against float64: torch, interpreted Triton, Triton on a GPU."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import triton
import triton.language  # before the patch: only our own kernels are to be interpreted
from tests.kernels.rows import segments_of, tiles_of

from veneer.kernels.dense import add_dense, add_dense_torch, add_dense_triton
from veneer.kernels.low_rank import DECODE_TILE, make_tiles
from veneer.kernels.sparse import add_sparse, add_sparse_torch, add_sparse_triton, sparse_size
from veneer.kernels.tables import (
    ALIGNED,
    BASE_SLOT,
    DENSE_OFFSET,
    SPARSE_OFFSET,
    AdapterTables,
    RowTiles,
    Segment,
    absent_entries,
    int_elements,
)

CUDA = torch.cuda.is_available()
if not CUDA:  # a kernel is compiled or interpreted according to this when its module is imported
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        import veneer.kernels.jit.dense
        import veneer.kernels.jit.sparse  # noqa: F401

Add = Callable[[torch.Tensor, torch.Tensor, AdapterTables, RowTiles, int], None]
BASE = BASE_SLOT
SITE = 1


@dataclass(frozen=True)
class Case:
    """`counts` are (slot, rows) in row order; `shares` what part of each slot's W is not 0, None without W."""

    name: str
    counts: tuple[tuple[int, int], ...]
    shares: tuple[float | None, ...]
    inputs: int = 96
    outputs: int = 80
    tile_rows: int = DECODE_TILE


CASES = [
    Case("empty", (), (0.1,)),
    Case("only base rows", ((BASE, 5),), (0.1,)),
    Case("one row", ((0, 1),), (0.2,)),
    Case("a mix", ((BASE, 2), (0, 3), (1, 9), (2, 1), (3, 2)), (0.05, 0.9, None, 0.0)),
    Case("odd sizes", ((0, 2), (BASE, 1), (1, 3)), (0.3, 0.02), inputs=133, outputs=71),
    Case("large tiles", ((0, 70), (BASE, 9), (1, 12)), (0.1, 0.2), inputs=100, tile_rows=64),
]
LARGE = [
    Case("prefill", ((BASE, 300), (0, 900), (1, 500)), (0.02, None), 2048, 1024, 64),
    Case("decode", tuple((slot, 8) for slot in range(4)), (0.02,) * 4, 4096, 1024),
]


class Setup:
    """Random changes in an arena, at site 1 of 3, at scattered offsets with NaN between them."""

    def __init__(self, case: Case, dtype: torch.dtype, device: str, *, sparse: bool) -> None:
        random = torch.Generator().manual_seed(0)
        self.case = case
        size = ALIGNED
        self.weights = []
        entries = absent_entries(len(case.shares), 3)
        arena = torch.full((len(case.shares) * 3 * case.inputs * case.outputs + 4096,), math.nan, dtype=dtype)
        for slot, share in enumerate(case.shares):
            weight = torch.randn(case.outputs, case.inputs, generator=random).to(dtype)
            weight[torch.rand(weight.shape, generator=random) >= (share or 0.0)] = 0
            self.weights.append(weight.double())
            if share is not None:
                entries[slot, SITE, SPARSE_OFFSET if sparse else DENSE_OFFSET] = size
                size += write_sparse(arena, size, weight) if sparse else write_dense(arena, size, weight)
                size = -(-(size + 3) // ALIGNED) * ALIGNED
        self.tables = AdapterTables(arena.to(device), entries.to(device), entries)
        self.segments = segments_of(case.counts)
        rows = sum(count for _, count in case.counts)
        self.x = torch.randn(rows, case.inputs, generator=random).to(device, dtype)
        self.wide = torch.randn(rows, case.outputs + 5, generator=random).to(device, dtype)

    def tiles(self) -> RowTiles:
        slots = len(self.case.shares)
        return tiles_of(self.segments, slots, self.case.tile_rows, self.x.device, deltas=True)


def write_dense(arena: torch.Tensor, at: int, weight: torch.Tensor) -> int:
    arena[at : at + weight.numel()] = weight.flatten()
    return weight.numel()


def write_sparse(arena: torch.Tensor, at: int, weight: torch.Tensor) -> int:
    rows, columns = weight.nonzero().unbind(1)
    starts = torch.searchsorted(rows.contiguous(), torch.arange(len(weight) + 1))
    for values in (starts, columns):
        place = at * arena.itemsize // 4
        arena.view(torch.int32)[place : place + len(values)] = values.int()
        at += int_elements(len(values), arena.itemsize)
    arena[at : at + len(rows)] = weight[rows, columns]
    return sparse_size(len(weight), len(rows), arena.itemsize)


def check(add: Add, case: Case, dtype: torch.dtype, device: str, limit: float, *, sparse: bool) -> None:
    setup = Setup(case, dtype, device, sparse=sparse)
    y = setup.wide[:, : case.outputs]  # columns of a wider tensor
    before, rest = y.clone(), setup.wide[:, case.outputs :].clone()
    expected = y.double().cpu()
    for slot, start, stop in setup.segments:
        if slot != BASE:
            expected[start:stop] += setup.x[start:stop].double().cpu() @ setup.weights[slot].T
    add(setup.x, y, setup.tables, setup.tiles(), SITE)
    error = (y.double().cpu() - expected).abs()
    assert (error <= limit * expected.abs().clamp(min=expected.abs().mean())).all()
    assert torch.equal(setup.wide[:, case.outputs :], rest)
    for slot, start, stop in setup.segments:
        if slot == BASE or case.shares[slot] is None:
            assert torch.equal(y[start:stop], before[start:stop])


def name(case: Case) -> str:
    return case.name


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 1e-5), (torch.float16, 2e-3)], ids=["float32", "float16"]
)
@pytest.mark.parametrize("add", [add_dense_torch, *([] if CUDA else [add_dense_triton])])
@pytest.mark.parametrize("case", CASES, ids=name)
def test_dense_matches_float64(add: Add, case: Case, dtype: torch.dtype, limit: float) -> None:
    check(add, case, dtype, "cpu", limit, sparse=False)


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 1e-5), (torch.float16, 2e-3)], ids=["float32", "float16"]
)
@pytest.mark.parametrize("add", [add_sparse_torch, *([] if CUDA else [add_sparse_triton])])
@pytest.mark.parametrize("case", CASES, ids=name)
def test_sparse_matches_float64(add: Add, case: Case, dtype: torch.dtype, limit: float) -> None:
    check(add, case, dtype, "cpu", limit, sparse=True)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-4), (torch.bfloat16, 2**-6)])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=name)
def test_compiled_matches_float64(case: Case, sparse: bool, dtype: torch.dtype, limit: float) -> None:
    check(add_sparse if sparse else add_dense, case, dtype, "cuda", limit, sparse=sparse)


def test_they_compile_without_spilling_registers(tmp_path: Path) -> None:
    """With them the kernels of tokens' rows."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "cache"), "TRITON_DEFAULT_FP_FUSION": "1"}
    environment.pop("TRITON_INTERPRET", None)
    script = Path(__file__).with_name("compile_changes.py")
    subprocess.run([sys.executable, script, tmp_path], env=environment, check=True)
    made = list(tmp_path.glob("*.cubin"))
    assert len(made) == 16
    for cubin in made:
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert "LOCAL:0 " in usage, cubin.name


@pytest.mark.parametrize("add", [add_dense, add_sparse])
def test_what_does_not_fit_is_refused(add: Add) -> None:
    entries = absent_entries(1, 1)
    tables = AdapterTables(torch.zeros(16), entries, entries)
    tiles = make_tiles([Segment(0, 0, 2)], 2, 1, torch.device("cpu"), deltas=True)
    with pytest.raises(ValueError, match=r"x is torch\.float32 \[2, 4\]; .* contiguous"):
        add(torch.ones(2, 8)[:, ::2], torch.ones(2, 4), tables, tiles, 0)
    with pytest.raises(
        ValueError, match=r"y is torch\.bfloat16 \[2, 4\]; it must be 2 rows of torch\.float32"
    ):
        add(torch.ones(2, 4), torch.ones(2, 4).bfloat16(), tables, tiles, 0)
