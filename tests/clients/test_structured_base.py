"""Instructor and Outlines with schemas, against the default base in NF4: grammars hold its answers to them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel, ConfigDict, Field
from tests.conftest import LiveServer

pytestmark = pytest.mark.model

BASE = "SmolLM2-135M-Instruct"
ASKED = "The parcel for Ada is 3 days late and she is angry. Put it into the form of a ticket."
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 100}


class Ticket(BaseModel):
    """A customer's ticket."""

    model_config = ConfigDict(extra="forbid")
    customer: str = Field(max_length=20)
    mood: Literal["calm", "angry"]
    days: int = Field(ge=0, le=99)


@pytest.fixture(scope="module")
def client(
    live_server: Callable[..., LiveServer], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[openai.OpenAI]:
    options = ["--store", str(tmp_path_factory.mktemp("store")), "--threads", "1"]
    server = live_server(*options, "--kv-cache-memory", "256MiB")
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


def needs(library: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(find_spec(library) is None, reason=f"{library} is not installed")


@needs("instructor")
@pytest.mark.parametrize("mode", ["JSON_SCHEMA", "TOOLS", "TOOLS_STRICT"])
def test_instructor(client: openai.OpenAI, mode: str) -> None:
    instructor: Any = import_module("instructor")
    asking = instructor.from_openai(client, mode=getattr(instructor.Mode, mode))
    messages = [{"role": "user", "content": ASKED}]
    found = asking.chat.completions.create(
        model=BASE, response_model=Ticket, messages=messages, max_retries=0, **GREEDY
    )
    assert isinstance(found, Ticket)


@needs("outlines")
def test_outlines(client: openai.OpenAI) -> None:
    outlines: Any = import_module("outlines")
    model = outlines.from_openai(client, BASE)
    whole = model(ASKED, Ticket, **GREEDY)
    assert Ticket.model_validate_json(whole)
    assert "".join(model.stream(ASKED, Ticket, **GREEDY)) == whole
    vllm = outlines.from_vllm(client, BASE)
    assert Ticket.model_validate_json(vllm(ASKED, Ticket, **GREEDY))
    assert vllm(ASKED, Literal["late", "lost"], **GREEDY) in ("late", "lost")
    assert 0 <= int(vllm(ASKED, outlines.regex(r"[0-9]{1,2}"), **GREEDY)) < 100
    grammar = outlines.types.CFG('start: "[" NUMBER ("," NUMBER)~0..3 "]"\nNUMBER: /[0-9]/')
    assert isinstance(json.loads(vllm(ASKED, grammar, **GREEDY)), list)
