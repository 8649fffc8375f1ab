"""Llama 3: the answer is a JSON object, perhaps after the token for programs; several are parted by semicolons."""

from __future__ import annotations

from veneer.server.tool_calls.family import Family, json_before

LLAMA3 = Family(
    name="llama3_json",
    before=json_before("name", "parameters"),
    after="}",
    between="; ",
    skipped=("<|python_tag|>", ";", ",", "[", "]"),
    specials=("<|python_tag|>",),
)
