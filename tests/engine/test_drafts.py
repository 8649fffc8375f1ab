"""Sequences with drafts: the same answers in fewer steps, whatever else a request asks for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, PrefixTuningConfig
from tests.engine.adapters import load, save_lora, save_random

LORAS = [f"{rank:064x}" for rank in (2, 16)]
SCALES, PREFIX = "a" * 64, "b" * 64
ADAPTERS = [None, *LORAS, SCALES, PREFIX]
LENGTH = 24


@pytest.fixture(scope="module")
def stores(make_stores: Callable[..., Callable[[str], Path]]) -> Callable[[str], Path]:
    """A function: architecture -> folder of a store with random adapters of the tiny model."""

    def write(base: Path, blobs: Path) -> None:
        for digest in LORAS:
            save_lora(blobs / digest, base, int(digest, 16))
        targets: Any = {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
        save_random(blobs / SCALES, load(base), IA3Config(**targets), seed=1)
        save_random(
            blobs / PREFIX,
            load(base),
            PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
            seed=2,
        )

    return make_stores(write)


@pytest.fixture
def driver(
    tiny_model: Callable[[str], Path], stores: Callable[[str], Path], make_engine: Callable[..., Any]
) -> Any:
    return make_engine(tiny_model("llama"), store=str(stores("llama")))


SAMPLINGS: list[dict[str, Any]] = [
    {},
    {"logprobs": 3},
    {"temperature": 1.0, "seed": 5, "logprobs": 0},
    {"temperature": 0.7, "seed": 9, "top_p": 0.9, "top_k": 20},
    {"repetition_penalty": 1.4, "frequency_penalty": 0.3, "presence_penalty": 0.2},
    {"logit_bias": {7: 3.0}, "prompt_logprobs": 1},
    {"ignore_eos": False, "stop_token_ids": list(range(10, 30)), "min_tokens": 9},
]


def damaged(tokens: list[int], every: int = 7) -> list[int]:
    return [5 if at % every == every - 1 else token for at, token in enumerate(tokens)]


def ask(driver: Any, drafted: bool, answers: list[list[int]] | None = None) -> list[str]:
    """Each sampling with each adapter; with drafts from the answers, one token in seven of which is wrong."""
    asked = [(sampling, adapter) for sampling in SAMPLINGS for adapter in ADAPTERS]
    predictions = [damaged(answer) for answer in answers] if answers else [[] for _ in asked]
    return [
        driver.submit(
            [3 + index, 9, 27, 5],
            adapter,
            max_tokens=LENGTH,
            draft_tokens=5 if drafted else 0,
            prediction=prediction,
            **sampling,
        )
        for index, ((sampling, adapter), prediction) in enumerate(zip(asked, predictions, strict=True))
    ]


@pytest.mark.parametrize("lookahead", [False, True])
def test_drafts_change_no_answer(
    tiny_model: Callable[[str], Path],
    stores: Callable[[str], Path],
    make_engine: Callable[..., Any],
    lookahead: bool,
) -> None:
    """Greedy and drawn, penalized, with stop tokens, log probabilities and adapters of several kinds."""
    fields = {"store": str(stores("llama")), "lookahead": lookahead, "max_loras": 5}
    driver = make_engine(tiny_model("llama"), **fields, max_num_seqs=64)
    plain = ask(driver, drafted=False)
    answers = driver.run(*plain)
    engine = driver.engine
    before = engine.steps
    drafted = ask(driver, drafted=True, answers=answers)
    assert driver.run(*drafted) == answers
    assert engine.steps - before < LENGTH
    assert 0 < engine.accepted_draft_tokens < engine.draft_tokens
    for old, new in zip(plain, drafted, strict=True):
        old_items, new_items = driver.outputs[old], driver.outputs[new]
        assert new_items[-1].finish_reason == old_items[-1].finish_reason
        assert new_items[-1].stop_token == old_items[-1].stop_token
        for field in ("logprobs", "prompt_logprobs"):
            expected, found = (
                [entry for item in items for entry in getattr(item, field)]
                for items in (old_items, new_items)
            )
            assert [entry.top_ids for entry in found] == [entry.top_ids for entry in expected]
            assert [entry.rank for entry in found] == [entry.rank for entry in expected]
            assert [e.logprob for e in found] == pytest.approx([e.logprob for e in expected], abs=1e-4)
        for item in new_items:  # an end token may be of the draft
            assert len(item.tokens) - 1 <= item.accepted <= min(len(item.tokens), item.drafted)
    stats = engine.stats()
    assert stats.draft_tokens == engine.draft_tokens


def test_drafts_short_of_pages_and_rows(
    tiny_model: Callable[[str], Path], stores: Callable[[str], Path], make_engine: Callable[..., Any]
) -> None:
    page = 2 * 3 * 4 * 2 * 16 * 4  # bytes: K and V, layers, tokens, heads, head_dim, float32
    store = str(stores("llama"))
    answers = [
        answer
        for driver in [make_engine(tiny_model("llama"), store=store, max_num_seqs=64)]
        for answer in driver.run(*ask(driver, drafted=False))
    ]
    driver = make_engine(
        tiny_model("llama"), store=store, max_num_seqs=9, kv_cache_memory=40 * page, max_loras=2
    )
    assert driver.run(*ask(driver, drafted=True, answers=answers)) == answers
    assert driver.engine.scheduler.preemptions > 0
    assert driver.engine.accepted_draft_tokens > 0


def test_a_repeated_text_is_found_without_a_prediction(driver: Any) -> None:
    answer = driver.generate([3, 9, 27], LORAS[0], max_tokens=60)
    steps = driver.engine.steps
    again = driver.generate([3, 9, 27], LORAS[0], max_tokens=60, draft_tokens=6)
    assert again == answer
    repeats = sum(answer[at : at + 3] in [answer[i : i + 3] for i in range(at)] for at in range(57))
    assert (driver.engine.steps - steps < 60) == (repeats > 0)
    assert repeats > 0, "the tiny model repeats itself; without that the test shows nothing"


def test_one_who_drafts_keeps_nobody_from_planning_ahead(
    tiny_model: Callable[[str], Path], stores: Callable[[str], Path], make_engine: Callable[..., Any]
) -> None:
    """Where nothing can be drafted, the next step is launched before the last one's tokens are known."""
    driver = make_engine(tiny_model("llama"), store=str(stores("llama")), lookahead=True)
    identifier = driver.submit(
        [3, 9, 27], max_tokens=6, draft_tokens=4, logit_bias=dict.fromkeys((40,), -100.0)
    )
    driver.step()
    ahead = 0
    while not driver.finished(identifier):
        ahead += driver.engine._ahead is not None
        driver.step()
    assert ahead > 0 or driver.engine.draft_tokens > 0


