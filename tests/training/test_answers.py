"""The answers that are measured are those of greedy generation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from veneer.engine.base import load_base
from veneer.errors import InvalidRequest
from veneer.training.evaluation.answers import Answers

PROMPTS = [[5, 6, 7], [40, 41, 42, 43, 44, 45, 46], [9], [100, 30]]


def greedy(model: Any, prompt: list[int]) -> list[int]:
    config = GenerationConfig(do_sample=False, max_new_tokens=6, pad_token_id=2, eos_token_id=[2])
    ids = torch.tensor([prompt])
    tokens = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)[0].tolist()
    answer: list[int] = tokens[len(prompt) :]
    return answer[: answer.index(2)] if 2 in answer else answer


def test_answers_are_those_of_greedy_generation_in_the_order_of_the_prompts(tiny_base: Path) -> None:
    base = load_base(tiny_base, quantization="none", dtype=torch.float32, device=torch.device("cpu"))
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).eval()
    done: list[int] = []
    with Answers(base, tiny_base, longest=16, batch_size=3) as answers:
        found = answers.generate(PROMPTS, None, 6, lambda: done.append(1))
        assert found == [greedy(model, prompt) for prompt in PROMPTS]
        assert len(done) == len(PROMPTS)
        with pytest.raises(InvalidRequest, match="the prompt has 37 tokens"):
            answers.generate([list(range(3, 40))], None, 6)
