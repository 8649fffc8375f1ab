"""`/v1/aliases`: names for adapters, and for blends of several.

PUT    /v1/aliases/ALIAS    {"target": "NAME"} follows, {"target": "NAME@3"} stays;
                            {"adapters": [{"id", "weight"}]} saves a blend of the versions that these names mean now
GET    /v1/aliases/ALIAS    what it stands for
DELETE /v1/aliases/ALIAS
"""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict

from veneer.adapters.saved_blends import Blend, digests_of
from veneer.adapters.schema import AdapterVersion
from veneer.errors import InvalidRequest, NotFound
from veneer.server.adapters_api import adapter_object, json_answer, require_engine, selector_of
from veneer.server.blend_wire import MergedAdapters, Mixture, Rank, WeightedAdapters, make_blend
from veneer.server.publish import refuse_reserved_name
from veneer.server.state import ServerState, state_of

router = APIRouter()


class AliasBody(BaseModel):
    model_config = ConfigDict(extra="forbid")
    target: str | None = None
    adapters: WeightedAdapters | None = None
    max_rank: Rank | None = None
    merged_adapters: MergedAdapters | None = None


@router.put("/v1/aliases/{alias:path}")
async def put_alias(request: Request, alias: str, body: AliasBody) -> Response:
    state = state_of(request)
    refuse_reserved_name(state, alias)
    mixture = Mixture(body.adapters, body.merged_adapters, body.max_rank)
    if (body.target is None) == mixture.is_empty:
        raise InvalidRequest("an alias has either a target or adapters", param="target")
    if body.target is None:
        return await _save_blend(state, alias, mixture)
    target = selector_of(state, body.target)
    record = await asyncio.to_thread(state.store.alias, alias, target.name, target.version)
    return json_answer(_alias_object(state, record))


def _alias_object(state: ServerState, record: AdapterVersion) -> dict[str, Any]:
    alias = record.alias
    assert alias is not None
    pointed = alias.target if alias.version is None else f"{alias.target}@{alias.version}"
    return {"id": alias.name, "object": "alias", "target": pointed, "adapter": adapter_object(state, record)}


async def _save_blend(state: ServerState, name: str, mixture: Mixture) -> Response:
    """Save a blend that the engine has made once, so that it can be served."""
    require_engine(state)
    blend = make_blend(state.store, state.served_name, mixture)
    if blend is None:
        raise InvalidRequest("the weights leave nothing: that is the base", param="adapters")
    with state.in_flight.hold(*digests_of(blend)):
        await state.texts.of(blend)
        await state.blends.of(blend)
        saved = await asyncio.to_thread(state.store.save_blend, name, blend.ingredients, blend.recipe)
        return json_answer(await _blend_object(state, saved))


async def _blend_object(state: ServerState, blend: Blend) -> dict[str, Any]:
    """A saved blend as clients see it."""
    made, info = blend.recipe, await state.blends.of(blend)
    return {
        "id": blend.name,
        "object": "blend",
        "created_at": blend.created_at,
        "adapters": [
            {
                "id": f"{each.adapter.name}@{each.adapter.version}",
                "weight": each.weight,
                "task_id": each.task if each.adapter.tasks else None,
            }
            for each in blend.ingredients
        ],
        "method": made.method,
        "density": made.density,
        "majority_sign_method": made.sign,
        "max_rank": made.rank,
        "rank": blend.details.get("rank") if info is None else info.rank,
        "error": None if info is None else info.error,
        "bytes": blend.details.get("bytes") if info is None else info.bytes,
        "portability": blend.details.get("portability") if info is None else info.portability,
    }


@router.get("/v1/aliases/{alias:path}")
async def get_alias(request: Request, alias: str) -> Response:
    state = state_of(request)
    for blend in await asyncio.to_thread(state.store.blends, alias):
        with state.in_flight.hold(*digests_of(blend)):
            return json_answer(await _blend_object(state, blend))
    record = await asyncio.to_thread(state.store.resolve, *selector_of(state, alias))
    if record.alias is None:
        raise NotFound(f"{alias!r} is an adapter and no alias; see /v1/adapters/{alias}", param="alias")
    return json_answer(_alias_object(state, record))


@router.delete("/v1/aliases/{alias:path}")
async def delete_alias(request: Request, alias: str) -> Response:
    await asyncio.to_thread(state_of(request).store.remove_alias, alias)
    return json_answer({"id": alias, "object": "alias.deleted", "deleted": True})
