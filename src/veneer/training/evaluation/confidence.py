"""What can be said of a metric from a limited number of rows: intervals, and tests of paired differences.

Rows are taken as a random sample of all the rows that might have been asked; models answer the same ones.

* A share: Wilson's interval (Wilson, 1927), which also holds for few rows and shares of 0 and 1.
* Other metrics: percentiles of the bootstrap over rows (Efron, 1979), a point where all rows are equal.
* The difference of two shares: Agresti and Min's interval (2005), and McNemar's exact test, which looks at the rows
  that only one of the models has right.
* Other differences: the bootstrap over rows, the same ones for both models, and a sign-flip permutation test
  (Fisher, 1935): were the models equally good, each row's difference might as well be its negative.

p is two-sided and of one comparison: of many, some are below any bound by chance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from veneer.training.evaluation.metrics import MAX_NATS, SHARES, Metric, Score, total

LEVEL = 0.95
RESAMPLES = 2000  # of the bootstrap
FLIPS = 9999  # of the permutation test, whose smallest p is one of 10,000
_BATCH = 1 << 22  # numbers drawn at a time

Floats = NDArray[np.float64]


class Measured(NamedTuple):
    """A metric over rows, with the bounds of its 95 % interval."""

    value: float
    low: float
    high: float
    rows: int


class Difference(NamedTuple):
    """The second model's metric minus the first's on the same rows, its 95 % interval, and how sure it is."""

    value: float
    low: float
    high: float
    p_value: float
    test: str
    better: int  # rows whose score is higher with the second model
    worse: int

    @property
    def significant(self) -> bool:
        return self.p_value < 1 - LEVEL


def measure(metric: Metric, scores: Sequence[Score]) -> Measured:
    """A metric and its interval. `scores`: one a row, at least one."""
    value = total(metric, scores)
    if metric in SHARES:
        low, high = wilson(round(sum(score.value for score in scores)), len(scores))
    else:
        low, high = _bounds(_bootstrap([scores], lambda sums: _of_sums(metric, sums[0])))
    return Measured(value, low, high, len(scores))


def compare(metric: Metric, first: Sequence[Score], second: Sequence[Score]) -> Difference:
    """The difference of two models. `first[i]` and `second[i]` are of the same row; at least one."""
    gains = [b.value - a.value for a, b in zip(first, second, strict=True)]
    better, worse = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
    value = total(metric, second) - total(metric, first)
    if metric in SHARES:
        low, high = agresti_min(better, worse, len(gains))
        return Difference(value, low, high, mcnemar(better, worse), "McNemar exact", better, worse)
    samples = _bootstrap([first, second], lambda sums: _of_sums(metric, sums[1]) - _of_sums(metric, sums[0]))
    low, high = _bounds(samples)
    return Difference(value, low, high, sign_flip(gains), "sign-flip permutation", better, worse)


def wilson(hits: int, rows: int) -> tuple[float, float]:
    """Bounds of a share, from `hits` of `rows`."""
    z = _z()
    centre = hits + z * z / 2
    spread = z * math.sqrt(hits * (rows - hits) / rows + z * z / 4)
    size = rows + z * z
    return max(0.0, (centre - spread) / size), min(1.0, (centre + spread) / size)


def agresti_min(better: int, worse: int, rows: int) -> tuple[float, float]:
    """Bounds of the difference of two paired shares: Wald's, with half a row added to each of the four cells."""
    size, gains, losses = rows + 2, better + 0.5, worse + 0.5
    value = (gains - losses) / size
    spread = _z() * math.sqrt(gains + losses - (gains - losses) ** 2 / size) / size
    return max(-1.0, value - spread), min(1.0, value + spread)


def mcnemar(better: int, worse: int) -> float:
    """Two-sided p: how likely so uneven a split of these rows is where each way is as likely as the other."""
    changed, ways, tail = better + worse, 1, 1
    for count in range(min(better, worse)):
        ways = ways * (changed - count) // (count + 1)  # the next binomial coefficient
        tail += ways
    return min(1.0, 2 * tail / (1 << changed))


def sign_flip(gains: Sequence[float], seed: int = 0) -> float:
    """Two-sided p of a mean of differences; at least 1 / (FLIPS + 1)."""
    values: Floats = np.array([gain for gain in gains if gain], dtype=np.float64)
    bound = abs(values.sum()) * (1 - 1e-12)  # equal sums in another order may differ in the last bit
    generator = np.random.default_rng(seed)
    reached = 0
    for count in _batches(FLIPS, len(values)):
        signs = generator.integers(0, 2, (count, len(values)), dtype=np.int8)
        reached += int((np.abs((2.0 * signs - 1) @ values) >= bound).sum())
    return (reached + 1) / (FLIPS + 1)


def _bootstrap(
    models: Sequence[Sequence[Score]], statistic: Callable[[list[Floats]], Floats], seed: int = 0
) -> Floats:
    """The statistic of RESAMPLES samples of rows, from each model's [2, samples] sums of values and weights."""
    columns: list[Floats] = [np.array(scores, dtype=np.float64).T.copy() for scores in models]
    rows = len(models[0])
    generator = np.random.default_rng(seed)
    found = []
    for count in _batches(RESAMPLES, rows):
        places = generator.integers(0, rows, (count, rows), dtype=np.int32)
        sums = [[column.take(places).sum(axis=1) for column in pair] for pair in columns]
        found.append(statistic([np.stack(pair) for pair in sums]))
    return np.concatenate(found)


def _batches(samples: int, width: int) -> Iterator[int]:
    """So many samples of this width, in parts that fit into memory."""
    left, most = samples, max(1, _BATCH // max(1, width))
    while left:
        yield min(left, most)
        left -= min(left, most)


def _of_sums(metric: Metric, sums: Floats) -> Floats:
    mean: Floats = sums[0] / sums[1]
    return np.asarray(np.exp(np.minimum(-mean, MAX_NATS))) if metric == "perplexity" else mean


def _bounds(samples: Floats) -> tuple[float, float]:
    low, high = np.quantile(samples, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _z() -> float:
    return NormalDist().inv_cdf((1 + LEVEL) / 2)
