"""Token ids are what serving sends, and the learnt tokens are the assistant's turns with their ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from veneer.errors import InvalidRequest
from veneer.server.adapter_text import base_text
from veneer.server.conversation import template_messages
from veneer.training.data.encoding import IGNORED, Encoded, Encoder
from veneer.training.data.formats import Message, Pair, Row, Text

STOPS = [2]
TALK = (
    Message("system", "s"),
    Message("user", "one"),
    Message("assistant", "first"),
    Message("user", "two"),
    Message("assistant", "second", 0),
    Message("user", "three"),
)


def row(prompt: str, answer: str = "yes") -> Row:
    return Row((Message("user", prompt),), answer, "rows.jsonl:1")


def learnt(encoded: Encoded, tokenizer: Any) -> list[str]:
    """The runs of tokens that have a label, as text."""
    runs: list[list[int]] = [[]]
    for token, label in zip(encoded.ids, encoded.labels, strict=True):
        if label == IGNORED:
            runs.append([])
        else:
            assert label == token
            runs[-1].append(label)
    return [tokenizer.decode(run) for run in runs if run]


@pytest.fixture(
    params=[
        "plain",
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}",
    ]
)
def templated(request: Any, tokenizer: Any) -> Any:
    """The test tokenizer with its own template, and with one that has no line breaks."""
    if request.param == "plain":
        yield tokenizer
        return
    before, tokenizer.chat_template = tokenizer.chat_template, request.param.replace("</s>", "<|im_end|>")
    yield tokenizer
    tokenizer.chat_template = before


def test_the_prompt_is_what_serving_sends_and_the_answer_ends_the_turn(templated: Any) -> None:
    encoded = Encoder(templated, STOPS, loss_on="assistant").row(Row(TALK, "third", "rows.jsonl:1"))
    chat = [{"role": turn.role, "content": turn.content} for turn in TALK]
    served = templated.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert encoded.prompt == served
    assert templated.decode(encoded.answer) == "third<|im_end|>"  # not the template's newline after it


def test_the_server_sends_the_same_ids(tiny_base: Path) -> None:
    from transformers import AutoTokenizer

    encoded = Encoder(AutoTokenizer.from_pretrained(tiny_base), STOPS).row(Row(TALK, "third", "rows.jsonl:1"))
    text = base_text(tiny_base)
    assert text.template is not None
    given = [{"role": turn.role, "content": turn.content} for turn in TALK]
    rendered = text.template.render(template_messages(given, text.template.source, unknown=pytest.fail))
    assert text.tokenizer.encode(rendered, add_special_tokens=False) == encoded.prompt


@pytest.mark.parametrize(
    ("loss_on", "expected"),
    [("assistant", ["first<|im_end|>", "third<|im_end|>"]), ("answer", ["third<|im_end|>"])],
)
def test_learnt_turns_are_found_whatever_the_template(
    templated: Any, loss_on: Any, expected: list[str]
) -> None:
    encoded = Encoder(templated, STOPS, loss_on=loss_on).row(Row(TALK, "third", "rows.jsonl:1"))
    assert learnt(encoded, templated) == expected
    assert encoded.learnt == sum(len(text) - len("<|im_end|>") + 1 for text in expected)


def test_all_learns_everything_but_turns_of_weight_0(tokenizer: Any) -> None:
    encoder = Encoder(tokenizer, STOPS, loss_on="all")
    encoded = encoder.row(Row(TALK, "third", "rows.jsonl:1"))
    first, last = learnt(encoded, tokenizer)
    assert first.startswith("system\ns<|im_end|>")  # but for the first token, which nothing predicts
    assert first.endswith("two<|im_end|>\n<|im_start|>assistant\n")
    assert last.startswith("\n<|im_start|>user\nthree")
    greeting = (Message("assistant", "hi", 0), *TALK[1:2])
    assert learnt(encoder.row(Row(greeting, "yes", "rows.jsonl:1")), tokenizer)[0].startswith(
        "\n<|im_start|>user"
    )


def test_a_model_that_only_answers_cannot_learn_to_begin(tokenizer: Any) -> None:
    opens = Row((Message("assistant", "hi"), Message("user", "a")), "b", "rows.jsonl:3")
    with pytest.raises(InvalidRequest, match=r"rows.jsonl:3: messages\[0\] is the assistant's"):
        Encoder(tokenizer, STOPS, loss_on="assistant").row(opens)
    assert learnt(Encoder(tokenizer, STOPS, loss_on="answer").row(opens), tokenizer) == ["b<|im_end|>"]


def test_a_template_that_rewrites_earlier_turns_is_refused_with_the_row(tokenizer: Any) -> None:
    before = tokenizer.chat_template
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content if loop.last or m.role == 'user' else '...' }}"
        "<|im_end|>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    try:
        talk = Row(TALK[1:4], "third", "rows.jsonl:8")
        with pytest.raises(
            InvalidRequest, match=r"rows.jsonl:8: the chat template writes messages\[1\] otherwise"
        ):
            Encoder(tokenizer, STOPS, loss_on="assistant").row(talk)
        assert learnt(Encoder(tokenizer, STOPS, loss_on="answer").row(talk), tokenizer) == ["third<|im_end|>"]
    finally:
        tokenizer.chat_template = before


def merging_tokenizer() -> Any:
    """A tokenizer whose `]a` is one token, so that turns share tokens with what is before them."""
    from transformers import PreTrainedTokenizerFast

    words = ["<e>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "]a"]
    backend = Tokenizer(models.BPE({word: at for at, word in enumerate(words)}, [("]", "a")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<e>")
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role[0] }}]{{ m.content }}<e>{% endfor %}"
        "{% if add_generation_prompt %}[a]{% endif %}"
    )
    return tokenizer


def test_where_a_token_spans_the_border_an_answer_is_cut_apart_and_an_earlier_turn_has_it() -> None:
    tokenizer = merging_tokenizer()
    turns = (Message("user", "x"), Message("assistant", "ab"), Message("user", "y"))
    encoded = Encoder(tokenizer, [0], loss_on="assistant").row(Row(turns, "ac", "rows.jsonl:1"))
    words = tokenizer.convert_ids_to_tokens
    assert words(encoded.prompt) == [*"[u]x", "<e>", "[", "a", "]a", "b", "<e>", *"[u]y", "<e>", *"[a]"]
    assert words(encoded.answer) == ["a", "c", "<e>"]
    marked = [word for word, mark in zip(words(encoded.prompt), encoded.mask, strict=True) if mark]
    assert marked == ["]a", "b", "<e>"]


def test_a_developer_is_the_system_to_templates_that_do_not_know_it(tokenizer: Any) -> None:
    def prompt(role: str) -> list[int]:
        return (
            Encoder(tokenizer, STOPS).row(Row((Message(role, "s"), Message("user", "u")), "a", "x:1")).prompt
        )

    assert prompt("developer") == prompt("system")
    before = tokenizer.chat_template
    tokenizer.chat_template = before + "{# developer #}"
    try:
        assert "developer" in tokenizer.decode(prompt("developer"))
    finally:
        tokenizer.chat_template = before


def test_the_header_closes_the_question_and_opens_the_answer(tokenizer: Any) -> None:
    encoder = Encoder(tokenizer, STOPS)
    header = encoder.row(row("hi")).prompt[-encoder.header :]
    assert tokenizer.decode(header) == "<|im_end|>\n<|im_start|>assistant\n"
    assert Encoder(tokenizer, STOPS, template="none").header == 0


def test_without_a_template_the_text_is_taken_as_it_is(tokenizer: Any) -> None:
    encoder = Encoder(tokenizer, STOPS, template="none")
    encoded = encoder.row(row("2+2=", "4"))
    assert tokenizer.decode(encoded.prompt) == "2+2="
    assert tokenizer.decode(encoded.answer) == "4<|im_end|>"
    with pytest.raises(InvalidRequest, match=r"rows\.jsonl:9: conversations need"):
        encoder.row(Row(TALK, "a", "rows.jsonl:9"))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template"),
        ("{{ raise_exception('no system role') }}", "rows.jsonl:1: .*refuses it: no system role"),
        ("{% if add_generation_prompt %}>{% else %}<{% endif %}", "does not put the answer after"),
    ],
)
def test_a_template_that_does_not_fit_is_refused(template: str | None, message: str) -> None:
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"e": 0}, unk_token="e"))
    unfit = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="e")
    unfit.chat_template = template
    with pytest.raises(InvalidRequest, match=message):
        Encoder(unfit, STOPS).row(row("hi"))


def test_a_pair_shares_its_prompt(tokenizer: Any) -> None:
    encoder = Encoder(tokenizer, STOPS)
    pair = encoder.pair(Pair(TALK, "good", "bad", "rows.jsonl:1"))
    for side, answer in zip(pair, ("good", "bad"), strict=True):
        same = Encoder(tokenizer, STOPS, loss_on="answer").row(Row(TALK, answer, "rows.jsonl:1"))
        assert side == same
    assert pair.length == pair.chosen.length


def test_a_text_is_learnt_whole_and_ends(tokenizer: Any) -> None:
    encoded = Encoder(tokenizer, STOPS).text(Text("once", "rows.jsonl:1"))
    assert tokenizer.decode(encoded.ids) == "once<|im_end|>"
    assert encoded.labels == [IGNORED, *encoded.ids[1:]]


def test_a_tokenizer_that_ends_texts_itself_does_not_end_them_twice(tokenizer: Any) -> None:
    def ends(text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [*tokenizer(text, **options)["input_ids"], 2]}

    assert (
        Encoder(ends, STOPS).text(Text("a", "x:1")).ids
        == Encoder(tokenizer, STOPS).text(Text("a", "x:1")).ids
    )


@pytest.mark.model
@pytest.mark.parametrize("system", [(), (Message("system", "Be brief."),)])
def test_the_default_base_learns_the_assistants_turns(system: tuple[Message, ...]) -> None:
    from transformers import AutoTokenizer

    from veneer.engine.source import resolve

    tokenizer = AutoTokenizer.from_pretrained(resolve(None))
    encoder = Encoder(tokenizer, STOPS, loss_on="assistant")
    turns = (*system, *TALK[1:4])
    encoded = encoder.row(Row(turns, "\nthird", "rows.jsonl:1"))
    assert learnt(encoded, tokenizer) == ["first<|im_end|>", "\nthird<|im_end|>"]
    chat = [{"role": turn.role, "content": turn.content} for turn in turns]
    served = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert encoded.prompt == served
    assert tokenizer.decode(encoded.prompt[-encoder.header :]) == "<|im_end|>\n<|im_start|>assistant\n"
