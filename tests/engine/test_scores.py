"""Log probabilities of prompts through the engine: those of transformers and PEFT, however they are computed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
)
from peft.tuners.lora.variants import calculate_alora_offsets
from tests.engine.adapters import PAGE, Peft, digest_of, load, save_random

from veneer.engine.batch import Scheduled
from veneer.engine.messages import SamplingParams, TokenLogprobs
from veneer.engine.scores import PIECE_ROWS, pieces_of
from veneer.engine.sequence import Sequence

TASK: dict[str, Any] = {"task_type": "CAUSAL_LM"}
CONFIGS: dict[str, Callable[[], PeftConfig]] = {
    "head": lambda: LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "down_proj", "lm_head"]),
    "tokens": lambda: TrainableTokensConfig(token_indices=[9, 27, 81, 44]),
    "prefix": lambda: PrefixTuningConfig(**TASK, num_virtual_tokens=6),
    "prompt": lambda: PromptTuningConfig(**TASK, num_virtual_tokens=7),
    "invoked": lambda: LoraConfig(
        **TASK, r=4, lora_alpha=16, target_modules=["q_proj", "lm_head"], alora_invocation_tokens=[77]
    ),
}
LIKELIEST = 4


@pytest.fixture(scope="module")
def stores(make_stores: Callable[..., Callable[[str], Path]]) -> Callable[[str], Path]:
    """A function: architecture -> a store's folder with one adapter of each config, saved by PEFT."""

    def write(base: Path, blobs: Path) -> None:
        for name, config in CONFIGS.items():
            save_random(blobs / digest_of(name), load(base), config(), seed=len(name), strength=0.1)

    return make_stores(write)


class Reference(Peft):
    def inputs(self, name: str | None, prompt: list[int], output: list[int]) -> dict[str, Any]:
        if name != "invoked":
            return {}
        offsets = calculate_alora_offsets(self.models[name].peft_config, "default", torch.tensor([prompt]))
        return {"alora_offsets": offsets}


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("veneer.engine.runner.pieces_of", partial(pieces_of, most=3))


def prompts() -> list[tuple[list[int], str | None]]:
    """Several for each adapter, some of which begin alike."""
    texts = [
        [5, 9, 27, 81, 5, 25, 4],
        [5, 9, 27, 81, 5, 25, 4, 44, 77, 12, 9, 60, 61, 62, 63, 64, 65],
        [44, 77],
        [5, 9, 27, 81, 5, 25, 3, 77, 77, 14, 15],
        [6],
    ]
    return [(text, name) for text in texts for name in (None, *CONFIGS)]


def scores(driver: Any, identifier: str) -> list[TokenLogprobs]:
    return [entry for item in driver.outputs[identifier] for entry in item.prompt_logprobs]


def check(found: list[TokenLogprobs], prompt: list[int], expected: torch.Tensor) -> None:
    """`expected`: log probabilities [tokens, vocabulary] of what follows each token of the prompt."""
    assert len(found) == len(prompt) - 1
    for entry, token, row in zip(found, prompt[1:], expected, strict=False):
        assert entry.logprob == pytest.approx(float(row[token]), abs=1e-4)
        assert entry.top_logprobs == pytest.approx(row.topk(LIKELIEST).values.tolist(), abs=1e-4)
        assert row[entry.top_ids].tolist() == pytest.approx(entry.top_logprobs, abs=1e-4)
        # one whose log probability is as close to the token's may be on either side of it
        least = int((row > row[token] + 1e-4).sum()) + 1
        assert least <= entry.rank <= int((row >= row[token] - 1e-4).sum())


def check_all(driver: Any, reference: Peft) -> None:
    asked = prompts()
    ids = [
        driver.submit(text, name and digest_of(name), prompt_logprobs=LIKELIEST, max_tokens=index % 3)
        for index, (text, name) in enumerate(asked)
    ]
    for index, tokens in enumerate(driver.run(*ids)):
        text, name = asked[index]
        assert len(tokens) == index % 3
        check(scores(driver, ids[index]), text, reference.logprobs(name, text, []))
        assert driver.outputs[ids[index]][-1].finish_reason == "length"


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma3", "phi3"])
@pytest.mark.usefixtures("small_pieces")
def test_scores_are_those_of_transformers_and_peft(
    architecture: str,
    tiny_model: Callable[[str], Path],
    stores: Callable[[str], Path],
    make_engine: Callable[..., Any],
) -> None:
    folder, store = tiny_model(architecture), stores(architecture)
    driver = make_engine(folder, store=str(store))
    check_all(driver, Reference(folder, store))


