"""Exact match by greedy generation: does the model give the answer, word for word?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from veneer.training.data import Encoded, Row


@dataclass(frozen=True)
class ExactMatch:
    """How many rows were answered exactly (surrounding white space aside), and some that were not."""

    correct: int
    rows: int
    mistakes: tuple[dict[str, str], ...]

    @property
    def share(self) -> float:
        return self.correct / self.rows if self.rows else 0.0


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    stops: Sequence[int],
    *,
    max_new_tokens: int,
    batch_size: int,
    on_batch: Callable[[int], object] = lambda done: None,
) -> list[str]:
    """Greedy answers to token-id prompts, in their order; similar lengths share a batch, padded left."""
    from transformers import GenerationConfig

    greedy = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(stops),
        pad_token_id=stops[0],
        bos_token_id=tokenizer.bos_token_id,
    )
    # Set, not passed: passed ones are completed from the checkpoint's own sampling settings.
    model.generation_config = greedy
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    answers = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        ids, mask = pad([prompts[place] for place in batch], stops[0], left=True)
        with torch.inference_mode():
            output = model.generate(input_ids=ids.to(model.device), attention_mask=mask.to(model.device))
        texts = tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
        for place, text in zip(batch, texts, strict=True):
            answers[place] = text
        on_batch(len(batch))
    return answers


def exact_match(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    encoded: Sequence[Encoded],
    stops: Sequence[int],
    *,
    max_new_tokens: int,
    batch_size: int,
    shown: int = 5,
    on_batch: Callable[[int], object] = lambda done: None,
) -> ExactMatch:
    """Compare greedy answers with the rows' own; the first `shown` mistakes are kept."""
    was_training = model.training
    model.eval()
    answers = generate(
        model,
        tokenizer,
        [item.prompt for item in encoded],
        stops,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        on_batch=on_batch,
    )
    model.train(was_training)
    wrong = [
        {"prompt": row.prompt[-1].content, "expected": row.answer, "got": answer}
        for row, answer in zip(rows, answers, strict=True)
        if answer.strip() != row.answer.strip()
    ]
    return ExactMatch(len(rows) - len(wrong), len(rows), tuple(wrong[:shown]))


def pad(
    sequences: Sequence[list[int]], value: int, *, left: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Stack sequences of different lengths: ids and mask, both int64 [rows, longest]."""
    longest = max(map(len, sequences))
    ids = torch.full((len(sequences), longest), value)
    mask = torch.zeros((len(sequences), longest), dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        place = slice(longest - len(sequence), longest) if left else slice(0, len(sequence))
        ids[row, place] = torch.tensor(sequence)
        mask[row, place] = 1
    return ids, mask
