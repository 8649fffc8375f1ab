"""Which family a model's function calls are in: said by `--tool-call-parser`, or seen from its chat template."""

from __future__ import annotations

from typing import Final

from veneer.server.tool_calls.family import Family
from veneer.server.tool_calls.gemma import FUNCTION_GEMMA
from veneer.server.tool_calls.hermes import HERMES
from veneer.server.tool_calls.llama3 import LLAMA3
from veneer.server.tool_calls.mistral import MISTRAL, MISTRAL_NAMED
from veneer.server.tool_calls.plain_json import JSON
from veneer.server.tool_calls.pythonic import PYTHONIC
from veneer.server.tool_calls.qwen3_coder import QWEN3_CODER

# By the names of `--tool-call-parser`, vLLM's where it has the form.
FAMILIES: Final = {
    each.name: each for each in (HERMES, QWEN3_CODER, LLAMA3, PYTHONIC, MISTRAL, FUNCTION_GEMMA, JSON)
}


def knows_tools(template: str) -> bool:
    """Whether a chat template renders tools."""
    return "tools" in template


def family_of(template: str, parser: str | None) -> Family:
    """The family of a chat template's source; `parser` is what the operator said.

    Notations of their own are for templates that render tools: others are told the generic form in words.
    """
    chosen = FAMILIES[parser] if parser else _seen(template)
    if chosen.read is not None and not knows_tools(template):
        return JSON
    return MISTRAL_NAMED if chosen is MISTRAL and "[ARGS]" in template else chosen


def _seen(template: str) -> Family:
    if not knows_tools(template):
        return JSON
    if QWEN3_CODER.begin in template and "<function=" in template:
        return QWEN3_CODER
    for family in (FUNCTION_GEMMA, MISTRAL, HERMES):
        if family.begin in template:
            return family
    if "<|python_start|>" in template:
        return PYTHONIC
    if "<|python_tag|>" in template or '"parameters": ' in template:
        return LLAMA3
    return JSON
