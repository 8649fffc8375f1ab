"""CUDA graphs and fused layers against eager, plain steps: each proven architecture, a mix of adapters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine.adapters import save_lora

from veneer.engine.graphs import buckets_up_to


def test_buckets_cover_every_batch() -> None:
    for most in (1, 2, 3, 8, 9, 16, 17, 64, 100):
        buckets = buckets_up_to(most)
        assert buckets == sorted(set(buckets))
        assert buckets[-1] == most
        for rows in range(1, most + 1):
            smallest = next(size for size in buckets if size >= rows)
            assert smallest < rows + 16
    assert buckets_up_to(64) == [1, 2, 4, 8, 16, 32, 48, 64]


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3", "gemma3", "phi3"])
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_graphed_equals_eager_equals_alone(
    architecture: str, tiny_model: Callable[[str], Path], tmp_path: Path, make_engine: Callable[..., Any]
) -> None:
    model = tiny_model(architecture)
    store = tmp_path / "adapters"
    for rank in (2, 16, 33):
        save_lora(store / "blobs" / f"{rank:064x}", model, rank, lora_alpha=8)
    fields: dict[str, Any] = {"store": str(store), "device": "cuda", "max_num_seqs": 20, "page_size": 16}
    eager = make_engine(model, enforce_eager=True, **fields)
    graphed = make_engine(model, **fields)
    assert (eager.engine.runner.graphs, eager.engine.runner.mixed_graphs) == (None, None)
    assert graphed.engine.runner.graphs is not None
    adapters = [None, f"{2:064x}", f"{16:064x}", f"{33:064x}"]
    asks = [([3 + i, 7, 11, *range(5, 5 + 3 * i)], adapters[i % 4]) for i in range(11)]
    expected = [eager.generate(prompt, adapter, max_tokens=20) for prompt, adapter in asks]
    assert [graphed.generate(prompt, adapter, max_tokens=20) for prompt, adapter in asks] == expected
    for driver in (eager, graphed):
        ids = [driver.submit(prompt, adapter, max_tokens=20) for prompt, adapter in asks]
        assert driver.run(*ids) == expected
    base_only = [graphed.submit(prompt, None, max_tokens=20) for prompt, _ in asks[:3]]
    assert graphed.run(*base_only) == [eager.generate(prompt, None, max_tokens=20) for prompt, _ in asks[:3]]


Answer = list[tuple[int, float]]  # tokens with their log probabilities
ROUNDING = 0.15  # of a log probability in bfloat16; on a CPU the references differed by up to 0.044


def answer_all(driver: Any, asks: list[tuple[list[int], str | None]], between: int | None) -> list[Answer]:
    """`between` one request and the next: so many steps, or as many as it takes to answer it."""
    ids = []
    for prompt, adapter in asks:
        ids.append(driver.submit(prompt, adapter, max_tokens=20, logprobs=1))
        if between is None:
            driver.run(ids[-1])
        for _ in range(between or 0):
            driver.step()
    driver.run(*ids)
    return [
        [
            (token, entry.logprob)
            for item in driver.outputs[identifier]
            for token, entry in zip(item.tokens, item.logprobs, strict=True)
        ]
        for identifier in ids
    ]


def assert_same_up_to_rounding(found: list[Answer], expected: list[Answer]) -> None:
    """Equal tokens, or two that were as likely; what comes after such a tie is another text."""
    same = 0
    for ours, theirs in zip(found, expected, strict=True):
        assert len(ours) == len(theirs)
        for (token, logprob), (other, other_logprob) in zip(ours, theirs, strict=True):
            assert logprob == pytest.approx(other_logprob, abs=ROUNDING)
            if token != other:
                break
            same += 1
    assert same > sum(map(len, expected)) / 2


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3", "phi3"])
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_packed_and_fused_equals_plain_however_it_runs(
    architecture: str, tiny_model: Callable[[str], Path], tmp_path: Path, make_engine: Callable[..., Any]
) -> None:
    model = tiny_model(architecture)
    store = tmp_path / "adapters"
    for rank in (2, 16, 33):
        save_lora(store / "blobs" / f"{rank:064x}", model, rank, lora_alpha=8)
    fields: dict[str, Any] = {
        "store": str(store),
        "device": "cuda",
        "dtype": "bfloat16",
        "quantization": "nf4",
        "nf4_kernels": "packed",
        "max_num_seqs": 20,
        "page_size": 16,
        "prefix_caching": False,
    }
    eager = make_engine(model, enforce_eager=True, **fields)
    graphed = make_engine(model, **fields)
    assert "fused decoder layers: 3 of 3" in eager.engine.base.notes
    assert graphed.engine.runner.graphs is not None
    adapters = [None, f"{2:064x}", f"{16:064x}", f"{33:064x}"]
    asks = [([3 + i, 7, 11, *range(5, 5 + 3 * i)], adapters[i % 4]) for i in range(11)]
    asks.append(([9 + i % 100 for i in range(230)], adapters[1]))  # with the others a step of many rows
    eager.engine.base.context.fused = False
    plain = answer_all(eager, asks, between=None)
    eager.engine.base.context.fused = True
    for driver in (eager, graphed):
        for between in (None, 0):
            assert_same_up_to_rounding(answer_all(driver, asks, between), plain)
    base_only: list[tuple[list[int], str | None]] = [(prompt, None) for prompt, _ in asks[:3]]
    assert_same_up_to_rounding(answer_all(graphed, base_only, 0), answer_all(eager, base_only, None))


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_steps_with_prompts_replay_graphs(
    architecture: str,
    packed: bool,
    tiny_model: Callable[[str], Path],
    tmp_path: Path,
    make_engine: Callable[..., Any],
) -> None:
    model = tiny_model(architecture)
    store = tmp_path / "adapters"
    for rank in (2, 16, 33):
        save_lora(store / "blobs" / f"{rank:064x}", model, rank, lora_alpha=8)
    fields: dict[str, Any] = {
        "store": str(store),
        "device": "cuda",
        "max_num_seqs": 20,
        "page_size": 16,
        "prefix_caching": False,
    }
    if packed:
        fields |= {"dtype": "bfloat16", "quantization": "nf4", "nf4_kernels": "packed"}
    eager = make_engine(model, enforce_eager=True, **fields)
    fields["cuda_graphs"] = "all"
    graphed = make_engine(model, **fields)
    chunked = make_engine(model, max_num_batched_tokens=150, **fields)
    adapters = [None, f"{2:064x}", f"{16:064x}", f"{33:064x}"]
    asks = [([3 + (i + j) % 120 for j in range(2 + i * 37 % 203)], adapters[i % 4]) for i in range(30)]
    expected = answer_all(eager, asks, between=None)
    for driver, between in ((graphed, 1), (graphed, 2), (graphed, 0), (chunked, 1), (chunked, 0)):
        answer_all(driver, asks[:4], None)  # loads the adapters
        runner = driver.engine.runner
        before, eager_before = runner.mixed_graphs.replays, runner.eager_steps
        found = answer_all(driver, asks, between)
        assert runner.mixed_graphs.replays > before
        if between:  # only few prompts come together, so that no step has over 1024 rows
            assert runner.eager_steps == eager_before
        if packed:
            assert_same_up_to_rounding(found, expected)
        else:
            assert [[t for t, _ in items] for items in found] == [[t for t, _ in items] for items in expected]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_no_request_waits_for_a_kernel_to_be_compiled(
    tiny_model: Callable[[str], Path],
    tmp_path: Path,
    make_engine: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("llama")
    store = tmp_path / "adapters"
    for rank in (2, 16, 33):
        save_lora(store / "blobs" / f"{rank:064x}", model, rank, lora_alpha=8)
    driver = make_engine(
        model,
        store=str(store),
        device="cuda",
        kv_cache_memory=64 << 20,
        max_num_seqs=20,
        page_size=16,
        dtype="bfloat16",
        quantization="nf4",
        nf4_kernels="packed",
        prefix_caching=False,
        cuda_graphs="all",
    )
    compiled: list[str] = []
    monkeypatch.setattr("triton.knobs.runtime.jit_cache_hook", lambda **found: compiled.append(found["repr"]))
    adapters = [None, f"{2:064x}", f"{16:064x}", f"{33:064x}"]
    for count in (1, 3, 20, 50):  # the last makes steps of some thousand rows
        answer_all(driver, [([5 + i] * (1 + i * 53 % 240), adapters[i % 4]) for i in range(count)], 0)
    assert compiled == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_every_bucket_of_mixed_steps_is_replayed(
    tiny_model: Callable[[str], Path], make_engine: Callable[..., Any]
) -> None:
    fields: dict[str, Any] = {"device": "cuda", "max_num_seqs": 8, "page_size": 16, "prefix_caching": False}
    eager = make_engine(tiny_model("llama"), enforce_eager=True, **fields)
    graphed = make_engine(tiny_model("llama"), cuda_graphs="all", **fields)
    mixed = graphed.engine.runner.mixed_graphs
    for prompts, rows, replays in (
        (1, 9, 1),
        (4, 16, 1),
        (1, 100, 1),
        (2, 128, 1),
        (4, 128, 1),
        (8, 128, 1),
        (8, 129, 0),
    ):
        asks: list[tuple[list[int], str | None]] = [
            ([3 + (i + j) % 120 for j in range(rows)], None) for i in range(prompts)
        ]
        before = mixed.replays
        found = answer_all(graphed, asks, between=0)
        assert mixed.replays - before == replays
        expected = answer_all(eager, asks, between=None)
        assert [[t for t, _ in items] for items in found] == [[t for t, _ in items] for items in expected]
