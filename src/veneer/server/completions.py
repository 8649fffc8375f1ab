"""`POST /v1/completions`: text or token ids in, text out."""

from __future__ import annotations

import time
import uuid
from typing import Any, NamedTuple, cast

from fastapi import APIRouter, Request, Response

from veneer.server.adapter_text import Text
from veneer.server.generation import Delta, Logprob, Usage
from veneer.server.logprobs import completion_logprobs, echoed, prompt_logprobs
from veneer.server.state import ServerState
from veneer.server.streaming import Prepared, respond
from veneer.server.structured import answer_grammar
from veneer.server.text import TextTokenizer
from veneer.server.wire import CompletionRequest

router = APIRouter()
ROUTE = "/v1/completions"


@router.post(ROUTE)
async def completions(request: Request) -> Response:
    """OpenAI's completions; `model` chooses the base or an adapter."""
    return await respond(request, ROUTE, CompletionRequest, prepare)


class Prompt(NamedTuple):
    tokens: list[int]
    echo: str  # what its answers begin with


def prepare(state: ServerState, text: Text, body: CompletionRequest) -> Prepared:
    """Tokenize the prompts; token ids are taken as they are."""
    given = body.prompt
    many = isinstance(given, list) and not isinstance(given[0], int)
    prompts = [_prompt(text, body, each) for each in cast(list[str | list[int]], given if many else [given])]
    answer = CompletionFormat(state, text.tokenizer, body, prompts)
    grammar = answer_grammar(body.response_format, body.structured_outputs)
    return Prepared([prompt.tokens for prompt in prompts], "prompt", body.logprobs, answer, grammar)


def _prompt(text: Text, body: CompletionRequest, given: str | list[int]) -> Prompt:
    if isinstance(given, str):
        tokens = text.tokenizer.encode(given, add_special_tokens=body.add_special_tokens)
        return Prompt(tokens, given if body.echo else "")
    skip = body.skip_special_tokens
    return Prompt(given, text.tokenizer.decode(given, skip_special_tokens=skip) if body.echo else "")


class CompletionFormat:
    """OpenAI's `CreateCompletionResponse`, whole or in chunks of the same shape."""

    def __init__(
        self, state: ServerState, tokenizer: TextTokenizer, body: CompletionRequest, prompts: list[Prompt]
    ) -> None:
        self._tokenizer, self._body = tokenizer, body
        self._frame: dict[str, Any] = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": body.model,
            "system_fingerprint": state.fingerprint,
        }
        self._prompts = [prompt for prompt in prompts for _ in range(body.n)]  # by choice
        self._deltas: list[list[Delta]] = [[] for _ in self._prompts]
        self._begun: set[int] = set()

    def chunks(self, delta: Delta) -> list[dict[str, Any]]:
        choice = self._choice([delta], is_first=delta.choice not in self._begun)
        self._begun.add(delta.choice)
        return [self._frame | {"choices": [choice]}]

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        return self._frame | {"choices": [], "usage": usage.wire()}

    def add(self, delta: Delta) -> None:
        self._deltas[delta.choice].append(delta)

    def body(self, usage: Usage) -> dict[str, Any]:
        choices = [self._choice(deltas, is_first=True) for deltas in self._deltas]
        return self._frame | {"choices": choices, "usage": usage.wire()}

    def _choice(self, deltas: list[Delta], *, is_first: bool) -> dict[str, Any]:
        """What the deltas add to their choice, if they are its first the echo, too."""
        last, body, tokenizer = deltas[-1], self._body, self._tokenizer
        prompt, scores = self._prompts[last.choice], deltas[0].prompt
        echo = prompt.echo if is_first else ""
        found: dict[str, Any] = {
            "index": last.choice,
            "text": echo + "".join(delta.text for delta in deltas),
            "logprobs": None,
            "finish_reason": last.finish_reason,
            "stop_reason": last.stop_reason,
        }
        if body.logprobs is not None:
            logprobs = [_moved(each, len(prompt.echo)) for delta in deltas for each in _of(delta)]
            if body.echo and is_first:
                logprobs = echoed(tokenizer, prompt.tokens, echo, scores) + logprobs
            found["logprobs"] = completion_logprobs(tokenizer, logprobs, body.logprobs)
        if body.prompt_logprobs is not None:
            found["prompt_logprobs"] = prompt_logprobs(tokenizer, prompt.tokens, scores, body.prompt_logprobs)
        return found


def _of(delta: Delta) -> list[Logprob]:
    """One for each token of the delta, that which ended it included."""
    return delta.logprobs if delta.end is None else [*delta.logprobs, delta.end]


def _moved(logprob: Logprob, characters: int) -> Logprob:
    entry = logprob.entry
    return Logprob(entry._replace(offset=entry.offset + characters), logprob.values)
