"""How an answer travels: as one JSON body or as server-sent events, and what happens when the client leaves.

The engine's first word is awaited before the headers of a stream are sent, so that refusals keep their HTTP
status. What is held for a request (its sequences, its adapter) is released the moment the client is gone.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import aclosing, contextmanager
from functools import partial
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import msgspec
from fastapi import Request, Response
from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from veneer.adapters.saved_blends import Blend, Served, digests_of
from veneer.engine.messages import AdapterInfo
from veneer.errors import VeneerError
from veneer.server.adapter_text import Text
from veneer.server.errors import INTERNAL, error_body
from veneer.server.generation import Delta, Run, Usage, chosen_model, select_adapter
from veneer.server.state import ServerState, state_of
from veneer.server.structured import Grammar
from veneer.server.wire import GenerationRequest, StreamOptions, read_body

log = logging.getLogger(__name__)

INLINE_BYTES = 16_384  # bodies up to this size are tokenized on the loop, larger ones in a thread

Result = TypeVar("Result")
Body = TypeVar("Body", bound=GenerationRequest)


class Format(Protocol):
    """Turns deltas into one route's wire form."""

    def chunks(self, delta: Delta) -> list[dict[str, Any]]:
        """The events of a stream."""

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        """The last event, when the client asked for usage."""

    def add(self, delta: Delta) -> None:
        """Collect for `body`."""

    def body(self, usage: Usage) -> dict[str, Any]:
        """The whole answer."""


class Prepared(NamedTuple):
    """A body made ready for the engine."""

    prompts: list[list[int]]
    param: str  # the field that the prompts came from
    logprobs: int | None  # for `SamplingParams`
    format: Format
    grammar: Grammar | None = None  # of the answers
    shown: Sequence[str] = ()  # special tokens that the format reads in an answer's text
    prediction: Sequence[int] = ()  # tokens that the answers may repeat


Prepare = Callable[[ServerState, Text, Body], Prepared]


async def respond(request: Request, route: str, kind: type[Body], prepare: Prepare[Body]) -> Response:
    """Read the body, generate, answer. Raises VeneerErrors as long as no header has been sent."""
    received = time.monotonic()
    state = state_of(request)
    try:
        body = await read_body(request, kind, state.config.max_body_bytes, state.metrics.unknown_field)
        return await reply(request, Exchange(state, route, body, prepare, received), stream=body.stream)
    except ClientDisconnect:
        return Response(status_code=499)  # nobody reads it; the number is nginx's for access logs


async def reply(request: Request, exchange: Exchange[Any], *, stream: bool) -> Response:
    """Raises ClientDisconnect, and VeneerErrors as long as no header has been sent."""
    exchange.inline &= int(request.headers.get("content-length", INLINE_BYTES + 1)) <= INLINE_BYTES
    if not stream:
        answer = await until_disconnect(request, exchange.answer())
        return Response(answer, headers=exchange.headers(), media_type="application/json")
    events = exchange.events()
    first = await until_disconnect(request, _first(events))
    return EventStream(first, events, exchange)


