"""Rows in, token ids out; wrong rows are named by file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from veneer.errors import InvalidRequest
from veneer.training.data import Message, Row, check_apart, encode, encode_all, read_rows, split_rows

STOPS = [2]


def row(prompt: str, answer: str = "yes", where: str = "rows.jsonl:1") -> Row:
    return Row((Message(role="user", content=prompt),), answer, where)


def write(folder: Path, *lines: Any) -> Path:
    path = folder / "rows.jsonl"
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts), encoding="utf-8")
    return path


def test_both_forms_are_read_and_blank_lines_skipped(tmp_path: Path) -> None:
    talk = [{"role": "system", "content": "s"}, {"role": "user", "content": "u\u2028v"}]
    path = write(
        tmp_path,
        {"prompt": "p", "completion": "c"},
        "",
        json.dumps({"messages": [*talk, {"role": "assistant", "content": "ä"}]}, ensure_ascii=False),
    )
    first, second = read_rows(path)
    assert first == Row((Message(role="user", content="p"),), "c", "rows.jsonl:1")
    assert [turn.content for turn in second.prompt] == ["s", "u\u2028v"]
    assert (second.answer, second.where) == ("ä", "rows.jsonl:3")


GOOD = {"prompt": "p", "completion": "c"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a",', r"rows\.jsonl:2: not JSON"),
        ([1], r"rows\.jsonl:2: the row: .*dictionary"),
        ({"prompt": "a"}, r"rows\.jsonl:2: needs `prompt` and `completion`, or `messages`"),
        ({"prompt": "a", "completion": 5}, r"rows\.jsonl:2: completion: .*string"),
        ({**GOOD, "weight": 1}, r"rows\.jsonl:2: weight: Extra"),
        ({**GOOD, "messages": []}, r"rows\.jsonl:2: has `messages` and"),
        ({"prompt": "a", "completion": "  "}, r"rows\.jsonl:2: the answer is empty"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, r"rows\.jsonl:2: `messages` must end"),
        (
            {"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "a"}]},
            r"rows\.jsonl:2: `messages` must end",
        ),
        ({"messages": [{"role": "robot", "content": "a"}]}, r"rows\.jsonl:2: messages\.0\.role"),
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, line: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        read_rows(write(tmp_path, GOOD, line))


def test_a_file_without_rows_or_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="has no rows"):
        read_rows(write(tmp_path, "", " "))
    with pytest.raises(InvalidRequest, match="cannot be read"):
        read_rows(tmp_path / "none.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe4"}')
    with pytest.raises(InvalidRequest, match="cannot be read"):
        read_rows(tmp_path / "latin.jsonl")


def test_split_keeps_the_same_question_on_one_side() -> None:
    rows = [row(f"question {n % 20}", answer=str(n)) for n in range(60)]
    rows += [row(f"  QUESTION   {n}") for n in range(20)]
    training, held_out = split_rows(rows, 0.25, seed=3)
    assert len(training) + len(held_out) == len(rows)
    assert {r.key for r in training}.isdisjoint({r.key for r in held_out})
    assert len({r.key for r in held_out}) == 5
    check_apart(training, held_out)


def test_split_depends_on_questions_and_seed_not_on_order() -> None:
    rows = [row(f"question {n}") for n in range(40)]
    first, again = split_rows(rows, 0.2, seed=1)[1], split_rows(rows[::-1], 0.2, seed=1)[1]
    assert {r.key for r in first} == {r.key for r in again}
    assert {r.key for r in first} != {r.key for r in split_rows(rows, 0.2, seed=2)[1]}


def test_split_leaves_neither_side_empty() -> None:
    for fraction in (0.01, 0.99):
        training, held_out = split_rows([row("a"), row("b"), row("c")], fraction, seed=0)
        assert training
        assert held_out
    with pytest.raises(InvalidRequest, match="only one question"):
        split_rows([row("a"), row("A ")], 0.5, seed=0)


def test_a_held_out_row_that_is_trained_on_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"test:7 asks the same as train:1"):
        check_apart([row("Hello  there", where="train:1")], [row("hello there", where="test:7")])


def test_the_prompt_is_what_serving_sends_and_the_answer_ends_the_turn(tokenizer: Any) -> None:
    encoded = encode(row("hi", "yes"), tokenizer, "chat", STOPS)
    served = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, return_dict=False
    )
    assert encoded.prompt == served
    assert tokenizer.decode(encoded.answer) == "yes<|im_end|>"  # not the template's newline after it


def test_without_a_template_the_text_is_taken_as_it_is(tokenizer: Any) -> None:
    encoded = encode(row("2+2=", "4"), tokenizer, "none", STOPS)
    assert tokenizer.decode(encoded.prompt) == "2+2="
    assert tokenizer.decode(encoded.answer) == "4<|im_end|>"
    talk = Row((Message(role="system", content="s"), Message(role="user", content="u")), "a", "rows.jsonl:9")
    with pytest.raises(InvalidRequest, match=r"rows\.jsonl:9: conversations need"):
        encode(talk, tokenizer, "none", STOPS)


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

    unfit = PreTrainedTokenizerFast(tokenizer_object=_backend(), eos_token="e")
    unfit.chat_template = template
    with pytest.raises(InvalidRequest, match=message):
        encode(row("hi"), unfit, "chat", STOPS)


def _backend() -> Any:
    from tokenizers import Tokenizer, models

    return Tokenizer(models.WordLevel({"e": 0}, unk_token="e"))


def test_too_long_rows_are_counted_and_named(tokenizer: Any) -> None:
    rows = [row("short"), row("long " * 20, where="rows.jsonl:2"), row("long " * 30, where="rows.jsonl:3")]
    with pytest.raises(
        InvalidRequest, match=r"2 rows are longer than max_length 60, first rows.jsonl:2 with"
    ):
        encode_all(rows, tokenizer, "chat", STOPS, 60)
