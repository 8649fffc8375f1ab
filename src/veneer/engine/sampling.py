"""Choose the next token of each row from its logits. Everything is per row: a row's token depends on its own
logits, parameters, history and (seed, position) alone, never on what else is in the batch.

Randomness is a hash of (seed, position, token), one exponential number for each token, and the token that comes
first in the race is drawn (Gumbel-max). So the same request gives the same tokens in any batch and on any device:
the last bits of the logits, which a batch's size does change, decide only between two that arrive together.

Tokens are chosen on the device. Only `Sampled.results` waits for it; what to launch is decided from the
parameters, which the host knows. (No numbers in torch.where here: it would copy them to the device and wait.)
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from veneer.engine.grammars import Words
from veneer.engine.messages import SamplingParams, TokenLogprobs
from veneer.kernels.upload import upload

_MASK32 = (1 << 32) - 1
_MASK64 = (1 << 64) - 1


@dataclass(frozen=True)
class SamplingRow:
    """What one row needs besides its logits."""

    params: SamplingParams
    tokens: Sequence[int]  # virtual ones, prompt and output; the last may be known to the device alone
    num_prompt: int  # tokens of the prompt, virtual ones included
    position: int  # tokens generated before the one to choose
    forbidden: Sequence[int] = ()  # token ids that may not be chosen now (end tokens below min_tokens)
    allowed: Words | None = None  # what its grammar allows; None: every token
    num_virtual: int = 0  # tokens in front of the prompt that have no ids
    draft: Sequence[int] = ()  # behind the tokens, as if they were said

    @property
    def is_pending(self) -> bool:
        """Whether the last token is known to the device alone."""
        return self.num_prompt + self.position > len(self.tokens) + len(self.draft)

    @property
    def output(self) -> list[int]:
        """What was generated, as far as the host knows."""
        return [*self.tokens[self.num_prompt :], *self.draft]

    @property
    def is_penalized(self) -> bool:
        p = self.params
        return (p.repetition_penalty, p.presence_penalty, p.frequency_penalty) != (1.0, 0.0, 0.0)

    @property
    def takes_largest(self) -> bool:
        """Whether the choice is the largest of the logits as they are."""
        p = self.params
        changed = p.logit_bias or self.forbidden or self.is_penalized or self.allowed is not None
        return p.temperature <= 0 and not changed

    def changes(self) -> Mapping[int, float]:
        """What logit_bias and forbidden tokens add to the logits, by token id."""
        return {**self.params.logit_bias, **dict.fromkeys(self.forbidden, float("-inf"))}


class TopLogprobs(NamedTuple):
    """Log probabilities of a token in each row, and of its rivals."""

    own: torch.Tensor  # [rows, 1], of the tokens
    ranks: torch.Tensor  # int64 [rows, 1], of the tokens, 1 for the likeliest
    ids: torch.Tensor  # int64 [rows, most], the likeliest
    values: torch.Tensor  # [rows, most]

    def to_host(self) -> TopLogprobs:
        """As `Sampled.to_host`."""
        return TopLogprobs(*map(_to_host, self))

    def entries(self, counts: Sequence[int]) -> list[TokenLogprobs]:
        """Those of each row, with so many of the likeliest. Waits for the device when the tensors are there."""
        columns = (column.tolist() for column in self)
        return [
            TokenLogprobs(own, ids[:count], values[:count], rank)
            for (own,), (rank,), ids, values, count in zip(*columns, counts, strict=True)
        ]


def top_logprobs(logits: torch.Tensor, tokens: torch.Tensor, most: int) -> TopLogprobs:
    """logits: [rows, vocabulary], any float type; tokens: int64 [rows]; `most` of the likeliest."""
    logs = torch.log_softmax(logits.float(), dim=-1)
    own = logs.gather(1, tokens.unsqueeze(1))
    values, ids = logs.topk(most, dim=-1)
    return TopLogprobs(own, (logs >= own).sum(-1, keepdim=True), ids, values)


class Choice(NamedTuple):
    token: int
    logprobs: TokenLogprobs | None  # when they are wanted


def _to_host(x: torch.Tensor) -> torch.Tensor:
    return x.to("cpu", non_blocking=True, copy=True)


@dataclass(frozen=True)
class Sampled:
    """The chosen tokens, on the device until `to_host`."""

    rows: Sequence[SamplingRow]
    tokens: torch.Tensor  # int64 [rows]
    top: TopLogprobs | None

    def to_host(self) -> Sampled:
        """A copy in (pinned) host memory, valid once the device has done what was launched so far."""
        return Sampled(self.rows, _to_host(self.tokens), self.top and self.top.to_host())

    def results(self) -> list[Choice]:
        """Token and log probabilities of each row. Waits for the device when the tensors are there."""
        counts = [row.params.logprobs for row in self.rows]
        entries = iter(self.top.entries([k for k in counts if k is not None]) if self.top else ())
        return [
            Choice(token, None if k is None else next(entries))
            for token, k in zip(self.tokens.tolist(), counts, strict=True)
        ]


def noise_key(seed: int, position: int) -> int:
    """64 random bits of (seed, position): splitmix64 (Steele et al., 2014)."""
    z = (seed * 0x9E3779B97F4A7C15 + (position + 1) * 0xD1342543DE82EF95) & _MASK64
    for _ in range(2):
        z = (z + 0x9E3779B97F4A7C15) & _MASK64
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
        z ^= z >> 31
    return z


def exponential_noise(keys: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Exponentially distributed float32 [rows, vocabulary], a function of each row's key and the token alone.

    keys: int32 [rows, 2]. Two rounds of lowbias32 (Wellons, 2018) over the token, each with half of the key.
    """
    tokens = torch.arange(vocabulary, dtype=torch.int32, device=keys.device)
    x = tokens * _int32(0x9E3779B1) + keys[:, :1]
    for round_ in range(2):
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            x ^= (x >> shift) & ((1 << 32 - shift) - 1)
            x *= _int32(factor)
        x ^= (x >> 16) & 0xFFFF
        if not round_:
            x ^= keys[:, 1:]
    # 31 bits; what matters are the small numbers, which float32 tells apart
    return ((x & 0x7FFFFFFF).float() + 0.5).mul_(-(2.0**-31)).log1p_().neg_()


