"""`POST /v1/completions`: text or token ids in, text out."""

from __future__ import annotations

import time
import uuid
from typing import Any, cast

from fastapi import APIRouter, Request, Response

from veneer.server.adapter_text import Text
from veneer.server.generation import Delta, Logprob, Usage
from veneer.server.logprobs import completion_logprobs
from veneer.server.state import ServerState
from veneer.server.streaming import Prepared, respond
from veneer.server.text import TextTokenizer
from veneer.server.wire import CompletionRequest

router = APIRouter()
ROUTE = "/v1/completions"


@router.post(ROUTE)
async def completions(request: Request) -> Response:
    """OpenAI's completions; `model` chooses the base or an adapter."""
    return await respond(request, ROUTE, CompletionRequest, prepare)


def prepare(state: ServerState, text: Text, body: CompletionRequest) -> Prepared:
    """Tokenize the prompts; token ids are taken as they are."""
    given = body.prompt
    many = isinstance(given, list) and not isinstance(given[0], int)
    prompts = cast(list[str | list[int]], given if many else [given])
    encoded = [
        text.tokenizer.encode(prompt, add_special_tokens=body.add_special_tokens)
        if isinstance(prompt, str)
        else prompt
        for prompt in prompts
    ]
    echoes = [""] * len(prompts)
    if body.echo:
        echoes = [prompt if isinstance(prompt, str) else text.tokenizer.decode(prompt) for prompt in prompts]
    answer = CompletionFormat(state, text.tokenizer, body, echoes)
    return Prepared(encoded, "prompt", body.logprobs, answer)


class CompletionFormat:
    """OpenAI's `CreateCompletionResponse`, whole or in chunks of the same shape."""

    def __init__(
        self, state: ServerState, tokenizer: TextTokenizer, body: CompletionRequest, echoes: list[str]
    ) -> None:
        self._tokenizer = tokenizer
        self._with_logprobs = body.logprobs is not None
        self._frame: dict[str, Any] = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": body.model,
            "system_fingerprint": state.fingerprint,
        }
        self._prefixes = [echo for echo in echoes for _ in range(body.n)]  # still to be sent
        self._texts = list(self._prefixes)
        self._logprobs: list[list[Logprob]] = [[] for _ in self._texts]
        self._last: list[Delta | None] = [None for _ in self._texts]

    def chunks(self, delta: Delta) -> list[dict[str, Any]]:
        text, self._prefixes[delta.choice] = self._prefixes[delta.choice] + delta.text, ""
        choice = self._choice(delta.choice, text, delta.logprobs, delta)
        return [self._frame | {"choices": [choice]}]

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        return self._frame | {"choices": [], "usage": usage.wire()}

    def add(self, delta: Delta) -> None:
        self._texts[delta.choice] += delta.text
        self._logprobs[delta.choice] += delta.logprobs
        self._last[delta.choice] = delta

    def body(self, usage: Usage) -> dict[str, Any]:
        choices = [
            self._choice(index, text, logprobs, last)
            for index, (text, logprobs, last) in enumerate(
                zip(self._texts, self._logprobs, self._last, strict=True)
            )
        ]
        return self._frame | {"choices": choices, "usage": usage.wire()}

    def _choice(self, index: int, text: str, logprobs: list[Logprob], last: Delta | None) -> dict[str, Any]:
        return {
            "index": index,
            "text": text,
            "logprobs": completion_logprobs(self._tokenizer, logprobs) if self._with_logprobs else None,
            "finish_reason": last.finish_reason if last else None,
            "stop_reason": last.stop_reason if last else None,
        }
