"""Log probabilities in OpenAI's two forms, for chat and for completions, and vLLM's form for prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from veneer.engine.messages import TokenLogprobs
from veneer.server.generation import Logprob
from veneer.server.text import TextStream, TextTokenizer

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
        if values is not None  # of no token of an answer
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(tokenizer: TextTokenizer, logprobs: Sequence[Logprob], count: int) -> dict[str, Any]:
    """`choices[].logprobs` of completions: the token and the `count` likeliest at each position.

    Of tokens that read alike, as halves of characters do, `top_logprobs` has the likelier.
    """
    tops: list[dict[str, float] | None] = []
    for entry, values in logprobs:
        if values is None:
            tops.append(None)
            continue
        top = {_token(tokenizer, entry.token): _finite(values.logprob)}
        for token, value in zip(values.top_ids[:count], values.top_logprobs, strict=False):
            name = _token(tokenizer, token)
            top[name] = max(_finite(value), top.get(name, LOWEST))
        tops.append(top)
    return {
        "text_offset": [entry.offset for entry, _ in logprobs],
        "token_logprobs": [values and _finite(values.logprob) for _, values in logprobs],
        "tokens": [_token(tokenizer, entry.token) for entry, _ in logprobs],
        "top_logprobs": tops,
    }


def echoed(
    tokenizer: TextTokenizer, prompt: Sequence[int], text: str, scores: Sequence[TokenLogprobs]
) -> list[Logprob]:
    """A prompt's tokens, for `completion_logprobs`. `scores` are those of its second token and on.

    Offsets are into `text`, the prompt's; special tokens are in it, or are not.
    """
    for skip in (False, True):
        piece = TextStream(tokenizer, [], skip_special_tokens=skip).push(prompt, final=True)
        if piece.text == text:
            break
    return [Logprob(*each) for each in zip(piece.entries, [None, *scores], strict=True)]


def prompt_logprobs(
    tokenizer: TextTokenizer, prompt: Sequence[int], scores: Sequence[TokenLogprobs], count: int
) -> list[dict[int, dict[str, Any]] | None]:
    """vLLM's `prompt_logprobs`: null for the first token, then the token and the `count` likeliest by their ids."""

    def one(token: int, value: float, rank: int) -> dict[str, Any]:
        return {"logprob": _finite(value), "rank": rank, "decoded_token": _token(tokenizer, token)}

    found: list[dict[int, dict[str, Any]] | None] = [None]
    for token, values in zip(prompt[1:], scores, strict=True):
        here = {token: one(token, values.logprob, values.rank)}
        likeliest = zip(values.top_ids[:count], values.top_logprobs, strict=False)
        for rank, (other, value) in enumerate(likeliest, 1):
            here.setdefault(other, one(other, value, rank))
        found.append(here)
    return found
