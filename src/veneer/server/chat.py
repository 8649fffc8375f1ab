"""`POST /v1/chat/completions`."""

from __future__ import annotations

import time
import uuid
from typing import Any

from fastapi import APIRouter, Request, Response

from veneer.engine.messages import TokenLogprobs
from veneer.errors import InvalidRequest
from veneer.server.adapter_text import Text
from veneer.server.conversation import template_messages
from veneer.server.generation import Delta, Logprob, Usage
from veneer.server.logprobs import chat_logprobs, prompt_logprobs
from veneer.server.state import ServerState
from veneer.server.streaming import Prepared, respond
from veneer.server.text import TextTokenizer
from veneer.server.wire import ChatRequest, Conversation

router = APIRouter()
ROUTE = "/v1/chat/completions"

# What the renderer itself passes to a template.
_OURS = {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"}


@router.post(ROUTE)
async def chat_completions(request: Request) -> Response:
    """OpenAI's chat completions; `model` chooses the base or an adapter."""
    return await respond(request, ROUTE, ChatRequest, prepare)


def prepare(state: ServerState, text: Text, body: ChatRequest) -> Prepared:
    prompt = render(state, text, body)
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return Prepared([prompt], "messages", logprobs, ChatFormat(state, text.tokenizer, body, prompt))


def render(state: ServerState, text: Text, body: Conversation) -> list[int]:
    """The conversation as tokens. Raises InvalidRequest."""
    template = text.template
    if template is None:
        message = "The model has no chat template; send a prompt to /v1/completions."
        raise InvalidRequest(message, param="messages")
    for name in _OURS & body.chat_template_kwargs.keys():
        param = f"chat_template_kwargs.{name}"
        raise InvalidRequest(f"{param} is set by the server; leave it out.", param=param)
    rendered = template.render(
        template_messages(body.messages, template.source, state.metrics.unknown_field),
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        variables=body.chat_template_kwargs,
    )
    return text.tokenizer.encode(rendered, add_special_tokens=body.add_special_tokens)


class ChatFormat:
    """OpenAI's `CreateChatCompletionResponse` and its chunks."""

    def __init__(
        self, state: ServerState, tokenizer: TextTokenizer, body: ChatRequest, prompt: list[int]
    ) -> None:
        self._tokenizer = tokenizer
        self._prompt, self._prompt_count = prompt, body.prompt_logprobs
        self._prompt_scores: list[TokenLogprobs] = []
        self._with_logprobs = body.logprobs
        self._frame: dict[str, Any] = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": body.model,
            "system_fingerprint": state.fingerprint,
        }
        if body.service_tier is not None:
            self._frame["service_tier"] = "default"
        self._texts = [""] * body.n
        self._logprobs: list[list[Logprob]] = [[] for _ in range(body.n)]
        self._last: list[Delta | None] = [None] * body.n
        self._begun: set[int] = set()

    def chunks(self, delta: Delta) -> list[dict[str, Any]]:
        found = []
        if delta.choice not in self._begun:
            self._begun.add(delta.choice)
            found.append(self._chunk(delta.choice, {"role": "assistant", "content": ""}))
        if delta.text or delta.logprobs:
            found.append(self._chunk(delta.choice, {"content": delta.text}, self._wire(delta.logprobs)))
        if delta.finish_reason:
            found.append(self._chunk(delta.choice, {}, end=delta))
        return found

    def _chunk(
        self, index: int, delta: dict[str, Any], logprobs: Any = None, end: Delta | None = None
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}
        if end:
            choice |= {"finish_reason": end.finish_reason, "stop_reason": end.stop_reason}
        return self._frame | {"object": "chat.completion.chunk", "choices": [choice]}

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        return self._frame | {"object": "chat.completion.chunk", "choices": [], "usage": usage.wire()}

    def add(self, delta: Delta) -> None:
        self._texts[delta.choice] += delta.text
        self._logprobs[delta.choice] += delta.logprobs
        self._last[delta.choice] = delta
        self._prompt_scores = self._prompt_scores or delta.prompt  # every choice has the same

    def body(self, usage: Usage) -> dict[str, Any]:
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "logprobs": self._wire(logprobs),
                "finish_reason": last.finish_reason if last else None,
                "stop_reason": last.stop_reason if last else None,
            }
            for index, (text, logprobs, last) in enumerate(
                zip(self._texts, self._logprobs, self._last, strict=True)
            )
        ]
        answer: dict[str, Any] = {"object": "chat.completion", "choices": choices, "usage": usage.wire()}
        if self._prompt_count is not None:
            answer["prompt_logprobs"] = prompt_logprobs(
                self._tokenizer, self._prompt, self._prompt_scores, self._prompt_count
            )
        return self._frame | answer

    def _wire(self, logprobs: list[Logprob]) -> dict[str, Any] | None:
        return chat_logprobs(self._tokenizer, logprobs) if self._with_logprobs else None
