"""`/v1/adapters`: upload, list, delete, pin, roll back, download.

    POST   /v1/adapters                  form: name + files, or archive, or source (+ revision); or JSON.
                                         allow_ineffective=true: also one that does not change the output
    GET    /v1/adapters                  every adapter's current version
    GET    /v1/adapters/NAME[@VERSION]   one, with its versions; an alias shows the version behind it
    DELETE /v1/adapters/NAME[@VERSION]   200 when the files are gone, 202 while requests still run
    POST   /v1/adapters/NAME/pin         keep it on the device; /unpin the opposite
    POST   /v1/adapters/NAME/rollback    {"version": 2}, or where the name pointed before
    GET    /v1/adapters/NAME[@VERSION]/files/FILE     one of its files, as it was stored

Names may contain slashes.
"""

from __future__ import annotations

import asyncio
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import IO, Annotated, Any

import msgspec
from fastapi import APIRouter, Body, Request, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import StreamingResponse

from veneer.adapters.names import FILES, Selector, parse_selector
from veneer.adapters.schema import AdapterVersion
from veneer.engine.messages import AdapterStats
from veneer.errors import EngineUnavailable, InvalidRequest, NotFound, VeneerError
from veneer.server.publish import delete, follow_pins, publish, sync_pins
from veneer.server.state import ServerState, state_of
from veneer.server.upload import read_upload

router = APIRouter()


class RollbackBody(BaseModel):
    model_config = ConfigDict(extra="forbid")
    version: Annotated[int, Field(ge=1, strict=True)] | None = None


@router.post("/v1/adapters")
async def create_adapter(request: Request) -> Response:
    """201 with the adapter; 200 when the name's current version has this very content already."""
    state = state_of(request)
    require_engine(state)
    limit = state.config.max_upload_bytes
    async with read_upload(request, limit) as upload:
        record = await publish(
            state,
            upload.name,
            lambda staging: upload.fill(staging, limit),
            allow_ineffective=upload.allow_ineffective,
        )
    return json_answer(adapter_object(state, record), 201 if record.created else 200)


@router.get("/v1/adapters")
async def list_adapters(request: Request) -> Response:
    state = state_of(request)
    records = await asyncio.to_thread(state.store.list)
    aliases = _aliases(records)
    data = [adapter_object(state, record, aliases[record.name]) for record in records if record.alias is None]
    return json_answer({"object": "list", "data": data})


@router.get("/v1/adapters/{name:path}/files/{filename}")
async def get_file(request: Request, name: str, filename: str) -> Response:
    state = state_of(request)
    record = await asyncio.to_thread(state.store.resolve, *selector_of(state, name))
    if filename not in (*FILES, *record.text_files):
        have = ", ".join((*FILES, *record.text_files))
        raise NotFound(
            f"{record.name}@{record.version} has no file {filename[:200]!r}; it has {have}", param="file"
        )
    try:  # open, it can be read to its end whatever is deleted meanwhile
        file = await asyncio.to_thread((state.store.blob(record.digest) / filename).open, "rb")
    except FileNotFoundError:
        raise NotFound(f"{record.name}@{record.version} was deleted this moment", param="model") from None
    headers = {
        "content-length": str(os.fstat(file.fileno()).st_size),
        "x-veneer-adapter-digest": record.digest,
    }
    return StreamingResponse(_chunks(file), headers=headers, media_type="application/octet-stream")


@router.get("/v1/adapters/{name:path}")
async def get_adapter(request: Request, name: str) -> Response:
    state = state_of(request)
    return json_answer(await _described(state, selector_of(state, name)))


@router.delete("/v1/adapters/{name:path}")
async def delete_adapter(request: Request, name: str) -> Response:
    state = state_of(request)
    selector = selector_of(state, name)
    gone = await delete(state, selector.name, selector.version)
    body = {"id": name, "object": "adapter.deleted", "deleted": gone}
    return json_answer(body if gone else body | {"status": "draining"}, 200 if gone else 202)


@router.post("/v1/adapters/{name:path}/pin")
async def pin_adapter(request: Request, name: str) -> Response:
    return await _pinned(request, name, True)


@router.post("/v1/adapters/{name:path}/unpin")
async def unpin_adapter(request: Request, name: str) -> Response:
    return await _pinned(request, name, False)


@router.post("/v1/adapters/{name:path}/rollback")
async def rollback_adapter(
    request: Request, name: str, body: Annotated[RollbackBody | None, Body()] = None
) -> Response:
    state = state_of(request)
    record = await asyncio.to_thread(
        state.store.rollback, _name_only(state, name), body.version if body else None
    )
    await follow_pins(state)
    return json_answer(await _described(state, Selector(record.name)))


def require_engine(state: ServerState) -> None:
    """Refuse before the body is read when nobody could check the adapter."""
    if state.engine.state != "ready":
        raise EngineUnavailable(
            f"The engine is {state.engine.state} and cannot check adapters; "
            "try again when /ready answers 200."
        )


