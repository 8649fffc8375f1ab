"""How good an answer is, as a number for each row, and how rows add up. Pure functions, no models, no files.

| metric | of a row | of all rows |
| --- | --- | --- |
| exact_match | 1 if the answer is the expected one, surrounding white space aside | share |
| normalized_match | 1 if both are equal after `normalize` | share |
| token_f1 | F1 of the words that both have, after `normalize` | mean |
| perplexity | log-likelihood of the expected answer (nats) and its tokens | exp(-sum / tokens) |
| accuracy | 1 if the right choice is the most likely one | share |
| accuracy_normalized | the same, by log-likelihood per character | share |

`normalize` and token F1 are those of SQuAD's official script (Rajpurkar et al., 2016, evaluate-v1.1.py); the
accuracies are lm-evaluation-harness's `acc` and `acc_norm`. Of perplexity less is better, of all others more.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Literal, NamedTuple

Metric = Literal[
    "exact_match", "normalized_match", "token_f1", "perplexity", "accuracy", "accuracy_normalized"
]
ANSWER_METRICS: tuple[Metric, ...] = ("exact_match", "normalized_match", "token_f1")
CHOICE_METRICS: tuple[Metric, ...] = ("accuracy", "accuracy_normalized")
SHARES = frozenset[Metric]({"exact_match", "normalized_match", "accuracy", "accuracy_normalized"})

MAX_NATS = 700.0  # of a token; exp of more overflows
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


class Score(NamedTuple):
    """A metric of one row: a sum over `weight` things, which are the tokens for perplexity and 1 otherwise."""

    value: float
    weight: int = 1


def normalize(text: str) -> str:
    """Lower case, without ASCII punctuation and English articles, words one space apart.

    As in SQuAD's script `1.5` and `15` become the same; where that matters, look at exact_match.
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, expected: str) -> bool:
    return answer.strip() == expected.strip()


def normalized_match(answer: str, expected: str) -> bool:
    return normalize(answer) == normalize(expected)


def token_f1(answer: str, expected: str) -> float:
    """Harmonic mean of precision and recall of the words, counted as often as they occur; 0 to 1.

    Where one of the texts has no word left, it is 1 if neither has (as in SQuAD 2.0's script).
    """
    got, wanted = normalize(answer).split(), normalize(expected).split()
    if not got or not wanted:
        return float(got == wanted)
    shared = (Counter(got) & Counter(wanted)).total()
    return 2 * shared / (len(got) + len(wanted))


def perplexity(log_likelihood: float, tokens: int) -> float:
    """exp of the mean negative log-likelihood in nats."""
    return math.exp(min(-log_likelihood / tokens, MAX_NATS))


def most_likely(log_likelihoods: Sequence[float], lengths: Sequence[int] | None = None) -> int:
    """Which choice is the most likely, per unit of length if `lengths` are given; the first of equals."""
    values = (
        [value / length for value, length in zip(log_likelihoods, lengths, strict=True)]
        if lengths
        else (log_likelihoods)
    )
    return max(range(len(values)), key=values.__getitem__)


def total(metric: Metric, scores: Sequence[Score]) -> float:
    """The metric of all rows. `scores` must not be empty."""
    value, weight = math.fsum(score.value for score in scores), sum(score.weight for score in scores)
    return perplexity(value, weight) if metric == "perplexity" else value / weight


def less_is_better(metric: Metric) -> bool:
    return metric == "perplexity"


def shown(metric: Metric, value: float) -> str:
    """A value, or the difference of two, for people."""
    return f"{value:.2f}" if metric == "perplexity" else f"{100 * value:.1f} %"
