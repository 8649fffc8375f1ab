"""CUDA graphs against eager steps, for each proven architecture and a mix of adapters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

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


def make_adapter(folder: Path, model: Path, rank: int) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(rank)
    base: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    adapted = get_peft_model(base, LoraConfig(r=rank, target_modules="all-linear", lora_alpha=8))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    adapted.save_pretrained(folder)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3", "gemma3", "phi3"])
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_graphed_equals_eager_equals_alone(
    architecture: str, tiny_model: Callable[[str], Path], tmp_path: Path, make_engine: Callable[..., Any]
) -> None:
    model = tiny_model(architecture)
    store = tmp_path / "adapters"
    for rank in (2, 16, 33):
        make_adapter(store / "blobs" / f"{rank:064x}", model, rank)
    fields: dict[str, Any] = {"store": str(store), "device": "cuda", "max_num_seqs": 20, "page_size": 16}
    eager = make_engine(model, enforce_eager=True, **fields)
    graphed = make_engine(model, **fields)
    assert eager.engine.runner.graphs is None
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
