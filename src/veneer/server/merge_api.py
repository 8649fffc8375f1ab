"""`POST /v1/adapters/merge`: a new version of an adapter out of several, by a recipe.

    {"name": "both", "adapters": [{"id": "a", "weight": 0.7}, {"id": "b"}], "method": "ties_svd", "density": 0.2}

The engine does it beside its steps, and one merge at a time. A merge that was begun is finished, whoever leaves.
With `"stream": true` the answer is server-sent events: progress, then the adapter or an error, then [DONE]; its
header `x-veneer-merge` has the id with which `POST /v1/adapters/merge/ID/cancel` ends it.
"""

from __future__ import annotations

import asyncio
import shutil
import uuid
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from fastapi import APIRouter, Request, Response
from pydantic import Field
from starlette.responses import StreamingResponse

from veneer.adapters.names import FILES, TEXT_FILES
from veneer.adapters.recipes import DRAWS, ELECTS, SEED_LIMIT, recipe
from veneer.adapters.saved_blends import Blend, digests_of
from veneer.adapters.schema import AdapterVersion
from veneer.adapters.staging import Staging
from veneer.engine.messages import Merged
from veneer.errors import Conflict, InvalidRequest, MergeCancelled, NotFound, VeneerError
from veneer.server.adapters_api import adapter_object, require_engine
from veneer.server.blend_wire import Density, Rank, Strict, WeightedAdapters, ingredient
from veneer.server.errors import INTERNAL, error_body
from veneer.server.publish import publish
from veneer.server.state import ServerState, state_of

router = APIRouter()
ROUTE = "/v1/adapters/merge"
SVD = "_svd"


class MergeBody(Strict):
    """What a merge is asked for. `rank`, `density`, … only for the methods that use them."""

    name: str
    adapters: WeightedAdapters
    method: Literal[
        "linear",
        "cat",
        "svd",
        "ties",
        "ties_svd",
        "dare_linear",
        "dare_linear_svd",
        "dare_ties",
        "dare_ties_svd",
        "magnitude_prune",
        "magnitude_prune_svd",
    ] = "linear"
    density: Density | None = None
    majority_sign_method: Literal["total", "frequency"] | None = None
    seed: Annotated[int, Field(ge=0, lt=SEED_LIMIT)] | None = None
    rank: Rank | None = None
    stream: bool = False
    allow_ineffective: bool = False


class Plan(NamedTuple):
    """A merge that can begin."""

    blend: Blend
    keep_rows: bool


@dataclass
class Merge:
    """A merge that waits for its turn or is under way."""

    id: str = field(default_factory=lambda: f"merge-{uuid.uuid4().hex}")
    news: asyncio.Queue[tuple[int, int]] = field(default_factory=asyncio.Queue)  # sites done, of how many
    has_turn: bool = False
    cancelled: bool = False
    task: asyncio.Task[AdapterVersion] = field(init=False)


@router.post(ROUTE)
async def merge_adapters(request: Request, body: MergeBody) -> Response:
    """201 with the adapter; 200 when the name's current version has this very content already."""
    state = state_of(request)
    require_engine(state)
    plan = make_plan(state, body)
    merge = Merge()
    merge.task = asyncio.create_task(_merge(state, body, plan, merge))
    state.merges[merge.id] = merge
    merge.task.add_done_callback(lambda _: state.merges.pop(merge.id))
    if body.stream:
        events = _events(state, merge)
        return StreamingResponse(events, headers={"x-veneer-merge": merge.id}, media_type="text/event-stream")
    record = await asyncio.shield(merge.task)
    content = msgspec.json.encode(adapter_object(state, record))
    return Response(content, 201 if record.created else 200, media_type="application/json")


@router.post(ROUTE + "/{merge_id}/cancel")
async def cancel_merge(request: Request, merge_id: str) -> dict[str, Any]:
    """End a merge before its turn or at its next layer. Its own answer is 409 `merge_cancelled` then."""
    state = state_of(request)
    merge = state.merges.get(merge_id)
    if merge is None:
        raise NotFound(f"No merge {merge_id[:100]!r} is under way; it may be over.", param="merge_id")
    merge.cancelled = True
    if not merge.has_turn:
        merge.task.cancel()
    state.engine.cancel_merge(merge.id)
    await asyncio.wait({merge.task})
    if not isinstance(error := merge.task.exception(), VeneerError) or error.code != MergeCancelled.code:
        raise Conflict(f"The merge {merge_id!r} ended before it could be cancelled.")
    return {"id": merge.id, "object": "adapter.merge", "status": "cancelled"}