def _int32(bits: int) -> int:
    return bits - (1 << 32) if bits >> 31 else bits


def sample(
    logits: torch.Tensor,
    rows: Sequence[SamplingRow],
    tokens: torch.Tensor | None = None,
    last: torch.Tensor | None = None,
) -> Sampled:
    """Choose one token for each row.

    logits: [rows, vocabulary], any float type; not modified. Order of operations: logit_bias, forbidden
    tokens, the grammar's mask, penalties, temperature, top_k, top_p, min_p. Log probabilities are those of the
    raw logits.
    tokens: int64 [rows], the argmax of each row, if it is there already; becomes the result.
    last: integers [rows], the last token of each row; needed when one is pending.
    """
    if tokens is None:
        tokens = logits.argmax(-1)
    chosen = [i for i, row in enumerate(rows) if not row.takes_largest]
    if chosen:
        index = upload(chosen, np.int64, logits.device)
        scores = logits[index].float()
        tokens[index] = _choose(scores, [rows[i] for i in chosen], None if last is None else last[index])
    return Sampled(rows, tokens, _logprobs(logits, tokens, rows))


def _choose(scores: torch.Tensor, rows: Sequence[SamplingRow], last: torch.Tensor | None) -> torch.Tensor:
    """Token ids [rows]. scores: float32 [rows, vocabulary], the logits; overwritten."""
    changes = [(i, *change) for i, row in enumerate(rows) for change in row.changes().items()]
    if changes:
        row, token, change = upload(changes, np.float64, scores.device).unbind(1)
        scores[row.long(), token.long()] += change.float()
    masked = {i: row.allowed for i, row in enumerate(rows) if row.allowed is not None}
    if masked:
        forbidden = _forbidden(list(masked.values()), scores)
        if len(masked) == len(rows):
            scores.masked_fill_(forbidden, float("-inf"))
        else:
            index = upload(list(masked), np.int64, scores.device)
            scores[index] = scores[index].masked_fill_(forbidden, float("-inf"))
    penalized = [i for i, row in enumerate(rows) if row.is_penalized]
    if penalized:
        index = upload(penalized, np.int64, scores.device)
        scores[index] = _penalize(
            scores[index], [rows[i] for i in penalized], None if last is None else last[index]
        )
    greedy = scores.argmax(-1)
    if all(row.params.temperature <= 0 for row in rows):
        return greedy
    return _draw(scores, rows, greedy)


