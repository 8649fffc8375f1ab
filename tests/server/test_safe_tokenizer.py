"""tokenizer.json of an adapter: what a tokenizer for the base may be, and what is refused before it is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.server.conftest import train_tokenizer
from tokenizers import AddedToken, processors

from veneer.errors import InvalidRequest
from veneer.server.safe_tokenizer import load_tokenizer
from veneer.server.text import TextTokenizer

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
SLOW = r"(a+)+$"


@pytest.fixture(scope="module")
def base(model_folder: Path) -> TextTokenizer:
    return TextTokenizer.load(model_folder)


def definition() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(train_tokenizer().to_str())
    return found


def load(changed: Any, base: TextTokenizer) -> TextTokenizer:
    data = changed if isinstance(changed, bytes) else json.dumps(changed).encode()
    return TextTokenizer(load_tokenizer(data, base.definition))


def test_the_same_file_is_the_same_tokenizer(base: TextTokenizer) -> None:
    written = definition() | {"truncation": None, "padding": None}
    assert load(written, base).fingerprint == base.fingerprint
    padded = train_tokenizer()
    padded.enable_padding(length=5)
    padded.enable_truncation(3)
    assert load(padded.to_str().encode(), base).fingerprint == base.fingerprint, "as trainers leave it"


def test_added_tokens_and_tokens_around_a_text_are_free(base: TextTokenizer) -> None:
    changed = train_tokenizer()
    changed.add_special_tokens([AddedToken("<|tool|>", special=True)])
    end = changed.token_to_id("<|end|>")
    changed.post_processor = processors.TemplateProcessing(
        single="$A <|end|>", special_tokens=[("<|end|>", end)]
    )
    ours = load(changed.to_str().encode(), base)
    assert ours.encode("one<|tool|>", add_special_tokens=True) == [
        *base.encode("one", add_special_tokens=False),
        changed.token_to_id("<|tool|>"),
        end,
    ]
    assert ours.num_ids() == base.num_ids() + 1
    assert ours.fingerprint != base.fingerprint


def test_a_known_way_to_find_words_is_taken(base: TextTokenizer) -> None:
    split = {"type": "Split", "pattern": {"Regex": LLAMA3}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    changed = definition() | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]}}
    assert (
        load(changed, base).decode(load(changed, base).encode("1234 a", add_special_tokens=False)) == "1234 a"
    )


def replaced(path: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    """Set the value at a dotted path."""

    def change(found: dict[str, Any]) -> Any:
        *parents, last = path.split(".")
        target = found
        for name in parents:
            target = target[name]
        target[last] = value
        return found

    return change


def split(pattern: dict[str, str]) -> dict[str, Any]:
    return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}


def around(count: int, ids: int = 1) -> dict[str, Any]:
    piece = {"SpecialToken": {"id": "x", "type_id": 0}}
    tokens = {"x": {"id": "x", "ids": [0] * ids, "tokens": ["x"] * ids}}
    return {"type": "TemplateProcessing", "single": [piece] * count, "pair": [], "special_tokens": tokens}


TEXT = {"Sequence": {"id": "A", "type_id": 0}}


def swell(content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": "a"}, "content": content}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda found: b"{", "not valid JSON"),
        (lambda found: b"[" * 100_000, "not valid JSON"),
        (lambda found: [1], "must be a JSON object"),
        (lambda found: b"\xff", "not valid JSON"),
        (
            replaced("pre_tokenizer", split({"Regex": SLOW})),
            "regular expression that the base's tokenizer has not",
        ),
        (
            replaced("decoder", {"type": "Replace", "pattern": {"Regex": SLOW}, "content": ""}),
            "regular expression",
        ),
        (replaced("pre_tokenizer", split({"String": ""})), "must have a pattern"),
        (replaced("pre_tokenizer", {"type": "Whitespace"}), "pre_tokenizer 'Whitespace' is not served"),
        (replaced("pre_tokenizer", {"pattern": {"Regex": SLOW}}), "is not served"),
        (replaced("pre_tokenizer", [1]), "must be an object"),
        (replaced("pre_tokenizer", {"type": "Sequence", "pretokenizers": 7}), "a sequence of parts"),
        (
            replaced("pre_tokenizer", {"type": "Sequence", "pretokenizers": [{"type": "ByteLevel"}] * 2}),
            "one kind of part twice",
        ),
        (
            replaced("pre_tokenizer", {"type": "Sequence", "pretokenizers": [split({"String": "x"})] * 9}),
            "at most 8",
        ),
        (replaced("normalizer", swell("aa")), "must put ▁ for a space"),
        (replaced("normalizer", {"type": "Prepend", "prepend": "x" * 10**6}), "must put ▁ in front"),
        (replaced("normalizer", {"type": "Precompiled", "precompiled_charsmap": ""}), "'Precompiled'"),
        (replaced("post_processor", around(65)), "at most 64 tokens"),
        (replaced("post_processor", around(1, ids=1000)), "each with one id"),
        (replaced("post_processor", {"type": "TemplateProcessing"}), "must be a list"),
        (replaced("post_processor", around(0) | {"single": [TEXT] * 2}), "must hold the text once"),
        (replaced("model.type", "Unigram"), "its model is 'Unigram' and the base's is 'BPE'"),
        (replaced("model", None), "its model is 'None'"),
        (replaced("model.dropout", 0.5), "dropout = 0.5"),
        (replaced("model.continuing_subword_prefix", "x" * 10**6), "continuing_subword_prefix is 'xxx"),
        (replaced("model.end_of_word_suffix", "x" * 10**6), "end_of_word_suffix is 'xxx"),
        (replaced("model.max_input_chars_per_word", 10**9), "max_input_chars_per_word is '1000000000'"),
        (replaced("model.vocab", {"x" * 1025: 0}), "at most 1024 characters"),
        (replaced("model.vocab", 3), "its vocabulary"),
        (replaced("model.merges", ["nothing here"]), "the tokenizer fails"),
        (replaced("added_tokens", [{"id": 0, "content": ""}]), "a content of 1 to 1024"),
        (replaced("added_tokens", [{"id": 0, "content": "x"}] * 20_000), "at most 16,384"),
        (replaced("added_tokens", {"a": 1}), "must be a list"),
        (replaced("added_tokens", [{"id": -1, "content": "x"}]), "the tokenizer fails"),
        (replaced("decoder", None), "decoder"),
    ],
)
def test_what_is_not_for_this_base_is_refused(
    change: Callable[[dict[str, Any]], Any], says: str, base: TextTokenizer
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        load(change(definition()), base)
    assert says in refused.value.message


def test_a_key_that_stands_twice_is_read_once(base: TextTokenizer) -> None:
    """The library compiles both; here the one that was checked is all it gets."""
    written = json.dumps(definition())
    hostile = json.dumps(split({"Regex": SLOW}))
    doubled = f'{{"pre_tokenizer": {hostile}, {written[1:]}'
    assert load(doubled.encode(), base).fingerprint == base.fingerprint
