"""Pydantic AI, through chat and through the Responses API."""

from __future__ import annotations

from typing import Any

import pytest

pydantic_ai: Any = pytest.importorskip("pydantic_ai")
models: Any = pytest.importorskip("pydantic_ai.models.openai")
providers: Any = pytest.importorskip("pydantic_ai.providers.openai")


@pytest.mark.parametrize("kind", ["OpenAIChatModel", "OpenAIResponsesModel"])
def test_agents(url: str, kind: str) -> None:
    provider = providers.OpenAIProvider(base_url=url, api_key="none")
    settings = {"temperature": 0, "max_tokens": 16}
    agent = pydantic_ai.Agent(
        getattr(models, kind)("sql", provider=provider), instructions="seven", model_settings=settings
    )
    first = agent.run_sync("one two")
    assert first.output
    again = agent.run_sync("three", message_history=first.all_messages())
    assert again.usage.input_tokens > first.usage.input_tokens
    streamed = agent.run_stream_sync("one two")
    assert list(streamed.stream_text())[-1] == first.output