class Exchange(Generic[Body]):
    """One request being answered."""

    end = b"data: [DONE]\n\n"  # of a stream

    def __init__(
        self, state: ServerState, route: str, body: Body, prepare: Prepare[Body], received: float
    ) -> None:
        self._state, self._route, self._body = state, route, body
        self._prepare, self._received = prepare, received
        self._adapter: Served | None = None
        self._blend: AdapterInfo | None = None  # what is known of it, if it is one
        self._format: Format
        self._usage: Usage
        self.inline = True  # what is tokenized came with the body

    def headers(self) -> dict[str, str]:
        return adapter_headers(self._adapter, self._blend)

    async def answer(self) -> bytes:
        async with aclosing(self._deltas()) as deltas:
            async for delta in deltas:
                self._format.add(delta)

        def encode() -> bytes:
            return msgspec.json.encode(self._format.body(self._usage))

        # Long prompts take long to write down with what is told of each token.
        return encode() if self._body.prompt_scores is None else await asyncio.to_thread(encode)

    async def prompt_tokens(self) -> int:
        """How many tokens the prompts have; nothing is generated."""
        state, body = self._state, self._body
        adapter = select_adapter(state, chosen_model(state, body.model, body.lora_path), body.mixture)
        with state.in_flight.hold(*digests_of(adapter)):
            ready = await self._ready(await state.texts.of(adapter))
        return sum(map(len, ready.prompts))

    async def events(self) -> AsyncGenerator[bytes]:
        options = self._body.stream_options or StreamOptions()
        async with aclosing(self._deltas()) as deltas:
            async for delta in deltas:
                so_far = self._usage.wire() if options.continuous_usage_stats else None
                usage = {"usage": so_far} if so_far or options.include_usage else {}
                for chunk in self._format.chunks(delta):
                    yield _event(chunk | usage)
        if options.include_usage:
            yield _event(self._format.usage_chunk(self._usage))

    def failed(self, error: VeneerError) -> bytes:
        """The event of a stream that cannot go on; its status is sent."""
        return _event(error_body(error))

    async def _deltas(self) -> AsyncGenerator[Delta]:
        state, body = self._state, self._body
        # No await between these two: a delete waits for the requests that hold what it deletes.
        model = chosen_model(state, body.model, body.lora_path)
        self._adapter = adapter = select_adapter(state, model, body.mixture)
        with counted(state, self._route, adapter):
            state.engine.require_ready()
            text = await state.texts.of(adapter)
            if isinstance(adapter, Blend):
                self._blend = await state.blends.of(adapter)
            ready = await self._ready(text)
            self._format = ready.format
            with Run(
                state,
                body,
                ready.prompts,
                text=text,
                adapter=adapter,
                param=ready.param,
                logprobs=ready.logprobs,
                grammar=ready.grammar,
                shown=ready.shown,
                prediction=ready.prediction,
                received=self._received,
                blend=self._blend,
            ) as run:
                self._usage = run.usage
                async with aclosing(run.deltas()) as deltas:
                    async for delta in deltas:
                        yield delta

    async def _ready(self, text: Text) -> Prepared:
        prepare = partial(self._prepare, self._state, text, self._body)
        if text.is_slow:
            return await self._state.texts.run(prepare)
        return prepare() if self.inline else await asyncio.to_thread(prepare)


def adapter_headers(adapter: Served | None, blend: AdapterInfo | None) -> dict[str, str]:
    """Which adapter version answered; a name alone may have moved since. `blend`: what is known of one."""
    if adapter is None:
        return {}
    if isinstance(adapter, Blend):
        cut = {} if blend is None or blend.error is None else {"x-veneer-blend-error": f"{blend.error:.6g}"}
        return {"x-veneer-adapter": adapter.label} | cut
    version = f"{adapter.name}@{adapter.version}"
    return {"x-veneer-adapter": version, "x-veneer-adapter-digest": adapter.digest}


@contextmanager
def counted(state: ServerState, route: str, adapter: Served | None) -> Iterator[None]:
    name = adapter.name if adapter else None
    outcome = "cancelled"
    state.metrics.request_started(route, name)
    try:
        with state.in_flight.hold(*digests_of(adapter)):
            yield
        outcome = "ok"
    except VeneerError as error:
        outcome = error.code
        raise
    except Exception:
        outcome = "internal_error"
        raise
    finally:
        state.metrics.request_finished(route, name, outcome)


class EventStream(StreamingResponse):
    """Server-sent events. Closes its source for certain, however the connection ends."""

    def __init__(self, first: bytes, rest: AsyncGenerator[bytes], exchange: Exchange[Any]) -> None:
        self._rest, self._exchange = rest, exchange
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"} | exchange.headers()
        super().__init__(self._events(first), headers=headers, media_type="text/event-stream")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._rest.aclose()

    async def _events(self, first: bytes) -> AsyncIterator[bytes]:
        yield first
        try:
            async for event in self._rest:
                yield event
        except VeneerError as error:
            yield self._exchange.failed(error)
        except Exception:
            log.exception("a stream failed")
            yield self._exchange.failed(INTERNAL)
        yield self._exchange.end


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(data) + b"\n\n"


async def _first(events: AsyncGenerator[bytes]) -> bytes:
    return await anext(events)


async def until_disconnect(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`. Cancels it and raises ClientDisconnect as soon as the connection closes."""
    working = asyncio.create_task(work)
    watching = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
