"""Reading an adapter upload: a multipart form or JSON, within a byte limit, never whole in memory.

The form parser keeps parts above 1 MiB in unnamed temporary files (in TMPDIR), so an upload that breaks off
leaves nothing. The limit is checked against Content-Length before the first byte and again while reading.
"""

from __future__ import annotations

import errno
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import cast

import msgspec
from fastapi import Request
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from veneer.adapters.archive import unpack
from veneer.adapters.names import CONFIG_FILE, WANTED, WEIGHTS_FILE, stored_name
from veneer.adapters.sources import from_hub
from veneer.adapters.staging import Staging, file_limits
from veneer.errors import AdapterRefused, InvalidRequest, StorageFull, TooLarge

FORM_OVERHEAD = 1 << 20  # bytes of a form besides its files: boundaries, headers, short fields
FIELD_LIMIT = 64 << 10  # bytes of a JSON body or of one form field that is not a file
CHUNK = 1 << 20

_FIELDS = ("name", "files", "archive", "source", "revision", "allow_ineffective")


class _Source(msgspec.Struct, forbid_unknown_fields=True):
    """The JSON form of an upload."""

    name: str
    source: str
    revision: str | None = None
    allow_ineffective: bool = False


@dataclass(frozen=True)
class Upload:
    """What a client sent, checked for form alone: exactly one of files, archive and source is there."""

    name: str
    files: list[UploadFile] = field(default_factory=list)
    archive: UploadFile | None = None
    source: str | None = None
    revision: str | None = None
    allow_ineffective: bool = False

    def fill(self, staging: Staging, limit: int) -> None:
        """Write the adapter's files. Blocks; runs in a thread."""
        if self.source is not None:
            from_hub(self.source, staging, limit, revision=self.revision)
        elif self.archive is not None:
            unpack(self.archive.file, staging, limit)
        limits = file_limits(limit)
        for upload in self.files:
            filename = stored_name(upload.filename or "")
            if filename not in limits:
                raise AdapterRefused(
                    f"the file {filename[:200]!r} is not read; send {WANTED}, by these names",
                    param="files",
                )
            staging.write(filename, iter(partial(upload.file.read, CHUNK), b""), limits[filename])


@asynccontextmanager
async def read_upload(request: Request, limit: int) -> AsyncIterator[Upload]:
    """The upload in a request's body; its temporary files go at the end of the block.

    `limit` is the largest adapter in bytes. Raises `InvalidRequest`, `TooLarge`, `StorageFull`.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type == "application/json":
        yield await _read_json(request)
    elif content_type == "multipart/form-data":
        form = await read_form(request, limit + FORM_OVERHEAD, fields=4, files=len(file_limits(0)))
        try:
            yield _from_form(form)
        finally:
            await form.close()
    else:
        raise InvalidRequest(
            f"Content-Type {content_type!r} is not read here; send multipart/form-data with files, "
            "or application/json with a source"
        )


async def _read_json(request: Request) -> Upload:
    body = b"".join([chunk async for chunk in limited_body(request, FIELD_LIMIT)])
    try:
        sent = msgspec.json.decode(body, type=_Source)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"The body is not an adapter's source: {error}") from None
    return Upload(
        sent.name,
        source=sent.source,
        revision=sent.revision,
        allow_ineffective=sent.allow_ineffective,
    )


async def read_form(request: Request, limit: int, *, fields: int, files: int) -> FormData:
    """A form of at most `limit` bytes, and so many fields and files. The caller closes it."""
    stream = limited_body(request, limit)
    parser = MultiPartParser(
        request.headers, stream, max_files=files, max_fields=fields, max_part_size=FIELD_LIMIT
    )
    try:
        return await parser.parse()
    except MultiPartException as error:
        raise InvalidRequest(f"The form cannot be read: {error.message}") from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise StorageFull(
            "The server has no room for the upload's temporary file; try again later"
        ) from error


async def limited_body(request: Request, limit: int) -> AsyncGenerator[bytes, None]:
    """The body's chunks, at most `limit` bytes."""
    told = request.headers.get("content-length", "")
    size = int(told) if told.isascii() and told.isdecimal() else 0
    received = 0
    try:
        async for chunk in request.stream():
            received += len(chunk)
            if max(size, received) > limit:
                raise TooLarge(
                    f"The body has {'' if size else 'more than '}{max(size, received):,} bytes; "
                    f"at most {limit:,} are taken here"
                )
            yield chunk
    except ClientDisconnect:
        raise InvalidRequest(
            "The connection closed in the middle of the upload", code="incomplete_body"
        ) from None


def _from_form(form: FormData) -> Upload:
    for key in form:
        if key not in _FIELDS:
            raise InvalidRequest(f"unknown field {key!r}; an upload has {', '.join(_FIELDS)}", param=key)
    files = form.getlist("files")
    if not all(isinstance(each, UploadFile) for each in files):
        raise InvalidRequest("'files' must be files, with their file names", param="files")
    archives = form.getlist("archive")
    if len(archives) > 1 or not all(isinstance(each, UploadFile) for each in archives):
        raise InvalidRequest("'archive' must be one file, with its file name", param="archive")
    source = form_text(form, "source")
    if bool(files) + bool(archives) + (source is not None) != 1:
        raise InvalidRequest(
            f"send one of 'files' ({CONFIG_FILE} and {WEIGHTS_FILE}), 'archive' (.zip or .tar.gz) and "
            "'source' (a hub id)",
            param="files",
        )
    name, revision = form_text(form, "name"), form_text(form, "revision")
    if name is None:
        raise InvalidRequest(
            "the field 'name' is missing; it is what requests will call the adapter", param="name"
        )
    if revision is not None and source is None:
        raise InvalidRequest("'revision' belongs to 'source'", param="revision")
    allow_ineffective = form_text(form, "allow_ineffective") or "false"
    if allow_ineffective not in ("true", "false"):
        raise InvalidRequest(
            f"allow_ineffective {allow_ineffective[:200]!r} is neither 'true' nor 'false'",
            param="allow_ineffective",
        )
    return Upload(
        name,
        files=cast("list[UploadFile]", files),
        archive=cast("UploadFile", archives[0]) if archives else None,
        source=source,
        revision=revision,
        allow_ineffective=allow_ineffective == "true",
    )


def form_text(form: FormData, key: str) -> str | None:
    """A field that is not a file. Raises `InvalidRequest` unless it is there at most once."""
    values = form.getlist(key)
    if len(values) > 1 or not all(isinstance(value, str) for value in values):
        raise InvalidRequest(f"{key!r} must be sent once, as text", param=key)
    return cast("str", values[0]) if values else None
