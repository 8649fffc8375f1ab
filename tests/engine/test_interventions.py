"""Interventions at the ends of a prompt through the engine: chunks, prefix cache, preemption, short prompts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from veneer.adapters.names import ADAPTERHUB_WEIGHTS, CONFIG_FILE, WEIGHTS_FILE
from veneer.training.conformance.adapterhub import load_tensors
from veneer.training.conformance.reft import add_reft, run_reft

RECORDED = Path(__file__).parents[1] / "adapters" / "adapterhub"
NAMES = {"loreft": None, "loreft-both": None, "noreft": True, "direft": False}  # subtract_projection
PROMPTS = [list(range(10, 10 + length)) for length in (1, 2, 3, 5, 8, 13, 30)]


def digest_of(name: str) -> str:
    return f"{list(NAMES).index(name):064x}"


def config_of(name: str) -> Any:
    config = json.loads((RECORDED / name / CONFIG_FILE).read_text())
    if NAMES[name] is not None:
        config["config"]["subtract_projection"] = NAMES[name]
    return config


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("store")
    for name in NAMES:
        folder = root / "blobs" / digest_of(name)
        folder.mkdir(parents=True)
        (folder / CONFIG_FILE).write_text(json.dumps(config_of(name)))
        shutil.copy(RECORDED / name / ADAPTERHUB_WEIGHTS, folder / WEIGHTS_FILE)
    return root


@pytest.fixture(scope="module")
def references() -> dict[str | None, Any]:
    """By name, the restated library; None is the base."""

    def base() -> Any:
        return AutoModelForCausalLM.from_pretrained(RECORDED / "base", dtype=torch.float32).eval()

    found: dict[str | None, Any] = {None: base()}
    for name in NAMES:
        model = add_reft(base(), config_of(name)["config"])
        found[name] = load_tensors(model, RECORDED / name / ADAPTERHUB_WEIGHTS)
    return found


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"max_num_batched_tokens": 3},  # chunks end within, at and behind the ends
        {"max_num_batched_tokens": 7, "lookahead": True},
        {"kv_cache_memory": 20 * 2 * 2 * 4 * 2 * 16 * 4},  # 20 pages: sequences are preempted
        {"max_loras": 1, "slot_patience": 0.0},
    ],
)
def test_each_is_what_the_library_computes(
    fields: dict[str, Any],
    store: Path,
    references: dict[str | None, Any],
    make_engine: Callable[..., Any],
) -> None:
    driver = make_engine(RECORDED / "base", store=str(store), **fields)
    # A library that mixes up rows of prompts shorter than its last positions is no reference for them.
    shortest = {name: config_of(name)["config"]["suffix_positions"] for name in NAMES}
    asked = [(p, name) for p in PROMPTS for name in (None, *NAMES) if len(p) >= shortest.get(name or "", 0)]
    for _ in range(2):  # the second time from the prefix cache
        ids = [
            driver.submit(prompt, name and digest_of(name), max_tokens=7, logprobs=3)
            for prompt, name in asked
        ]
        for identifier, (prompt, name), tokens in zip(ids, asked, driver.run(*ids), strict=True):
            with torch.inference_mode():
                whole = torch.tensor([prompt + tokens])
                model = references[name]
                logits = model(whole).logits if name is None else run_reft(model, whole, len(prompt))
            expected = torch.log_softmax(logits[0, len(prompt) - 1 : -1], -1)
            assert tokens == expected.argmax(-1).tolist(), (prompt, name)
            top = torch.tensor([item.logprobs[0].top_logprobs for item in driver.outputs[identifier]])
            assert (top - expected.topk(3).values).abs().max() < 1e-4, (prompt, name)
    if "kv_cache_memory" in fields:
        assert driver.engine.scheduler.preemptions > 0
    else:
        assert driver.engine.pool.hit_tokens > 0


def test_prompts_shorter_than_the_last_positions_use_their_tail(
    store: Path, references: dict[str | None, Any], make_engine: Callable[..., Any]
) -> None:
    driver = make_engine(RECORDED / "base", store=str(store))
    prompt = PROMPTS[2]  # three tokens, of which the last five act
    identifier = driver.submit(prompt, digest_of("direft"), max_tokens=1, logprobs=3)
    driver.run(identifier)
    with torch.inference_mode():
        logits = run_reft(references["direft"], torch.tensor([prompt]), 3)[0, -1]
    found = torch.tensor(driver.outputs[identifier][0].logprobs[0].top_logprobs)
    assert (found - torch.log_softmax(logits, -1).topk(3).values).abs().max() < 1e-4
