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
from veneer.server.tool_calls.message import Message
from veneer.server.tool_calls.prompt import with_tools
from veneer.server.tool_calls.registry import family_of
from veneer.server.tool_calls.request import Tools, grammar_of, tools_of
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
    tools = tools_in(state, text, body)
    grammar = grammar_of(body, tools, text.tokenizer)
    prompt = render(state, text, body, tools)
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    answer = ChatFormat(state, text.tokenizer, body, prompt, tools)
    shown = tools.family.specials if tools else ()
    said = body.prediction
    prediction = text.tokenizer.encode(said.text, add_special_tokens=False) if said else []
    return Prepared([prompt], "messages", logprobs, answer, grammar, shown, prediction)


def tools_in(state: ServerState, text: Text, body: Conversation) -> Tools | None:
    """See `tools_of`."""
    return tools_of(body, text.template.source if text.template else "", state.config.tool_call_parser)


def render(state: ServerState, text: Text, body: Conversation, tools: Tools | None = None) -> list[int]:
    """The conversation as tokens. Raises InvalidRequest."""
    template = text.template
    if template is None:
        message = "The model has no chat template; send a prompt to /v1/completions."
        raise InvalidRequest(message, param="messages")
    for name in _OURS & body.chat_template_kwargs.keys():
        param = f"chat_template_kwargs.{name}"
        raise InvalidRequest(f"{param} is set by the server; leave it out.", param=param)
    family = tools.family if tools else family_of(template.source, state.config.tool_call_parser)
    messages = template_messages(body.messages, template.source, state.metrics.unknown_field, family)
    if tools and not tools.rendered:
        messages = with_tools(messages, tools.described, family)
    rendered = template.render(
        messages,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        variables=body.chat_template_kwargs,
        tools=tools.described if tools and tools.rendered else (),
    )
    return text.tokenizer.encode(rendered, add_special_tokens=body.add_special_tokens)


class ChatFormat:
    """OpenAI's `CreateChatCompletionResponse` and its chunks."""

    def __init__(
        self,
        state: ServerState,
        tokenizer: TextTokenizer,
        body: ChatRequest,
        prompt: list[int],
        tools: Tools | None,
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
        self._messages = [Message(tools) for _ in range(body.n)]
        self._logprobs: list[list[Logprob]] = [[] for _ in range(body.n)]
        self._last: list[Delta | None] = [None] * body.n

    def chunks(self, delta: Delta) -> list[dict[str, Any]]:
        deltas = self._take(delta)
        if delta.logprobs and not any("role" not in each for each in deltas):
            deltas.append({"content": ""})
        found = [self._chunk(delta.choice, each) for each in deltas]
        if delta.logprobs:  # with the first that is news
            first = next(chunk for chunk, each in zip(found, deltas, strict=True) if "role" not in each)
            first["choices"][0]["logprobs"] = self._wire(delta.logprobs)
        if delta.finish_reason:
            found.append(self._chunk(delta.choice, {}, end=delta))
        return found

    def _take(self, delta: Delta) -> list[dict[str, Any]]:
        return self._messages[delta.choice].take(delta.text, final=delta.finish_reason is not None)

    def _chunk(self, index: int, delta: dict[str, Any], end: Delta | None = None) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        if end:
            choice |= {"finish_reason": self._reason(end), "stop_reason": end.stop_reason}
        return self._frame | {"object": "chat.completion.chunk", "choices": [choice]}

    def _reason(self, end: Delta) -> str | None:
        called = self._messages[end.choice].has_calls
        return "tool_calls" if called and end.finish_reason == "stop" else end.finish_reason

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        return self._frame | {"object": "chat.completion.chunk", "choices": [], "usage": usage.wire()}

    def add(self, delta: Delta) -> None:
        self._take(delta)
        self._logprobs[delta.choice] += delta.logprobs
        self._last[delta.choice] = delta
        self._prompt_scores = self._prompt_scores or delta.prompt  # every choice has the same

    def body(self, usage: Usage) -> dict[str, Any]:
        choices = [
            {
                "index": index,
                "message": message.whole(),
                "logprobs": self._wire(logprobs),
                "finish_reason": self._reason(last) if last else None,
                "stop_reason": last.stop_reason if last else None,
            }
            for index, (message, logprobs, last) in enumerate(
                zip(self._messages, self._logprobs, self._last, strict=True)
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
