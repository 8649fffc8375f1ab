"""Reads a tokenizer.json that comes with an adapter.

The `tokenizers` library trusts its file: it compiles and runs the regular expressions in it, repeats what a
replacement says, and allocates what the numbers say. Here the file is parsed first, and only what a tokenizer for
this base can need is passed on: the base's kind of model and, around it, the base's own parts or well-known ones. A
regular expression must be the base's or one of `_KNOWN_REGEXES`. What is free are the vocabulary, the added tokens
and the tokens put around a text.

https://github.com/huggingface/tokenizers/blob/v0.22.0/tokenizers/src/tokenizer/serialization.rs
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
from tokenizers import Tokenizer

from veneer.errors import AdapterRefused
from veneer.server.text import guarded

_PIECE_LIMIT = 1024  # characters of a token
_ADDED_LIMIT = 16_384  # added tokens
_PARTS_LIMIT = 8  # of a sequence of normalizers, pre-tokenizers or post-processors
_AROUND_LIMIT = 64  # tokens put around a text
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_MODEL_SIZES = ("continuing_subword_prefix", "end_of_word_suffix", "max_input_chars_per_word")
_KNOWN_REGEXES = frozenset(
    {
        # GPT-2's, Llama 3's and Qwen 2's ways to find words
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|{_WORDS}|\p{{N}}{{1,3}}|{_REST}",
        rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|{_WORDS}|\p{{N}}|{_REST}",
    }
)
_TYPES: Mapping[str, frozenset[str]] = {
    "normalizer": frozenset({"NFC", "NFD", "NFKC", "NFKD", "Prepend", "Replace"}),
    "pre_tokenizer": frozenset({"ByteLevel", "Digits", "Metaspace", "Split"}),
    "post_processor": frozenset({"ByteLevel", "TemplateProcessing"}),
    "decoder": frozenset({"ByteFallback", "ByteLevel", "Fuse", "Metaspace", "Replace", "Strip"}),
}
_MEMBERS = {
    "normalizer": "normalizers",
    "pre_tokenizer": "pretokenizers",
    "post_processor": "processors",
    "decoder": "decoders",
}


def load_tokenizer(data: bytes, base: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer in a file's bytes. `base` is the definition of the base's (`TextTokenizer.definition`).

    Raises AdapterRefused for what is not served, by its name; InvalidRequest when the library fails on the rest.
    """
    try:
        given = msgspec.json.decode(data)
    except (ValueError, RecursionError) as error:
        raise _refused(f"it is not valid JSON: {error}") from None
    if not isinstance(given, dict):
        raise _refused("it must be a JSON object")
    # Written anew, so that what was checked is what the library reads: a key may stand twice in the file.
    checked: dict[str, Any] = {"version": "1.0", "truncation": None, "padding": None}
    checked["added_tokens"] = _added_tokens(given.get("added_tokens") or [])
    regexes = _KNOWN_REGEXES | set(_regexes(base))
    for name in _TYPES:
        part = given.get(name)
        if part is not None and part != base.get(name):
            _check_part(name, part, regexes)
        checked[name] = part
    checked["model"] = _model(given.get("model"), base["model"])
    return guarded(lambda: Tokenizer.from_str(msgspec.json.encode(checked).decode()))


def _refused(reason: str) -> AdapterRefused:
    return AdapterRefused(
        f"tokenizer.json: {reason[:1000]}. A tokenizer that comes with an adapter must be the base's but for its "
        "tokens; save the one the adapter was trained with, or leave it out to use the base's.",
        param="files",
    )


def _regexes(part: Any) -> Iterator[str]:
    """Every regular expression in a definition."""
    if isinstance(part, dict):
        for key, value in part.items():
            if key == "Regex":
                yield str(value)
            else:
                yield from _regexes(value)
    elif isinstance(part, list):
        for value in part:
            yield from _regexes(value)


