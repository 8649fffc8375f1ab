"""`/v1/responses`: OpenAI's Responses, answered as chats are and stored so that clients can go on from them.

    POST   /v1/responses                     a response, whole or as events (responses_wire.py has the body)
    GET    /v1/responses/ID                  as it was answered
    DELETE /v1/responses/ID
    POST   /v1/responses/ID/cancel           refused: nothing runs in the background
    GET    /v1/responses/ID/input_items      ?limit= &after= &order=   the conversation before its output

A response is stored before its last byte is sent. One whose client left is not stored.
"""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Query, Request, Response
from starlette.requests import ClientDisconnect

from veneer.errors import InvalidRequest, NotFound, VeneerError
from veneer.server import chat
from veneer.server.adapter_text import Text
from veneer.server.generation import Delta
from veneer.server.response_events import Event, ResponseWriter
from veneer.server.response_items import messages_of, new_response_id, read_input
from veneer.server.response_store import Item
from veneer.server.responses_wire import ResponseRequest, chat_request, read_request, renamed
from veneer.server.state import ServerState, state_of
from veneer.server.streaming import Exchange, Prepared, reply
from veneer.server.wire import ChatRequest, read_object

router = APIRouter()
ROUTE = "/v1/responses"
# Fields of a request that its response repeats.
_SAME = (
    "previous_response_id",
    "instructions",
    "max_output_tokens",
    "model",
    "parallel_tool_calls",
    "temperature",
    "top_p",
    "top_logprobs",
    "truncation",
    "metadata",
)


@router.post(ROUTE)
async def create_response(request: Request) -> Response:
    """OpenAI's responses; `model` chooses the base or an adapter."""
    received = time.monotonic()
    state = state_of(request)
    try:
        data = await read_object(request, state.config.max_body_bytes)
        body, passed = read_request(data, state.metrics.unknown_field)
        items = await asyncio.to_thread(_conversation, state, body)
        exchange = _ResponseExchange(state, body, passed, items, received)
        return await reply(request, exchange, stream=body.stream)
    except ClientDisconnect:
        return Response(status_code=499)


@router.post(f"{ROUTE}/input_tokens")
async def count_input_tokens(request: Request) -> Response:
    """How many tokens the prompt of this response would have."""
    state = state_of(request)
    data = await read_object(request, state.config.max_body_bytes)
    body, passed = read_request(data, state.metrics.unknown_field)
    items = await asyncio.to_thread(_conversation, state, body)
    exchange = _ResponseExchange(state, body, passed, items, time.monotonic())
    try:
        count = await exchange.prompt_tokens()
    except InvalidRequest as error:
        raise renamed(error) from None
    return _json({"object": "response.input_tokens", "input_tokens": count})


@router.get(f"{ROUTE}/{{response_id}}")
async def get_response(
    request: Request, response_id: str, stream: bool = False, starting_after: int | None = None
) -> Response:
    if stream or starting_after is not None:
        name = "stream" if stream else "starting_after"
        rule = "it belongs to background responses; leave it out"
        raise InvalidRequest(f"{name} is not supported: {rule}.", param=name, code="unsupported_parameter")
    found = await asyncio.to_thread(state_of(request).responses.get, response_id)
    return _json(found.response)


@router.delete(f"{ROUTE}/{{response_id}}")
async def delete_response(request: Request, response_id: str) -> Response:
    await asyncio.to_thread(state_of(request).responses.delete, response_id)
    return _json({"id": response_id, "object": "response", "deleted": True})


@router.post(f"{ROUTE}/{{response_id}}/cancel")
async def cancel_response(request: Request, response_id: str) -> Response:
    await asyncio.to_thread(state_of(request).responses.get, response_id)
    message = (
        f"{response_id!r} was not created with background: true, and only such responses can be cancelled."
    )
    raise InvalidRequest(message, param="response_id", code="unsupported_parameter")


@router.get(f"{ROUTE}/{{response_id}}/input_items")
async def list_input_items(
    request: Request,
    response_id: str,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: str | None = None,
    order: Literal["asc", "desc"] = "desc",
) -> Response:
    """The newest first, unless the order is asc."""
    found = await asyncio.to_thread(state_of(request).responses.get, response_id)
    items = found.items if order == "asc" else found.items[::-1]
    if after is not None:
        ids = [item["id"] for item in items]
        if after not in ids:
            raise NotFound(f"The response has no item {after[:100]!r}.", param="after")
        items = items[ids.index(after) + 1 :]
    page = items[:limit]
    first, last = (page[0]["id"], page[-1]["id"]) if page else ("", "")  # text in OpenAI's specification
    ends = {"first_id": first, "last_id": last, "has_more": len(items) > limit}
    return _json({"object": "list", "data": page} | ends)


def _json(body: dict[str, Any]) -> Response:
    return Response(msgspec.json.encode(body), media_type="application/json")