def make_plan(state: ServerState, body: MergeBody) -> Plan:
    """The recipe that a body asks for. Raises InvalidRequest for fields that its method does not use."""
    method, svd, _ = body.method.partition(SVD)
    method, wants_rank = ("linear", True) if body.method == "svd" else (method, bool(svd))
    keep_rows = method == "cat"
    method = "linear" if keep_rows else method
    used = {
        "density": method != "linear",
        "majority_sign_method": method in ELECTS,
        "seed": method in DRAWS,
        "rank": wants_rank,
    }
    for name, is_used in used.items():
        value = getattr(body, name)
        if value is not None and not is_used:
            raise InvalidRequest(
                f"{name}={value} does nothing with method {body.method}; leave it out.", param=name
            )
    if body.density is None and method != "linear":
        raise InvalidRequest(f"method {body.method} needs a density, above 0 and at most 1.", param="density")
    ingredients = [ingredient(state.store, state.served_name, each, "adapters") for each in body.adapters]
    rank = body.rank
    if wants_rank and rank is None:  # as PEFT
        rank = max(1, *(int(each.adapter.details.get("rank") or 0) for each in ingredients))
    made = recipe(
        [each.part for each in ingredients],
        method,
        density=1.0 if body.density is None else body.density,
        sign=body.majority_sign_method or "total",
        seed=body.seed or 0,
        rank=rank,
    )
    if not made.parts:
        raise InvalidRequest("the weights leave nothing: that is the base", param="adapters")
    left = {part.key for part in made.parts}
    return Plan(Blend(made, tuple(each for each in ingredients if each.part.key in left)), keep_rows)


async def _merge(state: ServerState, body: MergeBody, plan: Plan, merge: Merge) -> AdapterVersion:
    """Hold the adapters, wait for the turn, have them merged, publish what comes out."""
    with state.in_flight.hold(*digests_of(plan.blend)):
        try:
            await state.texts.of(plan.blend)  # they must be read alike
            async with state.merging:
                merge.has_turn = True
                return await _publish(state, body, plan, merge)
        except asyncio.CancelledError:
            if merge.cancelled:
                raise MergeCancelled from None
            raise


async def _publish(state: ServerState, body: MergeBody, plan: Plan, merge: Merge) -> AdapterVersion:
    blend = plan.blend
    found: dict[str, Any] = {"recipe": _described(body, blend)}
    loop = asyncio.get_running_loop()

    async def merged(folder: str) -> Merged:
        if merge.cancelled:
            raise MergeCancelled
        assert blend.key is not None
        return await state.engine.merge_adapters(
            merge.id,
            blend.key,
            folder,
            keep_rows=plan.keep_rows,
            progress=lambda *each: merge.news.put_nowait(each),
        )

    def fill(staging: Staging) -> None:
        """In a thread."""
        if blend.recipe.is_plain and not blend.ingredients[0].task:
            _copy(state, blend.adapters[0], staging, [*FILES, *TEXT_FILES])
            found["distance"] = 0.0
            return
        _copy(state, blend.adapters[0], staging, list(TEXT_FILES))
        made = asyncio.run_coroutine_threadsafe(merged(str(staging.path)), loop).result()
        found["distance"], found["warnings"] = made.distance, made.warnings

    return await publish(state, body.name, fill, allow_ineffective=body.allow_ineffective, more=found)


def _copy(state: ServerState, adapter: AdapterVersion, staging: Staging, names: list[str]) -> None:
    folder = state.store.blob(adapter.digest)
    for name in names:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, staging.path / name)


def _described(body: MergeBody, blend: Blend) -> dict[str, Any]:
    """The recipe for the adapter's details: with the versions, and all numbers as they were used."""
    made = blend.recipe
    parts = [
        {
            "id": f"{each.adapter.name}@{each.adapter.version}",
            "digest": each.adapter.digest,
            "task_id": each.task if each.adapter.tasks else None,
            "weight": each.weight,
        }
        for each in blend.ingredients
    ]
    described: dict[str, Any] = {"method": body.method, "adapters": parts}
    if body.density is not None:
        described["density"] = body.density
    if made.method in ELECTS:
        described["majority_sign_method"] = made.sign
    if made.method in DRAWS:
        described["seed"] = made.seed
    return described | ({} if made.rank is None else {"rank": made.rank})


async def _events(state: ServerState, merge: Merge) -> AsyncGenerator[bytes]:
    while not merge.task.done():
        waiting = asyncio.ensure_future(merge.news.get())
        await asyncio.wait({merge.task, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if waiting.done():
            done, total = waiting.result()
            yield _event({"object": "adapter.merge.progress", "done": done, "total": total})
        else:
            waiting.cancel()
    try:
        yield _event(adapter_object(state, await merge.task))
    except VeneerError as error:
        yield _event(error_body(error))
    except Exception:
        yield _event(error_body(INTERNAL))
        raise
    yield b"data: [DONE]\n\n"


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(data) + b"\n\n"
