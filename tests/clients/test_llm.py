"""Simon Willison's `llm`, with the server as one of its extra OpenAI models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

llm: Any = pytest.importorskip("llm")


@pytest.fixture
def user(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files that its documentation has for such a server."""
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    entry = f"  model_name: sql\n  api_base: {url}\n"
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: veneer\n{entry}- model_id: veneer-text\n{entry}  completion: true\n"
    )


@pytest.mark.usefixtures("user")
@pytest.mark.parametrize("name", ["veneer", "veneer-text"])
def test_prompts(name: str) -> None:
    model = llm.get_model(name)
    whole = model.prompt("one two", stream=False, temperature=0, max_tokens=8)
    assert whole.text()
    streamed = model.prompt("one two", stream=True, temperature=0, max_tokens=8)
    assert "".join(streamed) == whole.text()


@pytest.mark.usefixtures("user")
def test_conversations() -> None:
    conversation = llm.get_model("veneer").conversation()
    first = conversation.prompt("one two", max_tokens=4)
    first.text()
    second = conversation.prompt("three", max_tokens=4)
    second.text()
    assert second.usage().input > first.usage().input
