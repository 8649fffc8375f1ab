"""Sampling against definitions written out in plain Python, and its independence of the batch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from veneer.engine.messages import SamplingParams
from veneer.engine.sampling import SamplingRow, exponential_noise, noise_key, sample

VOCABULARY = 50


def row(
    *,
    prompt: list[int] | None = None,
    output: list[int] | None = None,
    pending: bool = False,
    forbidden: list[int] | None = None,
    **params: Any,
) -> SamplingRow:
    """With `pending`, one more token was generated and only the device has it."""
    prompt, output = prompt or [], output or []
    return SamplingRow(
        SamplingParams(max_tokens=8, **params),
        prompt + output,
        len(prompt),
        len(output) + pending,
        forbidden or [],
    )


def choose(logits: torch.Tensor, rows: list[SamplingRow], last: torch.Tensor | None = None) -> list[int]:
    return [token for token, _ in sample(logits, rows, last=last).results()]


def random_logits(rows: int) -> torch.Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(3)) * 3


def draws(logits: torch.Tensor, count: int = 4000, **params: Any) -> torch.Tensor:
    rows = [row(seed=seed, **params) for seed in range(count)]
    tokens = choose(logits.expand(count, -1), rows)
    return torch.bincount(torch.tensor(tokens), minlength=VOCABULARY) / count


def test_noise_is_exponential_and_its_own_for_each_seed_position_and_token() -> None:
    keys = [noise_key(seed, position) for seed in range(100) for position in range(100)]
    assert len(set(keys)) == len(keys)
    halves = torch.tensor([[key >> 32, key & 0xFFFFFFFF] for key in keys[:200]]).int()
    noise = exponential_noise(halves, 1000).double()
    assert (noise > 0).all()
    uniform = (1 - torch.exp(-noise)).flatten()
    assert (torch.histc(uniform.float(), bins=20, min=0, max=1) / 10_000 - 1).abs().max() < 0.05
    for axis in (0, 1):  # neighbouring rows and tokens have nothing to do with each other
        one, other = noise.narrow(axis, 0, 199), noise.narrow(axis, 1, 199)
        pair = torch.stack([one[:199, :199].flatten(), other[:199, :199].flatten()])
        assert abs(torch.corrcoef(pair)[0, 1]) < 0.02


def test_the_last_bits_of_the_logits_decide_next_to_nothing() -> None:
    vocabulary, count = 20_000, 64
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(count, vocabulary, generator=generator) * 3
    close = logits + torch.randn(count, vocabulary, generator=generator) * 1e-5
    changed = 0
    for start in range(0, 1280, count):
        rows = [row(seed=start + i) for i in range(count)]
        changed += sum(a != b for a, b in zip(choose(logits, rows), choose(close, rows), strict=True))
    assert changed == 0  # inverting the distribution in vocabulary order changed 3 of these 1280


def test_greedy_takes_the_largest() -> None:
    logits = random_logits(5)
    assert choose(logits, [row(temperature=0.0)] * 5) == logits.argmax(-1).tolist()


def test_frequencies_follow_the_distribution() -> None:
    logits = random_logits(1)[0]
    expected = torch.softmax(logits / 1.5, -1)
    assert (draws(logits, temperature=1.5) - expected).abs().max() < 0.03


@pytest.mark.parametrize(
    ("params", "allowed"),
    [
        ({"top_k": 3}, lambda p: p >= p.sort(descending=True).values[2]),
        ({"min_p": 0.3}, lambda p: p >= 0.3 * p.max()),
        ({"top_p": 0.7}, lambda p: _nucleus(p, 0.7)),
        ({"top_k": 5, "top_p": 0.9}, lambda p: _nucleus(_renormalized_top(p, 5), 0.9)),
    ],
)
def test_filters_keep_exactly_what_they_say(params: dict[str, Any], allowed: Any) -> None:
    logits = random_logits(1)[0]
    probs = torch.softmax(logits.double(), -1)
    mask = allowed(probs)
    kept = torch.where(mask, probs, 0.0)
    found = draws(logits, **params)
    assert not found[~mask].any()
    assert (found - kept / kept.sum()).abs().max() < 0.03


def _renormalized_top(p: torch.Tensor, k: int) -> torch.Tensor:
    kept = torch.where(p >= p.sort(descending=True).values[k - 1], p, 0.0)
    return kept / kept.sum()


def _nucleus(p: torch.Tensor, mass: float) -> torch.Tensor:
    mask = torch.zeros_like(p, dtype=torch.bool)
    total = 0.0
    for index in p.argsort(descending=True).tolist():
        if total >= mass:
            break
        mask[index] = True
        total += p[index].item()
    return mask


MIXED: list[dict[str, Any]] = [
    {"seed": 1},
    {"seed": 2, "top_k": 4},
    {"temperature": 0.0},
    {"seed": 3, "top_p": 0.8, "min_p": 0.01},
    {"seed": 4, "repetition_penalty": 1.3, "prompt": [1, 2], "output": [3]},
    {"seed": 5, "logit_bias": {7: 2.0}},
    {"seed": 6, "temperature": 0.7, "top_k": 10, "top_p": 0.6},
    {"seed": 7, "min_p": 0.2},
    {"temperature": 0.0, "frequency_penalty": 1.5, "output": [8, 8, 9]},
    {"temperature": 0.0, "forbidden": [4, 5], "logit_bias": {4: 90.0, 6: 3.0}},
    {"seed": 8, "presence_penalty": -1.0, "output": [1, 30], "forbidden": [2], "top_p": 0.95},
    {"seed": 9, "top_k": VOCABULARY, "top_p": 1.0, "logprobs": 2},
]


def test_same_tokens_whatever_else_is_in_the_batch() -> None:
    logits = random_logits(len(MIXED))
    rows = [row(**params) for params in MIXED]
    together = choose(logits, rows)
    assert together == [choose(logits[i : i + 1], [rows[i]])[0] for i in range(len(rows))]
    assert together[::-1] == choose(logits.flip(0), rows[::-1])
    assert together == choose(logits, rows, last=torch.zeros(len(rows), dtype=torch.int32))


def test_a_pending_token_counts_like_a_known_one() -> None:
    logits = random_logits(len(MIXED))
    last = torch.arange(10, 10 + len(MIXED))
    known = [
        row(**{**params, "output": [*params.get("output", []), 10 + i]}) for i, params in enumerate(MIXED)
    ]
    pending = [row(**params, pending=True) for params in MIXED]
    assert choose(logits, pending, last) == choose(logits, known)
    penalized = row(temperature=0.0, presence_penalty=50.0, pending=True)
    largest = logits[:1].argmax(-1)
    assert choose(logits[:1], [penalized], largest) != largest.tolist()


def test_the_argmax_may_be_there_already() -> None:
    logits = random_logits(3)
    rows = [row(temperature=0.0), row(seed=3, temperature=2.0), row(temperature=0.0)]
    tokens = torch.tensor([11, 12, 13])  # shows whether it is used
    sampled = sample(logits, rows, tokens)
    assert sampled.tokens is tokens
    assert tokens.tolist() == [11, choose(logits[1:2], rows[1:2])[0], 13]
    copied = sampled.to_host()
    tokens.zero_()
    assert [token for token, _ in copied.results()][::2] == [11, 13]


def test_penalties_and_bias() -> None:
    logits = torch.zeros(1, VOCABULARY)
    logits[0, :4] = torch.tensor([2.0, 1.9, -1.0, 1.8])
    assert choose(logits, [row(temperature=0.0, output=[0], presence_penalty=0.15)]) == [1]
    assert choose(logits, [row(temperature=0.0, output=[0, 1, 1], frequency_penalty=0.15)]) == [0]
    assert choose(logits, [row(temperature=0.0, prompt=[0, 1], repetition_penalty=1.2)]) == [3]
    # a negative logit becomes more negative under a repetition penalty
    low = torch.full((1, VOCABULARY), -2.0)
    low[0, 0], low[0, 1] = -1.0, -1.5
    assert choose(low, [row(temperature=0.0, output=[0], repetition_penalty=2.0)]) == [1]
    assert choose(logits, [row(temperature=0.0, logit_bias={9: 100.0})]) == [9]
    biased = choose(logits, [row(temperature=0.0, logit_bias={0: -100.0})])
    assert biased == [1]


def test_forbidden_tokens_are_never_chosen() -> None:
    logits = torch.zeros(1, VOCABULARY)
    logits[0, 5] = 50.0
    assert choose(logits, [row(temperature=0.0)]) == [5]
    assert choose(logits, [row(temperature=0.0, forbidden=[5])]) != [5]
    assert choose(logits, [row(forbidden=[5], logit_bias={5: 50.0})]) != [5]


def test_logprobs_are_of_the_raw_logits() -> None:
    logits = random_logits(3)
    rows = [row(seed=9, temperature=0.3, logprobs=4), row(seed=9), row(temperature=0.0, logprobs=0)]
    tokens, (first, none, zero) = zip(*sample(logits, rows).results(), strict=True)
    assert none is None
    assert first is not None
    assert zero is not None
    expected = torch.log_softmax(logits[0], -1)
    assert math.isclose(first.logprob, expected[tokens[0]].item(), abs_tol=1e-5)
    values, ids = expected.topk(4)
    assert first.top_ids == ids.tolist()
    assert first.top_logprobs == pytest.approx(values.tolist(), abs=1e-5)
    assert (zero.top_ids, zero.top_logprobs) == ([], [])
