"""Text to tokens and back, with the `tokenizers` library alone.

`TextStream` turns a sequence's tokens into text as they come. What it has released never changes and never
ends in half a character; together the pieces equal what `Tokenizer.decode` makes of prompt and output, less
the prompt's text. Stop strings are found wherever tokens cut them.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
import reprlib
from collections import deque
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from tokenizers import Tokenizer

from veneer.errors import InvalidRequest, VeneerError

Value = TypeVar("Value")

_SPECIAL_LIMIT = 1024  # characters; a template may repeat a special token with every message
SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def read_special_tokens(folder: Path) -> dict[str, str]:
    """The named special tokens that a chat template sees, as transformers passes them. Raises InvalidRequest."""
    config = read_json(folder / "special_tokens_map.json") | read_json(folder / "tokenizer_config.json")
    found = {}
    for name in SPECIAL:
        token = config.get(name)
        text = token.get("content") if isinstance(token, dict) else token
        if not isinstance(text, str | None) or (text is None and token) or len(text or "") > _SPECIAL_LIMIT:
            raise InvalidRequest(
                f"tokenizer_config.json: {name} must be text of at most {_SPECIAL_LIMIT} characters or an added "
                f"token (got {reprlib.repr(token)})."
            )
        if text:
            found[name] = text
    return found


class _DecoderKind(NamedTuple):
    byte_level: bool  # GPT-2's byte alphabet; otherwise sentencepiece's, with ▁ for a space
    byte_fallback: bool  # <0x0A> stands for a byte
    drops_first_space: bool


class TextTokenizer:
    """A tokenizer.json, which alone decides about BOS and EOS (as in transformers 5).

    Safe to use from several threads.

    Attributes:
        definition: the file as the library writes it, but for the vocabulary.
        fingerprint: equal for tokenizers that do the same.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        written = self._tokenizer.to_str()
        self.fingerprint = hashlib.sha256(written.encode()).digest()
        self.definition: dict[str, Any] = json.loads(written)
        model = self.definition["model"]
        self.definition["model"] = {key: model[key] for key in model if key not in ("vocab", "merges")}
        self._decoder = _decoder_kind(self.definition["decoder"])
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(index for index, token in added.items() if token.special)
        self._bytes: dict[int, bytes] = {}

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids. Raises InvalidRequest when the tokenizer fails on the text."""
        encoded = guarded(lambda: self._tokenizer.encode(text, add_special_tokens=add_special_tokens))
        return list(encoded.ids)

    @classmethod
    def load(cls, folder: Path) -> TextTokenizer:
        """The one of a model's folder. Raises InvalidRequest when there is none."""
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise InvalidRequest(f"{folder} has no tokenizer.json; save the model with its fast tokenizer.")
        return cls(Tokenizer.from_file(str(file)))

    def token_id(self, token: str) -> int | None:
        found: int | None = self._tokenizer.token_to_id(token)
        return found

    def token(self, index: int) -> str:
        """As the vocabulary spells it; empty for ids without a token."""
        return self._tokenizer.id_to_token(index) or ""

    def num_ids(self) -> int:
        """One more than the largest id of a token. Takes tens of milliseconds for a large vocabulary."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return self._tokenizer.decode(list(tokens), skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token: int) -> bytes:
        """The bytes a token adds to the text. Empty for ids without a token (padding of the vocabulary)."""
        known = self._bytes.get(token)
        if known is None:
            known = self._bytes[token] = self._to_bytes(self.token(token))
        return known

    def drops_space_after(self, prompt: Sequence[int], skip_special_tokens: bool) -> bool:
        """Whether the decoder drops one leading space of a text that follows `prompt`."""
        shown = (token for token in prompt if not (skip_special_tokens and token in self.special_ids))
        return self._decoder.drops_first_space and next(shown, None) is None

    def _to_bytes(self, token: str) -> bytes:
        if self._decoder.byte_level:
            values = [_BYTE_OF.get(character) for character in token]
            # A token with a character outside of the byte alphabet is an added token: plain text.
            return token.encode() if None in values else bytes(value for value in values if value is not None)
        if self._decoder.byte_fallback and (byte := re.fullmatch("<0x([0-9A-Fa-f]{2})>", token)):
            return bytes.fromhex(byte[1])
        return token.replace("▁", " ").encode()


class Entry(NamedTuple):
    """A token whose text has been released. `offset`: characters of the output before it."""

    token: int
    offset: int
    position: int  # among the sequence's tokens


class Piece(NamedTuple):
    text: str
    entries: list[Entry]
    stop: str | None = None  # the stop string that ended the sequence


class TextStream:
    """The growing text of one sequence.

    `stop`: strings that end it. A sequence ends at the stop string that is complete first; of several that
    complete with the same character, the longest. The first `min_tokens` tokens are not searched. `shown`: special
    tokens that are never skipped.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        prompt: Sequence[int],
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
        shown: Collection[int] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._include_stop = include_stop
        self._skip = tokenizer.special_ids.difference(shown) if skip_special_tokens else frozenset[int]()
        self._drop_space = tokenizer.drops_space_after(prompt, skip_special_tokens)
        self._min_tokens = min_tokens
        self._characters = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""  # decoded, but it may be the beginning of a stop string
        self._released = 0  # characters
        self._decoded = 0
        self._tokens = 0
        self._entries: deque[Entry] = deque()

    @property
    def num_tokens(self) -> int:
        """Tokens taken so far: all that were pushed, or those up to the stop string."""
        return self._tokens

    @property
    def num_characters(self) -> int:
        """Characters of the text so far, without what is held back."""
        return self._released

    def push(self, tokens: Sequence[int], *, hide_last: bool = False, final: bool = False) -> Piece:
        """Take new tokens; `hide_last`: the last one ended the sequence and is not part of its text.

        `final`: no more follow, so nothing is held back. After a piece with `stop` push no more.
        """
        shown = len(tokens) - hide_last
        for token in tokens[:shown]:
            data = b"" if token in self._skip else self._tokenizer.token_bytes(token)
            if self._drop_space and data:
                data = data.removeprefix(b" ")
                self._drop_space = False
            if found := self._push_one(token, data):
                return found
        self._tokens += hide_last
        if final and (found := self._append(self._characters.decode(b"", final=True))):
            return found
        return self._release(len(self._held) if final else self._safe(), final=final)

    def _push_one(self, token: int, data: bytes) -> Piece | None:
        self._entries.append(Entry(token, self._decoded, self._tokens))
        self._tokens += 1
        return self._append(self._characters.decode(data))

    def _append(self, text: str) -> Piece | None:
        """Add text; a Piece if that completes a stop string."""
        if not text:
            return None
        before = len(self._held)
        self._held += text
        self._decoded += len(text)
        if self._tokens <= self._min_tokens:
            self._searched_from = self._decoded
            return None
        first = max(0, self._searched_from - self._released)
        hit = self._find(first, before)
        if hit is None:
            return None
        start, stop = hit
        return self._release(start + len(stop) if self._include_stop else start)._replace(stop=stop)

    _searched_from = 0  # characters of the output that no stop string may use

    def _find(self, first: int, before: int) -> tuple[int, str] | None:
        """Where the first stop string to be complete starts in the held text: (start, stop)."""
        best: tuple[int, int, str] | None = None
        for stop in self._stop:
            start = self._held.find(stop, max(first, before - len(stop) + 1))
            if start >= 0:
                candidate = (start + len(stop), start, stop)
                best = candidate if best is None else min(best, candidate)
        return None if best is None else (best[1], best[2])

    def _safe(self) -> int:
        """How much of the held text cannot be part of a stop string that is still to be completed."""
        longest = max(map(len, self._stop), default=0) - 1
        first = max(0, self._searched_from - self._released)
        for start in range(max(first, len(self._held) - longest), len(self._held)):
            if any(stop.startswith(self._held[start:]) for stop in self._stop):
                return start
        return len(self._held)

    def _release(self, count: int, *, final: bool = False) -> Piece:
        text, self._held = self._held[:count], self._held[count:]
        self._released += len(text)
        entries = []
        while self._entries and (final or self._entries[0].offset < self._released):
            entries.append(self._entries.popleft())
        return Piece(text, entries)


