"""Every error leaves the server in OpenAI's error shape."""

from __future__ import annotations

import logging
import reprlib
from http import HTTPStatus
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import iter_route_contexts
from starlette.exceptions import HTTPException
from starlette.routing import Route

from veneer.errors import EngineUnavailable, InvalidRequest, NotFound, QueueFull, VeneerError

log = logging.getLogger(__name__)

INTERNAL = VeneerError("The server failed on this request. The fault is the server's; its log says more.")


def error_body(error: VeneerError) -> dict[str, Any]:
    """OpenAI's `ErrorResponse`."""
    fields = {"message": error.message, "type": error.type, "param": error.param, "code": error.code}
    return {"error": fields}


def error_response(error: VeneerError) -> Response:
    headers = {}
    if isinstance(error, QueueFull):
        headers["Retry-After"] = str(error.retry_after)
    elif isinstance(error, EngineUnavailable):
        headers["Retry-After"] = "2"
    body = msgspec.json.encode(error_body(error))
    return Response(body, error.status, headers, media_type="application/json")


def pydantic_error(errors: list[Any]) -> InvalidRequest:
    """The first fault of a pydantic validation, named by its place: `messages[0].content`."""
    first = errors[0]
    path = first["loc"][1:] if first["loc"][:1] in (("body",), ("query",), ("path",)) else first["loc"]
    # A union's faults carry the member's type in their place ("list[int]"); it is no part of the request.
    place = [part for part in path if isinstance(part, int) or part.isidentifier()]
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")
    shown = "" if first["type"] == "missing" else f" (got {reprlib.repr(first.get('input'))})"
    return InvalidRequest(f"{param or 'The request'}: {first['msg']}{shown}.", param=param or None)


def _methods(request: Request) -> list[str]:
    """What the path of a request takes; one router alone would tell of its first route's methods."""
    found: set[str] = set()
    for each in iter_route_contexts(request.app.routes):
        if isinstance(each.route, Route) and each.route.path_regex.match(request.url.path):
            found |= each.methods or set()
    return sorted(found)


def install_error_handlers(app: FastAPI) -> None:
    async def veneer_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, VeneerError)
        return error_response(error)

    async def validation_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return error_response(pydantic_error(list(error.errors())))

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if error.status_code == HTTPStatus.NOT_FOUND:
            return error_response(NotFound(f"There is no route {request.method} {request.url.path}."))
        if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            allowed = ", ".join(_methods(request))
            message = f"{request.url.path} does not take {request.method}; it takes {allowed}."
            reply = error_response(InvalidRequest(message, code="method_not_allowed"))
            reply.headers["Allow"] = allowed
        else:
            reply = error_response(InvalidRequest(str(error.detail)))
        reply.status_code = error.status_code
        return reply

    async def internal_error(request: Request, error: Exception) -> Response:
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return error_response(INTERNAL)

    app.add_exception_handler(VeneerError, veneer_error)
    app.add_exception_handler(RequestValidationError, validation_error)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(Exception, internal_error)
