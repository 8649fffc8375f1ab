"""Outlines, with the server as an OpenAI model."""

from __future__ import annotations

from typing import Any

import openai
import pytest

outlines: Any = pytest.importorskip("outlines")


def test_texts(url: str) -> None:
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    model = outlines.from_openai(client, "sql")
    whole = model("one two", temperature=0, max_tokens=8)
    assert whole
    assert "".join(model.stream("one two", temperature=0, max_tokens=8)) == whole
    vllm = outlines.from_vllm(client, "sql")
    assert vllm("one two", temperature=0, max_tokens=8) == whole
