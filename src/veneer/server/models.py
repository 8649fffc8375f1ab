"""`/v1/models`: the base, adapters, aliases and saved blends; adapters can be deleted here, as OpenAI has it."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response

from veneer.adapters.names import Selector, parse_selector
from veneer.adapters.saved_blends import Blend
from veneer.adapters.schema import AdapterVersion
from veneer.errors import InvalidRequest
from veneer.server.generation import select_adapter
from veneer.server.publish import delete
from veneer.server.state import ServerState, state_of

router = APIRouter()


@router.get("/v1/models")
async def list_models(request: Request) -> dict[str, Any]:
    """At most `max_models` entries; `name@version` also names versions that are not listed."""
    state = state_of(request)
    adapters = await asyncio.to_thread(state.store.list)
    served = [_adapter(state, record.served_name, record) for record in adapters if record.damage is None]
    blends = await asyncio.to_thread(state.store.blends)
    served += [_blend(state, blend) for blend in blends if not any(each.damage for each in blend.adapters)]
    return {"object": "list", "data": [_base(state), *served][: state.config.max_models]}


@router.get("/v1/models/{model:path}")
async def get_model(request: Request, model: str) -> dict[str, Any]:
    """One model under any of its names. 404 `model_not_found` for others."""
    state = state_of(request)
    record = select_adapter(state, model)
    if isinstance(record, Blend):
        return _blend(state, record)
    return _base(state) if record is None else _adapter(state, model, record)


@router.delete("/v1/models/{model:path}")
async def delete_model(request: Request, model: str) -> Response:
    """OpenAI's delete of a fine-tuned model: the adapter with all its versions, as DELETE /v1/adapters."""
    state = state_of(request)
    selected = parse_selector(model, state.served_name)
    if not isinstance(selected, Selector):
        raise InvalidRequest(f"{model!r} is the base model; it cannot be deleted", param="model")
    gone = await delete(state, selected.name, selected.version)
    body = {"id": model, "object": "model", "deleted": gone}
    return Response(msgspec.json.encode(body), 200 if gone else 202, media_type="application/json")


def _base(state: ServerState) -> dict[str, Any]:
    return _model(state, state.served_name, state.started, root=state.served_name, parent=None)


def _adapter(state: ServerState, name: str, record: AdapterVersion) -> dict[str, Any]:
    root = f"{record.name}@{record.version}"
    return _model(state, name, record.created_at, root=root, parent=state.served_name) | {
        "digest": record.digest
    }


def _blend(state: ServerState, blend: Blend) -> dict[str, Any]:
    return _model(state, blend.name, blend.created_at, root=blend.label, parent=state.served_name)


def _model(state: ServerState, name: str, created: int, *, root: str, parent: str | None) -> dict[str, Any]:
    """OpenAI's `Model` with vLLM's `root`, `parent` and `max_model_len` (null while the engine starts)."""
    info = state.engine.info
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "veneer",
        "root": root,
        "parent": parent,
        "max_model_len": info.max_model_len if info else None,
    }
