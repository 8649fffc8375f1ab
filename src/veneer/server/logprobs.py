"""Log probabilities in OpenAI's two forms, for chat and for completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from veneer.server.generation import Logprob
from veneer.server.text import TextTokenizer

LOWEST = -9999.0  # OpenAI's word for "very unlikely"; JSON has no infinity


def _token(tokenizer: TextTokenizer, token: int) -> str:
    """A token as text; what is no whole character becomes U+FFFD (the bytes say what it is)."""
    return tokenizer.token_bytes(token).decode("utf-8", "replace")


def _finite(value: float) -> float:
    return value if value > LOWEST else LOWEST  # also for NaN


def chat_logprobs(tokenizer: TextTokenizer, logprobs: Sequence[Logprob]) -> dict[str, Any]:
    """`choices[].logprobs` of chat completions: one `ChatCompletionTokenLogprob` a content token."""

    def one(token: int, value: float) -> dict[str, Any]:
        data = list(tokenizer.token_bytes(token))
        return {"token": _token(tokenizer, token), "logprob": _finite(value), "bytes": data}

    content = [
        one(entry.token, values.logprob)
        | {"top_logprobs": [one(*pair) for pair in zip(values.top_ids, values.top_logprobs, strict=True)]}
        for entry, values in logprobs
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(tokenizer: TextTokenizer, logprobs: Sequence[Logprob]) -> dict[str, Any]:
    """`choices[].logprobs` of completions. The chosen token is always among `top_logprobs`."""
    tops = []
    for entry, values in logprobs:
        top = {_token(tokenizer, entry.token): _finite(values.logprob)}
        for token, value in zip(values.top_ids, values.top_logprobs, strict=True):
            top.setdefault(_token(tokenizer, token), _finite(value))
        tops.append(top)
    return {
        "text_offset": [entry.offset for entry, _ in logprobs],
        "token_logprobs": [_finite(values.logprob) for _, values in logprobs],
        "tokens": [_token(tokenizer, entry.token) for entry, _ in logprobs],
        "top_logprobs": tops,
    }