def _check_part(name: str, part: Any, regexes: frozenset[str]) -> None:
    if not isinstance(part, dict):
        raise _refused(f"{name} must be an object")
    members = part.get(_MEMBERS[name]) if part.get("type") == "Sequence" else [part]
    if not isinstance(members, list) or not all(isinstance(member, dict) for member in members):
        raise _refused(f"{name} must be one part or a sequence of parts")
    if len(members) > _PARTS_LIMIT:
        raise _refused(f"{name} has {len(members)} parts; at most {_PARTS_LIMIT} are taken")
    kinds = [member.get("type") for member in members]
    for kind, member in zip(kinds, members, strict=True):
        if not isinstance(kind, str) or kind not in _TYPES[name]:
            raise _refused(
                f"{name} {str(kind)[:100]!r} is not served; served are {', '.join(sorted(_TYPES[name]))}"
            )
        if unknown := set(_regexes(member)) - regexes:
            raise _refused(
                f"{name} has a regular expression that the base's tokenizer has not: {min(unknown)!r}"
            )
        _check_sizes(name, kind, member)
    if len(set(kinds)) < len(kinds) and kinds.count("Split") < 2:
        raise _refused(f"{name} has one kind of part twice: {', '.join(kinds)}")


def _check_sizes(name: str, kind: str, member: Mapping[str, Any]) -> None:
    """Parts that put something into the text put in what sentencepiece does; one token around it, or some."""
    if kind == "Replace" and name == "normalizer":
        if (member.get("pattern"), member.get("content")) != ({"String": " "}, "▁"):
            raise _refused("a Replace of the normalizer must put ▁ for a space")
    elif kind == "Prepend" and member.get("prepend") != "▁":
        raise _refused("a Prepend of the normalizer must put ▁ in front")
    elif kind == "Split" and member.get("pattern") == {"String": ""}:
        raise _refused("a Split must have a pattern")
    elif kind == "TemplateProcessing":
        around = [*_list(member, "single"), *_list(member, "pair")]
        tokens = member.get("special_tokens")
        named = list(tokens.values()) if isinstance(tokens, dict) else []
        ids = [token.get("ids") for token in named if isinstance(token, dict)]
        long = any(not isinstance(each, list) or len(each) > 1 for each in ids)
        if len(around) > _AROUND_LIMIT or len(named) > _AROUND_LIMIT or long:
            raise _refused(f"at most {_AROUND_LIMIT} tokens may be put around a text, each with one id")
        if sum(isinstance(piece, dict) and "Sequence" in piece for piece in member["single"]) > 1:
            raise _refused("single of TemplateProcessing must hold the text once")


def _list(member: Mapping[str, Any], key: str) -> list[Any]:
    found = member.get(key)
    if not isinstance(found, list):
        raise _refused(f"{key} of TemplateProcessing must be a list")
    return found


def _added_tokens(tokens: Any) -> list[Any]:
    if not isinstance(tokens, list) or len(tokens) > _ADDED_LIMIT:
        raise _refused(f"added_tokens must be a list of at most {_ADDED_LIMIT:,}")
    for token in tokens:
        content = token.get("content") if isinstance(token, dict) else None
        if not isinstance(content, str) or not 0 < len(content) <= _PIECE_LIMIT:
            raise _refused(f"each added token must have a content of 1 to {_PIECE_LIMIT} characters")
    return tokens


def _model(model: Any, base: Mapping[str, Any]) -> dict[str, Any]:
    """`base` is the base's, without its vocabulary."""
    kind = base["type"]
    if not isinstance(model, dict) or model.get("type") != kind:
        given = model.get("type") if isinstance(model, dict) else model
        raise _refused(f"its model is {str(given)[:100]!r} and the base's is {kind!r}")
    if model.get("dropout"):
        raise _refused(
            f"dropout = {str(model['dropout'])[:100]}: the same text must always have the same tokens"
        )
    for name in _MODEL_SIZES:  # put to every character or word of a text, or say how long a word may be
        if (model.get(name) or None) != (base.get(name) or None):
            raise _refused(f"{name} is {str(model.get(name))[:100]!r} and the base's is {base.get(name)!r}")
    vocabulary = model.get("vocab")
    pieces: Any = vocabulary
    if isinstance(vocabulary, list):  # Unigram's: [piece, score]
        pieces = [entry[0] for entry in vocabulary if isinstance(entry, list) and entry]
    if not isinstance(pieces, dict | list) or not all(
        isinstance(piece, str) and len(piece) <= _PIECE_LIMIT for piece in pieces
    ):
        raise _refused(f"its vocabulary must be of texts of at most {_PIECE_LIMIT} characters")
    return model
