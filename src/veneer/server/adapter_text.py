"""The text side of an adapter: tokenizer, chat template and end tokens that its upload brought.

Each of the three is the base's when the adapter has no file for it, or one that does the same; nothing is loaded
twice then. Texts are kept by digest, least recently used out first.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from veneer.adapters.saved_blends import Blend, Served
from veneer.errors import AdapterRefused, InvalidRequest
from veneer.server.safe_tokenizer import load_tokenizer
from veneer.server.sandbox import Sandbox, SandboxedTemplate
from veneer.server.template import ChatTemplate, read_source
from veneer.server.text import TextTokenizer, guarded, read_json, read_special_tokens

TEXTS_LIMIT = 1024  # texts kept
TOKENIZER_BYTES = 256 << 20  # of the files of tokenizers kept; in memory they take some times as much
_END_LIMIT = 64  # end tokens
_SAMPLE = "Tokenize 1234 words, naïve – 日本語\n\tand <|spaces|>  "

Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class Text:
    """How requests for the base or an adapter become tokens, and tokens text."""

    tokenizer: TextTokenizer
    template: ChatTemplate | SandboxedTemplate | None
    special_tokens: Mapping[str, str]  # that a template sees
    end_tokens: tuple[int, ...] = ()  # that end a sequence, beside those of the base
    tokenizer_bytes: int = 0  # of the file of a tokenizer that is not the base's
    tokenizer_of: str | None = None  # digest of the adapter that brought it; None: the base's

    def is_like(self, other: Text) -> bool:
        """Whether requests are read and written with both in the same way."""
        return (
            self.tokenizer is other.tokenizer
            and _source(self.template) == _source(other.template)
            and self.special_tokens == other.special_tokens
            and set(self.end_tokens) == set(other.end_tokens)
        )

    @property
    def is_slow(self) -> bool:
        """Whether rendering may take seconds, so that it must not happen on the event loop."""
        return isinstance(self.template, SandboxedTemplate)


def _source(template: ChatTemplate | SandboxedTemplate | None) -> str | None:
    return None if template is None else template.source


def base_text(folder: Path) -> Text:
    """The text side of the base, out of a model's folder."""
    special_tokens = read_special_tokens(folder)
    return Text(
        tokenizer=TextTokenizer.load(folder),
        template=ChatTemplate.load(folder, special_tokens),
        special_tokens=special_tokens,
    )