@pytest.mark.parametrize(
    "fields",
    [
        {"prefix_caching": False},
        {"max_num_batched_tokens": 5},
        {"max_loras": 2, "slot_patience": 0.0, "max_num_batched_tokens": 7},
        {"lookahead": True, "max_num_batched_tokens": 16},
        {"page_size": 16},
    ],
    ids=str,
)
@pytest.mark.usefixtures("small_pieces")
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
    check_all(driver, reference)  # now the prompts are cached


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_a_prompt_that_is_preempted_is_scored_once(
    prefix_caching: bool,
    tiny_model: Callable[[str], Path],
    stores: Callable[[str], Path],
    make_engine: Callable[..., Any],
) -> None:
    """Long answers take the pages of the prompts that came last, which have given out a part of their scores."""
    folder, store = tiny_model("llama"), stores("llama")
    fields = {"kv_cache_memory": 22 * PAGE, "max_num_batched_tokens": 5, "prefix_caching": prefix_caching}
    driver = make_engine(folder, store=str(store), **fields)
    interrupted = set()
    preempt = driver.engine.scheduler._preempt

    def watched(sequence: Any) -> None:
        if sequence.unread and scores(driver, sequence.id):
            interrupted.add(sequence.id)
        preempt(sequence)

    driver.engine.scheduler._preempt = watched
    answers = [driver.submit([8, 9, 10 + index], max_tokens=34) for index in range(2)]
    while not all(driver.tokens(each) for each in answers):
        driver.step()
    text = [3 + 7 * index % 90 for index in range(50)]
    asked = [(text[:49], None), (text[1:], "head"), (text[2:], "prefix")]
    ids = [
        driver.submit(prompt, name and digest_of(name), prompt_logprobs=LIKELIEST, max_tokens=2)
        for prompt, name in asked
    ]
    driver.run(*answers, *ids)
    assert interrupted
    reference = Reference(folder, store)
    for identifier, (prompt, name) in zip(ids, asked, strict=True):
        check(scores(driver, identifier), prompt, reference.logprobs(name, prompt, []))


def test_nothing_else_changes_by_a_bit(
    tiny_model: Callable[[str], Path], stores: Callable[[str], Path], make_engine: Callable[..., Any]
) -> None:
    """Neither what others are told nor what follows the prompt."""
    answers = []
    for wanted in (None, 2):
        driver = make_engine(tiny_model("llama"), store=str(stores("llama")), prefix_caching=False)
        for loaded in CONFIGS:  # once they are, both engines run the same steps
            driver.generate([5], digest_of(loaded), max_tokens=1)
        ids = []
        for text, name in prompts():
            adapter = name and digest_of(name)
            ids.append(driver.submit(text, adapter, logprobs=3, max_tokens=5))
            ids.append(driver.submit(text, adapter, logprobs=3, max_tokens=5, prompt_logprobs=wanted))
        driver.run(*ids)
        answers.append([[item.logprobs for item in driver.outputs[each] if item.tokens] for each in ids])
        assert any(scores(driver, each) for each in ids) == (wanted is not None)
    assert answers[0] == answers[1]


def test_pages_of_the_prompt_are_shared_but_not_read(
    tiny_model: Callable[[str], Path], make_engine: Callable[..., Any]
) -> None:
    driver = make_engine(tiny_model("llama"))
    text = [3 + index for index in range(30)]

    def cached(**sampling: Any) -> int:
        identifier = driver.submit(text, max_tokens=2, **sampling)
        driver.run(identifier)
        return int(driver.outputs[identifier][-1].cached_tokens)

    assert cached(prompt_logprobs=0) == 0
    assert cached(prompt_logprobs=0) == 0
    assert driver.engine.pool.query_tokens == 0
    assert cached() == 28
    assert driver.engine.pool.query_tokens == 30


def test_the_prompt_alone_may_fill_the_context(
    tiny_model: Callable[[str], Path], make_engine: Callable[..., Any]
) -> None:
    driver = make_engine(tiny_model("llama"), max_model_len=20)
    text = list(range(3, 24))
    full, answered, longer = (
        driver.submit(text[:20], max_tokens=0, prompt_logprobs=1),
        driver.submit(text[:20], max_tokens=1),
        driver.submit(text, max_tokens=0),
    )
    driver.run(full, answered, longer)
    assert len(scores(driver, full)) == 19
    assert (driver.tokens(full), driver.outputs[full][-1].finish_reason) == ([], "length")
    for refused in (answered, longer):
        assert driver.outputs[refused][-1].error.code == "context_length_exceeded"
    small = make_engine(tiny_model("llama"), kv_cache_memory=4 * PAGE)
    whole, over = small.submit(text[:16], max_tokens=0), small.submit(text[:17], max_tokens=0)
    small.run(whole, over)
    assert small.outputs[whole][-1].finish_reason == "length"
    assert small.outputs[over][-1].error.code == "context_length_exceeded"


def test_a_step_is_scored_in_pieces_of_bounded_size() -> None:
    def sequence(tokens: int, wanted: int | None) -> Sequence:
        params = SamplingParams(max_tokens=1, prompt_logprobs=wanted)
        return Sequence(id="s", tokens=list(range(tokens)), sampling=params)

    one, other, last = sequence(1000, 0), sequence(40, None), sequence(9, 3)
    one.num_read = 150
    planned = [
        Scheduled(one, 100, 700, False),
        Scheduled(other, 0, 40, True),
        Scheduled(last, 0, 9, True),
    ]
    pieces = list(pieces_of(planned))
    assert [(piece.row, piece.part.start, piece.part.count) for piece in pieces] == [
        (50, 150, PIECE_ROWS),
        (50 + PIECE_ROWS, 150 + PIECE_ROWS, PIECE_ROWS),
        (50 + 2 * PIECE_ROWS, 150 + 2 * PIECE_ROWS, 650 - 2 * PIECE_ROWS),
        (740, 0, 8),
    ]
    assert [target for piece in pieces[:-1] for target in piece.targets] == list(range(151, 801))
    assert pieces[-1].targets == list(range(1, 9))
    assert list(pieces_of([Scheduled(last, 8, 1, True), Scheduled(last, 9, 1, True)])) == []
