"""`/health`, `/ready`, `/version` and `/metrics`.

/health   200 while the engine lives (starting, ready or draining), 503 when it is dead and stays so
/ready    200 only while requests can be served; load balancers send traffic by it
/metrics  Prometheus' text format; needs an API key like every other route (see auth.py)
"""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST

import veneer
from veneer.server.jobs import Progress, supervisor_of
from veneer.server.metrics import EngineView, PrometheusMetrics
from veneer.server.state import ServerState, state_of

router = APIRouter()


def _answer(status: int, body: dict[str, Any]) -> Response:
    return Response(msgspec.json.encode(body), status, media_type="application/json")


@router.get("/health")
async def health(request: Request) -> Response:
    """What the server serves with; `engine` is null until it has started, `notes` names its fallbacks.

    `job` is the fine-tuning job that it trains now, or null; `hot_adapter` the merged copy of the adapter that
    dominates (docs/hot-adapters.md), or null where none is made.
    """
    state = state_of(request)
    engine = state.engine
    body: dict[str, Any] = {
        "status": engine.state,
        "version": veneer.__version__,
        "model": state.served_name,
        "engine": engine.info,
        "restarts": engine.restarts,
        "job": _job(supervisor_of(request).progress),
        "hot_adapter": None if engine.stats is None else engine.stats.hot_adapter,
    }
    if engine.last_error is not None:
        body["last_error"] = engine.last_error
    return _answer(503 if engine.state == "dead" else 200, body)


@router.get("/ready")
async def ready(request: Request) -> Response:
    state = state_of(request)
    status = "registering" if state.registering and state.engine.state == "ready" else state.engine.state
    return _answer(200 if status == "ready" else 503, {"status": status})


@router.get("/version")
async def version() -> Response:
    return _answer(200, {"version": veneer.__version__})


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    state = state_of(request)
    assert isinstance(state.metrics, PrometheusMetrics), "create_app's caller passes PrometheusMetrics"
    view = EngineView(
        model_name=state.served_name,
        state=state.engine.state,
        restarts=state.engine.restarts,
        info=state.engine.info,
        stats=state.engine.stats,
        names=await asyncio.to_thread(_names, state),
        jobs=await asyncio.to_thread(state.jobs.counts),
        training=supervisor_of(request).progress,
    )
    return Response(state.metrics.render(view), media_type=CONTENT_TYPE_LATEST)


def _job(progress: Progress | None) -> dict[str, Any] | None:
    if progress is None:
        return None
    names = ("step", "total_steps", "tokens", "tokens_per_second", "seconds_left")
    return {"id": progress.job} | {name: getattr(progress, name) for name in names}


def _names(state: ServerState) -> dict[str, str]:
    """A name for each digest that a name selects now; an adapter's own name goes before its aliases."""
    found: dict[str, str] = {}
    for record in state.store.list():
        if record.alias is None:
            found[record.digest] = record.name
        else:
            found.setdefault(record.digest, record.name)
    return found