class AdapterTexts:
    """The texts of adapters beside the base's. Work on them runs in threads of their own."""

    def __init__(self, base: Text, blob: Callable[[str], Path]) -> None:
        """`blob` gives the folder of an adapter's files."""
        self.base = base
        self._blob = blob
        self._sandbox = Sandbox()
        self._texts: OrderedDict[str, Text] = OrderedDict()  # by digest
        self._tokenizers: WeakValueDictionary[bytes, TextTokenizer] = WeakValueDictionary()  # by file
        self._loading = threading.Lock()
        self._parsing = threading.Lock()  # one at a time: a tokenizer takes much memory while it is parsed
        self._threads = ThreadPoolExecutor(4, "adapter-text")

    def close(self) -> None:
        self._threads.shutdown()
        self._sandbox.close()

    async def run(self, work: Callable[[], Value]) -> Value:
        """Do work that may take long without keeping other threads from theirs."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def of(self, adapter: Served | None) -> Text:
        """What requests for an adapter are read and written with. Raises InvalidRequest for a blend of several."""
        if isinstance(adapter, Blend):
            return self._common(adapter, [await self.of(each) for each in adapter.adapters])
        if adapter is None or not adapter.text_files:
            return self.base
        digest = adapter.digest
        known = self._texts.get(digest)
        if known is None:
            return await self.run(lambda: self._load(digest))
        with suppress(KeyError):  # it was put out this moment
            self._texts.move_to_end(digest)
        return known

    def _common(self, blend: Blend, texts: Sequence[Text]) -> Text:
        """The text side of all parts of a blend; a request is read in one way."""
        first = texts[0]
        for adapter, text in zip(blend.adapters, texts, strict=True):
            if not first.is_like(text):
                raise InvalidRequest(
                    f"{blend.adapters[0].name!r} and {adapter.name!r} are read with different tokenizers, chat "
                    "templates or end tokens, so a blend of them has none. Upload one of them without these files.",
                    param="adapters",
                )
        return first

    def read(self, folder: Path) -> Text:
        """The text side of the adapter in `folder`. Blocks. Raises AdapterRefused for what cannot be used."""
        try:
            tokenizer, size = self._tokenizer(folder)
            _check_added_tokens(folder, tokenizer)
            special_tokens = self._special_tokens(folder)
            return Text(
                tokenizer=tokenizer,
                template=self._template(folder, special_tokens),
                special_tokens=special_tokens,
                end_tokens=_end_tokens(folder, tokenizer),
                tokenizer_bytes=size,
            )
        except AdapterRefused:
            raise
        except InvalidRequest as error:
            raise AdapterRefused(error.message, param="files") from error

    def forget(self, digest: str) -> None:
        self._texts.pop(digest, None)

    def _load(self, digest: str) -> Text:
        with self._loading:
            if digest not in self._texts:
                text = self.read(self._blob(digest))
                own = text.tokenizer is not self.base.tokenizer
                self._texts[digest] = replace(text, tokenizer_of=digest if own else None)
            self._texts.move_to_end(digest)
            text = self._texts[digest]
            while len(self._texts) > 1 and self._is_full():
                self._texts.popitem(last=False)
        return text

    def _is_full(self) -> bool:
        taken = sum(text.tokenizer_bytes for text in self._texts.values())
        return len(self._texts) > TEXTS_LIMIT or taken > TOKENIZER_BYTES

    def _tokenizer(self, folder: Path) -> tuple[TextTokenizer, int]:
        """The tokenizer, and the bytes of its file if it is not the base's."""
        file = folder / "tokenizer.json"
        if not file.is_file():
            return self.base.tokenizer, 0
        data = file.read_bytes()
        key = hashlib.sha256(data).digest()
        with self._parsing:
            tokenizer = self._tokenizers.get(key)
            if tokenizer is None:
                loaded = load_tokenizer(data, self.base.tokenizer.definition)
                tokenizer = guarded(lambda: _tried(TextTokenizer(loaded)))
                if tokenizer.fingerprint == self.base.tokenizer.fingerprint:
                    tokenizer = self.base.tokenizer
                self._tokenizers[key] = tokenizer
        return tokenizer, 0 if tokenizer is self.base.tokenizer else len(data)

    def _special_tokens(self, folder: Path) -> Mapping[str, str]:
        """The adapter's if it has a file that names them."""
        named = any(
            (folder / name).is_file() for name in ("tokenizer_config.json", "special_tokens_map.json")
        )
        return read_special_tokens(folder) if named else self.base.special_tokens

    def _template(
        self, folder: Path, special_tokens: Mapping[str, str]
    ) -> ChatTemplate | SandboxedTemplate | None:
        base = self.base.template
        source = read_source(folder)
        if source is not None and (base is None or source != base.source):
            return SandboxedTemplate(source, special_tokens, self._sandbox)
        if base is None or all(
            special_tokens.get(name) == self.base.special_tokens.get(name)
            for name in special_tokens.keys() | self.base.special_tokens.keys()
            if name in base.source
        ):
            return base
        return ChatTemplate(base.source, special_tokens)


def _tried(tokenizer: TextTokenizer) -> TextTokenizer:
    """The same. What does not work at all fails here, at the upload."""
    tokenizer.decode(tokenizer.encode(_SAMPLE, add_special_tokens=True))
    return tokenizer


def _check_added_tokens(folder: Path, tokenizer: TextTokenizer) -> None:
    """What other files say about added tokens must be what the tokenizer does: transformers would add them."""
    told: dict[Any, Any] = dict(read_json(folder / "added_tokens.json"))
    decoder = read_json(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise InvalidRequest("tokenizer_config.json: added_tokens_decoder must be an object.")
    for index, token in decoder.items():
        text = token.get("content") if isinstance(token, dict) else token
        told[str(text)] = int(index) if index.isdecimal() and len(index) < 10 else index
    for text, index in told.items():
        if tokenizer.token_id(text) != index:
            raise InvalidRequest(
                f"the added token {text[:100]!r} is {str(index)[:20]} in added_tokens.json or "
                f"tokenizer_config.json and {tokenizer.token_id(text)} in the tokenizer; "
                "save the tokenizer with all its files."
            )


def _end_tokens(folder: Path, tokenizer: TextTokenizer) -> tuple[int, ...]:
    """Those of generation_config.json and the tokenizer's eos_token."""
    told = read_json(folder / "generation_config.json").get("eos_token_id")
    ends = [] if told is None else told if isinstance(told, list) else [told]
    if len(ends) > _END_LIMIT or not all(type(end) is int and 0 <= end < 2**31 for end in ends):
        raise InvalidRequest(
            f"generation_config.json: eos_token_id must be a token id, or at most {_END_LIMIT} of them "
            f"(got {str(told)[:100]})."
        )
    if name := read_special_tokens(folder).get("eos_token"):
        end = tokenizer.token_id(name)
        if end is None:
            raise InvalidRequest(f"eos_token {name[:100]!r} is no token of the tokenizer.")
        ends = [*ends, end]
    return tuple(dict.fromkeys(ends))
