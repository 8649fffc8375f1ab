"""vLLM's `/tokenize`, `/detokenize` and `/tokenizer_info`, for the base or with what an adapter brought.

Shapes as in vLLM 0.2x, `vllm/entrypoints/serve/tokenize/protocol.py`; there as here `model` may be left out.
`/tokenizer_info` takes it as a query parameter, which vLLM has not.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

from fastapi import APIRouter, Request

from veneer.adapters.saved_blends import Served, digests_of
from veneer.server.adapter_text import Text
from veneer.server.chat import render, tools_in
from veneer.server.generation import check_tokens, select_adapter, vocabulary_of
from veneer.server.state import ServerState, state_of
from veneer.server.text import SPECIAL, read_json
from veneer.server.wire import Detokenize, TokenizeChat, TokenizeText, check_body, read_body, read_object

router = APIRouter()

CONFIG = "tokenizer_config.json"
# Where the files were on the machine that saved them.
_PATHS = ("vocab_file", "merges_file", "tokenizer_file", "special_tokens_map_file", "name_or_path")

Value = TypeVar("Value")


@router.post("/tokenize")
async def tokenize(request: Request) -> dict[str, Any]:
    """A text (`prompt`) or a conversation (`messages`) as token ids."""
    state = state_of(request)
    data = await read_object(request, state.config.max_body_bytes)
    kind: type[TokenizeText | TokenizeChat] = TokenizeChat if "messages" in data else TokenizeText
    body = check_body(data, kind, state.metrics.unknown_field)
    async with _selected(state, body.model) as (text, _):
        tokens = await _run(state, text, lambda: _encode(state, text, body))
    return {
        "count": len(tokens),
        "max_model_len": state.engine.require_ready().max_model_len,
        "tokens": tokens,
        "token_strs": [text.tokenizer.token(token) for token in tokens] if body.return_token_strs else None,
    }


@router.post("/detokenize")
async def detokenize(request: Request) -> dict[str, str]:
    """Token ids as text, special tokens included."""
    state = state_of(request)
    body = await read_body(request, Detokenize, state.config.max_body_bytes, state.metrics.unknown_field)
    async with _selected(state, body.model) as (text, adapter):
        check_tokens(body.tokens, vocabulary_of(state.engine.require_ready(), adapter), "tokens")
        tokens, decode = body.tokens, text.tokenizer.decode
        return {"prompt": await _run(state, text, lambda: decode(tokens, skip_special_tokens=False))}


@router.get("/tokenizer_info")
async def tokenizer_info(request: Request, model: str | None = None) -> dict[str, Any]:
    """The tokenizer's config, with the special tokens and the chat template that requests are read with."""
    state = state_of(request)
    async with _selected(state, model) as (text, adapter):
        digest = digests_of(adapter)[0]  # the parts of a blend are read alike
        own = None if digest is None else state.store.blob(digest)
        config = await asyncio.to_thread(_read_config, own, state.model_folder)
    found = {"tokenizer_class": "PreTrainedTokenizerFast"} | config
    found |= {name: text.special_tokens.get(name) for name in SPECIAL}
    found["chat_template"] = text.template and text.template.source
    return {name: value for name, value in found.items() if name not in _PATHS}


@asynccontextmanager
async def _selected(state: ServerState, model: str | None) -> AsyncIterator[tuple[Text, Served | None]]:
    """A model's text side, and the adapter (None: the base), whose files stay while the block runs."""
    # No await between these two: a delete waits for the requests that hold what it deletes.
    adapter = None if model is None else select_adapter(state, model)
    with state.in_flight.hold(*digests_of(adapter)):
        yield await state.texts.of(adapter), adapter


def _encode(state: ServerState, text: Text, body: TokenizeText | TokenizeChat) -> list[int]:
    if isinstance(body, TokenizeChat):
        return render(state, text, body, tools_in(state, text, body))
    return text.tokenizer.encode(body.prompt, add_special_tokens=body.add_special_tokens)


async def _run(state: ServerState, text: Text, work: Callable[[], Value]) -> Value:
    return await (state.texts.run(work) if text.is_slow else asyncio.to_thread(work))


def _read_config(own: Path | None, base: Path) -> dict[str, Any]:
    brought = own is not None and (own / CONFIG).is_file()
    return read_json((own if own is not None and brought else base) / CONFIG)