def _forbidden(allowed: Sequence[Words], scores: torch.Tensor) -> torch.Tensor:
    """Whether a token has no bit: bool [masks, vocabulary], true beyond the bits. Masks may go beyond scores."""
    words = np.zeros((len(allowed), -(-scores.shape[1] // 32)), np.int32)
    for row, mask in zip(words, allowed, strict=True):
        row[: len(mask)] = mask[: len(row)]
    octets = upload(words, np.int32, scores.device).view(torch.uint8).int()
    found = _zero_bits(scores.device).index_select(0, octets.view(-1))
    return found.view(torch.bool).view(len(allowed), -1)[:, : scores.shape[1]]


@functools.cache
def _zero_bits(device: torch.device) -> torch.Tensor:
    """Of each byte, which of its bits are zero, the lowest first: int64 [256], each of eight bools."""
    ones = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return torch.from_numpy((ones == 0).view(np.int64).squeeze(1)).to(device)


def _penalize(scores: torch.Tensor, rows: Sequence[SamplingRow], last: torch.Tensor | None) -> torch.Tensor:
    """Repetition penalty (Keskar et al., 2019) over prompt and output; the others over the output (OpenAI)."""
    params = [(row.params.repetition_penalty, row.params.frequency_penalty) for row in rows]
    presence = [(row.params.presence_penalty, float(row.is_pending)) for row in rows]
    table = upload(np.hstack([params, presence]), np.float32, scores.device)
    repetition, frequency, presence_, pending = (column.unsqueeze(1) for column in table.unbind(1))
    counts = _counts(scores, [row.output for row in rows])
    if any(row.is_pending for row in rows):
        assert last is not None  # the runner knows it of every row
        counts.scatter_add_(1, last.long().unsqueeze(1), pending)
    if any(row.params.repetition_penalty != 1.0 for row in rows):
        seen = _counts(scores, [row.tokens[row.num_virtual : row.num_prompt] for row in rows]) + counts > 0
        penalized = torch.where(scores > 0, scores / repetition, scores * repetition)
        scores = torch.where(seen, penalized, scores)
    return scores - frequency * counts - presence_ * (counts > 0)


def _counts(scores: torch.Tensor, ids: Sequence[Sequence[int]]) -> torch.Tensor:
    """How often each token is in each list: float32 like scores. Sums of ones are exact in any order."""
    vocabulary = scores.shape[1]
    flat = np.concatenate([np.asarray(tokens, np.int64) + i * vocabulary for i, tokens in enumerate(ids)])
    where = upload(flat, np.int64, scores.device)
    counts = torch.zeros_like(scores)
    counts.view(-1).index_add_(0, where, torch.ones_like(where, dtype=torch.float32))
    return counts


def _draw(scores: torch.Tensor, rows: Sequence[SamplingRow], greedy: torch.Tensor) -> torch.Tensor:
    """Sample from the filtered distribution of each row, those of temperature 0 aside. Token ids [rows]."""
    vocabulary = scores.shape[1]
    params = [row.params for row in rows]
    limits = [p.top_k if 0 < p.top_k < vocabulary else vocabulary for p in params]
    # Positions count generated tokens, so a preempted or differently chunked run draws the same numbers.
    keys = [noise_key(p.seed, row.position) for row, p in zip(rows, params, strict=True)]
    columns = [
        (
            p.temperature > 0,
            p.temperature or 1.0,
            limit,
            p.top_p,
            p.min_p,
            _int32(key >> 32),
            _int32(key & _MASK32),
        )
        for p, limit, key in zip(params, limits, keys, strict=True)
    ]
    table = upload(columns, np.float64, scores.device)
    drawn, temperature, limit, top_p, min_p = (column.unsqueeze(1) for column in table[:, :5].unbind(1))
    probs = torch.softmax(scores / temperature.float(), dim=-1)
    cut = [i for i, p in enumerate(params) if p.top_p < 1 or limits[i] < vocabulary]
    if cut:
        index = upload(cut, np.int64, scores.device)
        probs[index] = _cut(probs[index], scores[index], limit[index], top_p[index])
    if any(p.min_p > 0 for p in params):  # Nguyen et al., 2024; the cut keeps the largest
        probs.masked_fill_(probs < min_p * probs.amax(-1, keepdim=True), 0.0)
    found = probs.div_(exponential_noise(table[:, 5:].int(), vocabulary)).argmax(-1)
    return torch.where(drawn.squeeze(1) > 0, found, greedy)


def _cut(probs: torch.Tensor, scores: torch.Tensor, limit: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Zero what top_k and top_p (Holtzman et al., 2020) exclude.

    probs, scores: [rows, vocabulary], in the same order by size; limit, top_p: [rows, 1].
    """
    order = scores.argsort(dim=-1, descending=True, stable=True)
    rank = torch.arange(probs.shape[1], device=probs.device)
    ordered = probs.gather(1, order).masked_fill_(rank >= limit, 0.0)
    reached = ordered.cumsum(-1, dtype=torch.float64)
    # the smallest set whose mass reaches top_p of what top_k left; always at least one token
    excluded = (top_p < 1) & (reached - ordered >= top_p * reached[:, -1:]) & (rank > 0)
    return torch.zeros_like(probs).scatter_(1, order, ordered.masked_fill_(excluded, 0.0))


def _logprobs(logits: torch.Tensor, tokens: torch.Tensor, rows: Sequence[SamplingRow]) -> TopLogprobs | None:
    wanted = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
    if not wanted:
        return None
    index = upload(wanted, np.int64, logits.device)
    most = max(rows[i].params.logprobs or 0 for i in wanted)
    return top_logprobs(logits[index], tokens[index], most)
