"""OpenAI's own specification, cut to what this server has of it. What is left out is a deviation on purpose."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from pydantic import BaseModel

from veneer.server.jobs_wire import CreateJob
from veneer.server.responses_wire import ResponseRequest
from veneer.server.wire import ChatRequest, CompletionRequest, EmbeddingRequest

Schema = dict[str, Any]

# Their fields alone are sent. What others OpenAI has is refused by name or concerns only the caller:
# `NOT_HONOURED` in wire.py and `_REFUSED` in responses_wire.py say which and why.
BODIES: Final[dict[str, type[BaseModel]]] = {
    "/chat/completions": ChatRequest,
    "/completions": CompletionRequest,
    "/embeddings": EmbeddingRequest,
    "/responses": ResponseRequest,
    "/fine_tuning/jobs": CreateJob,
}
# Of unions, what the server takes: text, functions. It reads no images, audio and files, and runs no tools.
TAKEN: Final[dict[str, tuple[str, ...]]] = {
    "ChatCompletionRequestMessage": (
        "ChatCompletionRequestSystemMessage",
        "ChatCompletionRequestUserMessage",
        "ChatCompletionRequestAssistantMessage",
    ),
    "ChatCompletionRequestUserMessageContentPart": ("ChatCompletionRequestMessageContentPartText",),
    "ChatCompletionRequestAssistantMessageContentPart": ("ChatCompletionRequestMessageContentPartText",),
    "InputItem": ("EasyInputMessage",),
    "InputContent": ("InputTextContent",),
    "Tool": ("FunctionTool",),
    "ToolChoiceParam": ("ToolChoiceOptions", "ToolChoiceFunction", "ToolChoiceAllowed"),
}


def cut(spec: Schema, served: set[tuple[str, str]], models: list[str]) -> Schema:
    """The operations of `served` (method, path below /v1) and their schemas; each may also answer with an error."""
    schemas: Schema = spec["components"]["schemas"]
    for name, members in TAKEN.items():
        union = schemas[name]
        for kind in ("oneOf", "anyOf"):
            if kind in union:
                union[kind] = [each for each in union[kind] if _last(each.get("$ref", "")) in members]
                assert len(union[kind]) == len(members), name
        union.pop("discriminator", None)
    error = {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorResponse"}}}}
    paths: Schema = {}
    for path, operations in spec["paths"].items():
        for method, operation in operations.items():
            if (method.upper(), path) in served:
                operation["responses"]["default"] = {"description": "What was wrong", **error}
                paths.setdefault(path, {})[method] = operation
    _mend(paths, schemas)
    for path, body in BODIES.items():
        content = paths[path]["post"]["requestBody"]["content"]["application/json"]
        kept = {
            name: field for name, field in _fields(content["schema"], schemas) if name in body.model_fields
        }
        kept["model"] = {"enum": models}
        if "stream" in kept:
            kept["stream"] = {"const": False}  # events are no JSON
        required = [name for name in kept if body.model_fields[name].is_required()]
        content["schema"] = {"type": "object", "properties": kept, "required": required}
    found = {"openapi": spec["openapi"], "info": spec["info"], "paths": paths}
    return found | {"components": _reached(paths, spec)}


def _mend(paths: Schema, schemas: Schema) -> None:
    """Where OpenAI's specification does not say what OpenAI's clients take and its API sends."""
    for path, method in (("/responses/{response_id}", "delete"), ("/responses/{response_id}/cancel", "post")):
        del paths[path][method]["responses"]["404"]  # an error without the object around it
    content = paths["/files/{file_id}/content"]["get"]["responses"]["200"]["content"]
    content["application/octet-stream"] = {}  # it has JSON alone
    vector = schemas["Embedding"]["properties"]["embedding"]
    schemas["Embedding"]["properties"]["embedding"] = {"anyOf": [vector, {"type": "string"}]}  # in base64
    legacy = schemas["CreateCompletionResponse"]["properties"]["choices"]["items"]["properties"]["logprobs"]
    for name in ("token_logprobs", "top_logprobs"):  # the first token of a prompt has none
        each = legacy["anyOf"][0]["properties"][name]
        each["items"] = {"anyOf": [each["items"], {"type": "null"}]}


def _last(reference: str) -> str:
    return reference.rpartition("/")[2]


def _fields(schema: Schema, schemas: Schema) -> Iterator[tuple[str, Schema]]:
    """The properties of an object that is put together of several."""
    if "$ref" in schema:
        yield from _fields(schemas[_last(schema["$ref"])], schemas)
    for part in schema.get("allOf", []):
        yield from _fields(part, schemas)
    yield from schema.get("properties", {}).items()


def _reached(paths: Schema, spec: Schema) -> Schema:
    """The components that the paths lead to."""
    found: Schema = {}
    waiting = [paths]
    while waiting:
        for reference in _references(waiting.pop()):
            _, _, kind, name = reference.split("/")
            known = found.setdefault(kind, {})
            if name not in known:
                known[name] = spec["components"][kind][name]
                waiting.append(known[name])
    return found


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        if isinstance(reference := value.get("$ref"), str):
            yield reference
        for each in value.values():
            yield from _references(each)
    elif isinstance(value, list):
        for each in value:
            yield from _references(each)
