"""`veneer eval …`: models of a running server side by side on the same rows, in the terminal, as HTML and as JSON.

Exit status: 0 evaluated, and the gate passed if there is one; 1 an error; 3 the gate did not pass.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Iterable, Iterator, Sequence

from pydantic import ValidationError
from tqdm import tqdm

from veneer.errors import InvalidRequest
from veneer.server.adapters_cli import key_of
from veneer.server.eval_client import BASE, ServerModels
from veneer.training.evaluation.confidence import Difference, Measured
from veneer.training.evaluation.error_analysis import CATEGORIES
from veneer.training.evaluation.evaluate import EvaluationResult, evaluate, metrics_for
from veneer.training.evaluation.gate import GateDecision, gate_passed
from veneer.training.evaluation.metrics import Metric, shown
from veneer.training.evaluation.report import to_dict, to_html
from veneer.training.evaluation.rows import EvaluationRow, read_evaluation_rows
from veneer.training.recipe import Gate

GATE_NOT_PASSED = 3


def run(arguments: argparse.Namespace) -> int:
    """Evaluate `arguments.model` on `arguments.data`; returns the exit status."""
    models: list[str] = arguments.model
    if len(set(models)) < len(models):
        raise InvalidRequest(f"--model: each model once (got {', '.join(models)})")
    if arguments.output is not None and not arguments.output.parent.is_dir():
        raise InvalidRequest(f"--output {arguments.output}: its folder does not exist; make it first")
    rows = read_evaluation_rows(arguments.data, arguments.rows)
    metrics = metrics_for(rows, arguments.metric)
    gate = _gate(arguments, metrics[0])
    result = asyncio.run(_evaluate(arguments, rows, metrics))
    decision = None if gate is None else _decide(gate, result)
    settings = {
        "data": arguments.data.name,
        "template": arguments.template,
        "max_new_tokens": arguments.max_new_tokens,
    }
    if arguments.json:
        told = {} if decision is None else {"gate": decision._asdict()}
        print(json.dumps(to_dict(result, settings) | told, ensure_ascii=False, indent=2, allow_nan=False))
    else:
        print("\n".join(summary(result)))
        if decision is not None:
            print(f"\ngate {'passed' if decision.passed else 'not passed'}: {decision.reason}")
    if arguments.output is not None:
        arguments.output.write_text(to_html(result, settings), encoding="utf-8")
    return 0 if decision is None or decision.passed else GATE_NOT_PASSED


async def _evaluate(
    arguments: argparse.Namespace, rows: Sequence[EvaluationRow], metrics: Sequence[Metric]
) -> EvaluationResult:
    server = ServerModels(
        arguments.url,
        api_key=key_of(arguments),
        template=arguments.template,
        max_new_tokens=arguments.max_new_tokens,
    )
    async with server:
        if BASE in arguments.model:
            await server.find_base()
        with tqdm(total=len(rows) * len(arguments.model), desc="evaluating", unit="answer") as bar:
            return await evaluate(
                rows,
                arguments.model,
                metrics,
                generate=server.generate,
                score=server.score,
                concurrency=arguments.concurrency,
                on_answer=bar.update,
            )


def _gate(arguments: argparse.Namespace, metric: Metric) -> Gate | None:
    """The gate of the last model: by the first metric, against the first model and the one before the last."""
    if arguments.at_least is None and arguments.no_worse_than is None:
        return None
    if arguments.no_worse_than is not None and len(arguments.model) < 2:
        raise InvalidRequest("--no-worse-than compares the last --model with one before it; give two or more")
    try:
        return Gate(metric=metric, at_least=arguments.at_least, no_worse_than=arguments.no_worse_than)
    except ValidationError as error:
        raise InvalidRequest(f"--at-least: {error.errors()[0]['msg']}") from error


def _decide(gate: Gate, result: EvaluationResult) -> GateDecision:
    names = [model.model for model in result.models]
    if len(names) == 1:
        return gate_passed(gate, result, new=names[0])
    return gate_passed(gate, result, new=names[-1], base=names[0], previous=names[-2])


def summary(result: EvaluationResult) -> Iterator[str]:
    """The lines of the terminal's tables: metrics, categories of errors, differences."""
    names = [model.model for model in result.models]
    metrics = list(result.models[0].metrics)
    yield from _columns(
        [(f"{len(result.rows)} rows", *names)]
        + [(each, *(_measured(each, model.metrics[each]) for model in result.models)) for each in metrics]
    )
    found = [name for name in CATEGORIES if any(model.categories[name] for model in result.models)]
    if found:
        yield ""
        counts = [(name, *(str(model.categories[name]) for model in result.models)) for name in found]
        yield from _columns([("errors", *names), *counts])
    if result.comparisons:
        yield ""
        yield from _columns(
            [("differences", "", "value", "p", "rows better", "worse", ""), *_differences(result)]
        )


def _differences(result: EvaluationResult) -> Iterator[tuple[str, ...]]:
    for each in result.comparisons:
        for metric, found in each.differences.items():
            yield (
                f"{each.second} − {each.first}",
                metric,
                _measured(metric, found),
                f"{found.p_value:.2g}",
                str(found.better),
                str(found.worse),
                "more than chance" if found.significant else "may be chance",
            )


def _measured(metric: Metric, found: Measured | Difference) -> str:
    return f"{shown(metric, found.value)} [{shown(metric, found.low)}, {shown(metric, found.high)}]"


def _columns(rows: Iterable[Sequence[str]]) -> Iterator[str]:
    table = list(rows)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
