"""The generic form, for models whose chat template knows no tools: the answer is a JSON object, or one a line."""

from __future__ import annotations

from veneer.server.tool_calls.family import Family, json_before

JSON = Family(
    name="json",
    before=json_before("name", "arguments"),
    after="}",
    skipped=(";", ",", "[", "]"),
)
