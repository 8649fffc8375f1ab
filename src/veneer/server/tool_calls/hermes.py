"""Hermes and Qwen 2.5 and 3: a JSON object between tags for each call."""

from __future__ import annotations

from veneer.server.tool_calls.family import Family

HERMES = Family(
    name="hermes",
    before=lambda name: f'<tool_call>\n{{"name": "{name}", "arguments": ',
    after="}\n</tool_call>",
    begin="<tool_call>",
    end="</tool_call>",
    specials=("<tool_call>", "</tool_call>"),
)
