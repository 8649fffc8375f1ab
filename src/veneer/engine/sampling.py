"""Choose the next token of each row from its logits. Everything is per row: a row's token depends on its own
logits, parameters, history and (seed, position) alone, never on what else is in the batch.

Randomness is one uniform number per (seed, position), inverted through the row's cumulative distribution in
vocabulary order, so the same request gives the same tokens in any batch and on any device (up to the last
bits of the logits).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from veneer.engine.messages import SamplingParams, TokenLogprobs

_MASK64 = (1 << 64) - 1


@dataclass(frozen=True)
class SamplingRow:
    """What one row needs besides its logits."""

    params: SamplingParams
    prompt: Sequence[int]  # token ids
    output: Sequence[int]  # token ids generated so far
    forbidden: Sequence[int] = ()  # token ids that may not be chosen now (end tokens below min_tokens)


class Sampled(NamedTuple):
    tokens: list[int]
    logprobs: list[TokenLogprobs | None]


def uniform(seed: int, position: int) -> float:
    """A uniform number in [0, 1) from (seed, position): splitmix64 (Steele et al., 2014), top 53 bits."""
    z = (seed * 0x9E3779B97F4A7C15 + (position + 1) * 0xD1342543DE82EF95) & _MASK64
    for _ in range(2):
        z = (z + 0x9E3779B97F4A7C15) & _MASK64
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
        z ^= z >> 31
    return (z >> 11) * 2.0**-53


def sample(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> Sampled:
    """Choose one token for each row.

    logits: [rows, vocabulary], any float type; not modified. Order of operations: logit_bias, forbidden
    tokens, penalties, temperature, top_k, top_p, min_p. Log probabilities are those of the raw logits.
    """
    raw = logits.float()
    scores = _adjust(raw, rows)
    tokens = scores.argmax(-1)
    drawn = [i for i, row in enumerate(rows) if row.params.temperature > 0]
    if drawn:
        index = torch.tensor(drawn, device=logits.device)
        tokens[index] = _draw(scores[index], [rows[i] for i in drawn])
    chosen: list[int] = tokens.tolist()
    return Sampled(chosen, _logprobs(raw, chosen, rows))


def _adjust(raw: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    scores = raw
    for i, row in enumerate(rows):
        p = row.params
        penalized = (p.repetition_penalty, p.presence_penalty, p.frequency_penalty) != (1.0, 0.0, 0.0)
        if not (p.logit_bias or row.forbidden or penalized):
            continue
        if scores is raw:
            scores = raw.clone()
        if p.logit_bias:
            ids = torch.tensor(list(p.logit_bias), device=raw.device)
            scores[i, ids] += torch.tensor(list(p.logit_bias.values()), device=raw.device)
        if row.forbidden:
            scores[i, torch.tensor(row.forbidden, device=raw.device)] = float("-inf")
        if penalized:
            scores[i] = _penalize(scores[i], row)
    return scores


def _penalize(scores: torch.Tensor, row: SamplingRow) -> torch.Tensor:
    """Repetition penalty (Keskar et al., 2019) over prompt and output; the others over the output (OpenAI)."""
    p = row.params
    vocabulary = scores.shape[0]
    output = torch.tensor(row.output, dtype=torch.long, device=scores.device)
    counts = torch.bincount(output, minlength=vocabulary)[:vocabulary]
    if p.repetition_penalty != 1.0:
        seen = counts > 0
        seen[torch.tensor(row.prompt, dtype=torch.long, device=scores.device)] = True
        penalized = torch.where(scores > 0, scores / p.repetition_penalty, scores * p.repetition_penalty)
        scores = torch.where(seen, penalized, scores)
    return scores - p.frequency_penalty * counts - p.presence_penalty * (counts > 0)


def _column(values: list[float], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, device=device).unsqueeze(1)


def _draw(scores: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    """Sample from the filtered distribution of each row. Returns token ids [rows]."""
    temperature = _column([row.params.temperature for row in rows], scores.device)
    probs = torch.softmax(scores.double() / temperature, dim=-1)
    for i, row in enumerate(rows):
        p = row.params
        if 0 < p.top_k < probs.shape[1] or p.top_p < 1 or p.min_p > 0:
            probs[i] = _filter(probs[i], p)
    cumulative = probs.cumsum(-1)
    # Positions count generated tokens, so a preempted or differently chunked run draws the same numbers.
    draws = _column([uniform(row.params.seed, len(row.output)) for row in rows], scores.device)
    target = draws * cumulative[:, -1:]
    # The first token whose cumulative probability exceeds the target; never one of probability zero.
    return torch.searchsorted(cumulative, target, right=True).squeeze(1).clamp_(max=probs.shape[1] - 1)


def _filter(probs: torch.Tensor, p: SamplingParams) -> torch.Tensor:
    """Zero what top_k, top_p (Holtzman et al., 2020) and min_p (Nguyen et al., 2024) exclude. probs: [V]."""
    keep = torch.ones_like(probs, dtype=torch.bool)
    limit = p.top_k if 0 < p.top_k < probs.shape[0] else probs.shape[0]
    if p.top_p < 1 or limit < probs.shape[0]:
        order = torch.argsort(probs, descending=True, stable=True)
        keep[order[limit:]] = False
        if p.top_p < 1:
            ordered = probs[order[:limit]]
            before = ordered.cumsum(0) - ordered
            # the smallest set whose mass reaches top_p of what top_k left; always at least one token
            excluded = before >= p.top_p * ordered.sum()
            excluded[0] = False
            keep[order[:limit][excluded]] = False
    if p.min_p > 0:
        keep &= probs >= p.min_p * probs.max()
    return torch.where(keep, probs, 0.0)


def _logprobs(
    raw: torch.Tensor, tokens: list[int], rows: Sequence[SamplingRow]
) -> list[TokenLogprobs | None]:
    found: list[TokenLogprobs | None] = [None] * len(rows)
    wanted = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
    if not wanted:
        return found
    index = torch.tensor(wanted, device=raw.device)
    logs = torch.log_softmax(raw[index], dim=-1)
    most = max(rows[i].params.logprobs or 0 for i in wanted)
    values, ids = logs.topk(most, dim=-1) if most else (logs[:, :0], index[:, None][:, :0])
    own = logs.gather(1, torch.tensor([[tokens[i]] for i in wanted], device=raw.device))
    for row, i in enumerate(wanted):
        k = rows[i].params.logprobs or 0
        found[i] = TokenLogprobs(own[row].item(), ids[row, :k].tolist(), values[row, :k].tolist())
    return found
