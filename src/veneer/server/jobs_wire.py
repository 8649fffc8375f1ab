"""The bodies of the fine-tuning routes, and the objects they answer with: OpenAI's, with fields of our own.

A job's body may also have `adapter` and `training`, with fields of `Training` (training/recipe.py), and the
method `self_supervised`. Fields that nobody knows are refused by name; null means absent.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from veneer.errors import InvalidRequest
from veneer.server.errors import pydantic_error
from veneer.training.jobs.hyperparameters import METHODS, Method, described, resolve
from veneer.training.jobs.job_schema import Checkpoint, Event, File, Job
from veneer.training.jobs.job_store import NewJob

SEED_LIMIT = 2**31
_Auto = BeforeValidator(lambda value: None if value == "auto" else value)  # "auto" and absent are the same
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class Hyperparameters(_Strict):
    n_epochs: Annotated[int | None, Field(ge=1, le=50), _Auto] = None
    batch_size: Annotated[int | None, Field(ge=1, le=256), _Auto] = None
    learning_rate_multiplier: Annotated[float | None, Field(gt=0), _Auto] = None

    def given(self) -> dict[str, Any]:
        return {name: value for name, value in self.model_dump().items() if value is not None}


class DPOHyperparameters(Hyperparameters):
    beta: Annotated[float | None, Field(gt=0, le=2), _Auto] = None


class Supervised(_Strict):
    hyperparameters: Hyperparameters = Hyperparameters()


class DPO(_Strict):
    hyperparameters: DPOHyperparameters = DPOHyperparameters()


class MethodBody(_Strict):
    type: str
    supervised: Supervised | None = None
    dpo: DPO | None = None
    self_supervised: Supervised | None = None
    reinforcement: Any = None

    def kind(self) -> Method:
        """Raises `InvalidRequest` for what is no method here, or for the settings of another one."""
        found = [method for method in METHODS if method == self.type]
        if not found:
            raise InvalidRequest(
                f"method.type {self.type[:100]!r} is not supported; the methods are {', '.join(METHODS)}",
                param="method.type",
                code="unsupported_parameter",
            )
        for other in (*METHODS, "reinforcement"):
            if other != self.type and getattr(self, other) is not None:
                raise InvalidRequest(
                    f"method.{other} belongs to method.type {other!r}, and the type is {self.type!r}; "
                    "leave it out",
                    param=f"method.{other}",
                )
        return found[0]


class CreateJob(_Strict):
    model: Annotated[str, Field(min_length=1)]
    training_file: Annotated[str, Field(min_length=1)]
    validation_file: Annotated[str, Field(min_length=1)] | None = None
    suffix: Annotated[str, Field(min_length=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=SEED_LIMIT)] | None = None
    metadata: Metadata = {}
    method: MethodBody | None = None
    hyperparameters: Hyperparameters | None = None  # OpenAI's older form of method.supervised
    integrations: list[Any] = []
    # ours
    adapter: dict[str, Any] = {}
    training: dict[str, Any] = {}

    def job(self) -> NewJob:
        """With all values resolved. Raises `InvalidRequest`."""
        if self.integrations:
            raise InvalidRequest(
                "integrations are not supported: this server sends metrics to nobody; read the job's events",
                param="integrations",
                code="unsupported_parameter",
            )
        if self.training_file == self.validation_file:
            raise InvalidRequest(
                "validation_file is the training_file; losses on rows that were trained tell nothing",
                param="validation_file",
            )
        method, hyperparameters = self._method()
        training = resolve(
            method,
            hyperparameters.given(),
            adapter=self.adapter,
            training=self.training,
            seed=secrets.randbelow(SEED_LIMIT) if self.seed is None else self.seed,
            has_validation=self.validation_file is not None,
        )
        return NewJob(
            model=self.model,
            training_file=self.training_file,
            validation_file=self.validation_file,
            suffix=self.suffix,
            labels=self.metadata,
            method=described(training),
            training=training,
        )

    def _method(self) -> tuple[Method, Hyperparameters]:
        if self.method is None:
            return "supervised", self.hyperparameters or Hyperparameters()
        if self.hyperparameters is not None:
            raise InvalidRequest(
                "hyperparameters is the older form of method.supervised.hyperparameters; send one of them",
                param="hyperparameters",
            )
        method = self.method.kind()
        settings = getattr(self.method, method)
        return method, settings.hyperparameters if settings else Hyperparameters()


def parse_job(raw: bytes) -> CreateJob:
    """Read and check a job's body. Raises `InvalidRequest`."""
    try:
        data = msgspec.json.decode(raw)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"The request's body is not valid JSON: {error}.", code="invalid_json") from None
    if not isinstance(data, dict):
        raise InvalidRequest("The request's body must be a JSON object.", code="invalid_json")
    try:
        return CreateJob.model_validate({name: value for name, value in data.items() if value is not None})
    except ValidationError as error:
        raise pydantic_error(list(error.errors(include_url=False))) from None


# ---- answers --------------------------------------------------------------------------------------


def file_object(file: File) -> dict[str, Any]:
    """OpenAI's `File`. Files are stored whole or not at all, so each is processed."""
    shown = {
        "id": file.id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": file.created_at,
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
    }
    return shown if file.expires_at is None else shown | {"expires_at": file.expires_at}


def job_object(job: Job, seconds_left: float | None = None) -> dict[str, Any]:
    """OpenAI's `FineTuningJob`; ours are `training`, `step`, `total_steps` and `data_report`."""
    method: Mapping[str, Any] = job.method
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "created_at": job.created_at,
        "finished_at": job.finished_at,
        "estimated_finish": None if seconds_left is None else int(time.time() + seconds_left),
        "status": job.status,
        "error": job.error,
        "model": job.model,
        "fine_tuned_model": job.fine_tuned_model,
        "training_file": job.training_file,
        "validation_file": job.validation_file,
        "result_files": job.result_files,
        "trained_tokens": job.tokens if job.status == "succeeded" else None,
        "seed": job.seed,
        "organization_id": "veneer",
        "integrations": [],
        "metadata": job.labels,
        "method": method,
        "hyperparameters": method[method["type"]]["hyperparameters"],
        "training": job.training,
        "step": job.step,
        "total_steps": job.total_steps,
        "data_report": job.report,
    }


def event_object(event: Event) -> dict[str, Any]:
    return {
        "id": event.id,
        "object": "fine_tuning.job.event",
        "created_at": event.created_at,
        "level": event.level,
        "type": event.kind,
        "message": event.message,
        "data": event.data,
    }


def checkpoint_object(checkpoint: Checkpoint, job: str) -> dict[str, Any]:
    return {
        "id": checkpoint.id,
        "object": "fine_tuning.job.checkpoint",
        "created_at": checkpoint.created_at,
        "fine_tuned_model_checkpoint": checkpoint.name,
        "fine_tuning_job_id": job,
        "step_number": checkpoint.step,
        "metrics": checkpoint.metrics,
    }


def list_object(data: list[dict[str, Any]], has_more: bool, *, ends: Any = ...) -> dict[str, Any]:
    """OpenAI's list. With `ends`, also the ids at both ends, or that for an empty list."""
    listed: dict[str, Any] = {"object": "list", "data": data, "has_more": has_more}
    if ends is ...:
        return listed
    return listed | {
        "first_id": data[0]["id"] if data else ends,
        "last_id": data[-1]["id"] if data else ends,
    }
