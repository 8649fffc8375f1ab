"""Greedy generation in batches is the same as one prompt at a time, and matches are counted exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from veneer.training.data import Encoded, Message, Row
from veneer.training.evaluation import exact_match, generate, pad

PROMPTS = [[5, 6, 7], [40, 41, 42, 43, 44, 45, 46], [9], [100, 30]]


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).eval()


def test_batched_answers_equal_single_ones_in_order(model: Any, tokenizer: Any) -> None:
    done: list[int] = []
    batched = generate(model, tokenizer, PROMPTS, [2], max_new_tokens=6, batch_size=3, on_batch=done.append)
    single = [
        tokenizer.decode(
            model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                generation_config=GenerationConfig(do_sample=False, max_new_tokens=6, pad_token_id=2),
            )[0, len(prompt) :],
            skip_special_tokens=True,
        )
        for prompt in PROMPTS
    ]
    assert batched == single
    assert len(set(batched)) > 1
    assert done == [3, 1]


def test_sampling_settings_of_the_checkpoint_do_not_matter(model: Any, tokenizer: Any) -> None:
    expected = generate(model, tokenizer, PROMPTS, [2], max_new_tokens=6, batch_size=4)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=5.0, repetition_penalty=3.0, eos_token_id=[2]
    )
    assert generate(model, tokenizer, PROMPTS, [2], max_new_tokens=6, batch_size=4) == expected


def test_exact_match_ignores_surrounding_space_only(model: Any, tokenizer: Any) -> None:
    truth = generate(model, tokenizer, PROMPTS, [2], max_new_tokens=4, batch_size=4)
    answers = [f" {truth[0]}\n", truth[1] + "x", truth[2], truth[3].upper() + "?"]
    rows = [Row((Message(role="user", content=f"q{n}"),), text, "") for n, text in enumerate(answers)]
    encoded = [Encoded(prompt, []) for prompt in PROMPTS]
    model.train()
    match = exact_match(model, tokenizer, rows, encoded, [2], max_new_tokens=4, batch_size=2, shown=1)
    assert (match.correct, match.rows, match.share) == (2, 4, 0.5)
    assert match.mistakes == ({"prompt": "q1", "expected": truth[1] + "x", "got": truth[1]},)
    assert model.training


def test_pad_places_rows_left_or_right() -> None:
    ids, mask = pad([[1, 2], [3]], 9)
    assert ids.tolist() == [[1, 2], [3, 9]]
    assert mask.tolist() == [[1, 1], [1, 0]]
    assert pad([[1, 2], [3]], 9, left=True)[0].tolist() == [[1, 2], [9, 3]]
