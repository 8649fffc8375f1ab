"""OpenAI's Agents SDK, which speaks the Responses API."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest

agents: Any = pytest.importorskip("agents")


@pytest.fixture
def agent(url: str) -> Any:
    agents.set_tracing_disabled(True)
    client = openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0)
    model = agents.OpenAIResponsesModel(model="sql", openai_client=client)
    settings = agents.ModelSettings(temperature=0)
    return agents.Agent(name="one", instructions="seven", model=model, model_settings=settings)


def test_it_runs(agent: Any) -> None:
    first = agents.Runner.run_sync(agent, "one two")
    assert first.final_output
    again = agents.Runner.run_sync(agent, [*first.to_input_list(), {"role": "user", "content": "three"}])
    usage = (first.context_wrapper.usage, again.context_wrapper.usage)
    assert usage[1].input_tokens > usage[0].input_tokens
    last = agents.Runner.run_sync(agent, "four", previous_response_id=first.last_response_id)
    assert last.final_output


async def _streamed(agent: Any) -> None:
    run = agents.Runner.run_streamed(agent, "one two")
    text = ""
    async for event in run.stream_events():
        if event.type == "raw_response_event" and event.data.type == "response.output_text.delta":
            text += event.data.delta
    whole = await agents.Runner.run(agent, "one two")
    assert whole.final_output == run.final_output == text != ""


def test_it_streams(agent: Any) -> None:
    asyncio.run(_streamed(agent))


def test_it_chats(url: str) -> None:
    client = openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0)
    model = agents.OpenAIChatCompletionsModel(model="team/poet", openai_client=client)
    found = agents.Runner.run_sync(agents.Agent(name="two", model=model), "one two")
    assert found.final_output
