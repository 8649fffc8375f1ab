"""Models answer the same rows and are compared: values with intervals, paired differences, categories of errors.

    result = await evaluate(rows, ["base", "mine@1", "mine@2"], metrics, generate=generate, score=score)

Who runs the models is the caller's affair: `generate` and `score` may ask a server (`veneer eval`) or the resident
base. `assess` makes the result of answers that are there already, and is pure. Imports no torch.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple, Protocol

from veneer.errors import InvalidRequest, VeneerError
from veneer.training.data.formats import Row
from veneer.training.evaluation.confidence import Difference, Measured, compare, measure
from veneer.training.evaluation.error_analysis import Category, categorize
from veneer.training.evaluation.metrics import (
    ANSWER_METRICS,
    CHOICE_METRICS,
    Metric,
    Score,
    exact_match,
    most_likely,
    normalized_match,
    token_f1,
)
from veneer.training.evaluation.rows import Choices, EvaluationRow, Turn, expected_of, prompt_of


class Generation(NamedTuple):
    text: str
    finish_reason: str | None = None  # "length": it ended at the limit of tokens


class GenerateAnswer(Protocol):
    def __call__(self, model: str, prompt: Sequence[Turn]) -> Awaitable[Generation]:
        """The model's greedy answer."""


class ScoreTexts(Protocol):
    def __call__(
        self, model: str, prompt: Sequence[Turn], texts: Sequence[str]
    ) -> Awaitable[Sequence[Sequence[float]]]:
        """For each text its tokens' log probabilities in nats, as the answer to the prompt.

        Without a prompt the texts stand alone; a first token, which nothing precedes, has none and is left out.
        """


@dataclass(frozen=True)
class Answer:
    """What one model gave for one row; what no metric needs is not there."""

    generation: Generation | None = None
    log_probabilities: Sequence[Sequence[float]] = ()  # of the expected answer's tokens, or of each choice's


@dataclass(frozen=True)
class Outcome:
    """One model's row. `text` is the answer, or the most likely choice; None where nothing is answered."""

    text: str | None
    category: Category | None  # None: not wrong
    scores: Mapping[Metric, Score]


@dataclass(frozen=True)
class ModelResult:
    model: str
    outcomes: Sequence[Outcome]  # one a row
    metrics: Mapping[Metric, Measured]

    @cached_property
    def categories(self) -> Counter[Category]:
        return Counter(outcome.category for outcome in self.outcomes if outcome.category is not None)


@dataclass(frozen=True)
class Comparison:
    """The second model minus the first."""

    first: str
    second: str
    differences: Mapping[Metric, Difference]


@dataclass(frozen=True)
class EvaluationResult:
    rows: Sequence[EvaluationRow]
    models: Sequence[ModelResult]
    comparisons: Sequence[Comparison]  # of each model with the first, and with the one before it

    def __getitem__(self, model: str) -> ModelResult:
        return {each.model: each for each in self.models}[model]


def metrics_for(rows: Sequence[EvaluationRow], asked: Sequence[Metric] = ()) -> tuple[Metric, ...]:
    """Those asked for, or all that such rows have; but perplexity of answers, a request more, only if asked for.

    Raises:
        InvalidRequest: the rows do not have a metric that was asked for.
    """
    if isinstance(rows[0], Row):
        default, possible = ANSWER_METRICS, (*ANSWER_METRICS, "perplexity")
    else:
        default = possible = CHOICE_METRICS if isinstance(rows[0], Choices) else ("perplexity",)
    if missing := [metric for metric in asked if metric not in possible]:
        raise InvalidRequest(f"these rows have no metric {missing[0]!r}; theirs are {', '.join(possible)}")
    return tuple(dict.fromkeys(asked)) or default


