"""`/v1/fine_tuning/jobs`: OpenAI's fine-tuning jobs, trained on the resident base.

    POST /v1/fine_tuning/jobs                   queue a job (jobs_wire.py has the body)
    GET  /v1/fine_tuning/jobs                   ?limit= &after= &metadata[key]=value
    GET  /v1/fine_tuning/jobs/ID                /events and /checkpoints below it, ?limit= &after=
    POST /v1/fine_tuning/jobs/ID/cancel         also /pause and /resume

What the statuses mean is in server/jobs.py. Lists begin with the newest.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Query, Request, Response

from veneer.adapters.names import is_name
from veneer.errors import EngineUnavailable, InvalidRequest, NotFound
from veneer.server.files_api import After
from veneer.server.jobs import JobSupervisor, supervisor_of
from veneer.server.jobs_wire import (
    CreateJob,
    checkpoint_object,
    event_object,
    job_object,
    list_object,
    parse_job,
)
from veneer.server.state import ServerState, state_of
from veneer.server.upload import FIELD_LIMIT, limited_body
from veneer.training.jobs.job_schema import Job

router = APIRouter()

Limit = Annotated[int, Query(ge=1, le=1000)]
_METADATA = re.compile(r"metadata\[(.+)\]", re.DOTALL)


@router.post("/v1/fine_tuning/jobs")
async def create_job(request: Request) -> Response:
    state = state_of(request)
    if state.engine.state in ("draining", "dead"):
        raise EngineUnavailable(f"The engine is {state.engine.state} and trains nothing more.")
    body = parse_job(b"".join([chunk async for chunk in limited_body(request, FIELD_LIMIT)]))
    _check_model(state, body)
    config = state.config
    job = await asyncio.to_thread(
        state.jobs.create, body.job(), most=config.max_jobs, unfinished=config.max_unfinished_jobs
    )
    supervisor_of(request).look()
    return _answer(job_object(job))


@router.get("/v1/fine_tuning/jobs")
async def list_jobs(request: Request, limit: Limit = 20, after: After = None) -> Response:
    supervisor = supervisor_of(request)
    wanted = _filter(request)
    found, more = await asyncio.to_thread(
        state_of(request).jobs.page, after=after, limit=limit, wanted=wanted
    )
    return _answer(list_object([_shown(supervisor, job) for job in found], more))


@router.get("/v1/fine_tuning/jobs/{job_id}")
async def get_job(request: Request, job_id: str) -> Response:
    job = await asyncio.to_thread(state_of(request).jobs.get, job_id)
    return _answer(_shown(supervisor_of(request), job))


@router.post("/v1/fine_tuning/jobs/{job_id}/cancel")
async def cancel_job(request: Request, job_id: str) -> Response:
    return await _turned(request, state_of(request).jobs.cancel, job_id)


@router.post("/v1/fine_tuning/jobs/{job_id}/pause")
async def pause_job(request: Request, job_id: str) -> Response:
    return await _turned(request, state_of(request).jobs.pause, job_id)


@router.post("/v1/fine_tuning/jobs/{job_id}/resume")
async def resume_job(request: Request, job_id: str) -> Response:
    return await _turned(request, state_of(request).jobs.resume, job_id)


@router.get("/v1/fine_tuning/jobs/{job_id}/events")
async def list_events(request: Request, job_id: str, limit: Limit = 20, after: After = None) -> Response:
    found, more = await asyncio.to_thread(state_of(request).jobs.events, job_id, after=after, limit=limit)
    return _answer(list_object([event_object(each) for each in found], more))


@router.get("/v1/fine_tuning/jobs/{job_id}/checkpoints")
async def list_checkpoints(request: Request, job_id: str, limit: Limit = 10, after: After = None) -> Response:
    found, more = await asyncio.to_thread(
        state_of(request).jobs.checkpoints, job_id, after=after, limit=limit
    )
    return _answer(list_object([checkpoint_object(each, job_id) for each in found], more, ends=None))


def _check_model(state: ServerState, body: CreateJob) -> None:
    """A job starts from the base alone."""
    if body.model == state.served_name:
        return
    name = body.model.removeprefix(f"{state.served_name}:").partition("@")[0]
    if is_name(name) and any(each.served_name == name for each in state.store.list()):
        raise InvalidRequest(
            f"{body.model[:200]!r} is an adapter; a job starts from the base, {state.served_name!r}: "
            "training an adapter further is not supported",
            param="model",
            code="unsupported_parameter",
        )
    raise NotFound(
        f"the model {body.model[:200]!r} does not exist; a job trains an adapter of {state.served_name!r}",
        param="model",
        code="model_not_found",
    )


def _filter(request: Request) -> Callable[[Job], bool]:
    """By `metadata[key]=value`, all of them; `metadata=null` asks for jobs without any."""
    wanted: dict[str, str] = {}
    none = False
    for key, value in request.query_params.multi_items():
        if match := _METADATA.fullmatch(key):
            wanted[match[1]] = value
        elif key == "metadata":
            if value != "null":
                raise InvalidRequest(
                    f"metadata={value[:100]!r}: write metadata[key]=value, or metadata=null for jobs without any",
                    param="metadata",
                )
            none = True
    if none:
        return lambda job: not job.labels
    return lambda job: all(job.labels.get(key) == value for key, value in wanted.items())


async def _turned(request: Request, change: Callable[[str], Job], job_id: str) -> Response:
    supervisor = supervisor_of(request)
    return _answer(_shown(supervisor, await supervisor.turn(change, job_id)))


def _shown(supervisor: JobSupervisor, job: Job) -> dict[str, Any]:
    progress = supervisor.progress
    running = progress is not None and progress.job == job.id and job.status == "running"
    return job_object(job, progress.seconds_left if progress and running else None)


def _answer(body: dict[str, Any]) -> Response:
    return Response(msgspec.json.encode(body), media_type="application/json")
