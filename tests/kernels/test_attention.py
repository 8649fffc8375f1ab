"""Paged attention against dense float64: torch path, Triton in the interpreter, Triton on a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
import triton.language  # noqa: F401  before the patch: only our own kernels are to be interpreted

from veneer.kernels.attention import (
    PagedBatch,
    paged_attention,
    paged_attention_torch,
    paged_attention_triton,
    write_kv,
)
from veneer.kernels.attention_plan import plan

CUDA = torch.cuda.is_available()
if not CUDA:  # a kernel is compiled or interpreted according to this when its module is imported
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        import veneer.kernels.jit.attention  # noqa: F401

Attention = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, PagedBatch, float, int | None, float | None], torch.Tensor
]


@dataclass(frozen=True)
class Case:
    """`sequences` are (new tokens, all tokens)."""

    name: str
    sequences: tuple[tuple[int, int], ...]
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    page_size: int = 4
    window: int | None = None
    softcap: float | None = None
    strength: float = 1.0  # of the queries; large ones make sharp weights


SMALL = [
    Case("empty", ()),
    Case("first token", ((1, 1),)),
    Case("decode", ((1, 7), (1, 16), (1, 33))),
    Case("long decode, split over keys", ((1, 700), (1, 9))),
    Case("prefill", ((13, 13),)),
    Case("prefill chunk", ((9, 21), (16, 16))),
    Case("mixed", ((1, 30), (5, 5), (1, 1), (20, 43), (1, 12))),
    Case("padding sequences", ((1, 30), (0, 0), (3, 8), (0, 0))),
    Case("groups of 3", ((1, 10), (11, 19)), heads=9, kv_heads=3),
    Case("one group of 20", ((1, 10), (7, 9)), heads=20, kv_heads=1),
    Case("no groups", ((1, 10), (7, 9)), heads=3, kv_heads=3),
    Case("head_dim 96", ((1, 21), (6, 17)), head_dim=96, page_size=16),
    Case("head_dim 256", ((1, 21), (6, 17)), head_dim=256, page_size=16),
    Case("window", ((1, 50), (1, 5), (20, 43), (9, 9)), window=8),
    Case("window of 1", ((1, 9), (6, 9)), window=1),
    Case("window, split over keys", ((1, 1500), (1, 20)), window=600, page_size=16),
    Case("softcap", ((1, 50), (20, 43)), softcap=2.0, strength=6.0),
    Case("softcap and window", ((1, 50), (20, 43)), window=13, softcap=5.0, strength=6.0),
    Case("sharp weights", ((1, 50), (20, 43)), strength=60.0),
]
LARGE = [
    Case("8B decode", tuple((1, 100 * i + 1) for i in range(32)), 32, 8, 128, 16),
    Case("8B mixed", ((512, 2048), (1, 4000), (1, 3), (300, 300)), 32, 8, 128, 16),
    Case("Gemma", ((200, 1500), (1, 1500), (1, 100)), 8, 4, 256, 16, window=512),
    Case("Phi", ((200, 700), (1, 1500)), 32, 32, 96, 16),
]


class Setup:
    """Random sequences whose pages are scattered over a cache that is NaN everywhere else."""

    def __init__(self, case: Case, dtype: torch.dtype, device: str) -> None:
        random = torch.Generator().manual_seed(0)
        self.case = case
        query_lens, kv_lens = ([pair[i] for pair in case.sequences] for i in (0, 1))
        self.rows = sum(query_lens)
        needed = [-(-keys // case.page_size) for keys in kv_lens]
        order = torch.randperm(sum(needed) + 5, generator=random).tolist()
        table = torch.full((len(needed), max(needed, default=0) + 2), order[-1], dtype=torch.int32)
        for sequence, pages in enumerate(needed):
            table[sequence, :pages] = torch.tensor([order.pop(0) for _ in range(pages)])

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=random).to(dtype)

        kv_shape = (case.kv_heads, case.head_dim)
        q = (
            draw(case.heads, self.rows, case.head_dim).transpose(0, 1) * case.strength
        )  # strided, as in models
        k_cache, v_cache = torch.full(
            (2, sum(needed) + 5, case.page_size, *kv_shape), math.nan, dtype=dtype
        ).unbind(0)
        new_slots, new_keys, new_values, expected = [], [], [], []
        for sequence, (queries, keys) in enumerate(case.sequences):
            position = torch.arange(keys)
            slots = table[sequence].long()[position // case.page_size] * case.page_size
            slots += position % case.page_size
            k, v = draw(keys, *kv_shape), draw(keys, *kv_shape)
            old = keys - queries
            for cache, side in ((k_cache, k), (v_cache, v)):
                cache.view(-1, *kv_shape)[slots[:old]] = side[:old]
            first = sum(query_lens[:sequence])
            expected.append(self.dense(q[first : first + queries], k, v))
            new_slots.append(slots[old:])
            new_keys.append(k[old:])
            new_values.append(v[old:])
        empty = torch.empty(0, *kv_shape, dtype=dtype)
        self.expected = torch.cat([*expected, torch.empty(0, case.heads, case.head_dim, dtype=torch.float64)])
        self.q = q.to(device)
        self.k_cache, self.v_cache = k_cache.to(device), v_cache.to(device)
        starts = torch.tensor([0, *query_lens]).cumsum(0).int()
        slots = torch.cat([*new_slots, torch.empty(0, dtype=torch.int64)])
        self.batch = PagedBatch(
            starts.to(device),
            torch.tensor(kv_lens, dtype=torch.int32, device=device),
            table.to(device),
            slots.to(device),
            query_lens,
            kv_lens,
        )
        k, v = torch.cat([*new_keys, empty]), torch.cat([*new_values, empty])
        write_kv(k.to(device), v.to(device), self.k_cache, self.v_cache, self.batch.slot_mapping)

    @property
    def scale(self) -> float:
        return float(self.case.head_dim**-0.5)

    def dense(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Attention of one sequence written out in float64."""
        group = self.case.heads // self.case.kv_heads
        k, v = (side.double().repeat_interleave(group, 1) for side in (k, v))
        score = torch.einsum("qhd,khd->hqk", q.double(), k) * self.scale
        if self.case.softcap is not None:
            score = self.case.softcap * torch.tanh(score / self.case.softcap)
        position = torch.arange(len(k) - len(q), len(k))[:, None]
        distance = position - torch.arange(len(k))
        hidden = distance < 0
        if self.case.window is not None:
            hidden |= distance >= self.case.window
        weights = torch.softmax(score.masked_fill(hidden, -math.inf), -1)
        return torch.einsum("hqk,khd->qhd", weights, v)

    def run(self, attention: Attention, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
        """The result, with every tensor that `torch.empty` gives the kernel filled with NaN."""
        empty = torch.empty

        def poisoned(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
            return empty(*shape, dtype=dtype, device=device).fill_(math.nan)

        with monkeypatch.context() as patched:
            patched.setattr(torch, "empty", poisoned)
            out = self.call(attention)
        assert out.dtype == self.q.dtype
        return out.double().cpu()

    def call(self, attention: Attention) -> torch.Tensor:
        case = self.case
        return attention(
            self.q, self.k_cache, self.v_cache, self.batch, self.scale, case.window, case.softcap
        )


def assert_close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, strength: float) -> None:
    """Worst element and root mean square, relative to the size of the values (1).

    float32: scores grow with `strength`, and their rounding with them. Others: weights and result are rounded
    by up to 2^-9 each, and results are averages of values of up to 5.
    """
    assert actual.shape == expected.shape
    if not expected.numel():
        return
    worst, mean = (2e-6 * max(strength, 2.0), 1e-6 * strength) if dtype == torch.float32 else (3e-2, 3e-3)
    error = (actual - expected).abs()
    assert error.max() <= worst
    assert error.square().mean().sqrt() <= mean


def ids(case: Case) -> str:
    return case.name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", SMALL, ids=ids)
def test_torch_path_matches_dense(case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = Setup(case, dtype, "cpu")
    assert_close(setup.run(paged_attention, monkeypatch), setup.expected, dtype, case.strength)


@pytest.mark.skipif(CUDA, reason="kernels are compiled where there is a GPU, and run there by the gpu tests")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", SMALL, ids=ids)
def test_interpreted_triton_matches_dense(
    case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """float16 stands for bf16, which the interpreter's matmul does not know."""
    setup = Setup(case, dtype, "cpu")
    assert_close(setup.run(paged_attention_triton, monkeypatch), setup.expected, dtype, case.strength)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", SMALL + LARGE, ids=ids)
def test_compiled_triton_matches_dense(
    case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = Setup(case, dtype, "cuda")
    assert_close(setup.run(paged_attention_triton, monkeypatch), setup.expected, dtype, case.strength)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_a_captured_graph_replays_other_lengths_without_synchronizing() -> None:
    captured = Setup(Case("bounds", ((1, 1024), (1, 1024), (1, 1024))), torch.float32, "cuda")
    later = Setup(Case("later", ((1, 900), (1, 3), (0, 0))), torch.float32, "cuda")
    batch = captured.batch
    captured.call(paged_attention_triton)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.set_sync_debug_mode("error")
    try:
        token = torch.zeros(3, 2, 16, device="cuda")
        write_kv(token, token, captured.k_cache, captured.v_cache, batch.slot_mapping)
        captured.call(paged_attention_triton)
        with torch.cuda.graph(graph):
            out = captured.call(paged_attention_triton)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    captured.q[:2] = later.q
    captured.k_cache[: len(later.k_cache)] = later.k_cache
    captured.v_cache[: len(later.v_cache)] = later.v_cache
    batch.query_start.copy_(later.batch.query_start)
    batch.kv_len.copy_(later.batch.kv_len)
    batch.block_table[:, : later.batch.block_table.shape[1]] = later.batch.block_table
    graph.replay()
    assert_close(out[:2].double().cpu(), later.expected, torch.float32, 1.0)


@pytest.mark.parametrize("attention", [paged_attention_torch, paged_attention_triton])
def test_a_block_table_may_have_its_pages_as_rows(attention: Attention) -> None:
    setup = Setup(SMALL[6], torch.float32, "cuda" if CUDA else "cpu")
    straight = setup.call(attention)
    table = setup.batch.block_table
    wide = torch.full((table.shape[1], table.shape[0] + 3), 10**6, dtype=torch.int32, device=table.device)
    wide[:, : table.shape[0]] = table.T
    setup.batch = replace(setup.batch, block_table=wide[:, : table.shape[0]].T)
    assert torch.equal(setup.call(attention), straight)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_write_kv_touches_only_its_slots(dtype: torch.dtype) -> None:
    k_cache, v_cache = torch.full((2, 3, 4, 2, 16), math.nan).unbind(0)
    k, v = torch.randn(2, 5, 2, 16).unbind(0)
    slots = torch.tensor([11, 0, 7, 2, 5], dtype=dtype)
    write_kv(k, v, k_cache, v_cache, slots)
    for cache, side in ((k_cache, k), (v_cache, v)):
        flat = cache.view(-1, 2, 16)
        assert torch.equal(flat[slots], side)
        assert flat.isnan().all(2).all(1).sum() == 7


def test_gathers_are_built_once_for_all_layers() -> None:
    setup = Setup(SMALL[6], torch.float32, "cpu")
    assert setup.batch.groups(4, None) is setup.batch.groups(4, None)
    assert setup.batch.groups(4, 8) is not setup.batch.groups(4, None)


@pytest.mark.parametrize(
    "attention",
    [
        paged_attention_torch,
        pytest.param(paged_attention_triton, marks=pytest.mark.skipif(CUDA, reason="compiled")),
    ],
)
def test_arguments_that_do_not_fit_are_refused(attention: Attention) -> None:
    setup = Setup(SMALL[2], torch.float32, "cpu")
    keys, values = setup.k_cache, setup.v_cache
    for q, cache, message in (
        (setup.q[:, :3], keys, "does not fit a cache"),
        (setup.q.half(), keys, r"q is torch\.float16"),
        (setup.q, keys.transpose(0, 1), "contiguous and of one shape"),
        (setup.q[..., :15], keys[..., :15].contiguous(), "contiguous and of one shape"),
    ):
        with pytest.raises(ValueError, match=message):
            attention(q, cache, values, setup.batch, 1.0, None, None)
    cut = keys[..., :15].contiguous()
    with pytest.raises(ValueError, match="multiple of 16"):
        attention(setup.q[..., :15], cut, cut, setup.batch, 1.0, None, None)


@pytest.mark.parametrize("head_dim", [16, 64, 96, 128, 256])
@pytest.mark.parametrize("element_size", [2, 4])
@pytest.mark.parametrize("heads", [(32, 8), (9, 3), (40, 1), (8, 8)])
def test_plan_fits_shared_memory_and_covers_the_queries(
    head_dim: int, element_size: int, heads: tuple[int, int]
) -> None:
    group = heads[0] // heads[1]
    for decode, queries in ((True, 1), (False, 500)):
        sizes = plan(decode, 3, queries, 4096, *heads, head_dim, element_size)
        assert sizes.block_d >= head_dim
        assert sizes.block_q * group <= sizes.block_m
        assert decode or sizes.block_q * sizes.programs >= queries
        tiles = sizes.block_m + 2 * 2 * sizes.block_n  # queries, two stages of keys and of values
        assert tiles * sizes.block_d * element_size <= 99 << 10 or group > 32


def test_decode_is_split_when_few_rows_have_many_keys() -> None:
    assert plan(True, 1, 1, 8192, 32, 8, 128, 2).splits == 32
    assert plan(True, 64, 1, 8192, 32, 8, 128, 2).splits == 1
    assert plan(True, 1, 1, 100, 32, 8, 128, 2).splits == 1
