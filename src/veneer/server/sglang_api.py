"""SGLang's two adapter routes with SGLang's bodies and answers. What they do is in vllm_api.py.

Source of the shapes: SGLang 0.5, `managers/io_struct.py`. `loaded_adapters` has every adapter that is served, each
with its current version; there the values are paths, which this server does not keep.
"""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict

from veneer.errors import InvalidRequest, VeneerError
from veneer.server.adapters_api import set_pinned
from veneer.server.state import ServerState, state_of
from veneer.server.vllm_api import exists, load, unload

router = APIRouter()


class SGLangLoad(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    lora_name: str
    lora_path: str
    pinned: bool = False
    lora_id: str | None = None  # SGLang makes it itself; here as there the name decides


class SGLangUnload(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    lora_name: str
    lora_id: str | None = None


@router.post("/load_lora_adapter")
async def load_lora_adapter(request: Request, body: SGLangLoad) -> Response:
    state, name = state_of(request), body.lora_name
    try:
        if await exists(state, name):
            rule = "unload it first, or upload a new version with POST /v1/adapters"
            raise InvalidRequest(f"LoRA adapter '{name}' is already loaded: {rule}.", param="lora_name")
        await load(state, name, body.lora_path)
        if body.pinned:
            await set_pinned(state, name, True)
    except VeneerError as error:
        return await _answer(state, error)
    return await _answer(state)


@router.post("/unload_lora_adapter")
async def unload_lora_adapter(request: Request, body: SGLangUnload) -> Response:
    state = state_of(request)
    try:
        await unload(state, body.lora_name)
    except VeneerError as error:
        return await _answer(state, error)
    return await _answer(state)


async def _answer(state: ServerState, error: VeneerError | None = None) -> Response:
    """SGLang's `LoRAUpdateOutput`; there as here what was refused is a 400. The server's own faults keep theirs."""
    records = await asyncio.to_thread(state.store.list)
    served = {each.name: f"{each.name}@{each.version}" for each in records if each.alias is None}
    body: dict[str, Any] = {
        "success": error is None,
        "error_message": error and error.message,
        "loaded_adapters": served,
    }
    status = 200 if error is None else 400 if error.status < 500 else error.status
    return Response(msgspec.json.encode(body), status, media_type="application/json")
