"""Tokens with rows of an adapter's own against float64: torch, interpreted Triton, Triton on a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import triton.language  # noqa: F401  before the patch: only our own kernels are to be interpreted
from tests.kernels.rows import segments_of, tiles_of

from veneer.kernels.low_rank import DECODE_TILE, make_tiles
from veneer.kernels.tables import (
    A_OFFSET,
    ALIGNED,
    B_OFFSET,
    BASE_SLOT,
    RANK,
    TOKENS,
    TOKENS_OFFSET,
    AdapterTables,
    RowTiles,
    Segment,
    absent_entries,
    int_elements,
)
from veneer.kernels.token_rows import (
    embed_rows,
    embed_rows_torch,
    embed_rows_triton,
    token_logits,
    token_logits_torch,
    token_logits_triton,
)

CUDA = torch.cuda.is_available()
if not CUDA:  # a kernel is compiled or interpreted according to this when its module is imported
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        import veneer.kernels.jit.token_rows  # noqa: F401

BASE, SITE, WIDTH = BASE_SLOT, 1, 5


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter runs one after the other; with few each has several blocks of tokens."""
    if not CUDA:
        monkeypatch.setattr("veneer.kernels.token_rows.HEAD_PROGRAMS", 2)


@dataclass(frozen=True)
class Case:
    """`counts` are (slot, rows) in row order; of each slot, its tokens and the rank of its update."""

    name: str
    counts: tuple[tuple[int, int], ...]
    tokens: tuple[tuple[int, ...], ...]
    ranks: tuple[int, ...]
    vocabulary: int = 50
    hidden: int = 72
    tile_rows: int = DECODE_TILE


ALL = tuple(range(50))
CASES = [
    Case("empty", (), ((3,),), (2,)),
    Case("only base rows", ((BASE, 5),), ((3,),), (2,)),
    Case("one token", ((0, 4),), ((3,),), (0,)),
    Case("every token", ((0, 9),), (ALL,), (0,)),
    Case("added tokens", ((BASE, 2), (0, 9)), ((0, 49, 50, 51, 54),), (0,)),
    Case("only added tokens", ((0, 9),), ((50,),), (0,)),
    Case("more than every token", ((0, 9),), ((*ALL, 50, 51),), (0,)),
    Case(
        "a mix",
        ((BASE, 2), (0, 3), (1, 11), (2, 2), (3, 5)),
        ((1, 2, 7, 8, 30), (), (), (0, 9, 50)),
        (0, 17, 0, 3),
    ),
    Case("odd sizes", ((0, 7), (1, 2)), ((4, 5, 6), ()), (1, 5), vocabulary=41, hidden=133),
    Case("large tiles", ((0, 70), (BASE, 9), (1, 12)), (ALL[::2], ()), (0, 3), tile_rows=64),
]


