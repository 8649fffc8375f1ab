"""LangChain's OpenAI integration."""

from __future__ import annotations

from typing import Any

import pytest

langchain: Any = pytest.importorskip("langchain_openai")


def test_chats(url: str) -> None:
    chat = langchain.ChatOpenAI(model="sql", base_url=url, api_key="none", temperature=0, max_tokens=8)
    whole = chat.invoke([("system", "seven"), ("user", "one two")])
    assert whole.usage_metadata["output_tokens"] == 8
    assert "".join(chunk.content for chunk in chat.stream([("system", "seven"), ("user", "one two")])) == (
        whole.content
    )
    assert len(chat.batch(["one", "two", "three"])) == 3


def test_responses(url: str) -> None:
    chat = langchain.ChatOpenAI(
        model="sql", base_url=url, api_key="none", temperature=0, use_responses_api=True
    )
    first = chat.invoke("one two")
    assert first.text
    again = chat.invoke("one", previous_response_id=first.response_metadata["id"])
    assert again.usage_metadata["input_tokens"] > first.usage_metadata["input_tokens"]
    assert "".join(chunk.text for chunk in chat.stream("one two")) == first.text


def test_completions(url: str) -> None:
    model = langchain.OpenAI(model="sql", base_url=url, api_key="none", max_tokens=4)
    assert model.invoke("one two")


def test_embeddings(url: str) -> None:
    """It sends token ids of OpenAI's own tokenizer unless told to send text."""
    model = langchain.OpenAIEmbeddings(
        model="sql", base_url=url, api_key="none", check_embedding_ctx_length=False
    )
    assert [len(each) for each in model.embed_documents(["one", "two three"])] == [8, 8]
    assert len(model.embed_query("one")) == 8
