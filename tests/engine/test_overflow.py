"""An adapter whose finite numbers overflow in the forward pass: it is refused, and harms nobody else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from tests.engine.adapters import load, prompt_of, save_random, told

from veneer.adapters.names import WEIGHTS_FILE
from veneer.engine.messages import CheckAdapter

HOSTILE, PLAIN = "1" * 64, "2" * 64


@pytest.fixture
def store(tiny_model: Callable[[str], Path], tmp_path: Path) -> Path:
    """One adapter of numbers that overflow float32 in a layer, and one of others."""
    for seed, digest in enumerate((HOSTILE, PLAIN)):
        config = LoraConfig(r=3, target_modules=["k_proj", "v_proj"])
        save_random(tmp_path / "store" / "blobs" / digest, load(tiny_model("llama")), config, seed=seed)
    file = tmp_path / "store" / "blobs" / HOSTILE / WEIGHTS_FILE
    save_file({key: value * 1e37 for key, value in load_file(file).items()}, file)
    return tmp_path / "store"


def test_it_is_refused_when_it_is_uploaded(
    store: Path, tiny_model: Callable[[str], Path], make_engine: Callable[..., Any]
) -> None:
    driver = make_engine(tiny_model("llama"), store=str(store))
    folder = str(store / "blobs" / HOSTILE)
    reply = driver.call(CheckAdapter(call="c", folder=folder, digest="3" * 64, allow_ineffective=True))
    assert reply.error.status == 400
    assert "answered with NaN" in reply.error.message


def test_pages_it_used_are_clean_for_others(
    store: Path, tiny_model: Callable[[str], Path], make_engine: Callable[..., Any]
) -> None:
    """With the few pages that there are everybody gets what the hostile one has written to."""

    def ask(driver: Any) -> list[str]:
        return [driver.submit(prompt_of(1), who, logprobs=5, max_tokens=7) for who in (None, PLAIN)]

    driver, alone = (
        make_engine(tiny_model("llama"), store=str(store), kv_cache_memory=1 << 16) for _ in range(2)
    )
    driver.run(driver.submit(prompt_of(2), HOSTILE, max_tokens=20, temperature=1.0, top_k=5))
    during = driver.submit(prompt_of(2), HOSTILE, max_tokens=20, temperature=1.0, logprobs=1)
    ours, theirs = ask(driver), ask(alone)
    driver.run(during, *ours)
    alone.run(*theirs)
    assert told(driver, during).isnan().all()
    for mine, other in zip(ours, theirs, strict=True):
        assert driver.tokens(mine) == alone.tokens(other)
        torch.testing.assert_close(told(driver, mine), told(alone, other), rtol=0, atol=1e-5)