class Setup:
    """Random rows and updates in an arena, at site 1 of 3, at scattered offsets with NaN between them."""

    def __init__(self, case: Case, dtype: torch.dtype, device: str) -> None:
        random = torch.Generator().manual_seed(0)
        self.case = case
        arena = torch.full((1 << 17,), math.nan, dtype=dtype)
        entries = absent_entries(len(case.ranks), 3)
        at = ALIGNED
        self.rows: list[torch.Tensor] = []
        self.updates: list[torch.Tensor] = []  # [vocabulary, hidden]

        def put(tensor: torch.Tensor) -> int:
            nonlocal at
            place, at = at, -(-(at + tensor.numel() + 3) // ALIGNED) * ALIGNED
            arena[place : place + tensor.numel()] = tensor.flatten()
            return place

        for slot, (ids, rank) in enumerate(zip(case.tokens, case.ranks, strict=True)):
            a, b = (
                torch.randn(rank, size, generator=random).to(dtype) for size in (case.vocabulary, case.hidden)
            )
            rows = torch.randn(len(ids), case.hidden, generator=random).to(dtype)
            self.rows.append(rows.double())
            self.updates.append(a.double().T @ b.double())
            if rank:
                entries[slot, SITE, [A_OFFSET, B_OFFSET, RANK]] = torch.tensor([put(a), put(b), rank])
            if ids:
                entries[slot, SITE, [TOKENS_OFFSET, TOKENS]] = torch.tensor([at, len(ids)])
                place = at * dtype.itemsize // 4
                arena.view(torch.int32)[place : place + len(ids)] = torch.tensor(ids, dtype=torch.int32)
                at += int_elements(len(ids), dtype.itemsize)
                put(rows)
        self.tables = AdapterTables(arena.to(device), entries.to(device), entries)
        self.segments = segments_of(case.counts)
        count = sum(rows for _, rows in case.counts)
        self.x = torch.randn(count, case.hidden, generator=random).to(device, dtype)
        self.ids = torch.randint(case.vocabulary, (count,), generator=random)
        for slot, first, stop in self.segments:  # half of them have rows
            if slot != BASE and (own := case.tokens[slot]):
                self.ids[first:stop:2] = torch.tensor(own)[
                    torch.arange(len(range(first, stop, 2))) % len(own)
                ]

    def tiles(self) -> RowTiles:
        slots = len(self.case.ranks)
        return tiles_of(self.segments, slots, self.case.tile_rows, self.x.device)


def check_embedding(run: Any, case: Case, dtype: torch.dtype, device: str, limit: float) -> None:
    setup = Setup(case, dtype, device)
    out = setup.x.clone()
    expected = out.double().cpu()
    for slot, start, stop in setup.segments:
        for row in range(start, stop) if slot != BASE else ():
            token = int(setup.ids[row])
            if token in case.tokens[slot]:
                expected[row] = setup.rows[slot][case.tokens[slot].index(token)]
            if token < case.vocabulary:
                expected[row] += setup.updates[slot][token]
    run(setup.ids.to(device), out, setup.tables, setup.tiles(), SITE, case.vocabulary)
    assert_close(out, expected, limit)
    for slot, start, stop in setup.segments:
        if slot == BASE:
            assert torch.equal(out[start:stop], setup.x[start:stop])


def check_logits(run: Any, case: Case, dtype: torch.dtype, device: str, limit: float) -> None:
    setup = Setup(case, dtype, device)
    y = torch.randn(len(setup.x), case.vocabulary).to(device, dtype)
    added = torch.full((len(setup.x) + 2, WIDTH), math.nan, dtype=dtype, device=device)
    wide = torch.cat([y, added[: len(y)]], 1).double().cpu()
    for slot, start, stop in setup.segments:
        if slot != BASE and case.tokens[slot]:
            found = setup.x[start:stop].double().cpu() @ setup.rows[slot].T
            wide[start:stop, list(case.tokens[slot])] = found
    run(setup.x, y, added, setup.tables, setup.tiles(), SITE)
    assert_close(y, wide[:, : case.vocabulary], limit)
    assert_close(added[: len(y)], wide[:, case.vocabulary :], limit)
    assert added[len(y) :].isnan().all()


def assert_close(found: torch.Tensor, expected: torch.Tensor, limit: float) -> None:
    bound = limit * expected.abs().clamp(min=float(expected.abs().nanmean()) if expected.numel() else 0)
    assert torch.equal(found.isnan().cpu(), expected.isnan())  # what must not be written
    assert ((found.double().cpu() - expected).abs() <= bound)[~expected.isnan()].all()


def name(case: Case) -> str:
    return case.name


DTYPES = pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 1e-5), (torch.float16, 5e-3)], ids=["float32", "float16"]
)
GPU_DTYPES = pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-4), (torch.bfloat16, 2**-6)])


@DTYPES
@pytest.mark.parametrize("run", [embed_rows_torch, *([] if CUDA else [embed_rows_triton])])
@pytest.mark.parametrize("case", CASES, ids=name)
def test_embeddings(run: Callable[..., None], case: Case, dtype: torch.dtype, limit: float) -> None:
    check_embedding(run, case, dtype, "cpu", limit)


@DTYPES
@pytest.mark.parametrize("run", [token_logits_torch, *([] if CUDA else [token_logits_triton])])
@pytest.mark.parametrize("case", CASES, ids=name)
def test_logits(run: Callable[..., None], case: Case, dtype: torch.dtype, limit: float) -> None:
    check_logits(run, case, dtype, "cpu", limit)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@GPU_DTYPES
@pytest.mark.parametrize("case", CASES, ids=name)
def test_compiled(case: Case, dtype: torch.dtype, limit: float) -> None:
    check_embedding(embed_rows, case, dtype, "cuda", limit)
    check_logits(token_logits, case, dtype, "cuda", limit)


def test_added_tokens_beyond_the_columns_are_left_out() -> None:
    case = Case("far", ((0, 2),), ((49, 50 + WIDTH - 1, 50 + WIDTH),), (0,))
    for run in (token_logits_torch, *([] if CUDA else [token_logits_triton])):
        setup = Setup(case, torch.float32, "cpu")
        y, added = torch.zeros(2, 50), torch.zeros(2, WIDTH)
        run(setup.x, y, added, setup.tables, setup.tiles(), SITE)
        assert (y != 0).sum() == 2
        assert (added != 0).nonzero().tolist() == [[0, WIDTH - 1], [1, WIDTH - 1]]


def test_what_does_not_fit_is_refused() -> None:
    entries = absent_entries(1, 1)
    tables = AdapterTables(torch.zeros(16), entries, entries)
    tiles = make_tiles([Segment(0, 0, 2)], 2, 1, torch.device("cpu"))
    x, y = torch.ones(2, 4), torch.ones(2, 9)
    with pytest.raises(ValueError, match=r"ids are torch\.int32 \[2\]; they must be int64 \[2\]"):
        embed_rows(torch.zeros(2, dtype=torch.int32), x, tables, tiles, 0, 9)
    with pytest.raises(ValueError, match=r"out is torch\.bfloat16"):
        embed_rows(torch.zeros(2, dtype=torch.int64), x.bfloat16(), tables, tiles, 0, 9)
    with pytest.raises(ValueError, match=r"added is torch\.float32 \[1, 3\]; .* 2 rows"):
        token_logits(x, y, torch.ones(1, 3), tables, tiles, 0)