def test_a_prediction_that_ends_before_the_answer_does(driver: Any) -> None:
    """Behind it in the text that is looked up come the adapter's virtual tokens."""
    answer = driver.generate([3, 9, 27], PREFIX, max_tokens=30)
    for end in range(4, 12):
        found = driver.generate([3, 9, 27], PREFIX, max_tokens=30, draft_tokens=6, prediction=answer[:end])
        assert found == answer
    assert driver.engine.accepted_draft_tokens > 8


def test_cancelled_in_the_middle(driver: Any) -> None:
    answer = driver.generate([3, 9, 27], max_tokens=40)
    gone = driver.submit([3, 9, 27], max_tokens=40, draft_tokens=4, prediction=answer)
    kept = driver.submit([3, 9, 27], max_tokens=40, draft_tokens=4, prediction=answer)
    for _ in range(3):
        driver.step()
    driver.engine.scheduler.cancel(gone)
    assert driver.run(kept) == [answer]
    assert driver.engine.pool.used == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("enforce_eager", [False, True])
def test_gpu_drafts_change_no_answer(
    tiny_model: Callable[[str], Path],
    stores: Callable[[str], Path],
    make_engine: Callable[..., Any],
    enforce_eager: bool,
) -> None:
    fields = {"store": str(stores("llama")), "device": "cuda", "page_size": 16, "max_loras": 5}
    plain = make_engine(tiny_model("llama"), enforce_eager=True, lookahead=False, **fields)
    answers = plain.run(*ask(plain, drafted=False))
    driver = make_engine(tiny_model("llama"), enforce_eager=enforce_eager, **fields)
    assert driver.run(*ask(driver, drafted=True, answers=answers)) == answers
    assert driver.engine.accepted_draft_tokens > 0
    assert enforce_eager or driver.engine.runner.mixed_graphs.replays > 0
