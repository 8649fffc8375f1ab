"""Instructor, in the mode that asks for JSON in words. The toy engine repeats the prompt, which has a schema in it.

So an answer is read whose fields are those of a schema.
"""

from __future__ import annotations

from typing import Any

import openai
import pytest
from pydantic import BaseModel

instructor: Any = pytest.importorskip("instructor")

MESSAGES = [{"role": "user", "content": "one two"}]


class Answer(BaseModel):
    title: str
    type: str


@pytest.fixture
def client(url: str) -> Any:
    plain = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    return instructor.from_openai(plain, mode=instructor.Mode.MD_JSON)


def test_answers_are_read(client: Any) -> None:
    found = client.chat.completions.create(
        model="sql", response_model=Answer, messages=MESSAGES, temperature=0, max_retries=0
    )
    assert isinstance(found, Answer)
    assert (found.title, found.type) == ("Answer", "object")


def test_plain_answers(client: Any) -> None:
    found = client.chat.completions.create(model="sql", response_model=None, messages=MESSAGES, max_tokens=8)
    assert found.choices[0].message.content