def _conversation(state: ServerState, body: ResponseRequest) -> list[Item]:
    """All items that lead to the answer. Raises InvalidRequest."""
    earlier: list[Item] = []
    if (id := body.previous_response_id) is not None:
        try:
            earlier = state.responses.get(id).conversation
        except NotFound as error:
            name = "previous_response_id"
            raise InvalidRequest(error.message, param=name, code="previous_response_not_found") from None
    return earlier + read_input(body.input, state.responses.get, state.metrics.unknown_field)


class _ResponseExchange(Exchange[ChatRequest]):
    """A chat whose answer is written as a response."""

    end = b""

    def __init__(
        self,
        state: ServerState,
        body: ResponseRequest,
        passed: dict[str, Any],
        items: list[Item],
        received: float,
    ) -> None:
        self._asked, self._items = body, items
        self._stores = _stores(state, body)
        self._frame = _frame(body, self._stores)
        self._writer: ResponseWriter
        messages = messages_of(items, body.instructions)
        chat_body = chat_request(body, passed, messages, state.metrics.unknown_field)
        super().__init__(state, ROUTE, chat_body, self._prepared, received)
        self.inline = False  # a stored conversation is longer than the body

    async def answer(self) -> bytes:
        async with aclosing(self._deltas()) as deltas:
            async for delta in deltas:
                self._writer.events(delta)
        *_, last = await self._finish()
        encoded: bytes = msgspec.json.encode(last["response"])
        return encoded

    async def events(self) -> AsyncGenerator[bytes]:
        async with aclosing(self._deltas()) as deltas:
            async for delta in deltas:
                for event in self._writer.events(delta):
                    yield _encoded(event)
        for event in await self._finish():
            yield _encoded(event)

    def failed(self, error: VeneerError) -> bytes:
        return _encoded(self._writer.failed(error))

    async def _finish(self) -> list[Event]:
        """The last events, once the response is stored."""
        events = self._writer.end(self._usage)
        if self._stores:
            await asyncio.to_thread(self._state.responses.add, events[-1]["response"], self._items)
        return events

    async def _deltas(self) -> AsyncGenerator[Delta]:
        try:
            async with aclosing(super()._deltas()) as deltas:
                async for delta in deltas:
                    yield delta
        except InvalidRequest as error:
            raise renamed(error) from None

    def _prepared(self, state: ServerState, text: Text, body: ChatRequest) -> Prepared:
        prepared = chat.prepare(state, text, body)
        if self._asked.truncation == "auto":
            prepared = self._fitted(prepared, text)
        self._writer = ResponseWriter(self._frame, prepared.format)
        return prepared._replace(param="input")

    def _fitted(self, whole: Prepared, text: Text) -> Prepared:
        """Without as many of the oldest turns as it takes to fit; instructions and the last turn stay."""
        state, body = self._state, self._body
        room = state.engine.require_ready().max_model_len - (self._asked.max_output_tokens or 1)
        if self._adapter is not None:
            room -= int(self._adapter.details.get("virtual_tokens", 0))
        messages = body.messages
        head = next((i for i, each in enumerate(messages) if each["role"] not in ("system", "developer")), 0)
        starts = [i for i, each in enumerate(messages) if each["role"] == "user" and i >= head]

        def without(count: int) -> Prepared:
            kept = messages[:head] + messages[starts[count] :]
            return chat.prepare(state, text, body.model_copy(update={"messages": kept}))

        if len(whole.prompts[0]) <= room or len(starts) < 2:
            return whole
        fits = bisect_left(range(len(starts)), True, key=lambda count: len(without(count).prompts[0]) <= room)
        return without(min(fits, len(starts) - 1))


def _stores(state: ServerState, body: ResponseRequest) -> bool:
    """Raises InvalidRequest when the client wants what the server does not do."""
    if body.store and not state.responses.most:
        message = "store=True is not supported: this server was started with --max-responses 0; send false."
        raise InvalidRequest(message, param="store", code="unsupported_parameter")
    return state.responses.most > 0 if body.store is None else body.store


def _frame(body: ResponseRequest, stores: bool) -> dict[str, Any]:
    """What is known of the response before there is any of it."""
    form = body.text and body.text.format
    shown = form.model_dump(by_alias=True, exclude_none=True) if form else {"type": "text"}
    choice = body.tool_choice
    labels = {name: getattr(body, name) for name in ("user", "safety_identifier", "prompt_cache_key")}
    return {
        "id": new_response_id(),
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "background": False,
        "completed_at": None,
        "error": None,
        "incomplete_details": None,
        "output": [],
        "reasoning": None,
        "service_tier": "default",
        "store": stores,
        "text": {"format": shown},
        "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
        "tools": [tool.model_dump() for tool in body.tools],
        **{name: getattr(body, name) for name in _SAME},
        **{name: value for name, value in labels.items() if value is not None},
    }


def _encoded(event: Event) -> bytes:
    kind: str = event["type"]
    return b"event: " + kind.encode() + b"\ndata: " + msgspec.json.encode(event) + b"\n\n"
