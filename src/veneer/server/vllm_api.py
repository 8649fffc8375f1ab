"""vLLM's two adapter routes with vLLM's bodies, answers and error texts, because gateways call them.

Source of the shapes: vLLM 0.2x, `vllm/entrypoints/openai/models/serving.py`. `lora_path` is a hub id, or an
absolute path below a folder that the operator allowed with --adapter-dir. Unloading deletes the adapter from
the store; files under `lora_path` itself are never touched.
"""

from __future__ import annotations

import asyncio
from http import HTTPStatus

import msgspec
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict

from veneer.adapters.names import is_name
from veneer.errors import InvalidRequest, NotFound, VeneerError
from veneer.server.adapters_api import require_engine
from veneer.server.publish import delete, fill_from, publish
from veneer.server.state import ServerState, state_of

router = APIRouter()

_TYPES = {400: "BadRequestError", 403: "PermissionDeniedError", 404: "NotFoundError"}


class LoadBody(BaseModel):
    model_config = ConfigDict(extra="forbid")
    lora_name: str = ""
    lora_path: str = ""
    load_inplace: bool = False
    is_3d_lora_weight: bool = False


class UnloadBody(BaseModel):
    model_config = ConfigDict(extra="forbid")
    lora_name: str = ""
    lora_int_id: int | None = None  # an id of vLLM's own; there as here the name alone decides


@router.post("/v1/load_lora_adapter")
async def load_lora_adapter(request: Request, body: LoadBody) -> Response:
    state = state_of(request)
    try:
        await _load(state, body)
    except VeneerError as error:
        return _error(error)
    return _success(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


@router.post("/v1/unload_lora_adapter")
async def unload_lora_adapter(request: Request, body: UnloadBody) -> Response:
    state = state_of(request)
    try:
        if not body.lora_name:
            raise _invalid("'lora_name' needs to be provided to unload a LoRA adapter.")
        await unload(state, body.lora_name)
    except VeneerError as error:
        return _error(error)
    return _success(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


async def _load(state: ServerState, body: LoadBody) -> None:
    if not body.lora_name or not body.lora_path:
        raise _invalid("Both 'lora_name' and 'lora_path' must be provided.")
    if body.is_3d_lora_weight:
        raise _invalid("'is_3d_lora_weight' is not supported: adapters of fused experts are not served.")
    if not body.load_inplace and await exists(state, body.lora_name):
        raise _invalid(
            f"The lora adapter '{body.lora_name}' has already been loaded. If you want to load the adapter "
            "in place, set 'load_inplace' to True."
        )
    await load(state, body.lora_name, body.lora_path)


async def load(state: ServerState, name: str, path: str) -> None:
    """Make what is at `path` the next version of `name`. Raises what `publish` raises."""
    require_engine(state)
    await publish(state, name, fill_from(state, path, state.config.adapter_dirs))


async def unload(state: ServerState, name: str) -> None:
    """Delete the adapter. Raises NotFound in vLLM's words."""
    if not await exists(state, name):
        raise NotFound(f"The lora adapter '{name}' cannot be found.", param="lora_name")
    await delete(state, name)


async def exists(state: ServerState, name: str) -> bool:
    if not is_name(name):
        return False
    try:
        await asyncio.to_thread(state.store.versions, name)
    except NotFound:
        return False
    return True


def _invalid(message: str) -> InvalidRequest:
    return InvalidRequest(message, code="InvalidUserInput")


def _error(error: VeneerError) -> Response:
    """vLLM's ErrorResponse: the class in `type`, the HTTP status in `code`."""
    kind = "InvalidUserInput" if error.code == "InvalidUserInput" else _TYPES.get(error.status)
    kind = kind or HTTPStatus(error.status).phrase.replace(" ", "") + "Error"
    fields = {"message": error.message, "type": kind, "param": error.param, "code": error.status}
    return Response(msgspec.json.encode({"error": fields}), error.status, media_type="application/json")


def _success(text: str) -> Response:
    return Response(text)  # vLLM answers plain text without a content type
