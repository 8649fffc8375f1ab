"""An evaluation as JSON, and as one HTML file that needs nothing else: no scripts, no fonts, no network."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from veneer import __version__
from veneer.training.evaluation.error_analysis import CATEGORIES
from veneer.training.evaluation.evaluate import EvaluationResult, Outcome
from veneer.training.evaluation.metrics import Score, perplexity, shown
from veneer.training.evaluation.plots import COLOURS, categories_plot, metrics_plot
from veneer.training.evaluation.rows import Choices, expected_of, prompt_of

EXAMPLES = 200  # rows shown in HTML
CHARACTERS = 2000  # shown of a text in HTML


def to_dict(result: EvaluationResult, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Everything, for JSON. `settings`: how it was done, such as the data's name; put beside the results."""
    return {
        "veneer": __version__,
        "settings": dict(settings),
        "rows": len(result.rows),
        "models": [
            {
                "model": model.model,
                "metrics": {
                    metric: {"value": found.value, "low": found.low, "high": found.high}
                    for metric, found in model.metrics.items()
                },
                "errors": {name: model.categories[name] for name in CATEGORIES if model.categories[name]},
            }
            for model in result.models
        ],
        "comparisons": [
            {
                "first": each.first,
                "second": each.second,
                "differences": {
                    metric: found._asdict() | {"significant": found.significant}
                    for metric, found in each.differences.items()
                },
            }
            for each in result.comparisons
        ],
        "answers": [_row(result, place) for place in range(len(result.rows))],
    }


def to_html(result: EvaluationResult, settings: Mapping[str, Any]) -> str:
    """A page with the tables, plots and the first EXAMPLES rows, the last model's mistakes first."""
    order = sorted(range(len(result.rows)), key=lambda place: _interest(result, place))
    return _template().render(
        result=result,
        settings=settings,
        version=__version__,
        metrics=list(result.models[0].metrics),
        categories=[each for each in CATEGORIES if any(model.categories[each] for model in result.models)],
        colours=COLOURS,
        plots=[("Metrics with their 95 % intervals", _data_url(metrics_plot(result)))]
        + [("Right and wrong answers", _data_url(categories_plot(result)))] * _has_answers(result),
        examples=[_example(result, place) for place in order[:EXAMPLES]],
        shown=shown,
    )


def _row(result: EvaluationResult, place: int) -> dict[str, Any]:
    row = result.rows[place]
    told = {"choices": list(row.choices)} if isinstance(row, Choices) else {}
    outcomes = {model.model: model.outcomes[place] for model in result.models}
    return {
        "where": row.where,
        "prompt": [{"role": turn.role, "content": turn.content} for turn in prompt_of(row)],
        "expected": expected_of(row),
        **told,
        "models": {
            name: {
                "text": outcome.text,
                "error": outcome.category,
                "scores": {metric: _value(metric, score) for metric, score in outcome.scores.items()},
            }
            for name, outcome in outcomes.items()
        },
    }


def _value(metric: str, score: Score) -> float:
    return perplexity(score.value, score.weight) if metric == "perplexity" else float(score.value)


def _has_answers(result: EvaluationResult) -> bool:
    return result.models[0].outcomes[0].text is not None


def _interest(result: EvaluationResult, place: int) -> tuple[bool, bool]:
    """Sorts rows that the last model has wrong first, then those that any has wrong."""
    wrong = [model.outcomes[place].category is not None for model in result.models]
    return not wrong[-1], not any(wrong)


def _example(result: EvaluationResult, place: int) -> dict[str, Any]:
    row = result.rows[place]
    outcomes = [model.outcomes[place] for model in result.models]
    return {
        "where": row.where,
        "prompt": [(turn.role, _cut(turn.content)) for turn in prompt_of(row)],
        "expected": _cut(expected_of(row)),
        "outcomes": [(outcome, _cut(outcome.text or "")) for outcome in outcomes],
        "classes": sorted({outcome.category or "right" for outcome in outcomes} | _change(outcomes)),
    }


def _change(outcomes: list[Outcome]) -> set[str]:
    """Whether the last model mends or breaks what the one before it did."""
    if len(outcomes) < 2:
        return set()
    before, after = (outcome.category is None for outcome in outcomes[-2:])
    return {"mended" if after else "broken"} if before != after else set()


def _cut(text: str) -> str:
    return text if len(text) <= CHARACTERS else f"{text[:CHARACTERS]}… ({len(text)} characters)"


def _data_url(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(Path(__file__).with_name("report.html").read_text("utf-8"))
