"""Qwen3-Coder: calls in tags, each argument as text between tags of its own.

    <tool_call>
    <function=NAME>
    <parameter=KEY>
    VALUE
    </parameter>
    </function>
    </tool_call>

A text stands there as it is and everything else as JSON, so the function's schema says what a value is.
"""

from __future__ import annotations

import json
import re
from typing import Any

from veneer.server.tool_calls.family import Calls, Family, Offered

_FUNCTION = re.compile(r"\s*<function=([^>\n]+)>(.*?)(?:</function>\s*)?", re.DOTALL)
_PARAMETER = re.compile(r"\s*<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>\s*", re.DOTALL)
_PYTHON = {"True": True, "False": False, "None": None}  # written now and then


def read(text: str, offered: Offered) -> Calls | None:
    found = _FUNCTION.fullmatch(text)
    if found is None or found[1] not in offered:
        return None
    properties = (offered[found[1]] or {}).get("properties")
    schemas = properties if isinstance(properties, dict) else {}
    arguments, at = {}, 0
    while at < len(found[2].rstrip()):
        parameter = _PARAMETER.match(found[2], at)
        if parameter is None:
            return None
        key, at = parameter[1], parameter.end()
        arguments[key] = _value(parameter[2], schemas.get(key))
    try:
        return [(found[1], json.dumps(arguments, allow_nan=False))]
    except ValueError:
        return None  # NaN


def _value(text: str, schema: Any) -> Any:
    kind = schema.get("type") if isinstance(schema, dict) else None
    kinds = kind if isinstance(kind, list) else [kind]
    if "string" in kinds and not (text == "null" and "null" in kinds):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return _PYTHON.get(text, text)


QWEN3_CODER = Family(
    name="qwen3_coder",
    before=lambda name: f"<tool_call>\n<function={name}>",
    after="\n</function>\n</tool_call>",
    begin="<tool_call>",
    end="</tool_call>",
    specials=("<tool_call>", "</tool_call>"),
    read=read,
)
