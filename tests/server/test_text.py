"""Text to tokens and back: against `tokenizers`, against transformers, and against brute force."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from tests.server.conftest import CHATML, train_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from veneer.errors import InvalidRequest
from veneer.server.template import ChatTemplate
from veneer.server.text import Piece, TextStream, TextTokenizer, read_special_tokens

ALPHABET = ["a", "é", "漢", "😀", " ", "the ", "quick", "\n", "x"]


def sentencepiece_tokenizer(*, strip: bool = True) -> Tokenizer:
    """Shaped like Llama 2's (strip) or Gemma's (no strip): ▁ for a space, <0x0A> for a byte."""
    vocabulary = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>"])}
    for value in range(256):
        vocabulary[f"<0x{value:02X}>"] = len(vocabulary)
    for token in ["▁", "a", "x", "é", "▁a", "▁the", "quick", "▁quick", "▁▁"]:
        vocabulary[token] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    prepend = [normalizers.Prepend("▁")] if strip else []
    tokenizer.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*parts, *([decoders.Strip(" ", 1, 0)] if strip else [])])
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<unk>", "<s>", "</s>")])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def metaspace_tokenizer() -> Tokenizer:
    vocabulary = {
        token: index for index, token in enumerate(["<unk>", "▁", "a", "▁a", "▁the", "quick", "漢"])
    }
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


KINDS = {
    "byte-level": train_tokenizer,
    "llama": sentencepiece_tokenizer,
    "gemma": lambda: sentencepiece_tokenizer(strip=False),
    "metaspace": metaspace_tokenizer,
}


def save(tokenizer: Tokenizer, folder: Path, **config: Any) -> TextTokenizer:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return TextTokenizer.load(folder)


@pytest.fixture(params=KINDS)
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> TextTokenizer:
    return save(KINDS[request.param](), tmp_path)


def ids(tokenizer: TextTokenizer) -> dict[str, int]:
    """The id of each token of one or more characters, as the vocabulary writes it."""
    raw: Tokenizer = tokenizer._tokenizer
    return raw.get_vocab()


def pieces(stream: TextStream, tokens: list[int], chunk: int = 1) -> list[Piece]:
    found = []
    for start in range(0, len(tokens), chunk):
        found.append(stream.push(tokens[start : start + chunk]))
        if found[-1].stop is not None:
            return found
    return [*found, stream.push([], final=True)]


@pytest.mark.parametrize("skip", [True, False])
def test_streamed_text_equals_the_whole_decode(tokenizer: TextTokenizer, skip: bool) -> None:
    """Prompt and output decoded at once, less the prompt: wherever the output begins, characters are whole."""
    rng, compared = random.Random(0), 0
    for _ in range(300):
        text = "".join(rng.choice(ALPHABET) for _ in range(20))
        tokens = tokenizer.encode(text, add_special_tokens=False)
        for _ in range(3):  # a few special tokens in between
            special = rng.choice(sorted(tokenizer.special_ids) or tokens)
            tokens.insert(rng.randrange(len(tokens) + 1), special)
        cut = rng.randrange(4)
        before = tokenizer.decode(tokens[:cut], skip_special_tokens=skip)
        whole = tokenizer.decode(tokens, skip_special_tokens=skip)
        if "\N{REPLACEMENT CHARACTER}" in before + whole:
            continue  # the prompt ends within a character, or a special token cut one
        stream = TextStream(tokenizer, tokens[:cut], skip_special_tokens=skip)
        found = pieces(stream, tokens[cut:], chunk=rng.randrange(1, 4))
        assert before + "".join(piece.text for piece in found) == whole
        compared += 1
    assert compared > 50


def test_any_tokens_stream_to_the_whole_decode(tmp_path: Path) -> None:
    """Byte-level tokens at random are mostly broken UTF-8: replaced in the same places, never earlier."""
    tokenizer = save(train_tokenizer(), tmp_path)
    rng = random.Random(1)
    for _ in range(300):
        tokens = [rng.randrange(len(ids(tokenizer))) for _ in range(20)]
        found = pieces(TextStream(tokenizer, []), tokens)
        assert "".join(piece.text for piece in found) == tokenizer.decode(tokens)


def test_characters_are_held_back_until_they_are_whole(tmp_path: Path) -> None:
    tokenizer = save(train_tokenizer(), tmp_path)
    tokens = tokenizer.encode("é😀", add_special_tokens=False)
    assert len(tokens) == 6
    found = [piece.text for piece in pieces(TextStream(tokenizer, []), tokens)]
    assert found == ["", "é", "", "", "", "😀", ""]
    cut_off = [piece.text for piece in pieces(TextStream(tokenizer, []), tokens[:4])]
    assert cut_off == ["", "é", "", "", "\N{REPLACEMENT CHARACTER}"]


def test_a_leading_space_follows_a_prompt_and_not_an_empty_one(tmp_path: Path) -> None:
    tokenizer = save(sentencepiece_tokenizer(), tmp_path)
    the = [ids(tokenizer)["▁the"]]
    assert pieces(TextStream(tokenizer, [5, 6]), the)[0].text == " the"
    assert pieces(TextStream(tokenizer, [1]), the)[0].text == "the"  # <s> alone shows nothing
    assert pieces(TextStream(tokenizer, [1], skip_special_tokens=False), the)[0].text == " the"


def test_token_bytes_make_up_the_text(tokenizer: TextTokenizer) -> None:
    text = "a quick é" if tokenizer.special_ids else "a a"
    tokens = tokenizer.encode(text, add_special_tokens=False)
    assert b"".join(map(tokenizer.token_bytes, tokens)).decode().lstrip() == text
    assert tokenizer.token_bytes(10**6) == b""


def expected(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """Brute force: grow the text by characters until it ends in a stop string; the longest one counts."""
    for end in range(1, len(text) + 1):
        hits = [stop for stop in stops if text[:end].endswith(stop)]
        if hits:
            stop = max(hits, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


@pytest.mark.parametrize("include", [True, False])
def test_stop_strings_end_where_they_are_complete_first(tmp_path: Path, include: bool) -> None:
    tokenizer = save(train_tokenizer(), tmp_path)
    rng = random.Random(2)
    stopped = 0
    for _ in range(500):
        text = "".join(rng.choice("aab b😀") for _ in range(15))
        stops = ["".join(rng.choice("aab 😀") for _ in range(rng.randrange(1, 5))) for _ in range(3)]
        tokens = tokenizer.encode(text, add_special_tokens=False)
        stream = TextStream(tokenizer, [], stop=stops, include_stop=include)
        found = pieces(stream, tokens, chunk=rng.randrange(1, 6))
        assert ("".join(piece.text for piece in found), found[-1].stop) == expected(text, stops, include)
        stopped += found[-1].stop is not None
    assert 100 < stopped < 500


def test_text_that_may_begin_a_stop_string_waits(tmp_path: Path) -> None:
    tokenizer = save(train_tokenizer(), tmp_path)
    tokens = [token for letter in "xaabaac" for token in tokenizer.encode(letter, add_special_tokens=False)]
    found = pieces(TextStream(tokenizer, [], stop=["aac"]), tokens)
    assert [piece.text for piece in found] == ["x", "", "", "aab", "", "", ""]
    assert found[-1].stop == "aac"
    together = TextStream(tokenizer, [], stop=["aac"])
    whole = together.push([*tokens, *tokens], final=True)
    assert (whole.text, whole.stop) == ("".join(piece.text for piece in found), "aac")
    assert together.num_tokens == len(found)  # none after the stop string
    unfinished = pieces(TextStream(tokenizer, [], stop=["aac"]), tokens[:-1])
    assert [piece.text for piece in unfinished][-2:] == ["", "aa"]


def test_entries_come_with_their_text(tmp_path: Path) -> None:
    tokenizer = save(train_tokenizer(), tmp_path)
    tokens = tokenizer.encode("xé stop", add_special_tokens=False)
    stream = TextStream(tokenizer, [], stop=["zz", "st"])
    entries = [entry for piece in pieces(stream, tokens) for entry in piece.entries]
    assert [entry.offset for entry in entries] == [0, 1, 1, 2]  # x, two halves of é, the space
    assert [entry.position for entry in entries] == [0, 1, 2, 3]


def test_the_first_tokens_are_not_searched_for_stop_strings(tmp_path: Path) -> None:
    tokenizer = save(train_tokenizer(), tmp_path)
    tokens = [token for letter in "abab" for token in tokenizer.encode(letter, add_special_tokens=False)]
    found = pieces(TextStream(tokenizer, [], stop=["ab"], min_tokens=2), tokens)
    assert "".join(piece.text for piece in found) == "ab"
    assert found[-1].stop == "ab"
    found = pieces(TextStream(tokenizer, [], stop=["ba"], min_tokens=2), tokens)
    assert "".join(piece.text for piece in found) == "abab"


def test_a_last_token_may_be_hidden(tmp_path: Path) -> None:
    tokenizer = save(train_tokenizer(), tmp_path)
    tokens = tokenizer.encode("ax", add_special_tokens=False)
    piece = TextStream(tokenizer, []).push(tokens, hide_last=True, final=True)
    assert (piece.text, len(piece.entries)) == ("a", 1)


def test_an_unsupported_decoder_is_refused_by_name(tmp_path: Path) -> None:
    tokenizer = train_tokenizer()
    tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(InvalidRequest, match="WordPiece"):
        save(tokenizer, tmp_path)
    with pytest.raises(InvalidRequest, match=r"has no tokenizer\.json"):
        TextTokenizer.load(tmp_path / "nothing")


# ---- against transformers ---------------------------------------------------------------------------

CONVERSATION = [
    {"role": "system", "content": "be <brief> & 'kind'"},
    {"role": "user", "content": "what is 2 > 1?\n"},
    {"role": "assistant", "content": "  true  "},
    {"role": "user", "content": "why?"},
]
TEMPLATES = {
    "chatml": CHATML,
    "blocks": """
    {%- if messages[0].role == 'system' %}
        {%- set offset = 1 %}{{ bos_token }}
    {%- else %}
        {%- set offset = 0 %}
    {%- endif %}
{% for message in messages[offset:] %}
    {% if loop.index0 == 7 %}{% break %}{% endif %}
    {{ '[' ~ message.role ~ '] ' + message.content | trim }}
{% endfor %}
    {%- if add_generation_prompt %}{{ '[assistant]' }}{% endif %}""",
    "json": "{% for m in messages %}{{ m | tojson }}{{ m | tojson(indent=2) }}{% endfor %}{{ tools is none }}",
    "namespace": (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}"
        "{{ dict(a=1) }}{{ eos_token }}{{ mood | default('none') }}{{ strftime_now('%Y') }}"
        "{% for m in messages %}{{ m.content }}{% endfor %}"
    ),
    "generation": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    ),
}


def transformers_tokenizer(folder: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render_as_in_transformers(tmp_path: Path, name: str) -> None:
    save(
        train_tokenizer(),
        tmp_path,
        bos_token="<|im_start|>",
        eos_token={"__type": "AddedToken", "content": "<|end|>"},
    )
    (tmp_path / "chat_template.jinja").write_text(TEMPLATES[name])
    theirs = transformers_tokenizer(tmp_path)
    ours = ChatTemplate.load(tmp_path, read_special_tokens(tmp_path))
    assert ours is not None
    for messages in (CONVERSATION, CONVERSATION[1:], CONVERSATION[:1]):
        for generation in (True, False):
            wanted = theirs.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=generation, mood="good"
            )
            got = ours.render(messages, add_generation_prompt=generation, variables={"mood": "good"})
            assert got == wanted
    if name in ("chatml", "blocks"):
        wanted = theirs.apply_chat_template(CONVERSATION[:3], tokenize=False, continue_final_message=True)
        got = ours.render(CONVERSATION[:3], add_generation_prompt=False, continue_final_message=True)
        assert got == wanted


@pytest.mark.parametrize("config", [{}, {"add_bos_token": True}, {"add_bos_token": False}])
@pytest.mark.parametrize("kind", ["byte-level", "llama"])
def test_special_tokens_are_added_as_in_transformers(
    tmp_path: Path, kind: str, config: dict[str, Any]
) -> None:
    """transformers 5 takes BOS and EOS from tokenizer.json, whatever the config says."""
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    if kind == "byte-level":
        tokens = {"bos_token": "<|im_start|>", "eos_token": "<|end|>"}
    ours = save(KINDS[kind](), tmp_path, **tokens, **config)
    theirs = transformers_tokenizer(tmp_path)
    for text in ("", "the quick é", tokens["bos_token"] + "x"):
        for add in (True, False):
            assert ours.encode(text, add_special_tokens=add) == theirs.encode(text, add_special_tokens=add)


@pytest.mark.model
def test_the_packaged_base_reads_and_writes_as_in_transformers() -> None:
    from veneer.engine.source import resolve

    folder = resolve(None)
    ours, theirs = TextTokenizer.load(folder), transformers_tokenizer(folder)
    template = ChatTemplate.load(folder, read_special_tokens(folder))
    assert template is not None
    for messages in (CONVERSATION, CONVERSATION[1:]):
        wanted = theirs.apply_chat_template(messages, tokenize=True, add_generation_prompt=True)["input_ids"]
        text = template.render(messages)
        assert ours.encode(text, add_special_tokens=False) == wanted
        found = pieces(TextStream(ours, wanted[:5]), wanted[5:])
        whole = theirs.decode(wanted, skip_special_tokens=True)
        assert theirs.decode(wanted[:5], skip_special_tokens=True) + "".join(p.text for p in found) == whole


def test_named_templates_in_the_config_are_read(tmp_path: Path) -> None:
    named = [{"name": "rag", "template": "no"}, {"name": "default", "template": "{{ messages[0].content }}"}]
    save(train_tokenizer(), tmp_path, chat_template=named)
    template = ChatTemplate.load(tmp_path, {})
    assert template is not None
    assert template.render(CONVERSATION) == "be <brief> & 'kind'"
    save(train_tokenizer(), tmp_path)
    assert ChatTemplate.load(tmp_path, {}) is None
    save(train_tokenizer(), tmp_path, chat_template=named[:1])
    with pytest.raises(InvalidRequest, match="rag"):
        ChatTemplate.load(tmp_path, {})


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[9].content }}",
        "{{ messages[0].content + 1 }}",
        "{{ 1 / 0 }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ dict.__init__.__globals__ }}",
        "{{ namespace(__class__=1) }}",
        "{% set ns = namespace() %}{% set ns.__init__ = 1 %}",
        "{% for i in range(1000000) %}{% endfor %}",
    ],
)
def test_a_template_that_fails_is_a_bad_request(source: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        ChatTemplate(source, {}).render(CONVERSATION)
    assert refused.value.param == "messages"


def test_a_changed_final_message_cannot_be_continued() -> None:
    template = ChatTemplate("{{ messages[-1].content | upper }}", {})
    with pytest.raises(InvalidRequest, match="continue_final_message"):
        template.render(CONVERSATION, continue_final_message=True)