def _decoder_kind(decoder: dict[str, Any] | None) -> _DecoderKind:
    """Raises InvalidRequest for a decoder not known here."""
    parts = (decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]) if decoder else []
    known = [
        part["type"] in ("ByteLevel", "ByteFallback", "Fuse", "Metaspace")
        or (part["type"] == "Replace" and (part["pattern"], part["content"]) == ({"String": "▁"}, " "))
        or (part["type"] == "Strip" and (part["content"], part["start"], part["stop"]) == (" ", 1, 0))
        for part in parts
    ]
    kinds = {part["type"] for part in parts}
    if all(known) and parts[-1:] and parts[-1]["type"] == "ByteLevel" and "Strip" not in kinds:
        # transformers 5.17 puts sentencepiece's steps in front for vocabularies out of GGUF files. They
        # match nothing there: neither ▁ nor <0x..> is spelled in the byte alphabet.
        return _DecoderKind(True, False, False)
    if not all(known) or not kinds & {"Metaspace", "Replace"} or "ByteLevel" in kinds:
        raise InvalidRequest(
            f"tokenizer.json has the decoder {decoder}, which is not supported: "
            "it must be ByteLevel, or sentencepiece's Replace/ByteFallback/Fuse/Strip or Metaspace."
        )
    prefixed = any(part["type"] == "Metaspace" and part.get("prepend_scheme") != "never" for part in parts)
    return _DecoderKind("ByteLevel" in kinds, "ByteFallback" in kinds, prefixed or "Strip" in kinds)


def guarded(work: Callable[[], Value]) -> Value:
    """What `work` returns. Whatever the tokenizers library raises, a panic too, is an InvalidRequest."""
    try:
        return work()
    except VeneerError:
        raise
    except Exception as error:
        raise InvalidRequest(f"the tokenizer fails: {str(error)[:500]}") from error
    except BaseException as error:
        if type(error).__module__ != "pyo3_runtime":  # its PanicException is no Exception
            raise
        raise InvalidRequest(f"the tokenizer fails: {str(error)[:500]}") from error


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes, character to byte."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [value for value in range(256) if value not in printable]
    return {chr(value): value for value in printable} | {
        chr(256 + n): value for n, value in enumerate(others)
    }


_BYTE_OF = _byte_alphabet()


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object; an empty one when there is no such file. Raises InvalidRequest for anything else."""
    if not file.is_file():
        return {}
    try:
        text = file.read_text(encoding="utf-8")
        found = json.loads(text)
        if "\\u" in text:  # half a surrogate is no text, and no template or tokenizer takes it
            json.dumps(found, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{file.name} is not valid JSON: {error}.") from error
    if not isinstance(found, dict):
        raise InvalidRequest(f"{file.name} must be a JSON object.")
    return found
