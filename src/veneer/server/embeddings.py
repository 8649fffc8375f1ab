"""`POST /v1/embeddings`: one vector for each input, from the base's hidden states or an adapter's.

The vector is the mean over the input's tokens of what the output head reads (`pooling: "last"`: that of its last
token), scaled to length 1. `dimensions` cuts it before it is scaled.
"""

from __future__ import annotations

import asyncio
import base64
import struct
from typing import Any, NamedTuple

import msgspec
from fastapi import APIRouter, Request, Response
from starlette.requests import ClientDisconnect

from veneer.adapters.saved_blends import Blend, Served
from veneer.engine.client import NewSequence
from veneer.engine.messages import EngineInfo, SamplingParams
from veneer.errors import InvalidRequest
from veneer.server.adapter_text import Text
from veneer.server.generation import check_tokens, chosen_model, select_adapter, select_task, vocabulary_of
from veneer.server.state import ServerState, state_of
from veneer.server.streaming import adapter_headers, counted, until_disconnect
from veneer.server.wire import EmbeddingRequest, read_body

router = APIRouter()
ROUTE = "/v1/embeddings"


class _Answer(NamedTuple):
    vectors: list[bytes]  # float32, little-endian
    tokens: int
    headers: dict[str, str]


@router.post(ROUTE)
async def embeddings(request: Request) -> Response:
    """OpenAI's embeddings; `model` chooses the base or an adapter."""
    state = state_of(request)
    try:
        limit, unknown = state.config.max_body_bytes, state.metrics.unknown_field
        body = await read_body(request, EmbeddingRequest, limit, unknown)
        answer = await until_disconnect(request, _answer(state, body))
    except ClientDisconnect:
        return Response(status_code=499)
    encoded = await asyncio.to_thread(_encode, body, answer)
    return Response(encoded, headers=answer.headers, media_type="application/json")


async def _answer(state: ServerState, body: EmbeddingRequest) -> _Answer:
    # No await between these two: a delete waits for the requests that hold what it deletes.
    adapter = select_adapter(state, chosen_model(state, body.model, body.lora_path), body.mixture)
    with counted(state, ROUTE, adapter):
        info = state.engine.require_ready()
        _check(state, body, info)
        text = await state.texts.of(adapter)
        blend = await state.blends.of(adapter) if isinstance(adapter, Blend) else None
        work = lambda: _tokenize(body, text, info, adapter)  # noqa: E731
        prompts = await (state.texts.run(work) if text.is_slow else asyncio.to_thread(work))
        params = SamplingParams(
            max_tokens=0, temperature=0.0, pooling=body.pooling, dimensions=body.dimensions
        )
        limits = [limit for limit in (body.timeout, state.config.request_timeout) if limit is not None]
        vectors: dict[int, bytes] = {}
        with state.engine.submit(
            [NewSequence(prompt, params) for prompt in prompts],
            select_task(adapter, body.task_id),
            min(limits, default=None),
        ) as generation:
            async for index, output in generation:
                vectors[index] = output.pooled
        count = sum(map(len, prompts))
        state.metrics.tokens(adapter.name if adapter else None, count, 0)
        found = [vectors[index] for index in range(len(prompts))]
        return _Answer(found, count, adapter_headers(adapter, blend))


def _check(state: ServerState, body: EmbeddingRequest, info: EngineInfo) -> None:
    if body.dimensions is not None and body.dimensions > info.hidden_size:
        message = f"dimensions={body.dimensions}: the model's vectors have {info.hidden_size} numbers."
        raise InvalidRequest(message, param="dimensions")
    most = state.config.max_sequences
    if len(body.inputs) > most:
        message = f"input: {len(body.inputs)} inputs were sent; one request may have {most}."
        raise InvalidRequest(message, param="input")


def _tokenize(
    body: EmbeddingRequest, text: Text, info: EngineInfo, adapter: Served | None
) -> list[list[int]]:
    """The inputs as tokens. Raises InvalidRequest for those that the model cannot take."""
    vocabulary = vocabulary_of(info, adapter)
    room = info.max_model_len - (int(adapter.details.get("virtual_tokens", 0)) if adapter else 0)
    prompts = []
    for index, given in enumerate(body.inputs):
        param = f"input[{index}]" if body.has_many else "input"
        if isinstance(given, str):
            tokens = text.tokenizer.encode(given, add_special_tokens=body.add_special_tokens)
        else:
            tokens = given
            check_tokens(tokens, vocabulary, param)
        if not tokens:
            raise InvalidRequest(f"{param} has no tokens; the model needs at least one.", param=param)
        if len(tokens) > room:
            rule = f"has {len(tokens)} tokens and the model takes {room}; shorten it"
            raise InvalidRequest(f"{param} {rule}.", param=param, code="context_length_exceeded")
        prompts.append(tokens)
    return prompts


def _encode(body: EmbeddingRequest, answer: _Answer) -> bytes:
    """OpenAI's `CreateEmbeddingResponse`."""
    as_text = body.encoding_format == "base64"
    data: list[dict[str, Any]] = [
        {
            "object": "embedding",
            "index": index,
            "embedding": base64.b64encode(vector).decode()
            if as_text
            else struct.unpack(f"<{len(vector) // 4}f", vector),
        }
        for index, vector in enumerate(answer.vectors)
    ]
    usage = {"prompt_tokens": answer.tokens, "total_tokens": answer.tokens}
    return msgspec.json.encode({"object": "list", "data": data, "model": body.model, "usage": usage})
