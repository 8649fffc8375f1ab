"""Activations between A and B against float64: torch, interpreted Triton, Triton on a GPU; compiled for both."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import triton.language  # before the patch: only our own kernels are to be interpreted
from tests.kernels.rows import segments_of, tiles_of

from veneer.kernels.activation import activate, activate_torch, activate_triton
from veneer.kernels.low_rank import (
    DECODE_TILE,
    Workspace,
    low_rank,
    low_rank_torch,
    low_rank_triton,
    view_tiles,
)
from veneer.kernels.tables import (
    ABSENT,
    ACTIVATION,
    ACTIVATIONS,
    ALIGNED,
    BASE_SLOT,
    DETAIL,
    ELEMENTWISE,
    GROUP,
    INNER_OFFSET,
    MAX_CHOICES,
    RANK,
    AdapterTables,
    RowTiles,
    absent_entries,
    find_hidden,
)

CUDA = torch.cuda.is_available()
if not CUDA:  # a kernel is compiled or interpreted according to this when its module is imported
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        import veneer.kernels.jit.activation
        import veneer.kernels.jit.epilogue
        import veneer.kernels.jit.low_rank  # noqa: F401

BASE = BASE_SLOT
SITE = 1  # the first of two, of four


@dataclass(frozen=True)
class Phi:
    kind: str
    rank: int = 0  # of the elementwise kinds and softmax
    group: int = 0
    count: int = 0
    detail: int = 0
    has_inner: bool = True

    @property
    def ranks(self) -> int:
        return {"arrow": self.count * (1 + self.group), "fusion": self.count * (1 + 2 * self.group)}.get(
            self.kind, self.rank
        )

    def __call__(self, h: torch.Tensor) -> torch.Tensor:
        """phi of a float64 h [rank] of one row, one element after the other."""
        match self.kind:
            case "softmax":
                return torch.cat([softmax(part) for part in torch.split(h, self.group)])
            case "arrow":
                scores, experts = h[: self.count].abs().tolist(), h[self.count :].view(self.count, self.group)
                best = sorted(range(self.count), key=lambda e: (-scores[e], e))[: self.detail]
                chosen = dict(
                    zip(best, softmax(torch.tensor([scores[e] for e in best])).tolist(), strict=True)
                )
                parts = [experts[e] * chosen.get(e, 0.0) for e in range(self.count)]
                return torch.cat([torch.zeros(self.count), *parts])
            case "fusion":
                start, rest = h[: self.count], h[self.count :].view(2, self.count, self.group)
                made = [scalar(ELEMENTWISE[self.detail], part) for part in rest[0]]
                gates = softmax(
                    start + torch.stack([(m * k).sum() for m, k in zip(made, rest[1], strict=True)])
                )
                parts = [gate * m for gate, m in zip(gates, made, strict=True)]
                return torch.cat([gates, *parts, torch.zeros(self.count * self.group)])
        return scalar(self.kind, h)


def softmax(h: torch.Tensor) -> torch.Tensor:
    weights = (h - h.max()).exp()
    return weights / weights.sum()


def scalar(kind: str, h: torch.Tensor) -> torch.Tensor:
    formulas: dict[str, Callable[[float], float]] = {
        "": lambda v: v,
        "relu": lambda v: max(v, 0.0),
        "silu": lambda v: v / (1 + math.exp(-v)),
        "gelu": lambda v: v * (1 + math.erf(v / math.sqrt(2))) / 2,
        "gelu_tanh": lambda v: v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))) / 2,
        "tanh": math.tanh,
        "sigmoid": lambda v: 1 / (1 + math.exp(-v)),
        "leaky_relu": lambda v: v if v >= 0 else 0.01 * v,
    }
    return torch.tensor([formulas[kind](value) for value in h.tolist()])


@dataclass(frozen=True)
class Case:
    """`counts` are (slot, rows) in row order; `phis` belong to the slots."""

    name: str
    counts: tuple[tuple[int, int], ...]
    phis: tuple[Phi, ...]
    tile_rows: int = DECODE_TILE
    inputs: int = 64


def each(*phis: Phi, rows: int = 3) -> tuple[tuple[int, int], ...]:
    return ((BASE, 2), *((slot, rows) for slot in range(len(phis))), (BASE, 1))


ELEMENTS = tuple(
    Phi(kind, rank, has_inner=kind != "")
    for kind, rank in zip(ELEMENTWISE, (5, 1, 3, 16, 17, 33, 40, 64), strict=True)
)
SOFTMAXES = (
    Phi("softmax", 12, 3),
    Phi("softmax", 80, 40),
    Phi("softmax", 1, 1),
    Phi("softmax", 320, 10, has_inner=False),
)
ARROWS = (
    Phi("arrow", group=4, count=3, detail=2, has_inner=False),
    Phi("arrow", group=1, count=1, detail=1),
    Phi("arrow", group=35, count=5, detail=5),
    Phi("arrow", group=2, count=MAX_CHOICES, detail=3),
)
FUSIONS = (
    Phi("fusion", group=6, count=3, detail=ELEMENTWISE.index("relu")),
    Phi("fusion", group=1, count=1, detail=0, has_inner=False),
    Phi("fusion", group=40, count=2, detail=ELEMENTWISE.index("silu")),
    Phi("fusion", group=1, count=5, detail=ELEMENTWISE.index("tanh")),
)
SMALL = [
    Case("elementwise", each(*ELEMENTS), ELEMENTS),
    Case("softmax", each(*SOFTMAXES), SOFTMAXES),
    Case("arrow", each(*ARROWS), ARROWS),
    Case("fusion", each(*FUSIONS), FUSIONS),
    Case("one row", ((0, 1),), (Phi("relu", 8),)),
    Case("no rows", (), (Phi("relu", 8),)),
    Case("base rows", ((BASE, 3),), (Phi("relu", 8),)),
    Case("beside LoRA", ((1, 19), (BASE, 3), (0, 9)), (Phi("silu", 8), Phi("", 4, has_inner=False))),
    Case("rank 0", ((0, 2), (1, 2)), (Phi("relu", 4), Phi("", 0, has_inner=False))),
    Case(
        "large tiles",
        ((0, 70), (BASE, 5), (1, 130), (2, 64), (3, 1)),
        (Phi("gelu", 20), Phi("softmax", 12, 4), ARROWS[0], FUSIONS[0]),
        tile_rows=64,
    ),
    Case(
        "split over columns", ((0, 3), (1, 2), (2, 1)), (Phi("relu", 20), ARROWS[0], FUSIONS[0]), inputs=1040
    ),
]
LARGE = [
    Case(
        "prefill",
        ((0, 1000), (1, 700), (BASE, 300), (2, 400)),
        (Phi("silu", 64), SOFTMAXES[3], ARROWS[2]),
        64,
        1024,
    ),
    Case(
        "decode",
        tuple((slot, 3) for slot in range(4)),
        (Phi("relu", 64), SOFTMAXES[3], ARROWS[2], FUSIONS[2]),
        8,
        4096,
    ),
]


class Setup:
    """Random adapters at two neighbouring sites, at scattered offsets with NaN between them."""

    def __init__(self, case: Case, dtype: torch.dtype, device: str) -> None:
        random = torch.Generator().manual_seed(0)
        self.case, self.outputs = case, 48
        pieces: list[torch.Tensor] = []
        entries = absent_entries(len(case.phis), 4)
        self.factors: dict[tuple[int, int], tuple[torch.Tensor, ...]] = {}

        def place(values: torch.Tensor) -> int:
            used = sum(map(len, pieces))
            offset = -(-(used + 3) // ALIGNED) * ALIGNED
            pieces.extend((torch.full((offset - used,), math.nan), values.flatten().float()))
            return offset

        for slot, phi in enumerate(case.phis):
            for site in (SITE, SITE + 1):
                a = torch.randn(phi.ranks, case.inputs, generator=random) * 1.5 / case.inputs**0.5
                b = torch.randn(phi.ranks, self.outputs, generator=random)
                d = torch.randn(phi.ranks, generator=random) * phi.has_inner
                a, b, d = (side.to(dtype) for side in (a, b, d))
                self.factors[slot, site] = tuple(side.double() for side in (a, b, d))
                if not phi.ranks:
                    continue
                entries[slot, site, : RANK + 1] = torch.tensor([place(a), place(b), ABSENT, phi.ranks])
                entries[slot, site, [ACTIVATION, GROUP, DETAIL]] = torch.tensor(
                    [ACTIVATIONS.index(phi.kind), phi.group, phi.detail]
                )
                if phi.has_inner:
                    entries[slot, site, INNER_OFFSET] = place(d)
        arena = torch.cat([*pieces, torch.full((3,), math.nan)]).to(device, dtype)
        hidden = {slot: find_hidden(each, 4) for slot, each in enumerate(entries)}
        self.tables = AdapterTables(arena, entries.to(device), entries, hidden=hidden)
        self.segments = segments_of(case.counts)
        self.rows = sum(rows for _, rows in case.counts)
        self.x = torch.randn(self.rows, case.inputs, generator=random).to(device, dtype)
        self.y = torch.randn(self.rows, self.outputs, generator=random).to(device, dtype)
        bound = max(*(phi.ranks for phi in case.phis), 1)
        self.workspace = Workspace(self.tables, max(self.rows, 1), bound)
        for poisoned in (self.workspace.planes, self.workspace.plane):
            poisoned.fill_(math.nan)  # what a kernel has not written must not pass

    def tiles(self) -> RowTiles:
        slots = len(self.case.phis)
        return tiles_of(self.segments, slots, self.case.tile_rows, self.x.device, hidden=True)

    def expected_h(self, site: int) -> dict[int, torch.Tensor]:
        """phi(A x + d) of each row with an adapter."""
        found = {}
        for slot, start, stop in self.segments:
            for row in range(start, stop if slot != BASE else start):
                a, _, d = self.factors[slot, site]
                h = a @ self.x[row].double().cpu() + d
                found[row] = self.case.phis[slot](h).double() if len(h) else h
        return found

    def expected(self, site: int) -> torch.Tensor:
        y = self.y.double().cpu()
        made = self.expected_h(site)
        for slot, start, stop in self.segments:
            for row in range(start, stop if slot != BASE else start):
                y[row] += made[row] @ self.factors[slot, site][1]
        return y


def name(case: Case) -> str:
    return case.name


def check_planes(case: Case, run: Callable[..., None], shrink: Callable[..., None], device: str) -> None:
    """h of both sites in one plane, and nothing else written."""
    setup = Setup(case, torch.float32, device)
    tiles, workspace = setup.tiles(), setup.workspace
    shrink(setup.x, setup.tables, tiles, SITE, 2, workspace)
    if not setup.rows:
        return
    run(setup.tables, tiles, SITE, 2, setup.rows, workspace)
    found = workspace.held(SITE, 2, setup.rows).cpu()
    assert found.shape[1] == 1
    ranks = {row: phi.ranks for slot, start, stop in setup.segments if slot != BASE
             for phi in [case.phis[slot]] for row in range(start, stop)}  # fmt: skip
    for index in range(2):
        expected = setup.expected_h(SITE + index)
        for row in range(setup.rows):
            rank = ranks.get(row, 0)
            assert found[index, 0, row, rank:].isnan().all()
            if rank:
                error = (found[index, 0, row, :rank].double() - expected[row]).abs().max()
                assert error <= 1e-5 * max(1.0, float(expected[row].abs().max()))


def check_update(case: Case, run: Callable[..., None], dtype: torch.dtype, device: str) -> None:
    setup = Setup(case, dtype, device)
    y = setup.y.clone()
    run(setup.x, y, setup.tables, setup.tiles(), SITE, setup.workspace)
    expected = setup.expected(SITE)
    if not setup.rows:
        return
    limit = 2e-5 if dtype == torch.float32 else 4e-2
    assert (y.double().cpu() - expected).abs().max() <= limit * max(1.0, float(expected.abs().max()))
    for slot, start, stop in setup.segments:
        if slot == BASE:
            assert torch.equal(y[start:stop], setup.y[start:stop])


def planes_torch(*arguments: Any) -> None:
    from veneer.kernels.low_rank import shrink_torch

    shrink_torch(*arguments)


def planes_triton(*arguments: Any) -> None:
    from veneer.kernels.low_rank import shrink_triton

    shrink_triton(*arguments)


INTERPRETED = [] if CUDA else [(activate_triton, planes_triton)]


@pytest.mark.parametrize(("run", "shrink"), [(activate_torch, planes_torch), *INTERPRETED])
@pytest.mark.parametrize("case", SMALL, ids=name)
def test_planes_match_float64(case: Case, run: Callable[..., None], shrink: Callable[..., None]) -> None:
    check_planes(case, run, shrink, "cpu")


@pytest.mark.parametrize("run", [low_rank_torch, *([] if CUDA else [low_rank_triton])])
@pytest.mark.parametrize("case", SMALL, ids=name)
def test_update_matches_float64(case: Case, run: Callable[..., None]) -> None:
    check_update(case, run, torch.float32, "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("case", [*SMALL, *LARGE], ids=name)
def test_compiled_planes_match_float64(case: Case) -> None:
    check_planes(case, activate, planes_triton, "cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", [*SMALL, *LARGE], ids=name)
def test_compiled_update_matches_float64(case: Case, dtype: torch.dtype) -> None:
    check_update(case, low_rank, dtype, "cuda")


@pytest.mark.parametrize("run", [low_rank_torch, *([] if CUDA else [low_rank_triton])])
def test_equal_scores_choose_the_lowest_number(run: Callable[..., None]) -> None:
    case = Case("ties", ((0, 2),), (Phi("arrow", group=2, count=4, detail=2),))
    setup = Setup(case, torch.float32, "cpu")
    a, _, d = setup.factors[0, SITE]
    offset, _, _, _ = setup.tables.entries_host[0, SITE, : RANK + 1].tolist()
    a[:4], d[:4] = a[0], d[0]  # the scores of one input are the same four times
    setup.tables.arena[offset : offset + a.numel()] = a.flatten().float()
    inner = setup.tables.entries_host[0, SITE, INNER_OFFSET]
    setup.tables.arena[inner : inner + len(d)] = d.float()
    y = setup.y.clone()
    run(setup.x, y, setup.tables, setup.tiles(), SITE, setup.workspace)
    torch.testing.assert_close(y.double(), setup.expected(SITE), rtol=0, atol=1e-5)


@pytest.mark.parametrize("run", [low_rank_torch, *([] if CUDA else [low_rank_triton])])
def test_a_plain_lora_has_the_same_bits_with_and_without_an_activation_in_the_step(
    run: Callable[..., None],
) -> None:
    case = Case(
        "beside", ((1, 9), (0, 3)), (Phi("softmax", 12, 3), Phi("", 20, has_inner=False)), inputs=1040
    )
    setup = Setup(case, torch.float32, "cpu")
    answers = []
    for hidden in (False, True):
        y, tiles = setup.y.clone(), setup.tiles()
        tiles = view_tiles(torch.cat([torch.tensor([[int(tiles.used), 0, 0]], dtype=torch.int32), tiles.tiles]),
                           setup.segments, True, case.tile_rows, hidden=hidden)  # fmt: skip
        run(setup.x, y, setup.tables, tiles, SITE, setup.workspace)
        answers.append(y)
    assert torch.equal(answers[0][:9], answers[1][:9])
    assert not torch.equal(answers[0][9:], answers[1][9:])


def test_it_compiles_and_hardly_spills_registers(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "cache"), "TRITON_DEFAULT_FP_FUSION": "1"}
    environment.pop("TRITON_INTERPRET", None)
    script = Path(__file__).with_name("compile_activation.py")
    subprocess.run([sys.executable, script, tmp_path], env=environment, check=True)
    for name, most in (("80-bf16-8", 0), ("90-bf16-64", 128)):
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", tmp_path / f"{name}.cubin"]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        stack = re.search(r"STACK:(\d+) .*LOCAL:0 ", usage)
        assert stack is not None
        assert int(stack[1]) <= most


def test_planes_of_other_sites_are_refused() -> None:
    setup = Setup(SMALL[4], torch.float32, "cpu")
    with pytest.raises(ValueError, match="call shrink for them first"):
        activate(setup.tables, setup.tiles(), SITE, 2, 1, setup.workspace)


def test_hidden_sites_are_those_with_an_activation_and_the_hidden_states_in_use() -> None:
    entries = absent_entries(6)
    entries[0, RANK] = 4  # a plain LoRA at a linear layer
    entries[1, [RANK, ACTIVATION]] = torch.tensor([4, ACTIVATIONS.index("relu")])
    entries[3, RANK] = 2
    entries[4, 2] = 16  # a bias alone
    assert find_hidden(entries, 3) == {1, 3, 4}
    assert find_hidden(absent_entries(6), 3) == frozenset()
