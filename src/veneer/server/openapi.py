"""The document at `/openapi.json`: FastAPI's, with the bodies that routes read by hand, and every error.

FastAPI knows the parameters of a route. The bodies here are the models that the routes check with, so the document
cannot tell of another body; forms are written down.
"""

from __future__ import annotations

from typing import Any, Final

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from veneer.server.jobs_wire import CreateJob
from veneer.server.responses_wire import PASSED, ResponseRequest
from veneer.server.wire import (
    ChatRequest,
    CompletionRequest,
    Detokenize,
    EmbeddingRequest,
    TokenizeChat,
    TokenizeText,
)

JSON, EVENTS, TEXT, FORM = "application/json", "text/event-stream", "text/plain", "multipart/form-data"

_BODIES: Final[dict[str, tuple[type[BaseModel], ...]]] = {
    "/v1/chat/completions": (ChatRequest,),
    "/v1/completions": (CompletionRequest,),
    "/v1/responses": (ResponseRequest,),
    "/v1/responses/input_tokens": (ResponseRequest,),
    "/v1/embeddings": (EmbeddingRequest,),
    "/tokenize": (TokenizeText, TokenizeChat),
    "/detokenize": (Detokenize,),
    "/v1/fine_tuning/jobs": (CreateJob,),
}
_WORDS = {"type": "string", "minLength": 1}
_FILE = {"type": "string", "format": "binary"}
_FORMS: Final[dict[str, dict[str, Any]]] = {
    "/v1/files": {
        "type": "object",
        "required": ["file", "purpose"],
        "properties": {
            "file": _FILE,
            "purpose": _WORDS,
            "expires_after[anchor]": {"const": "created_at"},
            "expires_after[seconds]": {"type": "integer"},
        },
    },
    "/v1/adapters": {
        "type": "object",
        "required": ["name"],
        "properties": {
            "name": _WORDS,
            "files": {"type": "array", "items": _FILE},
            "archive": _FILE,
            "source": _WORDS,
            "revision": _WORDS,
            "allow_ineffective": {"type": "boolean"},
        },
    },
}
_SOURCE = {
    "type": "object",
    "required": ["name", "source"],
    "properties": {
        "name": _WORDS,
        "source": _WORDS,
        "revision": {"type": ["string", "null"]},
        "allow_ineffective": {"type": "boolean"},
    },
    "additionalProperties": False,
}
# What a route answers with besides JSON, and with which statuses besides 200.
_ANSWERS: Final[dict[str, tuple[str, ...]]] = {
    "/v1/chat/completions": (EVENTS,),
    "/v1/completions": (EVENTS,),
    "/v1/responses": (EVENTS,),
    "/v1/adapters/merge": (EVENTS,),
    "/metrics": (TEXT,),
    "/v1/files/{file_id}/content": ("application/octet-stream",),
    "/v1/load_lora_adapter": (TEXT,),
    "/v1/unload_lora_adapter": (TEXT,),
}
_STATUSES: Final[dict[tuple[str, str], str]] = {
    ("/v1/adapters", "post"): "201",
    ("/v1/adapters/merge", "post"): "201",
    ("/v1/adapters/{name}", "delete"): "202",
    ("/v1/models/{model}", "delete"): "202",
}
# These report errors in a shape of their own.
_OWN_ERRORS = ("/load_lora_adapter", "/unload_lora_adapter", "/health", "/ready")
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "integer", "null"]},  # a number is vLLM's
            },
        }
    },
}


def install_document(app: FastAPI) -> None:
    """Serve this document instead of FastAPI's own."""
    plain = app.openapi

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _complete(plain())
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]  # FastAPI's documented way


def _complete(document: dict[str, Any]) -> dict[str, Any]:
    models = sorted({model for each in _BODIES.values() for model in each}, key=lambda model: model.__name__)
    references, found = models_json_schema(
        [(model, "validation") for model in models], ref_template="#/components/schemas/{model}"
    )
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    schemas |= found["$defs"] | {"Error": _ERROR}
    for name in ("HTTPValidationError", "ValidationError"):  # FastAPI's, which is never sent
        schemas.pop(name, None)
    chat = schemas[ChatRequest.__name__]["properties"]
    schemas[ResponseRequest.__name__]["properties"] |= {name: chat[name] for name in sorted(PASSED)}
    for model in models:
        _allow_null(schemas[model.__name__])
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            if method == "post" and path in _BODIES:
                choices = [references[model, "validation"] for model in _BODIES[path]]
                schema = choices[0] if len(choices) == 1 else {"anyOf": choices}
                operation["requestBody"] = _body({JSON: {"schema": schema}})
            if method == "post" and path in _FORMS:
                content = {FORM: {"schema": _FORMS[path]}}
                source = {JSON: {"schema": _SOURCE}} if path == "/v1/adapters" else {}
                operation["requestBody"] = _body(content | source)
            operation["responses"] = _responses(path, method)
    return document


def _allow_null(schema: dict[str, Any]) -> None:
    """Null means absent."""
    required = schema.get("required", [])
    for name, field in schema["properties"].items():
        if name not in required and {"type": "null"} not in field.get("anyOf", []):
            schema["properties"][name] = {"anyOf": [field, {"type": "null"}]}


def _body(content: dict[str, Any]) -> dict[str, Any]:
    return {"required": True, "content": content}


def _responses(path: str, method: str) -> dict[str, Any]:
    answer = {
        "description": "The answer",
        "content": {JSON: {}} | {kind: {} for kind in _ANSWERS.get(path, ())},
    }
    schema = {} if path in _OWN_ERRORS else {"schema": {"$ref": "#/components/schemas/Error"}}
    error = {"description": "What was wrong", "content": {JSON: schema}}
    more = {_STATUSES[path, method]: answer} if (path, method) in _STATUSES else {}
    return {"200": answer} | more | {"default": error}
