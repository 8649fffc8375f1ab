"""LiteLLM, with Veneer as an OpenAI-compatible provider."""

from __future__ import annotations

from typing import Any

import pytest

litellm: Any = pytest.importorskip("litellm")

MESSAGES = [{"role": "user", "content": "one two"}]


def test_chats(url: str) -> None:
    asked: dict[str, Any] = {"model": "openai/sql", "api_base": url, "api_key": "none", "messages": MESSAGES}
    whole = litellm.completion(**asked, temperature=0, max_tokens=8)
    assert whole.usage.completion_tokens == 8
    chunks = litellm.completion(**asked, temperature=0, max_tokens=8, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content != ""


def test_fields_of_our_own_go_through(url: str) -> None:
    found = litellm.completion(
        model="openai/tiny",
        api_base=url,
        api_key="none",
        messages=MESSAGES,
        max_tokens=1,
        extra_body={"lora_path": "team/poet", "top_k": 3},
    )
    assert found._hidden_params["additional_headers"]["llm_provider-x-veneer-adapter"] == "team/poet@1"


def test_completions(url: str) -> None:
    found = litellm.text_completion(
        model="text-completion-openai/tiny", api_base=url, api_key="none", prompt="one two", max_tokens=4
    )
    assert found.choices[0].text


def test_embeddings(url: str) -> None:
    found = litellm.embedding(model="openai/sql", api_base=url, api_key="none", input=["one", "two"])
    assert [len(each["embedding"]) for each in found.data] == [8, 8]


def test_responses(url: str) -> None:
    asked: dict[str, Any] = {"model": "openai/sql", "api_base": url, "api_key": "none"}
    first = litellm.responses(input="one two", **asked, max_output_tokens=8)
    assert first.output[0].content[0].text
    events = litellm.responses(input="one", **asked, previous_response_id=first.id, stream=True)
    assert [event.type for event in events][-1] == "response.completed"


def test_errors_are_known(url: str) -> None:
    with pytest.raises(litellm.NotFoundError, match="nobody"):
        litellm.completion(model="openai/nobody", api_base=url, api_key="none", messages=MESSAGES)
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(
            model="openai/tiny",
            api_base=url,
            api_key="none",
            messages=[{"role": "user", "content": "one " * 5000}],
        )