async def evaluate(
    rows: Sequence[EvaluationRow],
    models: Sequence[str],
    metrics: Sequence[Metric],
    *,
    generate: GenerateAnswer,
    score: ScoreTexts,
    concurrency: int = 16,
    on_answer: Callable[[], object] = lambda: None,
) -> EvaluationResult:
    """Ask every model every row and assess the answers. `rows` are of one kind, at least one; see `metrics_for`.

    At most `concurrency` questions are open, those of one row to all models next to each other, so that whoever
    answers can batch them. `on_answer` is called after each. The first failure ends it and is raised.
    """
    answers: list[list[Answer]] = [[Answer()] * len(rows) for _ in models]
    places = iter([(row, model) for row in range(len(rows)) for model in range(len(models))])

    async def work() -> None:
        for row, model in places:  # shared by all workers
            try:
                answers[model][row] = await _ask(rows[row], models[model], metrics, generate, score)
            except VeneerError as error:
                error.message = f"{rows[row].where} to {models[model]}: {error.message}"
                raise
            on_answer()

    try:
        async with asyncio.TaskGroup() as workers:
            for _ in range(concurrency):
                workers.create_task(work())
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return assess(rows, models, metrics, answers)


async def _ask(
    row: EvaluationRow, model: str, metrics: Iterable[Metric], generate: GenerateAnswer, score: ScoreTexts
) -> Answer:
    generation: Generation | None = None
    likelihoods: Sequence[Sequence[float]] = ()
    if not set(ANSWER_METRICS).isdisjoint(metrics):
        generation = await generate(model, prompt_of(row))
    if isinstance(row, Choices) or "perplexity" in metrics:
        texts = row.choices if isinstance(row, Choices) else (expected_of(row),)
        likelihoods = await score(model, prompt_of(row), texts)
    return Answer(generation, likelihoods)


def assess(
    rows: Sequence[EvaluationRow],
    models: Sequence[str],
    metrics: Sequence[Metric],
    answers: Sequence[Sequence[Answer]],
) -> EvaluationResult:
    """The result of answers. `answers[m][r]` is model m's to row r, with what `metrics` need."""
    results = []
    for model, given in zip(models, answers, strict=True):
        outcomes = [_outcome(row, answer, metrics) for row, answer in zip(rows, given, strict=True)]
        measured = {metric: measure(metric, [each.scores[metric] for each in outcomes]) for metric in metrics}
        results.append(ModelResult(model, outcomes, measured))
    pairs = [(results[0], each) for each in results[2:]]
    return EvaluationResult(rows, results, [compare_models(*pair) for pair in [*pairwise(results), *pairs]])


def compare_models(first: ModelResult, second: ModelResult) -> Comparison:
    """Both have answered the same rows."""
    differences = {
        metric: compare(
            metric, *([each.scores[metric] for each in model.outcomes] for model in (first, second))
        )
        for metric in first.metrics
    }
    return Comparison(first.model, second.model, differences)


def _outcome(row: EvaluationRow, answer: Answer, metrics: Iterable[Metric]) -> Outcome:
    if isinstance(row, Choices):
        return _choice(row, answer, metrics)
    expected = expected_of(row)
    text, reason = answer.generation or (None, None)
    scores = {metric: _score(metric, text or "", expected, answer) for metric in metrics}
    return Outcome(text, None if text is None else categorize(text, expected, reason), scores)


def _score(metric: Metric, text: str, expected: str, answer: Answer) -> Score:
    match metric:
        case "exact_match":
            return Score(exact_match(text, expected))
        case "normalized_match":
            return Score(normalized_match(text, expected))
        case "token_f1":
            return Score(token_f1(text, expected))
    (likelihoods,) = answer.log_probabilities
    return Score(math.fsum(likelihoods), len(likelihoods))


def _choice(row: Choices, answer: Answer, metrics: Iterable[Metric]) -> Outcome:
    sums = [math.fsum(each) for each in answer.log_probabilities]
    chosen = {
        "accuracy": most_likely(sums),
        "accuracy_normalized": most_likely(sums, [len(choice) for choice in row.choices]),
    }
    scores = {metric: Score(chosen[metric] == row.right) for metric in metrics}
    shown = chosen[next(iter(scores))]
    return Outcome(row.choices[shown], None if shown == row.right else "choice", scores)
