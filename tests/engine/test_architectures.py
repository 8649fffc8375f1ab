"""Each proven architecture gives the tokens of transformers' own `generate`, however the engine runs it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from veneer.errors import InvalidRequest

ARCHITECTURES = ["llama", "llama-tied", "mistral", "qwen2", "qwen3", "gemma3", "phi3"]
NEW_TOKENS = 24


def _prompts() -> list[list[int]]:
    generator = random.Random(7)
    shared = [generator.randrange(3, 128) for _ in range(20)]
    lengths = [1, 3, 17, 40, 61, 9]
    prompts = [[generator.randrange(3, 128) for _ in range(n)] for n in lengths]
    return [*prompts, shared + prompts[1], shared + prompts[2]]


def _reference(folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = []
    for prompt in prompts:
        out = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            eos_token_id=None,
            do_sample=False,
        )
        tokens.append(out[0, len(prompt) :].tolist())
    return tokens


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_tokens_equal_transformers(
    architecture: str, tiny_model: Callable[[str], Path], make_engine: Callable[..., Any]
) -> None:
    folder = tiny_model(architecture)
    prompts = _prompts()
    expected = _reference(folder, prompts)

    alone = make_engine(folder, prefix_caching=False)
    assert [alone.generate(prompt, max_tokens=NEW_TOKENS) for prompt in prompts] == expected

    # 30 pages of 4 tokens are too few for all eight, 16 tokens a step cut the prompts.
    page = _page_bytes(alone)
    crowded = make_engine(folder, kv_cache_memory=30 * page, max_num_batched_tokens=16)
    ids = [crowded.submit(prompt, max_tokens=NEW_TOKENS) for prompt in prompts]
    assert crowded.run(*ids) == expected
    again = [crowded.submit(prompt, max_tokens=NEW_TOKENS) for prompt in prompts]
    assert crowded.run(*again) == expected
    assert crowded.engine.scheduler.preemptions > 0
    assert crowded.engine.pool.hit_tokens > 0
    assert crowded.engine.steps > max(map(len, prompts)) // 16


def _page_bytes(driver: Any) -> int:
    from veneer.engine.runner import kv_page_bytes

    return kv_page_bytes(driver.engine.base, 4)


def test_unproven_architecture_is_refused_by_name(tmp_path: Path, make_engine: Callable[..., Any]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(InvalidRequest, match=r"gpt2.*not proven"):
        make_engine(tmp_path)


def test_batch_dependent_rope_limits_the_context(
    tiny_model: Callable[[str], Path], tmp_path: Path, make_engine: Callable[..., Any]
) -> None:
    folder = tiny_model("phi3")
    config = json.loads((folder / "config.json").read_text())
    factors = [1.0] * 8
    config["rope_parameters"] = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": factors,
        "long_factor": [4.0] * 8,
        "original_max_position_embeddings": 64,
    }
    config["original_max_position_embeddings"] = 64
    target = tmp_path / "model"
    target.mkdir()
    (target / "config.json").write_text(json.dumps(config))
    (target / "model.safetensors").symlink_to(folder / "model.safetensors")
    driver = make_engine(target)
    assert driver.engine.max_model_len == 64
    assert any("longrope" in note for note in driver.engine.info().notes)
