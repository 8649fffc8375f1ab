"""Pooled hidden states of prompts through the engine: those of transformers and PEFT, however they are computed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.engine.adapters import PAGE, digest_of
from tests.engine.test_scores import CONFIGS, Reference, prompts, stores
from torch.nn.functional import normalize

__all__ = ["stores"]  # a fixture

POOLINGS = ("mean", "last")


def expected(reference: Reference, name: str | None, prompt: list[int], pooling: str) -> torch.Tensor:
    found = reference.forward(name, prompt, [], output_hidden_states=True)
    states: torch.Tensor = found.hidden_states[-1][0, -len(prompt) :]  # behind virtual tokens
    return normalize(states.mean(0) if pooling == "mean" else states[-1], dim=0)


def pooled(driver: Any, identifier: str) -> torch.Tensor:
    *earlier, last = driver.outputs[identifier]
    assert not earlier
    assert (last.finish_reason, last.tokens, last.error) == ("length", [], None)
    return torch.from_numpy(np.frombuffer(last.pooled, "<f4").copy())


def check_all(driver: Any, reference: Reference) -> None:
    """Every prompt pooled either way, among others that are answered."""
    asked = [(*each, pooling) for each in prompts() for pooling in POOLINGS]
    ids = []
    for text, name, pooling in asked:
        adapter = name and digest_of(name)
        ids.append(driver.submit(text, adapter, max_tokens=0, pooling=pooling))
        driver.submit(text, adapter, max_tokens=2)
    driver.run(*driver.outputs)
    for identifier, (text, name, pooling) in zip(ids, asked, strict=True):
        wanted = expected(reference, name, text, pooling)
        torch.testing.assert_close(pooled(driver, identifier), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "phi3"])
def test_pooled_states_are_those_of_transformers_and_peft(
    architecture: str,
    tiny_model: Callable[[str], Path],
    stores: Callable[[str], Path],
    make_engine: Callable[..., Any],
) -> None:
    folder, store = tiny_model(architecture), stores(architecture)
    check_all(make_engine(folder, store=str(store)), Reference(folder, store))


@pytest.mark.parametrize(
    "fields",
    [
        {"prefix_caching": False},
        {"max_num_batched_tokens": 5},
        {"max_loras": 2, "slot_patience": 0.0, "max_num_batched_tokens": 7},
        {"lookahead": True, "max_num_batched_tokens": 16},
    ],
    ids=str,
)
def test_however_they_are_computed(
    fields: dict[str, Any],
    tiny_model: Callable[[str], Path],
    stores: Callable[[str], Path],
    make_engine: Callable[..., Any],
) -> None:
    folder, store = tiny_model("llama"), stores("llama")
    reference = Reference(folder, store)
    driver = make_engine(folder, store=str(store), **fields)
    check_all(driver, reference)
    driver.outputs.clear()
    check_all(driver, reference)  # now the prompts are cached


def test_a_prompt_that_is_preempted_is_pooled_once(
    tiny_model: Callable[[str], Path], stores: Callable[[str], Path], make_engine: Callable[..., Any]
) -> None:
    """Long answers take the pages of the prompts that came last, a part of which has been summed up."""
    folder, store = tiny_model("llama"), stores("llama")
    driver = make_engine(folder, store=str(store), kv_cache_memory=22 * PAGE, max_num_batched_tokens=5)
    interrupted = set()
    preempt = driver.engine.scheduler._preempt

    def watched(sequence: Any) -> None:
        if sequence.pooled is not None:
            interrupted.add(sequence.id)
        preempt(sequence)

    driver.engine.scheduler._preempt = watched
    answers = [driver.submit([8, 9, 10 + index], max_tokens=34) for index in range(2)]
    while not all(driver.tokens(each) for each in answers):
        driver.step()
    text = [3 + 7 * index % 90 for index in range(50)]
    asked = [(text[:49], None), (text[1:], "head"), (text[2:], "prefix")]
    ids = [
        driver.submit(prompt, name and digest_of(name), max_tokens=0, pooling="mean")
        for prompt, name in asked
    ]
    driver.run(*answers, *ids)
    assert interrupted
    reference = Reference(folder, store)
    for identifier, (prompt, name) in zip(ids, asked, strict=True):
        wanted = expected(reference, name, prompt, "mean")
        torch.testing.assert_close(pooled(driver, identifier), wanted, rtol=0, atol=1e-5)


def test_dimensions_are_cut_before_the_vector_is_scaled(
    tiny_model: Callable[[str], Path], make_engine: Callable[..., Any]
) -> None:
    driver = make_engine(tiny_model("llama"))
    ids = [driver.submit([5, 9, 27], max_tokens=0, pooling="mean", dimensions=n) for n in (None, 6)]
    driver.run(*ids)
    whole, cut = (pooled(driver, each) for each in ids)
    torch.testing.assert_close(cut, normalize(whole[:6], dim=0))


def test_only_the_mean_needs_every_token_again(
    tiny_model: Callable[[str], Path], make_engine: Callable[..., Any]
) -> None:
    driver = make_engine(tiny_model("llama"))
    text = [3 + index for index in range(30)]

    def cached(pooling: str) -> int:
        identifier = driver.submit(text, max_tokens=0, pooling=pooling)
        driver.run(identifier)
        return int(driver.outputs[identifier][-1].cached_tokens)

    assert [cached("mean"), cached("mean"), cached("last")] == [0, 0, 28]


def test_nobody_elses_tokens_change(
    tiny_model: Callable[[str], Path], stores: Callable[[str], Path], make_engine: Callable[..., Any]
) -> None:
    """What is pooled beside it changes nobody's log probabilities by a bit."""
    answers = []
    for fields in ({"pooling": "mean", "max_tokens": 0}, {"max_tokens": 0}):
        driver = make_engine(tiny_model("llama"), store=str(stores("llama")), prefix_caching=False)
        for loaded in CONFIGS:  # once they are, both engines run the same steps
            driver.generate([5], digest_of(loaded), max_tokens=1)
        ids = []
        for text, name in prompts():
            adapter = name and digest_of(name)
            ids.append(driver.submit(text, adapter, logprobs=3, max_tokens=4))
            driver.submit(text, adapter, **fields)
        driver.run(*driver.outputs)
        answers.append([[item.logprobs for item in driver.outputs[each] if item.tokens] for each in ids])
    assert answers[0] == answers[1]
