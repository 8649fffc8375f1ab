"""Files in, examples out: formats are told by their fields, and wrong rows are named with the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from veneer.errors import InvalidRequest
from veneer.training.data.formats import MAX_MESSAGES, Message, Pair, Row, Text
from veneer.training.data.rows import (
    FAULTS_SHOWN,
    Fault,
    read_pairs,
    read_rows,
    read_texts,
    scan,
    validate,
)

GOOD = {"prompt": "p", "completion": "c"}
ASKED = (Message("user", "p"),)


def turn(role: str, content: Any = "x", **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def write(folder: Path, *lines: Any) -> Path:
    path = folder / "rows.jsonl"
    texts = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines]
    path.write_text("\n".join(texts), encoding="utf-8")
    return path


def only(folder: Path, line: Any, **options: Any) -> Any:
    (found,) = scan(write(folder, line), **options)
    return found


def test_conversations_are_read_and_blank_lines_skipped(tmp_path: Path) -> None:
    talk = {"messages": [turn("system", "s"), turn("user", "u\u2028v"), turn("assistant", "ä")]}
    first, second = read_rows(write(tmp_path, talk, "", {**talk, "messages": talk["messages"][1:]}))
    assert first == Row((Message("system", "s"), Message("user", "u\u2028v")), "ä", "rows.jsonl:1")
    assert second == Row((Message("user", "u\u2028v"),), "ä", "rows.jsonl:3")


@pytest.mark.parametrize(
    "names",
    ["prompt completion", "prompt response", "question answer", "input target", "input output"],
)
def test_completions_have_several_names(tmp_path: Path, names: str) -> None:
    row = only(tmp_path, dict(zip(names.split(), ["p", "c"], strict=True)))
    assert row == Row(ASKED, "c", "rows.jsonl:1", "completion")


def test_an_instruction_and_its_input_are_one_message(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Sing.", "input": "", "output": "la"},
        {"instruction": "Sing.", "input": None, "output": "la"},
        {"instruction": "Sing.", "output": "la"},
    )
    rows = read_rows(path)
    assert [row.prompt[0].content for row in rows] == ["Add.\n\n1 2", "Sing.", "Sing.", "Sing."]
    assert {row.format for row in rows} == {"instruction"}


def test_texts_are_read(tmp_path: Path) -> None:
    assert read_texts(write(tmp_path, {"text": "once"})) == [Text("once", "rows.jsonl:1")]


@pytest.mark.parametrize(
    "line",
    [
        {"prompt": "p", "chosen": "good", "rejected": "bad"},
        {
            "prompt": [turn("user", "p")],
            "chosen": [turn("assistant", "good")],
            "rejected": [turn("assistant", "bad")],
        },
        {
            "input": {"messages": [turn("user", "p")], "tools": [], "parallel_tool_calls": None},
            "preferred_output": [turn("assistant", "good")],
            "non_preferred_output": [turn("assistant", "bad")],
        },
    ],
)
def test_preference_pairs_are_read_in_both_forms(tmp_path: Path, line: Any) -> None:
    assert read_pairs(write(tmp_path, line)) == [Pair(ASKED, "good", "bad", "rows.jsonl:1")]


def test_weights_are_kept_and_what_follows_the_last_learnt_answer_is_left_out(tmp_path: Path) -> None:
    messages = [
        turn("user", "a"),
        turn("assistant", "b", weight=0),
        turn("user", "c"),
        turn("assistant", "d", weight=1),
        turn("user", "e"),
        turn("assistant", "f", weight=0.0),
    ]
    row = only(tmp_path, {"messages": messages})
    assert row.prompt == (Message("user", "a"), Message("assistant", "b", 0), Message("user", "c"))
    assert row.answer == "d"


def test_text_parts_are_joined_as_serving_does(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    row = only(tmp_path, {"messages": [turn("user", parts), turn("assistant", "c")]})
    assert row.prompt[0].content == "a\nb"


BAD: list[tuple[Any, str]] = [
    ({"prompt": "a"}, "has `prompt` but no `completion`, which completion rows need"),
    ({"a": 1}, "has `a`; needs `messages`, or `prompt` and `completion`, or"),
    ({}, "has no fields; needs"),
    ({"prompt": "a", "completion": 5}, "completion must be text (got 5)"),
    ({**GOOD, "weight": 1}, "`weight` is no field of completion rows, which have `prompt`, `completion`"),
    ({**GOOD, "messages": []}, "`messages` is no field of completion rows"),
    ({"prompt": None, "completion": "c"}, "has `completion` but no `prompt`"),
    ({"prompt": "a", "completion": "  "}, "completion is empty"),
    ({"text": ""}, "text is empty"),
    ({"instruction": "a", "input": 1, "output": "b"}, "input must be text (got 1)"),
    ({"conversations": []}, "write `messages` with `role` and `content`"),
    ({"messages": [turn("user"), turn("assistant")], "tools": []}, "`tools`: tool calls cannot be trained"),
    ({"messages": "hello"}, "messages must be a list of messages, not empty (got 'hello')"),
    ({"messages": [turn("assistant")]}, "messages must end with an assistant's answer"),
    ({"messages": [turn("assistant"), turn("user")]}, "messages must end with an assistant's answer"),
    (
        {"messages": [turn("robot")]},
        "messages[0].role must be one of system, developer, user, assistant (got",
    ),
    ({"messages": [turn([1])]}, "messages[0].role must be one of"),  # type: ignore[arg-type]
    ({"messages": [turn("user", weight=1), turn("assistant")]}, "messages[0].weight is no field"),
    ({"messages": [turn("user"), turn("assistant", weight=2)]}, "messages[1].weight must be 0 or 1 (got 2)"),
    ({"messages": [turn("user"), turn("assistant", weight=True)]}, "messages[1].weight must be 0 or 1"),
    ({"messages": [turn("user"), turn("assistant", weight=0)]}, "no answer of the assistant has weight 1"),
    ({"messages": [turn("user", None), turn("assistant")]}, "messages[0].content must be text (got None)"),
    ({"messages": [turn("user"), turn("assistant", " ")]}, "messages[1].content is empty"),
    ({"messages": [turn("user"), turn("assistant", tool_calls=[1])]}, "messages[1].tool_calls: tool calls"),
    ({"messages": [turn("user", [{"type": "image_url"}])]}, "messages[0].content[0] must be of type 'text'"),
    ({"messages": ["hi"]}, "messages[0] must be an object"),
    ({"messages": [turn("user")] * (MAX_MESSAGES + 1)}, f"has {MAX_MESSAGES + 1} messages; at most"),
    ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are the same"),
    ({"prompt": "a", "chosen": "b", "rejected": ""}, "rejected is empty"),
    (
        {"prompt": "a", "chosen": [turn("user"), turn("assistant")], "rejected": "c"},
        "chosen must be one assist",
    ),
    ({"input": "a", "preferred_output": "b", "non_preferred_output": "c"}, "input must be an object with"),
    (
        {
            "input": {"messages": [turn("user")], "tools": [1]},
            "preferred_output": "b",
            "non_preferred_output": "c",
        },
        "input.tools: tool calls cannot be trained",
    ),
]


@pytest.mark.parametrize(("line", "reason"), BAD)
def test_a_wrong_row_is_named_with_the_reason(tmp_path: Path, line: Any, reason: str) -> None:
    found = only(tmp_path, line)
    assert isinstance(found, Fault)
    assert found.where == "rows.jsonl:1"
    assert reason in found.reason
    assert found.empty_answer == ("is empty" in reason)


def test_a_file_is_of_one_format(tmp_path: Path) -> None:
    path = write(tmp_path, {"nothing": 1}, GOOD, {"text": "t"}, {"question": "q", "answer": "a"})
    faults = [item for item in scan(path) if isinstance(item, Fault)]
    assert [fault.where for fault in faults] == ["rows.jsonl:1", "rows.jsonl:3"]
    assert "is a row of format text, but rows.jsonl:2 is of completion" in faults[1].reason


def test_the_format_can_be_said(tmp_path: Path) -> None:
    assert isinstance(only(tmp_path, GOOD, format="completion"), Row)
    assert "has `completion`, `prompt`; needs `text`" in only(tmp_path, GOOD, format="text").reason
    with pytest.raises(InvalidRequest, match=r"format 'alpaca' is none of chat, completion"):
        only(tmp_path, GOOD, format="alpaca")


def test_fields_can_be_left_out_by_name(tmp_path: Path) -> None:
    assert isinstance(only(tmp_path, {**GOOD, "id": 1}, ignore=["id"]), Row)


def test_validation_counts_all_faults_and_keeps_the_first(tmp_path: Path) -> None:
    lines = [GOOD, {"prompt": "a", "completion": ""}, *[{"prompt": "a"}] * 40]
    found = validate(write(tmp_path, *lines), name="up.jsonl")
    assert (found.rows, found.format, found.fault_count, found.empty_answers) == (1, "completion", 41, 1)
    assert [fault.where for fault in found.faults] == [f"up.jsonl:{at}" for at in range(2, 2 + FAULTS_SHOWN)]
    with pytest.raises(InvalidRequest, match=r"'up.jsonl' has 41 faults: up.jsonl:2: .*; and 21 more"):
        found.check()


def test_rows_of_another_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        InvalidRequest, match=r"rows.jsonl:1 is a row of format text; this training takes conv"
    ):
        read_rows(write(tmp_path, {"text": "t"}))
    with pytest.raises(
        InvalidRequest, match=r"rows.jsonl:1 is a row of format completion; .* preference pairs"
    ):
        read_pairs(write(tmp_path, GOOD))


def test_one_fault_is_the_whole_message_and_no_row_is_one(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"^rows\.jsonl:2: has `prompt` but no"):
        read_rows(write(tmp_path, GOOD, {"prompt": "a"}))
    with pytest.raises(InvalidRequest, match="has no rows"):
        read_rows(write(tmp_path, "", " "))
