"""Adapters with several tasks: each task is PEFT's, has pages of its own, and goes with its adapter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import MultitaskPromptTuningConfig, PeftModel, PolyConfig
from safetensors.torch import load_file, save_file
from tests.engine.adapters import load, save_random

from veneer.adapters.names import WEIGHTS_FILE, adapter_key, split_key
from veneer.engine.messages import CheckAdapter, Done, DropAdapter, PinAdapter

TASKS = 3
DIGESTS = {"poly": "a" * 64, "prompt": "b" * 64}
CONFIGS: dict[str, Callable[[], Any]] = {
    "poly": lambda: PolyConfig(
        r=4, n_tasks=TASKS, n_splits=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    ),
    "prompt": lambda: MultitaskPromptTuningConfig(
        num_virtual_tokens=5, num_ranks=2, num_tasks=TASKS, task_type="CAUSAL_LM"
    ),
}
PROMPT = [5, 6, 7, 8, 9, 27, 81, 5, 3]


@pytest.fixture(scope="module")
def store(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with an adapter of each config, whose tasks differ strongly."""
    root = tmp_path_factory.mktemp("store")
    for name, config in CONFIGS.items():
        save_random(root / "blobs" / DIGESTS[name], load(base), config(), seed=len(name), strength=0.5)
    return root


@pytest.mark.parametrize("name", CONFIGS)
def test_each_task_is_pefts(name: str, base: Path, store: Path, make_engine: Callable[..., Any]) -> None:
    driver = make_engine(base, store=str(store))
    model = PeftModel.from_pretrained(load(base), store / "blobs" / DIGESTS[name]).eval()
    keys = [adapter_key(DIGESTS[name], task) for task in range(TASKS)]
    for _ in range(2):  # the second time with what the prefix cache has
        asked = [driver.submit(PROMPT, key, max_tokens=4, logprobs=3) for key in keys]
        found = []
        for task, identifier, tokens in zip(range(TASKS), asked, driver.run(*asked), strict=True):
            ids = torch.tensor([PROMPT + tokens])
            with torch.inference_mode():
                logits = model(input_ids=ids, task_ids=torch.tensor([task])).logits[0, -len(tokens) - 1 : -1]
            expected = torch.log_softmax(logits, -1).topk(3).values
            entries = [item.logprobs[0].top_logprobs for item in driver.outputs[identifier]]
            assert (torch.tensor(entries) - expected).abs().max() < 1e-4
            found.append(expected)
        assert min((found[0] - other).abs().max() for other in found[1:]) > 1e-2, "the tasks must differ"
    assert driver.engine.pool.hit_tokens > 0


def test_a_check_lowers_and_runs_every_task(
    base: Path, store: Path, make_engine: Callable[..., Any], tmp_path: Path
) -> None:
    driver = make_engine(base)
    answer = driver.call(CheckAdapter("c", str(store / "blobs" / DIGESTS["poly"]), DIGESTS["poly"]))
    assert answer.info is not None
    assert (answer.info.kind, answer.info.tasks, answer.info.rank) == ("poly", TASKS, 4)
    stats = driver.engine.residency.stats()
    assert {key for key, each in stats.items() if each.loads} == {
        adapter_key(DIGESTS["poly"], task) for task in range(TASKS)
    }
    broken = tmp_path / "broken"  # only its last task cannot be served
    broken.mkdir()
    for file in (store / "blobs" / DIGESTS["prompt"]).iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    tensors = load_file(broken / WEIGHTS_FILE)
    for factor in ("prefix_task_cols", "prefix_task_rows"):
        tensors[factor][-1] = 1e30
    save_file(tensors, broken / WEIGHTS_FILE)
    answer = driver.call(CheckAdapter("c", str(broken), "c" * 64))
    assert answer.error is not None
    assert "overflows" in answer.error.message


def test_a_task_that_does_nothing_is_warned_of(
    base: Path, store: Path, make_engine: Callable[..., Any], tmp_path: Path
) -> None:
    """An adapter is refused only when no task of it acts."""
    for file in (store / "blobs" / DIGESTS["poly"]).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    for key, tensor in tensors.items():
        if key.endswith("module_logits"):
            tensor[1] = -200.0  # sigmoid is 0, so no skill is mixed in
    save_file(tensors, tmp_path / WEIGHTS_FILE)
    answer = make_engine(base).call(CheckAdapter("c", str(tmp_path), "d" * 64))
    assert answer.info is not None
    assert [warning[:27] for warning in answer.info.warnings] == ["task 1: the adapter changes"]
    assert answer.info.effect
    for key, tensor in tensors.items():
        if key.endswith("module_logits"):
            tensor[:] = -200.0
    save_file(tensors, tmp_path / WEIGHTS_FILE)
    answer = make_engine(base).call(CheckAdapter("c", str(tmp_path), "d" * 64))
    assert answer.error is not None
    assert "changes nothing" in answer.error.message


def test_all_tasks_are_counted_and_go_together(
    base: Path, store: Path, make_engine: Callable[..., Any]
) -> None:
    driver = make_engine(base, store=str(store))
    digest, other = DIGESTS["poly"], DIGESTS["prompt"]
    keys = [adapter_key(digest, task) for task in range(TASKS)]
    for key in (*keys, adapter_key(other, 1)):
        driver.generate(PROMPT, key, max_tokens=2)
    driver.engine.handle(PinAdapter("pin", keys[2], True))
    running = driver.submit(PROMPT, keys[1], max_tokens=8)
    driver.step()
    stats = driver.engine.stats().adapters
    assert set(stats) == {digest, other}
    assert (stats[digest].loads, stats[digest].running, stats[digest].pinned) == (TASKS, 1, True)
    assert not stats[other].pinned
    assert driver.engine.handle(DropAdapter("drop", digest)) == []
    replies = driver.step()
    assert not any(isinstance(reply, Done) for reply in replies), "a sequence still uses a task"
    driver.run(running)
    for _ in range(1000):
        if any(isinstance(reply, Done) for reply in driver.step()):
            break
    else:
        raise AssertionError("the drop was not answered")
    assert {split_key(key)[0] for key in driver.engine.residency.stats()} == {other}


def test_deleted_tasks_leave_no_pages(base: Path, store: Path, make_engine: Callable[..., Any]) -> None:
    driver = make_engine(base, store=str(store))
    pool = driver.engine.pool
    for task in range(TASKS):
        driver.generate(PROMPT, adapter_key(DIGESTS["poly"], task), max_tokens=2)
    driver.generate(PROMPT, None, max_tokens=2)
    driver.engine.handle(DropAdapter("drop", DIGESTS["poly"]))
    hits = pool.hit_tokens
    for task in range(TASKS):
        driver.generate(PROMPT, adapter_key(DIGESTS["poly"], task), max_tokens=2)
    assert pool.hit_tokens == hits, "pages of a deleted adapter were found"
    driver.generate(PROMPT, None, max_tokens=2)
    assert pool.hit_tokens > hits
