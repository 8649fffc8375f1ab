"""The evaluation of a job's result before it is published: the base, the version before it and the new one, on the
rows that the engine held out, asked through this server's own routes as `veneer eval` asks.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.training.evaluation.rows import read_evaluation_rows
from veneer.training.jobs.job_schema import Job
from veneer.training.recipe import HELD_OUT, Training

if TYPE_CHECKING:  # they import numpy, which the server starts without
    from veneer.training.evaluation.evaluate import EvaluationResult
    from veneer.training.evaluation.gate import GateDecision

OPEN_QUESTIONS = 16  # at a time: other requests are served meanwhile

# Models as `veneer.server.eval_client.ServerModels`, for a recipe's template and tokens of an answer.
MakeModels = Callable[[str, int], AbstractAsyncContextManager[Any]]


@dataclass(frozen=True)
class Evaluated:
    result: EvaluationResult
    decision: GateDecision | None  # None: the job has no gate
    files: dict[str, bytes]  # by name: the evaluation as JSON and as a page

    def shown(self) -> dict[str, Any]:
        """For the job's event."""
        metrics = {
            model.model: {name: round(found.value, 6) for name, found in model.metrics.items()}
            for model in self.result.models
        }
        gate = {} if self.decision is None else {"gate": self.decision._asdict()}
        return {"evaluation": metrics, **gate}


def wanted_evaluation(folder: Path) -> Training | None:
    """What the job in the folder asks for, if that is an evaluation, too, and there are rows for it."""
    training = Training.model_validate_json((folder / "training.json").read_text("utf-8"))
    wanted = "evaluation" in training.model_fields_set and training.evaluation.rows > 0
    return training if wanted and (folder / HELD_OUT).exists() else None


async def evaluate_job(
    job: Job, training: Training, folder: Path, make_models: MakeModels, new: str, previous: str | None
) -> Evaluated:
    """Compare `new` with the base and with `previous`, names under which this server has them."""
    from veneer.training.evaluation.evaluate import evaluate, metrics_for
    from veneer.training.evaluation.gate import gate_passed

    settings, gate = training.evaluation, training.evaluation.gate
    rows = await asyncio.to_thread(read_evaluation_rows, folder / HELD_OUT, settings.rows)
    metrics = metrics_for(rows)
    if gate is not None and gate.metric not in metrics:
        metrics = (*metrics, *metrics_for(rows, [gate.metric]))
    names = [job.model, *([] if previous is None else [previous]), new]
    async with make_models(training.template, settings.max_new_tokens) as models:
        result = await evaluate(
            rows, names, metrics, generate=models.generate, score=models.score, concurrency=OPEN_QUESTIONS
        )
    decision = None if gate is None else gate_passed(gate, result, new=new, base=job.model, previous=previous)
    return Evaluated(result, decision, await asyncio.to_thread(_files, result, job))


def _files(result: EvaluationResult, job: Job) -> dict[str, bytes]:
    from veneer.training.evaluation.report import to_dict, to_html

    settings = {"job": job.id, "rows": "held out of the training data"}
    page = to_html(result, settings)
    return {
        "evaluation.json": json.dumps(to_dict(result, settings), ensure_ascii=False).encode(),
        "evaluation.html": page.encode(),
    }
