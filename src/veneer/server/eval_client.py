"""The models of a running server as training/evaluation/evaluate.py asks them, over its OpenAI API.

Answers come from `/v1/chat/completions`, or from `/v1/completions` for prompts that are put as they are.
Likelihoods take vLLM's `/tokenize` and `/v1/completions` with `echo` and `logprobs`: what is scored are the tokens
of the text as the assistant's answer in the chat template. Everything is greedy; nothing is drawn.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import httpx

from veneer.errors import NotFound, QueueFull, VeneerError
from veneer.server.adapters_cli import answer_of
from veneer.training.evaluation.evaluate import Generation
from veneer.training.evaluation.rows import Turn

Template = Literal["chat", "none"]
BASE = "base"  # stands for the server's base, whatever its name

_TIMEOUT = httpx.Timeout(600.0, connect=10.0)
_PATIENCE = 8  # times that a full queue is asked again
_LONGEST_PAUSE = 10.0  # seconds before it is


class ServerModels:
    """Use as a context. `template`: whether prompts are put as chat messages, or as they are."""

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        template: Template = "chat",
        max_new_tokens: int = 64,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._template, self._max_new_tokens = template, max_new_tokens
        self._names: dict[str, str] = {}
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        # As many connections as the caller asks questions at a time.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        self._client = httpx.AsyncClient(
            base_url=url, headers=headers, timeout=_TIMEOUT, limits=limits, transport=transport
        )

    async def __aenter__(self) -> ServerModels:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self._client.aclose()

    async def find_base(self) -> str:
        """What the server calls its base, which `base` stands for from now on.

        A model that is called so itself keeps its name. Raises NotFound when no listed model is a base.
        """
        listed = (await self._call("GET", "/v1/models"))["data"]
        names = [model["id"] for model in listed if model["id"] == BASE]
        names += [model["id"] for model in listed if model.get("parent") is None]
        if not names:
            raise NotFound(f"no model of {self._client.base_url} is a base; give its name as --model")
        self._names[BASE] = names[0]
        return str(names[0])

    async def generate(self, model: str, prompt: Sequence[Turn]) -> Generation:
        """The greedy answer."""
        body = {"max_tokens": self._max_new_tokens, "temperature": 0}
        if self._template == "chat":
            answer = await self._ask("/v1/chat/completions", model, body | {"messages": _messages(prompt)})
            text = answer["choices"][0]["message"]["content"]
        else:
            answer = await self._ask("/v1/completions", model, body | {"prompt": _plain(prompt)})
            text = answer["choices"][0]["text"]
        return Generation(text or "", answer["choices"][0]["finish_reason"])

    async def score(self, model: str, prompt: Sequence[Turn], texts: Sequence[str]) -> list[list[float]]:
        """Log probabilities of each text's tokens as the answer to the prompt.

        A token that spans the border between prompt and text counts as the text's.
        """
        start = await self._tokens(model, prompt, None) if prompt else []
        sequences = [await self._tokens(model, prompt, text) for text in texts]
        body = {"prompt": sequences, "echo": True, "logprobs": 1, "max_tokens": 0, "temperature": 0}
        answer = await self._ask("/v1/completions", model, body)
        found = sorted(answer["choices"], key=lambda choice: choice["index"])
        return [
            _after(_shared(start, tokens), tokens, choice["logprobs"])
            for tokens, choice in zip(sequences, found, strict=True)
        ]

    async def _tokens(self, model: str, prompt: Sequence[Turn], text: str | None) -> list[int]:
        """The prompt's tokens, followed by those of the beginning of its answer."""
        body: dict[str, Any]
        if self._template == "none" or not prompt:
            body = {"prompt": _plain(prompt) + (text or ""), "add_special_tokens": True}
        elif text is None:
            body = {"messages": _messages(prompt), "add_generation_prompt": True}
        else:
            messages = [*_messages(prompt), {"role": "assistant", "content": text}]
            body = {"messages": messages, "add_generation_prompt": False, "continue_final_message": True}
        return list((await self._ask("/tokenize", model, body))["tokens"])

    async def _ask(self, path: str, model: str, body: Mapping[str, Any]) -> dict[str, Any]:
        return await self._call("POST", path, json={"model": self._names.get(model, model), **body})

    async def _call(self, method: str, path: str, **content: Any) -> dict[str, Any]:
        for pause in range(_PATIENCE):
            try:
                return answer_of(await self._client.request(method, path, **content))
            except QueueFull:  # others use the server too
                await asyncio.sleep(min(2.0**pause / 4, _LONGEST_PAUSE))
            except httpx.TransportError as error:
                reason = str(error) or type(error).__name__
                raise VeneerError(
                    f"No answer from {self._client.base_url}: {reason}. Is `veneer serve` running there?"
                ) from None
        return answer_of(await self._client.request(method, path, **content))


def _messages(prompt: Sequence[Turn]) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.content} for turn in prompt]


def _plain(prompt: Sequence[Turn]) -> str:
    if len(prompt) > 1:
        raise VeneerError("a conversation of several messages needs --template chat")
    return "".join(turn.content for turn in prompt)


def _shared(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens both begin with."""
    pairs = zip(first, second, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def _after(start: int, tokens: Sequence[int], logprobs: Mapping[str, Any] | None) -> list[float]:
    """The log probabilities from a place on, of all the tokens that were sent; the very first has none."""
    given = [] if logprobs is None else logprobs["token_logprobs"]
    if len(given) != len(tokens):
        raise VeneerError(
            f"{len(given)} log probabilities came back for {len(tokens)} tokens; the server does "
            "not give those of prompts"
        )
    values = list(given[max(start, 1) :])
    if not values:
        raise VeneerError("the text has no token to score; it is too short")
    if not all(isinstance(value, float | int) and math.isfinite(value) for value in values):
        raise VeneerError(f"a token's log probability is not a finite number (got {values!r:.80})")
    return [float(value) for value in values]