def adapter_object(
    state: ServerState, record: AdapterVersion, aliases: Iterable[str] | None = None
) -> dict[str, Any]:
    """An adapter version as clients see it. `bytes` is its size on the device, `file_bytes` on disk.

    `requests` counts since the server started, `loads` and `evictions` since the engine started.
    """
    stats = state.engine.stats.adapters.get(record.digest) if state.engine.stats else None
    stats = stats or AdapterStats()
    details = record.details
    described: dict[str, Any] = {
        "id": record.name,
        "object": "adapter",
        "version": record.version,
        "current": record.current,
        "digest": record.digest,
        "created_at": record.created_at,
        "parent": state.served_name,
        "base_model": details.get("base_model") or None,
        "kind": details.get("kind"),
        "primitives": details.get("primitives", []),
        "portability": details.get("portability"),
        "rank": details.get("rank"),
        "sites": details.get("sites"),
        "effect": details.get("effect"),
        "tasks": record.tasks,
        "virtual_tokens": details.get("virtual_tokens", 0),
        "added_tokens": details.get("added_tokens", 0),
        "own_tokenizer": details.get("own_tokenizer", False),
        "own_chat_template": details.get("own_chat_template", False),
        "end_tokens": details.get("end_tokens", []),
        "text_files": list(record.text_files),
        "bytes": details.get("bytes"),
        "file_bytes": record.file_bytes,
        "residency": "device" if stats.device else "host" if stats.host else "disk",
        "pinned": record.pinned and record.current,
        "running": stats.running,
        "waiting": stats.waiting,
        "requests": state.in_flight.started[record.digest],
        "loads": stats.loads,
        "evictions": stats.evictions,
        "warnings": details.get("warnings", []),
    }
    if "recipe" in details:  # of a merge
        described |= {"recipe": details["recipe"], "distance": details.get("distance")}
    if record.damage is not None:
        described["damage"] = record.damage
    if aliases is not None:
        described["aliases"] = list(aliases)
    return described


async def _described(state: ServerState, selector: Selector) -> dict[str, Any]:
    """One adapter with its aliases and versions. Damaged versions are shown, with what is wrong."""
    versions = await asyncio.to_thread(state.store.versions, selector.name)
    wanted = selector.version
    if wanted is None and (alias := versions[0].alias) is not None:
        wanted = alias.version
    chosen = [each for each in versions if (each.current if wanted is None else each.version == wanted)]
    if not chosen:
        known = ", ".join(str(each.version) for each in versions)
        raise NotFound(
            f"adapter {versions[0].name!r} has no version {wanted}; it has {known}",
            param="model",
            code="model_not_found",
        )
    aliases = _aliases(await asyncio.to_thread(state.store.list))
    described = adapter_object(state, chosen[0], aliases[chosen[0].name])
    return described | {"versions": [adapter_object(state, each) for each in versions]}


async def _pinned(request: Request, name: str, pinned: bool) -> Response:
    state = state_of(request)
    record = await set_pinned(state, _name_only(state, name), pinned)
    return json_answer(await _described(state, Selector(record.name)))


async def set_pinned(state: ServerState, name: str, pinned: bool) -> AdapterVersion:
    """Keep an adapter on the device, or stop it. Raises Conflict when no slot is left for it."""
    before = (await asyncio.to_thread(state.store.resolve, name)).pinned
    record = await asyncio.to_thread(state.store.set_pinned, name, pinned)
    try:
        await sync_pins(state)
    except VeneerError:
        await asyncio.to_thread(state.store.set_pinned, name, before)
        await follow_pins(state)  # some of its tasks may be pinned
        raise
    return record


def _aliases(records: Iterable[AdapterVersion]) -> defaultdict[str, list[str]]:
    """The aliases of each adapter."""
    found: defaultdict[str, list[str]] = defaultdict(list)
    for each in records:
        if each.alias is not None:
            found[each.name].append(each.alias.name)
    return found


def selector_of(state: ServerState, text: str) -> Selector:
    """`name` or `name@version`, also with the base's name and a colon before it."""
    selector = parse_selector(text, state.served_name)
    if not isinstance(selector, Selector):
        raise NotFound(
            f"{text!r} is the base model, not an adapter; GET /v1/adapters lists adapters",
            param="model",
            code="model_not_found",
        )
    return selector


def _name_only(state: ServerState, text: str) -> str:
    selector = selector_of(state, text)
    if selector.version is not None:
        raise InvalidRequest(
            f"{text!r} names a version; this acts on the name: leave out '@{selector.version}'", param="name"
        )
    return selector.name


def _chunks(file: IO[bytes]) -> Iterator[bytes]:
    with file:
        while chunk := file.read(1 << 20):
            yield chunk


def json_answer(body: dict[str, Any], status: int = 200) -> Response:
    return Response(msgspec.json.encode(body), status, media_type="application/json")
