"""FunctionGemma: calls in a notation of its own, which is read as JSON here.

<start_function_call>call:NAME{key:<escape>text<escape>,other:[1,true]}<end_function_call>
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from veneer.server.tool_calls.family import Calls, Family, Offered

_TOKENS = re.compile(r"<escape>(.*?)<escape>|([{}\[\],:])|([^{}\[\],:<]+)", re.DOTALL)
_BARE = re.compile(r"true|false|null|-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?")


def read(text: str, offered: Offered) -> Calls | None:
    found = re.fullmatch(r"\s*call:([\w.-]+)(\{.*\})\s*", text, re.DOTALL)
    if found is None or found[1] not in offered:
        return None
    written = "".join(_as_json(found[2]))
    try:
        value = json.loads(written)
    except ValueError:
        return None
    return [(found[1], written)] if isinstance(value, dict) else None


def _as_json(text: str) -> Iterator[str]:
    """Keys and texts in quotes; everything else as it is, so that what is wrong stays wrong."""
    at = 0
    for token in _TOKENS.finditer(text):
        if token.start() != at:
            break
        at = token.end()
        escaped, mark, bare = token.groups()
        if bare is None:
            yield json.dumps(escaped, ensure_ascii=False) if mark is None else mark
        elif text[at : at + 1] == ":" or not _BARE.fullmatch(bare.strip()):
            yield json.dumps(bare.strip(), ensure_ascii=False)
        else:
            yield bare.strip()
    yield text[at:]


FUNCTION_GEMMA = Family(
    name="functiongemma",
    before=lambda name: f"<start_function_call>call:{name}",
    after="<end_function_call>",
    begin="<start_function_call>",
    end="<end_function_call>",
    specials=("<start_function_call>", "<end_function_call>", "<escape>"),
    read=read,
)
