"""Mistral: a list of calls after a special token, or, since its tokenizer 11, such a token for each call.

Its templates take ids of nine letters and digits alone.
"""

from __future__ import annotations

import secrets
import string

from veneer.server.tool_calls.family import Family, json_before


def mistral_id() -> str:
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


MISTRAL = Family(
    name="mistral",
    opening="[TOOL_CALLS] [",
    before=json_before("name", "arguments"),
    after="}",
    between=", ",
    closing="]",
    begin="[TOOL_CALLS]",
    skipped=(",", "[", "]"),
    specials=("[TOOL_CALLS]", "[ARGS]"),
    takes_names=True,
    call_id=mistral_id,
)

MISTRAL_NAMED = Family(
    name="mistral",
    before=lambda name: f"[TOOL_CALLS]{name}[ARGS]",
    after="",
    between="",
    begin="[TOOL_CALLS]",
    skipped=(",", "[", "]"),
    specials=("[TOOL_CALLS]", "[ARGS]"),
    takes_names=True,
    call_id=mistral_id,
)
