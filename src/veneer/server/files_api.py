"""`/v1/files`: OpenAI's Files. Rows for fine-tuning jobs go in, the metrics of jobs come out.

POST   /v1/files               form: file, purpose, perhaps expires_after[anchor] and [seconds]
GET    /v1/files               ?purpose= &limit= &after= &order=
GET    /v1/files/ID            DELETE /v1/files/ID: jobs that use it keep its content
GET    /v1/files/ID/content
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from functools import partial
from typing import Annotated, Any, BinaryIO, Literal

import msgspec
from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import StreamingResponse
from starlette.datastructures import FormData, UploadFile

from veneer.errors import InvalidRequest
from veneer.server.jobs_wire import file_object, list_object
from veneer.server.state import state_of
from veneer.server.upload import CHUNK, FORM_OVERHEAD, form_text, read_form
from veneer.training.jobs.file_store import RESULTS

router = APIRouter()

PURPOSES = ("assistants", "batch", "fine-tune", "vision", "user_data", "evals")
LIFETIMES = (3600, 2592000)  # seconds, of expires_after
_FIELDS = ("file", "purpose", "expires_after[anchor]", "expires_after[seconds]")
_NAME_LIMIT = 255  # characters

After = Annotated[str | None, Query(max_length=100)]
Order = Literal["asc", "desc"]


@router.post("/v1/files")
async def create_file(request: Request) -> Response:
    """The rows are checked by the job that uses them, not here."""
    state = state_of(request)
    limit = state.config.max_file_bytes
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise InvalidRequest(
            "A file is uploaded as multipart/form-data, with the fields 'file' and 'purpose'"
        )
    form = await read_form(request, limit + FORM_OVERHEAD, fields=len(_FIELDS), files=1)
    try:
        upload, purpose, lifetime = _checked(form)
        file = await asyncio.to_thread(
            state.files.add,
            iter(partial(upload.file.read, CHUNK), b""),
            upload.filename or "",
            purpose,
            limit=limit,
            most=state.config.max_files,
            lifetime=lifetime,
        )
    finally:
        await form.close()
    return _answer(file_object(file))


@router.get("/v1/files")
async def list_files(
    request: Request,
    purpose: str | None = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Order = "desc",
    after: After = None,
) -> Response:
    if purpose is not None and purpose not in (*PURPOSES, RESULTS):
        raise _wrong_purpose(purpose, (*PURPOSES, RESULTS))
    found, more = await asyncio.to_thread(
        state_of(request).files.page, purpose=purpose, after=after, limit=limit, order=order
    )
    return _answer(list_object([file_object(each) for each in found], more, ends=""))


@router.get("/v1/files/{file_id}")
async def get_file(request: Request, file_id: str) -> Response:
    return _answer(file_object(await asyncio.to_thread(state_of(request).files.get, file_id)))


@router.delete("/v1/files/{file_id}")
async def delete_file(request: Request, file_id: str) -> Response:
    await asyncio.to_thread(state_of(request).files.delete, file_id)
    return _answer({"id": file_id, "object": "file", "deleted": True})


@router.get("/v1/files/{file_id}/content")
async def get_content(request: Request, file_id: str) -> Response:
    file, content = await asyncio.to_thread(state_of(request).files.open, file_id)
    return StreamingResponse(
        _chunks(content), media_type="application/octet-stream", headers={"Content-Length": str(file.bytes)}
    )


def _chunks(content: BinaryIO) -> Iterator[bytes]:
    with content:
        yield from iter(partial(content.read, CHUNK), b"")


def _checked(form: FormData) -> tuple[UploadFile, str, int | None]:
    """File, purpose and lifetime of an upload. Raises `InvalidRequest`."""
    for key in form:
        if key not in _FIELDS:
            raise InvalidRequest(
                f"unknown field {key[:200]!r}; a file has {', '.join(_FIELDS)}", param=key[:200]
            )
    files = form.getlist("file")
    if len(files) != 1 or not isinstance(files[0], UploadFile):
        raise InvalidRequest("'file' must be one file, with its file name", param="file")
    upload = files[0]
    name = upload.filename or ""
    if not name or len(name) > _NAME_LIMIT or not name.isprintable():
        raise InvalidRequest(
            f"the file name {name[:100]!r} must be 1 to {_NAME_LIMIT} printable characters", param="file"
        )
    purpose = form_text(form, "purpose")
    if purpose not in PURPOSES:
        raise _wrong_purpose(purpose, PURPOSES)
    return upload, purpose, _lifetime(form)


def _wrong_purpose(purpose: str | None, known: tuple[str, ...]) -> InvalidRequest:
    got = "is missing" if purpose is None else f"{purpose[:100]!r} is unknown"
    return InvalidRequest(f"the purpose {got}; it is one of {', '.join(known)}", param="purpose")


def _lifetime(form: FormData) -> int | None:
    anchor, seconds = (form_text(form, f"expires_after[{part}]") for part in ("anchor", "seconds"))
    if anchor is None and seconds is None:
        return None
    least, most = LIFETIMES
    fine = seconds is not None and seconds.isascii() and seconds.isdecimal() and len(seconds) < 10
    if anchor != "created_at" or not fine or not least <= int(seconds or 0) <= most:
        raise InvalidRequest(
            f"expires_after (got anchor {str(anchor)[:100]!r}, seconds {str(seconds)[:100]!r}) has the anchor "
            f"'created_at' and {least} to {most} seconds",
            param="expires_after",
        )
    return int(seconds or 0)


def _answer(body: dict[str, Any]) -> Response:
    return Response(msgspec.json.encode(body), media_type="application/json")
