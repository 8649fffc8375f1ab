"""OpenAI's chat messages as a chat template reads them."""

from __future__ import annotations

from typing import Any

import pytest

from veneer.errors import InvalidRequest
from veneer.server.conversation import template_messages

CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
KNOWS_TOOLS = "{{ message.tool_calls }} tool developer"


def convert(message: dict[str, Any], source: str = "") -> tuple[dict[str, Any], list[str]]:
    unknown: list[str] = []
    (found,) = template_messages([message], source, unknown.append)
    return found, unknown


@pytest.mark.parametrize(
    ("role", "source", "mapped"),
    [
        ("system", "", "system"),
        ("developer", "", "system"),
        ("developer", KNOWS_TOOLS, "developer"),
        ("tool", "", "user"),
        ("tool", KNOWS_TOOLS, "tool"),
        ("function", "", "user"),
        ("function", KNOWS_TOOLS, "tool"),
        ("assistant", "", "assistant"),
    ],
)
def test_roles(role: str, source: str, mapped: str) -> None:
    assert convert({"role": role, "content": "x"}, source)[0] == {"role": mapped, "content": "x"}


def test_tool_calls_carry_their_arguments_as_data() -> None:
    message = {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None}
    found, unknown = convert(message, KNOWS_TOOLS)
    assert found["content"] is None
    assert found["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 1}}
    assert unknown == []


def test_calls_are_text_where_the_template_knows_none() -> None:
    found, _ = convert({"role": "assistant", "content": "Let me see.", "tool_calls": [CALL, CALL]})
    line = '{"name": "add", "arguments": {"a": 1}}'
    assert found == {"role": "assistant", "content": f"Let me see.\n{line}\n{line}"}


def test_reasoning_reaches_the_template_under_the_names_it_may_read() -> None:
    found, unknown = convert({"role": "assistant", "content": "4", "reasoning": "2 + 2"})
    assert found["reasoning_content"] == found["thinking"] == "2 + 2"
    assert unknown == []


def test_content_parts_and_refusals_are_text() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "refusal", "refusal": "no"}, "b"]
    assert convert({"role": "assistant", "content": parts})[0]["content"] == "a\nno\nb"
    assert convert({"role": "assistant", "refusal": "I will not"})[0]["content"] == "I will not"
    assert convert({"role": "user", "content": ""})[0]["content"] == ""


def test_unknown_fields_are_reported() -> None:
    assert convert({"role": "user", "content": "x", "mood": 1, "weight": None})[1] == ["messages.mood"]


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}, "content[0].type"),
        ({"role": "user", "content": [5]}, "content[0].type"),
        ({"role": "user", "content": "x", "name": 5}, "name"),
        ({"role": "assistant", "content": "x", "function_call": {"name": "f"}}, "function_call"),
        ({"role": "assistant", "content": "x", "audio": {"id": "a"}}, "audio"),
        ({"role": "assistant", "tool_calls": "add"}, "tool_calls"),
        (
            {"role": "assistant", "tool_calls": [CALL | {"function": {"name": "f", "arguments": "{"}}]},
            "tool_calls",
        ),
        ({"content": "x"}, "role"),
    ],
)
def test_what_cannot_be_read_is_named_by_its_place(message: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        convert(message, KNOWS_TOOLS)
    assert refused.value.param == f"messages[0].{param}"
